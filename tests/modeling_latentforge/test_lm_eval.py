"""The harness of most published scores, as its users call it, where nothing of ours is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_student
from tests.modeling_latentforge.test_remote_code import BLOCK
from tests.trainers.training_helpers import byte_tokenizer


NEEDS_LM_EVAL = "needs lm_eval: pip install -e '.[eval]'"
QUESTIONS = [
    {"question": "The ferry leaves at", "choices": [" noon", " eight in the morning", " no hour"], "answer": 1},
    {"question": "On Thursdays there is also a", "choices": [" goat", " market by the harbour"], "answer": 0},
    {"question": "Whoever wants a seat", "choices": [" comes early", ": waits"], "answer": 0},
]
TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ''\n"
    "metric_list: [{metric: acc}]",
    "write": "output_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 9, do_sample: false}\nmetric_list: [{metric: exact_match}]",
}
# each line of the standard input is the command line of one run
RUN = """
import json, sys
sys.path.append({where!r})
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
class OwnTasks(lm_eval.tasks.TaskManager):  # to list the thousands that it brings takes ten seconds a run
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{{**kwargs, "include_defaults": False}})
lm_eval.tasks.TaskManager = OwnTasks
assert not any(name.startswith(("modeling_latentforge", "trainers")) for name in sys.modules)
for line in sys.stdin:
    sys.argv = ["lm_eval", *json.loads(line)]
    cli_evaluate()
"""


def run_harness(tmp_path: Path, *runs: tuple[str, Path, str, int]) -> str:
    """What `lm_eval --model hf` says of each task, model folder, name of the output and batch size."""
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, lines in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            f"doc_to_text: question\n{lines}\n"
        )
    commands = [
        f"--model hf --model_args pretrained={folder},trust_remote_code=True --tasks {task} --device cpu "
        f"--include_path {tmp_path}/tasks --batch_size {batch} --output_path {tmp_path}/{output} --log_samples".split()
        for task, folder, output, batch in runs
    ]
    where = Path(importlib.util.find_spec("lm_eval").origin).parent.parent
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + RUN.format(where=str(where))],
        input="".join(json.dumps(command) + "\n" for command in commands),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def answers(folder: Path, task: str) -> list[list]:
    """What the model answered, question by question."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record["resps"] for record in sorted(records, key=lambda record: record["doc_id"])]


def log_probability(student, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = student(ids[:, :-1], sample_noise=False).logits.log_softmax(-1)
    return float(logits[0, len(context) - 1 :].gather(1, ids[0, len(context) :, None]).sum())


def test_the_harness_scores_and_writes_as_the_model_does(tmp_path):
    """A published score of another distribution than the model's own, or of another text, is a wrong one."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip(NEEDS_LM_EVAL)
    tokenizer = byte_tokenizer()
    students = {
        "causal": tiny_student(),
        "parallel": tiny_student("regression", "parallel"),
        "energy": tiny_student("energy", "parallel"),
    }
    for name, student in students.items():
        student.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    said = run_harness(
        tmp_path,
        ("choose,write", tmp_path / "causal", "causal-out", 2),
        # without a mask, what the harness pads on the right would move a parallel grid
        ("choose,write", tmp_path / "parallel", "parallel-out", 1),
        ("choose,write", tmp_path / "energy", "energy-out", 1),
    )
    for name in students:
        for question, found in zip(QUESTIONS, answers(tmp_path / f"{name}-out", "choose"), strict=True):
            context = tokenizer(question["question"]).input_ids
            expected = [
                log_probability(students[name], context, tokenizer(choice).input_ids) for choice in question["choices"]
            ]
            assert [float(response[0][0]) for response in found] == pytest.approx(expected, abs=1e-3)
    for name, student in students.items():
        for question, found in zip(QUESTIONS, answers(tmp_path / f"{name}-out", "write"), strict=True):
            ids = tokenizer(question["question"], return_tensors="pt").input_ids
            made = student.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
            assert found[0][0] == tokenizer.decode(made, skip_special_tokens=True).split("\n")[0]
    # P(patch) of an energy head and a parallel decoder can be drawn from and not computed
    assert said.count("no likelihood of what sampling writes") == 1

"""The report's parts that the demo's own test does not tell apart."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from tests.scripts.test_infer import make_tokenizer
from trainers.reporting import held_out_prompts, measure_generation, read_history, write_report


TEXT = "def main():\n    return first + second\n" * 20


def test_prompts_are_the_first_long_enough_documents():
    """Prompts chosen by how the models answer would be an advertisement."""
    texts = Dataset.from_dict(
        {"text": ["short", TEXT, "class A: " + TEXT, TEXT[9:], TEXT], "document": [0, 1, 1, 2, 3]}
    )
    tokenizer = make_tokenizer()
    prompts = held_out_prompts(texts, tokenizer, count=2, prompt_tokens=7, new_tokens=5)
    assert [TEXT.startswith(prompts[0]["prompt"]), TEXT[9:].startswith(prompts[1]["prompt"])] == [True, True]
    assert TEXT.startswith(prompts[0]["prompt"] + prompts[0]["reference"])
    assert len(held_out_prompts(texts, tokenizer, count=9, prompt_tokens=7, new_tokens=5)) == 3


def test_no_document_long_enough_is_refused():
    """An empty list of samples would end in an IndexError."""
    with pytest.raises(ValueError, match="lower prompt_tokens"):
        measure_generation({}, make_tokenizer(), [])


def test_history_is_found_in_the_folder_or_its_newest_checkpoint(tmp_path: Path):
    """checkpoint-1000 sorts before checkpoint-200 as text: the curve would end early."""
    with pytest.raises(FileNotFoundError, match="not the folder of a training"):
        read_history(tmp_path)
    for steps in (200, 1000):
        (tmp_path / f"checkpoint-{steps}").mkdir()
        state = {"log_history": [{"step": steps, "loss": 1.0}]}
        (tmp_path / f"checkpoint-{steps}" / "trainer_state.json").write_text(json.dumps(state))
    assert read_history(tmp_path)[0]["step"] == 1000
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 7, "loss": 1.0}]}))
    assert read_history(tmp_path)[0]["step"] == 7


def figures(student_nats: float) -> tuple[dict, dict]:
    """Made-up measurements of a teacher and a student."""
    likelihood = {
        name: {"nats_per_token": nats, "bits_per_byte": nats / 2, "num_tokens": 10, "num_bytes": 20}
        for name, nats in (("teacher", 4.0), ("student", student_nats))
    }
    codec = [{"sigma": sigma, "token_accuracy": 0.5, "patch_accuracy": 0.25} for sigma in (0.0, 0.3)]
    speed = {
        name: {"tokens_per_second": rate, "backbone_steps_per_token": steps}
        for name, rate, steps in (("teacher", 100.0, 1.0), ("student", 200.0, 0.125))
    }
    conditions = {"timed_tokens": 8, "prompt_tokens": 4, "dtype": "float32", "device": "cpu", "threads": 2}
    conditions |= {"repeats": 3, "temperature": 0.8, "seed": 0}
    sample = {"prompt": "a", "reference": "b", "teacher": "```", "student": "c"}
    generation = {"speed": {"greedy": speed, "sampled": speed}, "samples": [sample], "conditions": conditions}
    return {"likelihood": likelihood, "reconstruction": codec}, generation


@pytest.mark.parametrize(("nats", "words"), [(4.25, "0.250 nats/token worse"), (3.75, "0.250 nats/token better")])
def test_the_cost_is_said_in_words_with_the_right_sign(tmp_path: Path, nats: float, words: str):
    """A lost minus sign turns a cost into a gain."""
    quality, generation = figures(nats)
    history = {"student": [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 4.1}]}
    write_report(tmp_path, quality, generation, history, {"student": {"seconds": 3.0, "peak_memory_bytes": None}}, {})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert words in text and "2.00 times as fast" in text
    # a sample that holds a fence must not end the block
    assert "````text\n```\n````" in text
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["comparison"]["student"]["nats_worse_than_teacher"] == pytest.approx(nats - 4)

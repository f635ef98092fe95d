"""The demo's stages at toy size on real text: each runs once, again only when something that shapes it changed."""

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from scripts import bench, demo, evaluate_model, infer
from scripts.demo import DemoArguments, Stage, StageError, data_identity, plan, run_demo


ROOT = Path(demo.__file__).resolve().parent.parent
TINY = ROOT / "scripts" / "configs" / "demo_tiny.yaml"
STAGES = ["tokenizer", "teacher", "autoencoder", "student", "student_parallel", "generation", "report"]


def execute_here(stage: Stage, arguments_file: Path) -> int | None:
    """Run a stage's script in this process: importing torch seven times is not what is tested."""
    option, path = stage.command(arguments_file)[2:]
    returned = import_module(f"scripts.{Path(stage.script).stem}").main([option, path])
    assert not isinstance(returned, int), "a status that is returned is no failure to `run`: raise"
    return 1 << 30


def write_recipe(path: Path, cache: Path, change: Callable[[dict], None] = lambda recipe: None) -> str:
    recipe = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    recipe["text"]["cache_dir"] = str(cache)
    change(recipe)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files of the standard library's source."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (inspect.getsource(textwrap) + inspect.getsource(inspect)).splitlines(keepends=True)
    for number in range(30):
        (folder / f"{number}.py").write_text("".join(lines[40 * number : 40 * number + 40]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoArguments, dict]:
    """A demo that ran from nothing, and its summary. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = write_recipe(folder / "recipe.yaml", folder / "cache")
    arguments = DemoArguments(data=str(corpus), recipe=recipe, output_dir=str(folder / "runs"))
    return arguments, run_demo(arguments, execute_here, lambda line: None)


@pytest.fixture
def copied(finished: tuple[DemoArguments, dict], tmp_path: Path) -> DemoArguments:
    """The finished demo with a recipe of its own to change; paths in the stages' flags stay those of the original."""
    arguments = finished[0]
    shutil.copytree(arguments.output_dir, tmp_path / "backup")
    yield arguments
    shutil.rmtree(arguments.output_dir)
    shutil.copytree(tmp_path / "backup", arguments.output_dir)


def test_every_stage_runs_and_its_folder_loads(finished: tuple[DemoArguments, dict]):
    """A checkpoint that only its own script can load is no result."""
    arguments, summary = finished
    assert summary["ran"] == STAGES and list(summary["stages"]) == STAGES
    runs = Path(arguments.output_dir)
    AutoModel.from_pretrained(runs / "autoencoder")
    for name in ("teacher", "student", "student_parallel"):
        AutoModelForCausalLM.from_pretrained(runs / name)
    for name in ("tokenizer", "teacher", "autoencoder", "student", "student_parallel"):
        assert len(AutoTokenizer.from_pretrained(runs / name)) == 300


def test_the_report_tells_gain_and_cost_of_both_students(finished: tuple[DemoArguments, dict]):
    """A table with only the speed, or only one student, would sell the idea instead of measuring it."""
    folder = Path(finished[0].output_dir) / "report"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert set(report["comparison"]) == {"teacher", "student", "student_parallel"}
    for name, entry in report["comparison"].items():
        assert {"nats_per_token", "bits_per_byte", "speedup_greedy", "speedup_sampled"} <= set(entry), name
    assert report["comparison"]["teacher"]["backbone_steps_per_token"] == 1
    assert report["comparison"]["student_parallel"]["backbone_steps_per_token"] < 0.6
    assert [entry["sigma"] for entry in report["quality"]["reconstruction"]] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert len({likelihood["num_tokens"] for likelihood in report["quality"]["likelihood"].values()}) == 1
    text = (folder / "report.md").read_text(encoding="utf-8")
    for sample in report["generation"]["samples"]:
        assert sample["reference"] in text and sample["student"] in text
    assert "no claim about quality" in text and "none selected" in text
    for image in ("loss_curves.png", "reconstruction.png"):
        assert (folder / image).read_bytes().startswith(b"\x89PNG") and image in text


def test_a_second_run_does_nothing(finished: tuple[DemoArguments, dict]):
    """Twelve minutes again for a look at the report would teach people not to run it."""
    lines: list[str] = []
    summary = run_demo(finished[0], execute_here, lines.append)
    assert summary["ran"] == [] and summary["stages"] == finished[1]["stages"]
    assert sum("skipped" in line for line in lines) == len(STAGES)


def test_a_changed_setting_runs_its_stage_and_what_follows_from_it(copied: DemoArguments, tmp_path: Path):
    """A report of the new student beside figures of the old one would be wrong without a sign of it."""
    cache = Path(copied.recipe).parent / "cache"
    recipe = write_recipe(tmp_path / "r.yaml", cache, lambda recipe: recipe["student"].update(learning_rate=5e-4))
    changed = replace(copied, recipe=recipe)
    assert run_demo(changed, execute_here, lambda line: None)["ran"] == ["student", "generation", "report"]
    assert run_demo(changed, execute_here, lambda line: None)["ran"] == []


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda recipe: recipe["tokenizer"].update(vocab_size=290), STAGES),
        (
            lambda recipe: recipe["teacher"].update(max_steps=2),
            [name for name in STAGES if name not in ("tokenizer", "autoencoder")],
        ),
        (lambda recipe: recipe.update(latent_size=8), STAGES[2:]),
        (lambda recipe: recipe["report"].update(max_tokens=128), ["report"]),
    ],
)
def test_what_a_change_concerns_is_what_its_stage_feeds(
    finished: tuple[DemoArguments, dict], tmp_path: Path, change: Callable[[dict], None], again: list[str]
):
    """Too little run again gives wrong results; too much costs minutes."""
    cache = Path(finished[0].recipe).parent / "cache"
    arguments = replace(finished[0], recipe=write_recipe(tmp_path / "r.yaml", cache, change))
    assert [stage.name for stage in plan(arguments) if not stage.finished()] == again


def test_text_that_changed_runs_everything(corpus: Path, tmp_path: Path):
    """A demo of last week's text under this week's name is wrong."""
    folder = shutil.copytree(corpus, tmp_path / "text")
    before = data_identity(str(folder))
    assert before == data_identity(str(folder))
    (folder / "0.py").write_text("another = 1\n")
    assert data_identity(str(folder)) != before
    assert data_identity("builtin:python") == ["builtin:python", sys.version]


def test_a_stage_that_broke_off_is_not_finished(copied: DemoArguments, tmp_path: Path):
    """Half a model must never be taken for a result."""
    (Path(copied.output_dir) / "generation" / "stage.json").unlink()

    def fail(stage: Stage, arguments_file: Path) -> int | None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(copied, fail, lambda line: None)
    assert [stage.name for stage in plan(copied) if not stage.finished()] == ["generation"]
    assert run_demo(copied, execute_here, lambda line: None)["ran"] == ["generation"]


@pytest.mark.parametrize(
    ("gone", "again"),
    [
        ("tokenizer/tokenizer.json", "tokenizer"),
        ("student/model.safetensors", "student"),
        ("autoencoder/tokenizer_config.json", "autoencoder"),
        ("generation/generation.json", "generation"),
        ("report/report.md", "report"),
    ],
)
def test_a_stage_whose_result_is_gone_is_not_finished(copied: DemoArguments, gone: str, again: str):
    """Skipped by its stamp, it would leave the next stage without what that reads."""
    (Path(copied.output_dir) / gone).unlink()
    assert [stage.name for stage in plan(copied) if not stage.finished()] == [again]


def test_a_folder_that_cannot_be_written_to_is_said_before_the_first_stage(corpus: Path, tmp_path: Path):
    """What stands in the way is otherwise told by whichever stage meets it first."""
    (tmp_path / "runs").touch()
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "cache")
    arguments = DemoArguments(data=str(corpus), recipe=recipe, output_dir=str(tmp_path / "runs" / "demo"))
    with pytest.raises(OSError, match="cannot write to the output_dir .*: pass another --output_dir"):
        run_demo(arguments, execute_here, lambda line: None)


def test_a_model_of_one_s_own_brings_its_tokenizer(finished: tuple[DemoArguments, dict], tmp_path: Path):
    """A codec on another tokenizer than the teacher's cannot be distilled into."""
    teacher = Path(finished[0].output_dir) / "teacher"
    arguments = replace(finished[0], teacher=str(teacher), patch_size=2, output_dir=str(tmp_path / "runs"))
    assert run_demo(arguments, execute_here, lambda line: None)["ran"] == STAGES[2:]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "student")
    assert student.config.patch_size == 2 and student.config.latent_size == 64
    assert len(AutoTokenizer.from_pretrained(tmp_path / "runs" / "student")) == 300


def test_a_script_that_fails_ends_the_demo_with_its_own_words(corpus: Path, tmp_path: Path):
    """`exit status 1` alone sends people to a log that they do not know of."""
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path / "cache", lambda recipe: recipe["tokenizer"].update(vocab_size=9)
    )
    arguments = DemoArguments(data=str(corpus), recipe=recipe, output_dir=str(tmp_path / "runs"))
    with pytest.raises(StageError, match="vocab_size") as error:
        run_demo(arguments, say=lambda line: None)
    assert "log.txt" in str(error.value)


def test_files_that_no_demo_wrote_are_not_deleted(corpus: Path, tmp_path: Path):
    """`--output_dir` may be mistyped, and a stage empties its folder."""
    (tmp_path / "runs" / "tokenizer").mkdir(parents=True)
    (tmp_path / "runs" / "tokenizer" / "thesis.tex").touch()
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "cache")
    arguments = DemoArguments(data=str(corpus), recipe=recipe, output_dir=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="no demo wrote"):
        run_demo(arguments, execute_here, lambda line: None)
    assert (tmp_path / "runs" / "tokenizer" / "thesis.tex").exists()


def test_a_recipe_with_a_missing_or_unknown_stage_is_refused(tmp_path: Path):
    """A misspelt stage would run with a script's defaults, for hours."""
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, lambda recipe: recipe.update(studnet=recipe.pop("student")))
    with pytest.raises(ValueError, match=r"lacks \['student'\] and has \['studnet'\]"):
        plan(DemoArguments(recipe=recipe))
    with pytest.raises(ValueError, match="cannot read the recipe"):
        plan(DemoArguments(recipe=str(tmp_path / "none.yaml")))


def test_the_laptop_recipe_is_the_issue_s(tmp_path: Path):
    """K=8, D=256, vocabulary 4096, teacher 4 x 256: what the report's figures are said to be of."""
    stages = {stage.name: stage.flags for stage in plan(DemoArguments(output_dir=str(tmp_path)))}
    assert list(stages) == STAGES
    assert stages["tokenizer"]["vocab_size"] == 4096 and stages["tokenizer"]["data"] == "builtin:python"
    assert stages["autoencoder"]["patch_size"] == 8 and stages["autoencoder"]["latent_size"] == 256
    for name in ("teacher", "student", "student_parallel"):
        assert stages[name]["num_hidden_layers"] == 4 and stages[name]["hidden_size"] == 256
    assert stages["student"]["decoder_type"] == "autoregressive"
    assert stages["student_parallel"]["decoder_type"] == "parallel"


def test_the_readme_s_commands_and_python_run_on_the_demo_s_folders(
    finished: tuple[DemoArguments, dict], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The first thing a newcomer types must work as it stands."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    replacements = {
        "runs/demo": finished[0].output_dir,
        "builtin:python": str(corpus),
        "block_size=512": f"block_size=64, cache_dir={str(tmp_path)!r}",
        "checkpoints/student": str(tmp_path / "student"),
        "max_steps=300": "max_steps=1, report_to='none'",
        "patch_size=8": "patch_size=4",
        "PatchCollator(8)": "PatchCollator(4)",
        "hidden_size=256, intermediate_size=768": "hidden_size=32, intermediate_size=64",
    }
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if not re.search("wire|idea", block)]  # their own tests run those
    assert len(blocks) == 2
    for old, new in replacements.items():
        assert any(old in block for block in blocks), f"the README no longer holds {old}"
        blocks = [block.replace(old, new) for block in blocks]
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "def main(" in capsys.readouterr().out and namespace["logits"].shape[-1] == 300
    assert namespace["trainer"].state.global_step == 1

    (command,) = re.findall(r"^\.venv/bin/python scripts/infer\.py (.*)$", readme, re.MULTILINE)
    infer.main(shlex.split(command.replace("runs/demo", finished[0].output_dir)))
    assert capsys.readouterr().out.startswith("def main(")

    (command,) = re.findall(r"^\.venv/bin/python scripts/bench\.py (.*)$", readme, re.MULTILINE)
    quick = (
        "--tables decode memory drafting --batch_sizes 1 --prompt_lengths 8 --new_tokens 8 --repeats 1 --device cpu"
    )
    flags = f"{quick} --prompts_file {ROOT / 'prompts.txt'} --output_dir {tmp_path}"
    kept = bench.main(shlex.split(f"{command.replace('runs/demo', finished[0].output_dir)} {flags}"))
    assert "| student_parallel |" in capsys.readouterr().out and json.loads(kept.read_text())["finished"]

    (command,) = re.findall(r"^\.venv/bin/python scripts/evaluate_model\.py (.*)$", readme, re.MULTILINE)
    few = "--parts codec likelihood brier generation --block_size 64 --positions 60 --num_texts 4 --new_tokens 8"
    flags = f"{few} --data {corpus} --domain prose={corpus} code={corpus} --cache_dir {tmp_path} --device cpu"
    flags += f" --output_dir {tmp_path / 'evaluation'}"  # the folders are shared
    judged = evaluate_model.main(shlex.split(f"{command.replace('runs/demo', finished[0].output_dir)} {flags}"))
    assert list(json.loads(judged.read_text())["brier"]) == ["student", "teacher", "student_parallel"]


def test_the_tutorials_python_runs(finished: tuple[DemoArguments, dict], capsys: pytest.CaptureFixture):
    """Half an hour of somebody's time ends in a traceback."""
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", tutorial, re.MULTILINE | re.DOTALL)
    namespace: dict = {}
    for block in blocks:
        exec(compile(block.replace("runs/demo", finished[0].output_dir), "tutorial.md", "exec"), namespace)
    told = capsys.readouterr().out
    assert len(blocks) == 2 and "steps of the backbone" in told and "of the tokens come back" in told
    assert 0 < namespace["steps"] < 32


@pytest.mark.slow
def test_the_demo_runs_from_the_command_line_in_processes(corpus: Path, tmp_path: Path):
    """What `make demo` types: processes, logs, and the memory of each."""
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "cache")
    command = [sys.executable, "scripts/demo.py", "--data", str(corpus), "--recipe", recipe]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--output_dir", str(tmp_path / "runs")], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("skipped") == len(STAGES)
    summary = json.loads((tmp_path / "runs" / "demo.json").read_text(encoding="utf-8"))
    for name, stage in summary["stages"].items():
        assert 2**26 < stage["peak_memory_bytes"] < 2**33, name
        assert (tmp_path / "runs" / name / "log.txt").exists()

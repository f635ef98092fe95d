"""The README's commands: each is run by a test or by CI, and the Makefile knows what they ask of it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")

# where each command of the README is run: in the workflow, or by a test (file::name)
COVERED = {
    "make demo": "workflow",
    "make setup": "workflow",
    "make demo DATA= K= TEACHER=": "tests/scripts/test_demo.py::test_a_model_of_one_s_own_brings_its_tokenizer",
    ".venv/bin/python scripts/infer.py": "tests/scripts/test_demo.py::test_the_readme_s_commands_and_python_run",
    ".venv/bin/python scripts/bench.py": "tests/scripts/test_demo.py::test_the_readme_s_commands_and_python_run",
    ".venv/bin/python scripts/evaluate_model.py": (
        "tests/scripts/test_demo.py::test_the_readme_s_commands_and_python_run"
    ),
    "make frontier": "tests/trainers/evaluation/test_frontier.py::test_make_frontier_prints_tables_and_verdict",
    ".venv/bin/python scripts/serve.py": "tests/scripts/test_serve.py::test_a_student_is_served_and_stopped",
    ".venv/bin/python scripts/train_student.py": "tests/test_readme.py::test_help_of_the_script_in_the_readme",
    ".venv/bin/python scripts/train_wire.py": (
        "tests/scripts/test_train_wire.py::test_the_readmes_commands_and_python_run"
    ),
    ".venv/bin/python scripts/idea.py": "tests/scripts/test_idea.py::test_the_readmes_commands_and_python_run",
    ".venv/bin/python scripts/build_kd_cache.py": (
        "tests/scripts/test_build_kd_cache.py::test_the_readmes_command_labels_a_data_set"
    ),
    ".venv/bin/python scripts/estimate_memory.py": (
        "tests/scripts/test_estimate_memory.py::test_the_readmes_command_prints_a_table"
    ),
    ".venv/bin/python scripts/push_to_hub.py": (
        "tests/scripts/test_push_to_hub.py::test_the_readmes_command_uploads_and_sees_the_result_load"
    ),
    "make train-ae DATA= K= D=": "tests/test_readme.py::test_the_make_targets_chain",
    "make train-student DATA= KD_W= MSE_W= CE_W=": "tests/test_readme.py::test_the_make_targets_chain",
    "make infer PROMPT= MAX_NEW_TOKENS= TEMP=": "tests/test_readme.py::test_the_make_targets_chain",
    "make bench MAX_NEW_TOKENS=": "tests/test_readme.py::test_the_make_targets_chain",
}


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def kind(command: str) -> str:
    """`make x A=1 B=2` -> `make x A= B=`; `python script flags` -> `python script`."""
    words = shlex.split(command)
    if words[0] == "make":
        return " ".join(re.sub(r"=.*", "=", word) for word in words)
    return " ".join(words[:2])


def make(*arguments: str, **options) -> subprocess.CompletedProcess:
    # in the environment that the tests run in, without installing anything into it
    environment = [
        f"VENV={sys.prefix}",
        "--old-file",
        f"{sys.prefix}/.installed",
        "--old-file",
        f"{sys.prefix}/.torch",
    ]
    return subprocess.run(
        ["make", *environment, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")


def test_every_command_of_the_readme_is_run_somewhere():
    """A README that nobody runs is wrong after the second change."""
    found = {kind(command) for command in commands(README)}
    assert found == set(COVERED)
    for command, place in COVERED.items():
        if place == "workflow":
            assert command in WORKFLOW
        else:
            file, name = place.split("::")
            assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_what_contributing_asks_for_is_what_ci_runs():
    """A gate that CI does not have is one that changes slip through."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert commands(text) == ["make setup", "make check", "make test"]
    assert all(command in WORKFLOW for command in commands(text))


def test_the_files_and_folders_of_the_readme_exist():
    """A tree of files that are no more sends people searching."""
    tree = README.split("## Tree")[1].split("## Make targets")[0]
    folder = ""
    for line in tree.splitlines():
        if not line.startswith("    "):
            continue
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if line[4] != " ":
            folder = names[0]
            assert (ROOT / folder).is_dir(), folder
            continue
        for name in names:
            name = name.split(" ")[0]
            assert list((ROOT / folder).glob(name.rstrip("/"))), f"{folder}{name}"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@needs_make
def test_help_lists_every_target_that_the_readme_names():
    """A target that `make help` does not know is one that nobody finds."""
    text = make("help").stdout
    for target in set(re.findall(r"`make ([a-z0-9-]+)", README)):
        assert re.search(rf"^  {target} ", text, re.MULTILINE), target
    training = "DATA K D EPOCHS BATCH_SIZE STEPS TEACHER KD_W MSE_W CE_W"
    for variable in f"{training} PROMPT MAX_NEW_TOKENS TEMP PROMPTS_FILE BENCH FRONTIER".split():
        assert f"{variable}=" in text, variable


@needs_make
def test_every_listed_target_has_a_recipe_that_make_accepts(tmp_path: Path):
    """A syntax error in a target shows only when somebody needs it."""
    for target in re.findall(r"^  ([a-z0-9-]+) ", make("help").stdout.split("variables")[0], re.MULTILINE):
        done = make("-n", target, f"CHECKPOINTS={tmp_path}")
        assert done.returncode == 0, (target, done.stderr)


@needs_make
def test_text_that_a_person_types_reaches_the_script_unharmed(tmp_path: Path):
    """Quotes, backticks and dollars in a prompt must not be read by a shell, nor a dash by the script."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    prompt = '--say "it\'s $HOME" `date`; $(date) #'
    done = subprocess.run(
        ["make", "infer", f"VENV={tmp_path}", f"CHECKPOINTS={tmp_path}", f"PROMPT={prompt}", "STEPS="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"--prompt={prompt}" in done.stdout.splitlines()


@needs_make
def test_the_demo_takes_its_variables_only_when_given():
    """The Makefile's defaults belong to other targets: K=8 D=1024 would not be the demo of the README."""
    assert "--" not in make("-n", "demo").stdout.split("scripts/demo.py")[1]
    asked = make("-n", "demo", "DATA=a b.txt", "K=4", "TEACHER=my/model").stdout
    assert '--data="$DATA_TEXT"' in asked and '--patch_size "4"' in asked and '--teacher "my/model"' in asked
    assert "--latent_size" not in asked


@needs_make
def test_a_python_that_is_too_old_is_refused_with_the_remedy(tmp_path: Path):
    """pip's own message, minutes later, names a wheel and not the cause."""
    old = tmp_path / "python3.8"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 8)\n$2"\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "needs Python 3.10 or newer" in done.stderr and "PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_help_of_the_script_in_the_readme(capsys: pytest.CaptureFixture):
    """The README sends people there for every option."""
    from scripts.train_student import main

    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--kd_weight" in text and "--learning_rate" in text


@needs_make
@pytest.mark.slow
def test_the_make_targets_chain(tmp_path: Path):
    """`make infer` on a fresh clone: what is missing is made, in order, and fits together."""
    from scripts.make_toy_data import main as make_toy_data

    make_toy_data(["--output", str(tmp_path / "toy.jsonl"), "--num_documents", "60"])
    text = {"block_size": 64, "cache_dir": str(tmp_path / "cache"), "per_device_train_batch_size": 4}
    codec = {"hidden_size": 32, "intermediate_size": 64}
    student = {**codec, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipes = {name: text | recipe for name, recipe in (("autoencoder", codec), ("student", student))}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipes))
    common = [f"CHECKPOINTS={tmp_path / 'checkpoints'}", f"RECIPE={tmp_path / 'tiny.yaml'}", "STEPS=2", "BATCH_SIZE=2"]
    done = make(
        "infer", *common, f"DATA={tmp_path / 'toy.jsonl'}", "K=4", "D=16", "PROMPT=Dear ", "MAX_NEW_TOKENS=8", "TEMP=0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Dear " in done.stdout and "8 tokens" in done.stderr
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"tokenizer", "teacher", "ae", "student"}
    config = json.loads((tmp_path / "checkpoints" / "ae" / "config.json").read_text())
    assert config["patch_size"] == 4 and config["latent_size"] == 16
    again = make("infer", *common, "MAX_NEW_TOKENS=4")
    assert again.returncode == 0 and "train" not in again.stdout
    flags = f"--repeats 1 --batch_sizes 1 --prompt_lengths 8 --output_dir {tmp_path}"
    measured = make("bench", *common, "MAX_NEW_TOKENS=4", f"BENCH={flags}")
    assert measured.returncode == 0, measured.stdout + measured.stderr
    assert "| student |" in measured.stdout and len(list(tmp_path.glob("bench_*.json"))) == 1

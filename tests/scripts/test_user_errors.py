"""What a person sees who mistypes: every script as a process of its own, as a shell starts it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train_autoencoder
from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import byte_tokenizer
from trainers.command_line import run


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def start(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_ends_by_the_one_function(path: Path):
    """A new script that calls `main` itself answers a mistake with a traceback."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    last = tree.body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    assert ast.unparse(last.body[0]) == "from trainers.command_line import run"
    assert ast.unparse(last.body[1]).startswith("run(main") and len(last.body) == 2


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ('{"text": "one"}\n{"text": \n', "", "text.jsonl:2: not a line of JSON"),
        ("", "", "empty corpus"),
        (None, "", "no file or folder"),
        ('{"text": "one"}\n' * 99, "--block_size 30", "block_size (30)"),
        ('{"text": "one"}\n' * 99, "--latent_size 0", "latent_size` must be at least 1, got 0"),
    ],
)
def test_a_mistake_in_the_text_or_the_sizes_is_told_in_a_paragraph(text, more, message, tmp_path, monkeypatch, capsys):
    """The message that says file, line and remedy came below thirty lines of traceback."""
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    if text is not None:
        (tmp_path / "text.jsonl").write_text(text)
    flags = f"--data {tmp_path}/text.jsonl --tokenizer {tmp_path}/tokenizer --output_dir {tmp_path}/ae --use_cpu"
    flags += f" --cache_dir {tmp_path}/cache --block_size 32 --patch_size 4 --max_steps 1 {more}"
    monkeypatch.setattr(sys, "argv", ["train_autoencoder.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        run(train_autoencoder.main)
    _, error = capsys.readouterr().err.split("train_autoencoder.py: error: ")
    assert stop.value.code == 1 and message in error and len(error.splitlines()) <= 4
    assert "LATENTFORGE_DEBUG=1" in error


@pytest.mark.slow
def test_a_script_that_a_shell_starts_ends_in_words_or_with_its_traceback(tmp_path):
    """Whoever mistypes needs the message; whoever reports a fault must be able to say where it is."""
    tiny_autoencoder().save_pretrained(tmp_path)
    done = start("scripts/infer.py", "--model", str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^infer.py: error: model: .* is a codec, .*\n.*LATENTFORGE_DEBUG=1.*\n\Z", done.stderr, re.M)
    done = start("scripts/infer.py", "--model", str(tmp_path), LATENTFORGE_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "is a codec" in done.stderr


def test_a_wrong_call_keeps_its_own_status(capsys, monkeypatch):
    """Exit 2 says that nothing was begun."""
    monkeypatch.setattr(sys, "argv", ["train_autoencoder.py", "--tokenizer", "x", "--patchsize", "4"])
    with pytest.raises(SystemExit) as stop:
        run(train_autoencoder.main)
    assert stop.value.code == 2
    assert "error: unknown flag --patchsize (did you mean --patch_size" in capsys.readouterr().err

"""The server as a process: it starts, answers, stops, and says what is wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch


pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from scripts import serve  # noqa: E402
from tests.conftest import tiny_autoencoder, tiny_student  # noqa: E402
from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    for name, model in (("student", tiny_student()), ("codec", tiny_autoencoder()), ("token_lm", tiny_teacher())):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def test_a_student_is_served_and_stopped(room):
    """From the README's command to the first text; ended by SIGTERM, a deployment must not look like a crash."""
    environment = {**os.environ, "LATENTFORGE_API_KEY": "sk-of-the-test"}
    log = room / "log"
    # from another folder: the parts of the server are found anyway
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--model", str(room / "student"), "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=room, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"serving at (http://127.0.0.1:\d+) ", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        request = urllib.request.Request(
            f"{found[1]}/generate",
            json.dumps({"prompt": "def main(", "max_new_tokens": 5}).encode(),
            {"content-type": "application/json", "authorization": "Bearer sk-of-the-test"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert json.loads(reply.read())["num_tokens_generated"] <= 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
    said = log.read_text()
    assert '"path": "/generate", "status": 200' in said and "stopping: what has begun" in said
    assert "sk-of-the-test" not in said and "def main" not in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 70000", "port must lie between"),
        ("--cache_gib 0", "cache_gib must be above 0"),
        ("--deadline -1", "deadline must be 0 or more"),
        ("--chat_template nowhere.jinja", "there is no file nowhere.jinja"),
        ("--model ./nowhere", "there is no folder ./nowhere"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message, capsys, room):
    """Before a model is loaded."""
    given = flags if "--model" in flags else f"--model {room}/student {flags}"
    with pytest.raises(SystemExit):
        serve.main(given.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("codec", "is a codec"), ("token_lm", "serve it with vLLM")])
def test_models_that_write_no_patches_are_refused(room, name, message):
    """The error of a missing method would stand where the reason should."""
    with pytest.raises(ValueError, match=message):
        serve.main(["--model", str(room / name)])


def test_limits_without_room_and_a_port_in_use_are_told(room, monkeypatch, capfd):
    """A server that exits with uvicorn's traceback leaves one guessing."""
    monkeypatch.delenv("LATENTFORGE_API_KEY", raising=False)
    with pytest.raises(ValueError, match="leaves no room for one row"):
        serve.main(["--model", str(room / "student"), "--cache_gib", "0.000001"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(OSError, match=f"127.0.0.1:{port}.*another --port"):
            serve.main(["--model", str(room / "student"), "--port", port])

"""Two replicas of the server on a Ray of this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from scripts import serve_ray
from tests.conftest import tiny_student
from tests.trainers.training_helpers import byte_tokenizer
from trainers.evaluation.serving_load import free_port


ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ray") / "student"
    student = tiny_student()
    student.generation_config.eos_token_id = student.config.eos_token_id = None
    student.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_replicas 2 --max_replicas 4", "drop one"),
        ("--num_replicas 0", "num_replicas must be at least 1"),
        ("--min_replicas 5 --max_replicas 2", "must lie between 1 and max_replicas"),
        ("--target_requests 4", "add max_replicas"),
        ("--replica_cpus 0", "must be above 0"),
    ],
)
def test_replicas_that_cannot_be_are_refused(model, flags, message, capsys):
    """Before Ray is started."""
    with pytest.raises(SystemExit):
        serve_ray.main(["--model", str(model), *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_replicas_share_the_work_and_one_may_die(model, tmp_path):
    """One machine's queue is not a cluster: streams go through, and a replica that is killed is replaced."""
    pytest.importorskip("ray.serve", reason="the extra `scale` is not installed")
    log, port = tmp_path / "log", free_port()
    command = [sys.executable, str(ROOT / "scripts" / "serve_ray.py"), "--model", str(model), "--port", str(port)]
    command += ["--num_replicas", "2", "--replica_cpus", "0.5"]
    environment = {**os.environ, "RAY_DEDUP_LOGS": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, env=environment)

    def wait_for(what, seconds):
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        return found

    def post(path, body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read().decode()

    def generate(seed):
        body = {"prompt": "number", "max_new_tokens": 24, "seed": seed % 3}
        return json.loads(post("/generate", body))["generated_text"]

    try:
        wait_for(lambda: "serving at" in log.read_text(), 240)
        with ThreadPoolExecutor(12) as threads:
            texts = list(threads.map(generate, range(48)))
        assert len(set(texts)) == 3, "a seed gives the same text on either replica"
        stream = post("/v1/completions", {"prompt": "x", "max_tokens": 9, "stream": True})
        assert stream.count("data: ") == 4 and stream.endswith("data: [DONE]\n\n")
        replicas = {int(pid) for pid in re.findall(r"\(ServeReplica:\S+ pid=(\d+)\)", log.read_text())}
        assert len(replicas) == 2, "both have written a line of their log"
        os.kill(replicas.pop(), signal.SIGKILL)
        time.sleep(3)
        assert generate(0) == texts[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()[-3000:]
    finally:
        process.kill()

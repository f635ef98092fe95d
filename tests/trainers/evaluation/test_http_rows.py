"""The rows of `make verify` about teachers behind HTTP, in short; what real vLLM says is in `test_vllm_real.py`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.evaluation import teachers_over_http, vllm_parity
from trainers.evaluation.loopback_servers import FakeVLLM
from trainers.evaluation.vllm_parity import parity, save_tiny
from trainers.teachers import FlowConfig, VLLMServerTeacher
from trainers.teachers import flow as flow_module
from trainers.verification import Context


pytest.importorskip("openai")


def test_a_client_that_never_asks_for_more_leaves_the_server_idle(context: Context, monkeypatch: pytest.MonkeyPatch):
    """A teacher at a sixth of its rate makes a week of a night; `test_teacher_flow.py` has the other side."""
    monkeypatch.setattr(flow_module, "FlowConfig", lambda: FlowConfig(start=1, most=1))
    measured = teachers_over_http.aimd(context, warm_up=0.2, seconds=0.7)
    assert not measured.passed
    for name in ("with Retry-After", "without"):
        found = measured.details[name]
        assert 0 < found["share_of_ideal"] <= 1 / 6 + 0.05 and found["refused"] == 0 and found["limit"] == 1
        assert f"{name}: {found['share_of_ideal']:.0%}, 0.0% refused" in measured.figure


def test_a_fault_that_comes_through_is_named(context: Context, monkeypatch: pytest.MonkeyPatch):
    """One wrong row in a million is a wrong lesson that nobody can find."""
    chosen = ("absent", "nan")
    monkeypatch.setattr(teachers_over_http, "FAULTS", {fault: teachers_over_http.FAULTS[fault] for fault in chosen})
    measured = teachers_over_http.faults(context)
    assert measured.passed and measured.figure == "4 of 4 faults end as they must"
    assert measured.details["absent on generate"] == "right" and "NaN" in measured.details["nan on completions"]

    signal = VLLMServerTeacher.signal

    def swallow(self: VLLMServerTeacher, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
        try:
            return signal(self, input_ids, attention_mask)
        except ValueError:
            return signal(self, input_ids.flip(0), attention_mask)

    monkeypatch.setattr(VLLMServerTeacher, "signal", swallow)
    monkeypatch.setattr(teachers_over_http, "FAULTS", {"nan": teachers_over_http.FAULTS["nan"]})
    broken = teachers_over_http.faults(context)
    assert not broken.passed
    assert broken.figure == "0 of 2 faults end as they must; not: nan on generate, nan on completions"
    assert broken.details["nan on generate"] == "WRONG VALUES"


def test_scores_are_held_against_transformers_and_only_real_vllm_can_pass(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Doubles that agree with each other prove nothing about vLLM."""
    monkeypatch.setenv("VLLM_VENV", str(tmp_path / "nowhere"))
    assert teachers_over_http.vllm_python() is None
    measured = teachers_over_http.scoring_backends(context)
    assert not measured.passed and "vLLM is not installed (make setup-vllm)" in measured.figure
    assert len(measured.details) == 2
    assert all(found["max_error"] <= 1e-4 and found["tokens"] == 374 for found in measured.details.values())


def test_parity_finds_a_teacher_of_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any):
    """A server that was started with another checkpoint answers as readily."""
    save_tiny(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with FakeVLLM(model, tokenizer) as server:
        monkeypatch.setattr(sys, "argv", ["vllm_parity", str(tmp_path), "--url", server.url])
        vllm_parity.main()
        found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert found["max_error"] <= 1e-4 and found["tokens"] == 374 and found["path"] == "/inference/v1/generate"
        with torch.no_grad():
            model.lm_head.weight[7] += 0.1
        teacher = VLLMServerTeacher(server.url, tokenizer)
        assert parity(teacher, tmp_path)["max_error"] > 1e-3
        teacher.close()


def test_the_training_s_teacher_is_asked_about_every_batch(context: Context):
    """Training that skips what the teacher is slow to say would look as if waiting cost nothing."""
    _, tokenizer = teachers_over_http.tiny(context)
    sizes = teachers_over_http.PrefetchSizes(rows=2, block=16, steps=5, warm=2)
    with FakeVLLM(None, tokenizer, latency=0.1) as server:
        seconds = teachers_over_http.ask_alone(server.url, tokenizer, sizes)
        assert server.scored in (10, 11)  # two rows a batch, and perhaps the greeting
        assert 0.1 <= seconds < server.scored * 0.1 / 2  # five batches at once
        teacher = teachers_over_http.remote(server.url, tokenizer, sizes)
        before = server.scored
        assert 0 < teachers_over_http.train(context, teacher, tokenizer, sizes) < 60
        assert server.scored - before in (14, 15)  # two steps before those that are timed

"""The real vLLM, where `make setup-vllm` has installed it (VLLM_VENV names another folder)."""

import pytest

from trainers.evaluation.teachers_over_http import run_parity, vllm_python, vllm_server
from trainers.evaluation.vllm_parity import K, parity, save_tiny


pytest.importorskip("openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(vllm_python() is None, reason="vLLM is not installed: make setup-vllm"),
]


def test_vllm_in_process_scores_as_transformers_does(tmp_path):
    """The double shows what we believe of vLLM; this shows vLLM."""
    save_tiny(tmp_path / "tiny")
    found = run_parity(vllm_python(), tmp_path / "tiny", tmp_path / "log")
    assert found["tokens"] > 300 and found["max_error"] <= 1e-4


def test_vllm_server_scores_as_transformers_does_on_both_ways_in(tmp_path):
    """And is refused what it cannot do in the words that we wait for."""
    from transformers import AutoTokenizer

    from trainers.teachers import VLLMServerTeacher

    save_tiny(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    with vllm_server(vllm_python(), tmp_path / "tiny", tmp_path / "log") as url:
        teacher = VLLMServerTeacher(url, tokenizer, k=K)
        assert teacher.path == "/inference/v1/generate" and teacher.max_model_len == 256
        for path in ("/inference/v1/generate", "/v1/completions"):
            teacher.path = path
            assert parity(teacher, tmp_path / "tiny")["max_error"] <= 1e-4
        teacher.close()
        with pytest.raises(ValueError, match="at most 128 log-probabilities per token, asked for 129"):
            VLLMServerTeacher(url, tokenizer, k=129)

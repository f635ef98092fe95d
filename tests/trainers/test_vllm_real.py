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


def test_vllm_writes_from_a_message_what_the_receiver_writes_here(tmp_path):
    """The client's double shows what we believe of `prompt_embeds`; this shows vLLM."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from modeling_latentforge import Receiver
    from tests.modeling_latentforge.test_wire import CONTEXTS, PROMPTS, wire
    from trainers.wire_client import WireClient

    save_tiny(tmp_path / "tiny")  # its tokenizer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    reader = LlamaForCausalLM(config)
    # whole characters only: of half a one, vLLM shows nothing and transformers a mark
    printable = [
        len(token) == 1 and token.isascii() for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ]
    reader.lm_head.weight.data *= torch.tensor(printable)[:, None]
    reader.save_pretrained(tmp_path / "tiny")
    model = wire(receivers=())
    model.add_receiver("llama", Receiver(reader, tokenizer), mode="soft")
    message = model.encode(CONTEXTS)
    flags = ("--enable-prompt-embeds",)
    with vllm_server(vllm_python(), tmp_path / "tiny", tmp_path / "log", 256, *flags) as url:
        client = WireClient(url)
        found = client.generate(model, "llama", message, PROMPTS, max_new_tokens=16)
        client.close()
    assert found == model.generate("llama", message, PROMPTS, max_new_tokens=16, do_sample=False)
    assert len(set(found)) == len(found)

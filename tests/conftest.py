"""Tiny real models on real text: bytes of a module of the standard library are the tokens (256 = end of text, 257 =
padding)."""

import atexit
import inspect
import os
import shutil
import tempfile
import textwrap


if count := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch looks: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from modeling_latentforge import (
    LatentForgeAutoencoder,
    LatentForgeAutoencoderConfig,
    LatentForgeForCausalLM,
)


EOS, PAD, VOCAB = 256, 257, 258
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
BACKBONES = {
    "llama": lambda: LlamaConfig(**TINY, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**TINY, num_key_value_heads=2, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**TINY),
}
HEAD_DECODER = [(head, decoder) for head in ("regression", "energy") for decoder in ("autoregressive", "parallel")]


# what `pytest -k` of the first LatentForge selects, by module
KEYWORDS = {
    "env": ("test_rooms", "test_readme", "test_remote_code", "test_selectors"),
    "kd_api": (
        "test_teachers",
        "test_losses",
        "test_kd_trainer",
        "test_alignment",
        "test_kd_store",
        "test_vllm_teacher",
        "test_writing_teachers",
    ),
    "pack": ("test_data",),
    "ae_unit": ("test_autoencoder", "test_ae_trainer", "test_reconstruction"),
    "student_unit": ("test_latentforge", "test_latent_heads", "test_token_loss", "test_generation"),
    "infer_e2e": ("test_infer",),
}


def pytest_itemcollected(item: pytest.Item) -> None:
    item.extra_keyword_matches.update(word for word, modules in KEYWORDS.items() if item.path.stem in modules)


# read when trackio is imported, here or in a process that a test starts: no test writes into anybody's runs
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-of-tests-")
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_tracker_by_default(monkeypatch: pytest.MonkeyPatch):
    # half a second a training
    monkeypatch.setattr("trainers.base_trainer.default_report_to", lambda: "none")
    monkeypatch.setattr("trainers.base_trainer._say_that_no_tracker_is_there", lambda: None)


def text_ids(count: int, start: int = 0) -> torch.LongTensor:
    """`(count,)` bytes of real Python source."""
    return torch.tensor(list(inspect.getsource(textwrap).encode())[start : start + count])


def text_batch(rows: int, length: int) -> torch.LongTensor:
    """`(rows, length)` consecutive pieces of real text."""
    return text_ids(rows * length).view(rows, length)


def tiny_autoencoder(patch_size: int = 4, **kwargs) -> LatentForgeAutoencoder:
    # a larger initial scale than the default: an untrained model must still depend visibly on its input
    defaults = {"latent_size": 16, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.3}
    config = LatentForgeAutoencoderConfig(
        vocab_size=VOCAB, patch_size=patch_size, eos_token_id=EOS, pad_token_id=PAD, **{**defaults, **kwargs}
    )
    return LatentForgeAutoencoder(config).eval()


def tiny_student(
    head: str = "regression",
    decoder: str = "autoregressive",
    backbone: str | PreTrainedConfig = "llama",
    patch_size: int = 4,
    **kwargs,
) -> LatentForgeForCausalLM:
    backbone_config = BACKBONES[backbone]() if isinstance(backbone, str) else backbone
    backbone_config.initializer_range = 0.3
    head_config = {"head_type": head, "num_samples": 3, "num_targets": 4, "noise_size": 8}
    kwargs = {"num_decoder_layers": 2, "decoder_num_heads": 2, "initializer_range": 0.3, **kwargs}
    return LatentForgeForCausalLM.from_autoencoder(
        tiny_autoencoder(patch_size), backbone_config, head_config=head_config, decoder_type=decoder, **kwargs
    )

"""What the trainer tests share: a byte tokenizer, rows of real text with ragged labels, tiny training arguments."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import EOS, PAD, TINY, text_ids


# real prose and code, small enough to be tokenised in no time
TEXT = [
    "The codec turns a patch of tokens into one latent vector, and the decoder turns it back.\n" * 3,
    "def patch(ids, size):\n    return [ids[i : i + size] for i in range(0, len(ids), size)]\n" * 3,
    "A teacher gives a distribution at every position; a student learns from all of it, not from one sample.\n" * 3,
    "When in doubt, measure. When measured, write the number, its unit and the command beside it.\n" * 3,
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with the 258 ids of the tiny models: bytes, end of text, padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")
    assert (fast.eos_token_id, fast.pad_token_id) == (EOS, PAD)
    return fast


def tiny_teacher(**kwargs: Any) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(**{**TINY, "num_key_value_heads": 2, "initializer_range": 0.3, **kwargs})
    return LlamaForCausalLM(config).eval()


def ragged_rows(rows: int, length: int = 16, patch_size: int = 4) -> list[dict[str, list[int]]]:
    """Rows as `load_blocks` makes them, but with different numbers of labels: leading and inner padding, masked
    endings."""
    data = []
    for row in range(rows):
        ids = text_ids(length, start=7 * row).tolist()
        mask, labels = [1] * length, list(ids)
        for place in range(row % patch_size):
            ids[place], mask[place], labels[place] = PAD, 0, -100
        if row % 3 == 1:
            ids[length // 2], mask[length // 2], labels[length // 2] = PAD, 0, -100
        for place in range(length - 2 * (row % 4), length):
            labels[place] = -100
        data.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return data


def tiny_args(cls: type, output_dir: Path | str, **kwargs: Any) -> Any:
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    return cls(**{**defaults, **kwargs})


def train_log(trainer: Any) -> list[dict[str, float]]:
    """The logged training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]

"""Real vLLM against transformers on the same weights. Runs in the environment of `make setup-vllm`:

    .venv-vllm/bin/python -m trainers.evaluation.vllm_parity DIRECTORY               # vLLM in this process
    python -m trainers.evaluation.vllm_parity DIRECTORY --url http://127.0.0.1:8000  # a server; in any environment

`DIRECTORY` holds a model and its tokenizer ([`save_tiny`] makes one). Prints one line of JSON, the last one.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


ROWS, LENGTH, K = 4, 96, 20


def save_tiny(folder: Path, hidden_size: int = 64, num_layers: int = 2, positions: int = 256) -> None:
    """A random Qwen3 of head sizes that vLLM's CPU kernels know, over bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        max_position_embeddings=positions,
        initializer_range=0.2,
        eos_token_id=fast.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def parity(teacher: Any, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Largest difference of a teacher's log-probabilities from transformers' forward, over rows of text and with
    masked tokens; and the number of tokens with other ids in the top k."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    text = Path(__file__).read_bytes()
    ids = torch.tensor(list(teacher.tokenizer(text.decode())["input_ids"][: ROWS * LENGTH])).view(ROWS, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, 40] = 0
    signal = teacher.signal(ids, mask)
    error, others, count = 0.0, 0, 0
    for row in range(ROWS):
        places = mask[row].nonzero().flatten()
        with torch.no_grad():
            logprobs = model(ids[row, places][None]).logits[0].float().log_softmax(-1)[:-1]
        values, tops = logprobs.topk(teacher.k)
        mine, mine_ids = signal.top_logprobs[row, places[:-1]], signal.top_ids[row, places[:-1]].long()
        # by rank, and by id: two ids of nearly equal probability may change places
        error = max(
            error, float((mine - values).abs().max()), float((mine - logprobs.gather(1, mine_ids)).abs().max())
        )
        others += int((mine_ids.sort(-1).values != tops.sort(-1).values).any(-1).sum())
        count += len(places) - 1
    return {"max_error": error, "tokens": count, "tokens_with_other_ids": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", help="of a server that serves the folder; default: vLLM in this process")
    parser.add_argument("--dtype", default="float32", help="of both sides")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from trainers.teachers import VLLMLocalTeacher, VLLMServerTeacher

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    teacher: Any
    if arguments.url:
        teacher = VLLMServerTeacher(arguments.url, tokenizer, k=K)
    else:
        teacher = VLLMLocalTeacher(
            str(arguments.folder), tokenizer, k=K, dtype=arguments.dtype, max_model_len=128, enforce_eager=True
        )
    try:
        teacher.check()
        found = {
            "teacher": repr(teacher),
            "path": getattr(teacher, "path", None),
            **parity(teacher, arguments.folder, getattr(torch, arguments.dtype)),
        }
    finally:
        teacher.close()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
    # with the result printed and the engine shut down, vLLM's threads abort now and then while Python ends
    sys.stdout.flush()
    os._exit(0)

"""How fast a model writes, and how often its backbone runs for it."""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class StepCounter:
    """`count` forward passes so far."""

    count: int = 0


@contextmanager
def count_backbone_steps(model: Any) -> Iterator[StepCounter]:
    """Count forward passes of a student's backbone, or of a token model's decoder stack, inside the block."""
    counter = StepCounter()
    base = model.base_model
    backbone = getattr(base, "backbone", base)

    def add(*_: Any) -> None:
        counter.count += 1

    handle = backbone.register_forward_pre_hook(add)
    try:
        yield counter
    finally:
        handle.remove()


def generation_speed(
    models: Mapping[str, Any],
    input_ids: torch.Tensor,
    new_tokens: int = 128,
    do_sample: bool = False,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Tokens per second of several models that continue the same prompt, in turns.

    Taking turns lets a change of the machine's load fall on all models alike. The first round warms up and does not
    count. Every model writes exactly `new_tokens` (EOS is held back). Threads and dtype are the models' own: compare
    like with like.

    Args:
        models: by name; in eval mode, on one device.
        input_ids: `(B, T)`, the prompt.
        new_tokens: tokens to write per row.
        do_sample: sample at temperature 1, or take the likeliest token.
        repeats: counted rounds.
        seed: of the sampling, the same in every round.

    Returns:
        per model: `tokens_per_second` (median over rounds, all rows together), `runs` (each round's),
        `backbone_steps_per_token` (the prompt's pass included).

    Raises:
        ValueError: `repeats` or `new_tokens` below 1.
    """
    if repeats < 1 or new_tokens < 1:
        raise ValueError(f"`repeats` ({repeats}) and `new_tokens` ({new_tokens}) must be at least 1")
    runs: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, model in models.items():
            torch.manual_seed(seed)
            with count_backbone_steps(model) as counter:
                seconds = _write(model, input_ids, new_tokens, do_sample)
            steps[name] = counter.count / new_tokens
            if turn:
                runs[name].append(input_ids.shape[0] * new_tokens / seconds)
    return {
        name: {
            "tokens_per_second": statistics.median(values),
            "runs": values,
            "backbone_steps_per_token": steps[name],
        }
        for name, values in runs.items()
    }


def _write(model: Any, input_ids: torch.Tensor, new_tokens: int, do_sample: bool) -> float:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    if input_ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    written = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        **options,
    )
    if input_ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if written.shape[1] != input_ids.shape[1] + new_tokens:
        raise RuntimeError(f"asked for {new_tokens} new tokens, got {written.shape[1] - input_ids.shape[1]}")
    return seconds

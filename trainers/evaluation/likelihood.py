"""How well a causal LM predicts held-out text.

B batch, T tokens.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from .brier import bootstrap_means


@torch.no_grad()
def held_out_likelihood(
    model: Any,
    blocks: Any,
    tokenizer: Any = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    resamples: int = 0,
) -> dict[str, Any]:
    """Nats per predicted token over blocks of text, and bits per byte of that text.

    Every model that is compared must see the same blocks: what counts, labels other than -100 from the second place
    of a row on, is then the same for all, EOS included.

    Args:
        model: a causal LM, a student or a token model; put in eval mode for the time of the call.
        blocks: rows with `input_ids`, `attention_mask`, `labels`, each (T,), as `load_blocks` makes them.
        tokenizer: gives the text's length in bytes; None leaves bits per byte out.
        batch_size: rows at once.
        max_tokens: stop once so many tokens are predicted.
        resamples: how often the text is drawn again for an interval, in pieces of `batch_size` rows; 0 for none.

    Returns:
        `nats_per_token`, `num_tokens`, and with a tokenizer `bits_per_byte` and `num_bytes`; with `resamples` the 95 %
        `nats_interval`, of text like this and of this model: nothing is said of another seed's training.

    Raises:
        ValueError: no token to predict.
    """
    options: dict[str, Any] = {"use_cache": False}
    if hasattr(model, "autoencoder"):
        # a student: likelihood alone, and never the logits of all rows at once
        options |= {"loss_weights": {"ce": 1.0}, "output_logits": False}
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    num_tokens = num_bytes = 0
    pieces: list[tuple[float, int]] = []
    try:
        for start in range(0, len(blocks), batch_size):
            rows = blocks[start : start + batch_size]
            input_ids, attention_mask, labels = (
                torch.as_tensor(rows[name]).long() for name in ("input_ids", "attention_mask", "labels")
            )
            predicted = labels[:, 1:] != -100
            count = int(predicted.sum())
            if not count:
                continue
            output = model(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                labels=labels.to(model.device),
                **options,
            )
            pieces.append((float(output.loss) * count, count))
            nats += output.loss.double().cpu() * count
            num_tokens += count
            if tokenizer is not None:
                num_bytes += sum(
                    len(_decode(tokenizer, row[seen]).encode())
                    for row, seen in zip(labels[:, 1:], predicted, strict=True)
                )
            if max_tokens is not None and num_tokens >= max_tokens:
                break
    finally:
        model.train(was_training)
    if not num_tokens:
        raise ValueError("No token to predict: the blocks are empty, or masked everywhere.")
    result: dict[str, Any] = {"nats_per_token": float(nats) / num_tokens, "num_tokens": num_tokens}
    if tokenizer is not None:
        result |= {"bits_per_byte": float(nats) / math.log(2) / max(num_bytes, 1), "num_bytes": num_bytes}
    if resamples:
        sums = torch.tensor(pieces, dtype=torch.float64)
        drawn = bootstrap_means(sums[:, :1], sums[:, 1], resamples)[:, 0]
        result["nats_interval"] = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return result


def why_no_likelihood(model: Any) -> str | None:
    """Why a causal LM has no exact likelihood, and what to ask instead; None where it has one."""
    if not hasattr(model, "sample_latents"):
        return None  # a token model
    instead = "ask for BrierLM, which needs samples only (trainers/evaluation/patch_draws.py)"
    if model.head.noise_size:
        return (
            f"its {model.config.head_config.head_type} head draws latents from noise, so P(text) is an integral over "
            "that noise which nobody can "
            f"compute (logits at the centre of the noise belong to another distribution): {instead}"
        )
    if model.config.decoder_type == "parallel":
        return (
            f"its decoder emits the {model.config.patch_size} tokens of a patch at once, independent of each other: "
            "what its logits give is the likelihood of that product on one patch grid, which no token of the patch "
            f"conditions, and cannot stand beside a causal model's: {instead}"
        )
    return None


def exact_likelihood(
    model: Any,
    blocks: Any,
    tokenizer: Any = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """[`held_out_likelihood`] of a model that has one, with its interval.

    Raises:
        ValueError: a student with an energy head or a parallel decoder; the message says why and what to ask instead.
    """
    reason = why_no_likelihood(model)
    if reason is not None:
        raise ValueError(f"this model has no exact likelihood: {reason}")
    return held_out_likelihood(model, blocks, tokenizer, batch_size, max_tokens, resamples=1000)


def _decode(tokenizer: Any, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.no_grad()
def divergence_from_teacher(model: Any, teacher: Any, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """A teacher's loss of a student on held-out text, per predicted token: KL(teacher || student) in nats for one with
    full distributions.

    Args:
        model: a student; put in eval mode for the time of the call.
        teacher: see [`~trainers.teachers.Teacher`]; it stays open.
        batches: `input_ids`, `attention_mask` and `labels`, each `(B, T)`.

    Raises:
        ValueError: no token to predict.
    """
    was_training = model.training
    model.eval()
    nats, num_tokens = 0.0, 0
    try:
        for batch in batches:
            batch = {name: values.to(model.device) for name, values in batch.items()}
            signal = teacher.signal(batch["input_ids"], batch["attention_mask"])
            output = model(
                **batch,
                loss_weights={"kd": 1.0},
                distillation=signal.distillation(model.config.vocab_size),
                distillation_starts=signal.starts,
                output_logits=False,
                num_items_in_batch=1,
            )
            nats += float(output.loss)
            num_tokens += int(predicted(batch["labels"], batch["attention_mask"]).sum())
    finally:
        model.train(was_training)
    if not num_tokens:
        raise ValueError("No token to predict: the batches are empty, or masked everywhere.")
    return nats / num_tokens


def predicted(labels: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`(B, T)`, where a label counts: nothing predicts a row's first unmasked token."""
    first = (attention_mask != 0).long().cumsum(1) <= 1
    return (labels != -100) & ~first

"""Rows of scored tokens -> [`SparseSignal`]: what every backend that scores given ids has in common.

T tokens of a row, k entries. A scored row is a pair `(ids (T - 1, k), logprobs (T - 1, k))`, sorted, most likely
first: entry t speaks about token t + 1. The last token's successor is not scored; nothing is trained on it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..losses.divergence import ABSENT_LOGPROB
from .base import SparseSignal, speaking_positions
from .flow import BadReply


ScoredRow = tuple[np.ndarray, np.ndarray]

ABSENT = 10 * ABSENT_LOGPROB
# logprobs are of fp32 or narrower forwards: their exponentials may sum to a little more than one
MASS_SLACK = 1e-2


def check_score_temperature(temperature: float) -> None:
    """Refuse any but 1.

    Raises:
        ValueError: vLLM takes another one without a word and answers at 1.
    """
    if temperature != 1:
        raise ValueError(
            f"A teacher that scores over vLLM answers at temperature 1, whatever it is asked for, got {temperature}: "
            "set it to 1, or use a teacher with full logits (TEACHER_BACKEND=hf)."
        )


def check_row(ids: np.ndarray, logprobs: np.ndarray, where: str) -> None:
    """Refuse what cannot be log-probabilities.

    Raises:
        BadReply: NaN, values above 0, or a row whose probabilities sum to more than one.
    """
    if np.isnan(logprobs).any():
        raise BadReply(
            f"{where}: {int(np.isnan(logprobs).sum())} of {logprobs.size} log-probabilities are NaN. The teacher's "
            "forward overflows: serve it in another dtype."
        )
    if (logprobs > 1e-3).any():
        raise BadReply(f"{where}: a log-probability of {logprobs.max():.3g} is above 0.")
    mass = np.where(logprobs > ABSENT_LOGPROB, np.exp(logprobs.astype(np.float64)), 0.0).sum(-1)
    if mass.size and mass.max() > 1 + MASS_SLACK:
        raise BadReply(f"{where}: the probabilities of one token sum to {mass.max():.4f}: they are none.")


def score_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    k: int,
    score: Callable[[Sequence[list[int]]], Iterable[ScoredRow]],
    vocab_size: int,
    **known: Any,
) -> SparseSignal:
    """`(B, T)` ids and mask -> signal. Masked tokens are left out of what `score` is given, rows of fewer than two
    tokens are not asked about; their entries, and each row's last, are absent."""
    ids, mask = input_ids.cpu(), None if attention_mask is None else attention_mask.cpu() != 0
    places = [
        torch.arange(ids.shape[1]) if mask is None else mask[row].nonzero().flatten() for row in range(ids.shape[0])
    ]
    asked = [row for row, place in enumerate(places) if len(place) > 1]
    top_ids = torch.zeros(*ids.shape, k, dtype=torch.int32)
    top_logprobs = torch.full((*ids.shape, k), ABSENT)
    rows = [ids[row, places[row]].tolist() for row in asked]
    for row, (entry_ids, logprobs) in zip(asked, score(rows), strict=True):
        # columns that pad the teacher's matrix are no words: their mass belongs to the tail
        logprobs = np.where((entry_ids >= 0) & (entry_ids < vocab_size), logprobs, ABSENT)
        logprobs = np.maximum(logprobs, ABSENT)
        top_ids[row, places[row][:-1]] = torch.from_numpy(entry_ids.astype(np.int32))
        top_logprobs[row, places[row][:-1]] = torch.from_numpy(np.ascontiguousarray(logprobs, dtype=np.float32))
    positions = None if mask is None or bool(mask.all()) else speaking_positions(mask)
    return SparseSignal(top_ids, top_logprobs, vocab_size=vocab_size, positions=positions, **known)

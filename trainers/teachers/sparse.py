"""From full distributions to a few entries per token: an exact head and a sampled tail.

B batch, T tokens, V vocabulary, k stored entries per token, C tokens of one chunk.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ..losses.divergence import ABSENT_LOGPROB
from .base import DenseSignal, SparseSignal, Teacher, TeacherCapabilities


# Stored entries per token, and how many of them are draws: what came closest to full distributions at this size, see
# docs/experiments.md, `sparse_kd`.
TOP_K, NUM_DRAWS = 20, 8

# Logits held at once, in elements.
CHUNK_ELEMENTS = 2**22


@torch.no_grad()
def to_sparse(
    signal: DenseSignal,
    k: int = TOP_K,
    num_draws: int = NUM_DRAWS,
    generator: torch.Generator | int | None = None,
    *,
    seed: int | Sequence[int] | None = None,
) -> SparseSignal:
    """Keep k entries per token: the `k - num_draws` most likely ids, and draws with replacement from all others.

    Any sum over the entries estimates the sum over the vocabulary without bias; see
    [`~trainers.losses.sampled_tail_kl`]. With `num_draws` 0 all are the most likely ids, and what is known of the
    others is their mass.

    The same seed and the same distributions give the same draws, whatever the size of the chunks. With one seed for
    all, a row's draws depend on its place in the batch too; a store gives every row its own and keeps it in the row's
    key.

    Args:
        signal: `(B, T)` positions; columns that its tokenizer never uses are left out and the rest renormalised, as a
            student without them sees it.
        k: entries per token.
        num_draws: how many of them are draws, 0 to k.
        generator, seed: of the draws; one of the two. A generator lives on the CPU, and may be given as its seed; a
            seed is one for all, or one per row. Not needed without draws.

    Returns:
        On the signal's device, logprobs and entropy in fp32 (wider if the logits are): `k` is less than asked for
        where the vocabulary is smaller.

    Raises:
        ValueError: `k` or `num_draws` out of range, draws without a seed or with both, seeds for another number of
            rows.
    """
    if not 1 <= k or not 0 <= num_draws <= k:
        raise ValueError(f"`k` must be at least 1 and `num_draws` lie in 0 to k, got {k} and {num_draws}.")
    if (generator is None) == (seed is None) and (num_draws or seed is not None):
        raise ValueError("Draws need a seed: pass `generator` or `seed`, one of them, and keep it with the result.")
    batch, length = signal.hidden_states.shape[:2]
    device = signal.hidden_states.device
    vocab_size = signal.vocab_size if signal.num_tokens is None else signal.num_tokens
    head = min(k - num_draws, vocab_size)
    # all random numbers at once: chunks must not change what is drawn
    uniform = _uniform(batch, length, num_draws, generator if seed is None else seed)
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    step = max(1, CHUNK_ELEMENTS // signal.vocab_size)
    for index in torch.arange(batch * length, device=device).split(step):
        logits = signal.logits(index)[:, :vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = logits.log_softmax(-1)  # (C, V)
        probs = logprobs.exp()
        entropy = -torch.where(probs > 0, probs * logprobs, 0.0).sum(-1)
        values, ids = logprobs.topk(head)
        if num_draws:
            drawn, weights = _draw(probs.scatter_(-1, ids, 0.0), uniform[index.cpu()].to(device))
            ids, values = torch.cat([ids, drawn], -1), torch.cat([values, weights], -1)
        parts.append((ids, values.clamp(min=10 * ABSENT_LOGPROB), entropy))
    ids, values, entropy = (torch.cat(part).unflatten(0, (batch, length)) for part in zip(*parts, strict=True))
    return SparseSignal(
        ids,
        values,
        vocab_size=signal.vocab_size,
        num_tokens=signal.num_tokens,
        tokenizer_id=signal.tokenizer_id,
        positions=signal.positions,
        num_draws=num_draws,
        entropy=entropy if num_draws else None,
    )


def _uniform(
    batch: int, length: int, num_draws: int, source: torch.Generator | int | Sequence[int] | None
) -> torch.Tensor:
    """Random numbers `(B * T, num_draws)` in [0, 1)."""
    if isinstance(source, Sequence):
        if len(source) != batch:
            raise ValueError(f"`seed` holds {len(source)} seeds for {batch} rows: give one per row, or one for all.")
        rows = [_uniform(1, length, num_draws, seed) for seed in source]
        return torch.cat(rows) if rows else torch.empty(0, num_draws, dtype=torch.float64)
    generator = torch.Generator().manual_seed(source) if isinstance(source, int) else source
    return torch.rand(batch * length, num_draws, generator=generator, dtype=torch.float64)


def row_seeds(input_ids: torch.Tensor, seed: int) -> list[int]:
    """A seed for each row of `(B, T)`, made of its tokens: wherever and whenever the row comes, the same."""
    hashes = (hashlib.sha256(f"{seed}:{row}".encode()).digest() for row in input_ids.tolist())
    return [int.from_bytes(digest[:8], "little") >> 1 for digest in hashes]


def _draw(probs: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(C, m)` in proportion to `probs (C, V)`, where each falls by `uniform (C, m)`, and the log of each one's
    share of their sum; absent where that is 0."""
    # in fp32 the thousands of small steps behind the large ones would be rounded away
    reached = probs.cumsum(-1, dtype=torch.float64)  # (C, V)
    mass = reached[:, -1:]
    # the first id whose sum exceeds the number: never one of probability 0, not even at 0
    drawn = torch.searchsorted(reached, uniform * mass, right=True).clamp_(max=probs.shape[-1] - 1)
    share = torch.where(mass > 0, mass / uniform.shape[-1], 0.0).log().to(probs.dtype)
    return drawn, share.expand(-1, uniform.shape[-1])


class SparseTeacher:
    """Says of a teacher with full distributions only what a store would keep: [`to_sparse`] of its signals.

    While the teacher itself is at hand its full distributions teach better and cost no more; this is for finding out
    what a student loses to a store, before it is made.

    Args:
        teacher: gives [`DenseSignal`]s.
        k, num_draws: see [`to_sparse`].
        seed: of the draws, which are, as in a store, a row's own: they do not change when the row comes again, and
            what else the teacher was asked does not matter.

    Raises:
        ValueError: the teacher gives no full distributions.
    """

    def __init__(self, teacher: Teacher, k: int = TOP_K, num_draws: int = NUM_DRAWS, seed: int = 0):
        if teacher.capabilities.form != "dense":
            raise ValueError(
                f"SparseTeacher needs full distributions, and {type(teacher).__name__} gives "
                f"{teacher.capabilities.form} ones: use it as it is."
            )
        if not 0 <= num_draws <= k:
            raise ValueError(f"`num_draws` must lie in 0 to k ({k}), got {num_draws}.")
        self.teacher = teacher
        self.k, self.num_draws, self.seed = k, num_draws, seed
        self.vocab_size, self.num_tokens = teacher.vocab_size, teacher.num_tokens
        self.capabilities = TeacherCapabilities(
            form="sparse", any_temperature=False, remote=teacher.capabilities.remote
        )

    @property
    def name(self) -> str | None:
        """The teacher's."""
        return getattr(self.teacher, "name", None)

    def to(self, device: str | torch.device) -> "SparseTeacher":
        """Move the teacher."""
        mover: Any = self.teacher
        if hasattr(mover, "to"):
            mover.to(device)
        return self

    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SparseSignal:
        """`(B, T)` ids and mask -> k entries per position."""
        dense: Any = self.teacher.signal(input_ids, attention_mask)
        return to_sparse(dense, self.k, self.num_draws, seed=row_seeds(input_ids, self.seed))

    def check(self) -> None:
        """The teacher's."""
        self.teacher.check()

    def close(self) -> None:
        """The teacher's."""
        self.teacher.close()

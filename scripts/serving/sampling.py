"""Next tokens of many rows at once, each with its own temperature, cuts and seed. B rows, V vocabulary."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: among the likeliest tokens of this mass, in (0, 1].
        top_k: among so many likeliest tokens; 0 for all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must lie between 0 and 100, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}.")


def sample(logits: torch.Tensor, samplings: Sequence[Sampling], randoms: Sequence[random.Random]) -> torch.Tensor:
    """`(B, V)` -> token ids `(B,)`.

    Each row draws one number of its own generator, whoever else is there, and inverts the sum of its probabilities at
    it. So a seeded row's text does not depend on the crowd, but for the rounding of the logits themselves.
    """
    greedy = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawn:
        return greedy
    device = logits.device
    rows = None if len(drawn) == len(samplings) else torch.tensor(drawn, device=device)
    chosen = [samplings[row] for row in drawn]
    numbers = torch.tensor([randoms[row].random() for row in drawn], device=device, dtype=torch.float64)
    temperature = torch.tensor([sampling.temperature for sampling in chosen], device=device)[:, None]
    scaled = (logits if rows is None else logits[rows]) / temperature.to(logits.dtype)
    order = None
    if any(sampling.top_p < 1 or 0 < sampling.top_k < logits.shape[1] for sampling in chosen):
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    mass = scaled.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = mass[:, -1:]
    if order is not None:
        size = logits.shape[1]
        last = torch.tensor([(sampling.top_k or size) - 1 for sampling in chosen], device=device).clamp(max=size - 1)
        top_p = torch.tensor([sampling.top_p for sampling in chosen], device=device, dtype=torch.float64)
        # the token that reaches the mass is the last one in
        reached = (mass < top_p[:, None] * total).sum(-1).clamp(max=size - 1)
        last = torch.minimum(last, torch.where(top_p < 1, reached, last))
        total = mass.gather(1, last[:, None])
    place = torch.searchsorted(mass, numbers[:, None] * total, right=True)
    place = torch.minimum(place, (mass < total).sum(-1, keepdim=True))
    tokens = (place if order is None else order.gather(1, place))[:, 0]
    return tokens if rows is None else greedy.index_copy(0, rows, tokens)

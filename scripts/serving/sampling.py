"""Next tokens of many rows at once, each with its own temperature, cuts and seed. B rows, V vocabulary."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


LIKELIEST = 1024  # tokens that cuts are looked for among first


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
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawn:
        return logits.argmax(-1)
    device, size = logits.device, logits.shape[1]
    chosen = [samplings[row] for row in drawn]
    numbers = torch.tensor([randoms[row].random() for row in drawn], device=device, dtype=torch.float64)
    rows = None if len(drawn) == len(samplings) else torch.tensor(drawn, device=device)
    taken = logits if rows is None else logits[rows]
    temperature = torch.tensor([sampling.temperature for sampling in chosen], device=device, dtype=logits.dtype)
    # what the dtype rounds to 0 would divide 0 by 0
    temperature = temperature.clamp_min(torch.finfo(logits.dtype).tiny)[:, None]
    cut = [place for place, one in enumerate(chosen) if one.top_p < 1 or 0 < one.top_k < size]
    if not cut:
        tokens = _invert(taken, temperature, numbers)
    elif len(cut) == len(chosen):
        tokens = _invert_cut(taken, temperature, numbers, chosen)
    else:  # who asks for no cut does not pay for a sort
        index = torch.tensor(cut, device=device)
        tokens = _invert(taken, temperature, numbers)
        tokens[index] = _invert_cut(taken[index], temperature[index], numbers[index], [chosen[place] for place in cut])
    return tokens if rows is None else logits.argmax(-1).index_copy(0, rows, tokens)


def _weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Probabilities but for their sum, which lies between 1 and V."""
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_()


def _invert(logits: torch.Tensor, temperature: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`(B, V)`, `(B, 1)` and `(B,)` numbers in [0, 1) -> ids.

    The sum is searched in two steps, over blocks and then in one block: a running sum over a whole vocabulary costs
    several times as much.
    """
    rows, size = logits.shape
    block = _block_size(size)
    weights = _weights(logits, temperature)
    if size % block:
        weights = torch.nn.functional.pad(weights, (0, -size % block))
    weights = weights.view(rows, -1, block)
    sums = weights.sum(-1).double()
    upto = sums.cumsum(-1)
    target = numbers[:, None] * upto[:, -1:]
    number = _place(upto, target)
    before = upto.gather(1, number) - sums.gather(1, number)
    inner = weights[torch.arange(rows, device=logits.device), number[:, 0]].double().cumsum(-1)
    return (number * block + _place(inner, target - before))[:, 0]


@functools.cache
def _block_size(size: int) -> int:
    """Near the root; one that divides, if there is one, since filling up copies everything."""
    root = max(1, round(size**0.5))
    near = range(root, max(1, root // 4), -1)
    return next((block for block in near if not size % block), root)


def _place(upto: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Where running sums `(B, n)` pass `target (B, 1)`; never on a weight of 0 behind the last one."""
    place = torch.searchsorted(upto, target, right=True)
    return torch.minimum(place, (upto < upto[:, -1:]).sum(-1, keepdim=True))


def _invert_cut(
    logits: torch.Tensor, temperature: torch.Tensor, numbers: torch.Tensor, chosen: Sequence[Sampling]
) -> torch.Tensor:
    """The same among the likeliest tokens: of each row's `top_k`, and of these as many as reach the share `top_p`.

    Most cuts lie among few tokens, and sorting all takes long. Only rows whose own cut does not are sorted whole:
    equal logits may then stand in another order, which must not hang on who else is there.
    """
    tokens, is_within = _invert_cut_among(min(LIKELIEST, logits.shape[1]), logits, temperature, numbers, chosen)
    if not all(is_within):
        beyond = [row for row, within in enumerate(is_within) if not within]
        index = torch.tensor(beyond, device=logits.device)
        rest = logits[index], temperature[index], numbers[index], [chosen[row] for row in beyond]
        tokens[index] = _invert_cut_among(logits.shape[1], *rest)[0]
    return tokens


def _invert_cut_among(
    count: int, logits: torch.Tensor, temperature: torch.Tensor, numbers: torch.Tensor, chosen: Sequence[Sampling]
) -> tuple[torch.Tensor, list[bool]]:
    """[`_invert_cut`] among the `count` likeliest tokens, and for each row whether its cut lies among them."""
    device, size = logits.device, logits.shape[1]
    top_k = torch.tensor([min(one.top_k or size, size) for one in chosen], device=device)
    top_p = torch.tensor([one.top_p for one in chosen], device=device, dtype=torch.float64)
    total = _weights(logits, temperature).sum(-1, keepdim=True).double()
    values, order = logits.topk(count)
    mass = (_weights(values, temperature).double() / total).cumsum(-1)
    last = top_k.clamp(max=count) - 1
    whole = torch.where(top_k < size, mass.gather(1, last[:, None])[:, 0], 1.0)
    reached = (mass < (top_p * whole)[:, None]).sum(-1)  # the token that reaches the share is the last one in
    is_within = (top_k <= count) | ((top_k == size) & (reached < count))
    last = torch.minimum(last, reached)
    kept = mass.gather(1, last[:, None])
    place = torch.minimum(torch.searchsorted(mass, numbers[:, None] * kept, right=True), last[:, None])
    return order.gather(1, place)[:, 0], is_within.tolist()

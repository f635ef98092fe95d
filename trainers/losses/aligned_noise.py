"""A token's place among a teacher's choices: the noise with which the teacher would have drawn it.

M tokens, V vocabulary, k stored entries per token.

A teacher that draws by inverting the sum of its probabilities, sorted from the likeliest on, gives each token an
interval of [0, 1). A number drawn evenly from the interval of the text's own token is even over [0, 1) where the text
follows the teacher (PTP, arXiv 2512.21323).
"""

import torch

from .divergence import ABSENT_LOGPROB


def choice_interval(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(M, V)` and ids `(M,)` -> where each token's interval begins and how wide it is, both `(M,)`, fp32.

    Equal probabilities stand in the order of their ids.
    """
    probs = logits.float().softmax(-1)
    own = probs.gather(1, ids[:, None])
    places = torch.arange(probs.shape[1], device=probs.device)
    before = (probs > own) | ((probs == own) & (places < ids[:, None]))
    return (probs * before).sum(-1), own[:, 0]


def sparse_choice_interval(
    top_ids: torch.Tensor, top_logprobs: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`choice_interval`] of what is known: the likeliest ids `(M, k)` and their log-probabilities.

    A token outside them has all that is left of [0, 1): with whom it shares that is unknown.
    """
    probs = torch.where(top_logprobs > ABSENT_LOGPROB, top_logprobs.float().exp(), 0.0)
    mine = (top_ids == ids[:, None]) & (probs > 0)
    own = (probs * mine).amax(-1, keepdim=True)
    known = mine.any(-1)
    before = (probs > own) | ((probs == own) & (top_ids < ids[:, None]))
    lower = torch.where(known, (probs * before).sum(-1), probs.sum(-1)).clamp(max=1.0)
    return lower, torch.where(known, own[:, 0], 1 - lower)


def draw_from(lower: torch.Tensor, width: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A number from each interval, below 1."""
    share = torch.rand(lower.shape, generator=generator, device="cpu" if generator is not None else lower.device)
    return (lower + width * share.to(lower)).clamp(0, 1 - 2**-24)

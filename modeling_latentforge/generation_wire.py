"""What an answer's first token is drawn by: all that the wire's generation has beyond transformers' own loop.

A message fixes most of an answer; its first token is where a receiver that has read no text goes astray. (How many
first tokens may not end the answer, the seeds' `eos_ban_steps`, is `min_new_tokens` of transformers.)
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class FirstTokenProcessor(LogitsProcessor):
    """Draws the first new token of each row; all others are left as they are, for a greedy loop.

    Args:
        top_p: it is drawn from the likeliest tokens that together reach this probability (arXiv 1904.09751).
        temperature: of that draw.
        seeds: one a row, so that a row draws the same in every batch; None: torch's own numbers.
        start: ids that `generate` is given, padding included; 0 of embeddings.

    For `generate` with `do_sample=False`.

    Raises:
        ValueError: a share outside (0, 1], a temperature that is not above 0; when called, other rows than seeds.
    """

    def __init__(self, top_p: float, temperature: float = 1.0, seeds: Sequence[int] | None = None, start: int = 0):
        if not 0 < top_p <= 1:
            raise ValueError(f"`first_token_top_p` must lie in (0, 1], got {top_p}.")
        if not temperature > 0:
            raise ValueError(
                f"`first_token_temperature` must be above 0, got {temperature}: leave it out for no draw."
            )
        self.top_p, self.temperature, self.seeds, self.start = top_p, temperature, seeds, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`(B, T)` ids so far, `(B, V)` scores -> scores."""
        if input_ids.shape[1] != self.start:
            return scores
        if self.seeds is not None and len(self.seeds) != len(scores):
            raise ValueError(f"{len(self.seeds)} seeds for {len(scores)} rows: give one a row.")
        probabilities, ids = (scores.float() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        # the token that crosses the share is kept
        kept = probabilities.cumsum(-1) - probabilities < self.top_p
        sums = (probabilities * kept).cumsum(-1)
        if self.seeds is None:
            numbers = torch.rand(len(scores))
        else:
            numbers = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(x)) for x in self.seeds])
        target = numbers.to(scores.device)[:, None] * sums[:, -1:]
        place = torch.minimum((sums <= target).sum(-1, keepdim=True), kept.sum(-1, keepdim=True) - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, ids.gather(1, place), 0.0)


__all__ = ["FirstTokenProcessor"]

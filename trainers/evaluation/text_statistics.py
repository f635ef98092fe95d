"""How varied and how repetitive texts are, from their ids alone.

R texts of L tokens each, n-grams do not cross texts. Entropy and distinct-n grow with the number of tokens: compare
only figures of equal R and L.
"""

import torch


def ngrams(ids: torch.Tensor, length: int) -> torch.Tensor:
    """`(R, L)` -> `(R, L - length + 1)`, one number per n-gram, equal where the n-grams are (of all rows)."""
    windows = ids.unfold(1, length, 1)  # (R, L - length + 1, length)
    return torch.unique(windows.flatten(0, 1), dim=0, return_inverse=True)[1].view(windows.shape[:2])


def ngram_entropy(ids: torch.Tensor, length: int) -> float:
    """Entropy of the n-grams of all texts, in nats: of uniform ones the log of their number."""
    counts = ngrams(ids, length).flatten().bincount().double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def distinct(ids: torch.Tensor, length: int) -> float:
    """distinct-n: different n-grams of all texts over all of them, in (0, 1] (Li et al., arXiv 1510.03055)."""
    grams = ngrams(ids, length)
    return int(grams.max() + 1) / grams.numel()


def repetition(ids: torch.Tensor, length: int) -> float:
    """seq-rep-n: share of a text's n-grams that stand in the same text before, mean over texts, in [0, 1) (Welleck et
    al., arXiv 1908.04319)."""
    grams = ngrams(ids, length).sort(dim=1).values
    different = 1 + (grams[:, 1:] != grams[:, :-1]).sum(1)
    return float((1 - different.double() / grams.shape[1]).mean())


def text_statistics(ids: torch.Tensor) -> dict[str, float]:
    """`entropy_1` .. `entropy_3` (nats), `distinct_1` .. `distinct_3`, `repetition_4`, of `(R, L)` ids, L >= 4."""
    figures = {f"entropy_{n}": ngram_entropy(ids, n) for n in (1, 2, 3)}
    figures |= {f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)}
    return figures | {"repetition_4": repetition(ids, 4)}

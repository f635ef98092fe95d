"""What two ways to answer the same examples differ by, where some examples are of one document.

n examples in d documents. Examples of one document are no evidence of each other's: documents are drawn and flipped,
means are over examples.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .paired_statistics import (
    EXACT_PAIRS,
    Scores,
    as_pairs,
    as_scores,
    bootstrap_interval,
    holm,
    mcnemar,
    paired_difference,
    sign_flip_p,
)


RIGHT_OR_WRONG = ("em", "accuracy", "gsm8k", "first_token_top1", "first_token_top5", "agreement")


def document_sums(values: torch.Tensor, documents: Sequence[str]) -> torch.Tensor:
    """`(n,)` -> `(d,)`, documents in the order in which they first appear.

    Raises:
        ValueError: not one document an example.
    """
    if len(values) != len(documents):
        raise ValueError(f"{len(values)} scores and {len(documents)} documents: give one of each an example")
    places: dict[str, int] = {}
    index = torch.tensor([places.setdefault(document, len(places)) for document in documents])
    return torch.zeros(len(places), dtype=torch.float64).index_add(0, index, values)


def ratio_interval(
    top: torch.Tensor, bottom: torch.Tensor, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[float] | None:
    """BCa interval of `sum(top) / sum(bottom)` where documents are drawn, `(d,)` each; None of one document.

    Raises:
        ValueError: as `bootstrap_interval` says.
    """
    if len(top) < 2:
        return None

    def ratio(rows: torch.Tensor) -> torch.Tensor:  # documents by number
        index = rows.long()
        return top[index].sum(-1) / bottom[index].sum(-1)

    numbers = torch.arange(len(top), dtype=torch.float64)
    if bool((top * bottom[0] == bottom * top[0]).all()):  # every draw is the same
        return [float(top.sum() / bottom.sum())] * 2
    return list(bootstrap_interval(numbers, ratio, level, resamples, seed=seed))


def mean_interval(
    values: Scores, documents: Sequence[str] | None = None, resamples: int = 10_000, seed: int = 0
) -> list[float] | None:
    """95 % BCa interval of a mean over examples, documents drawn; None of one document."""
    scores = as_scores(values)
    names = list(map(str, range(len(scores)))) if documents is None else documents
    counts = document_sums(torch.ones_like(scores), names)
    return ratio_interval(document_sums(scores, names), counts, resamples=resamples, seed=seed)


def gain_share(
    closed: Scores,
    latent: Scores,
    text: Scores,
    documents: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """How much of what the context as text brings its latents bring: `(closed - latent) / (closed - text)`.

    Args:
        closed, latent, text: `(n,)` NLL of the same answers without the context, with its latents, with its text; nats
            per token.
        documents: of the examples; documents are drawn. None: each example is its own.
        level, resamples, seed: of the BCa intervals.

    Returns:
        `share` and `interval`; `gain`, what text brings in nats per token, and `gain_interval`; `examples`, and
        `documents`, their numbers. Intervals are None of one document. A gain near 0 makes the share's interval wide
        and, where some draws have none, meaningless: look at `gain_interval` first.

    Raises:
        ValueError: text brings nothing, so there is nothing to have a share of; scores that do not fit each other.
    """
    without, latents = as_pairs(closed, latent)
    _, texts = as_pairs(closed, text)
    names = list(map(str, range(len(without)))) if documents is None else documents
    gains = document_sums(without - texts, names)
    shares = document_sums(without - latents, names)
    gain = float((without - texts).mean())
    if gain <= 0:
        raise ValueError(f"the context as text brings {gain:.4f} nats per token: there is no gain to have a share of")
    draws = {"level": level, "resamples": resamples, "seed": seed}
    counts = document_sums(torch.ones_like(without), names)
    return {
        "share": float((without - latents).mean()) / gain,
        "interval": ratio_interval(shares, gains, **draws),  # type: ignore[arg-type]
        "gain": gain,
        "gain_interval": ratio_interval(gains, counts, **draws),  # type: ignore[arg-type]
        "examples": len(without),
        "documents": len(gains),
    }


def difference(
    ours: Scores, theirs: Scores, documents: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """[`paired_difference`] of examples; where several are of one document, documents are drawn and flipped. With
    `documents`, their number; of one document `interval` is None and `p` 1."""
    first, second = as_pairs(ours, theirs)
    sums = document_sums(first - second, documents)
    if len(sums) == len(first) > 1:
        return {**paired_difference(first, second, resamples=resamples, seed=seed), "documents": len(first)}
    return {
        "difference": float((first - second).mean()),
        "interval": mean_interval(first - second, documents, resamples, seed),
        "p": sign_flip_p(sums, resamples, seed),
        "exact": int((sums != 0).sum()) <= EXACT_PAIRS,
        "examples": len(first),
        "documents": len(sums),
    }


def compare(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    documents: Mapping[str, str],
    metric: str,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Paired tests of two methods on the same examples.

    Args:
        ours, theirs: score by example.
        documents: of the examples.
        metric: of `RIGHT_OR_WRONG`, McNemar's test is made too. It takes examples for independent, so `p` is its only
            where no two are of one document.

    Returns:
        [`difference`], with `test`, what `p` is of, and `mcnemar` where there is one.

    Raises:
        ValueError: other examples on one side than on the other, or none.
    """
    if ours.keys() != theirs.keys() or not ours:
        only = [sorted(x.keys() - y.keys()) for x, y in ((ours, theirs), (theirs, ours))]
        shown = "; ".join(f"{len(names)} only {side}" for side, names in zip(("here", "there"), only, strict=True))
        first = next((names[0] for names in only if names), "none")
        raise ValueError(f"the examples differ ({shown}; the first: {first}): compare runs of the same examples")
    ids = sorted(ours)
    pair = [ours[name] for name in ids], [theirs[name] for name in ids]
    found = {**difference(*pair, [documents[name] for name in ids], resamples, seed), "test": "sign flips"}
    if metric in RIGHT_OR_WRONG and all(score in (0, 1) for scores in pair for score in scores):
        found["mcnemar"] = mcnemar(*pair)
        if found["documents"] == found["examples"]:
            found |= {"p": found["mcnemar"]["p"], "exact": found["mcnemar"]["exact"], "test": "McNemar"}
    return found


def adjust(comparisons: Sequence[dict[str, Any]]) -> None:
    """Put `p_holm` into each: adjusted for all of them."""
    for entry, p in zip(comparisons, holm([entry["p"] for entry in comparisons]), strict=True):
        entry["p_holm"] = p


def scores_by_example(records: Iterable[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """One score an example: the mean over the seeds that drew it.

    Raises:
        ValueError: a record without this metric.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        if record.get(metric) is None:
            raise ValueError(
                f"the metric {metric!r} is missing of example {record['id']!r}, method {record['method']}"
            )
        found.setdefault(record["id"], []).append(float(record[metric]))
    return {name: sum(values) / len(values) for name, values in found.items()}


__all__ = [
    "RIGHT_OR_WRONG",
    "adjust",
    "compare",
    "difference",
    "document_sums",
    "gain_share",
    "mean_interval",
    "ratio_interval",
    "scores_by_example",
]

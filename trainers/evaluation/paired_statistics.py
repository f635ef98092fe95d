"""How sure a score, or the difference of two models, is: from one score per example of the same test set.

n examples, R resamples. Scores are of any unit, which means and intervals keep; all is counted in float64.

A two-sided p must be counted where the null hypothesis holds. One that is read off the paired bootstrap itself, as the
share of draws `|d* - mean d*| >= |d - mean d*|`, is about 1 whatever the data, as d is the centre of its own
bootstrap: here signs of the differences are flipped instead. Scores of tokens or patches of one text are not
independent of each other: give one score per text, or use `brier.bootstrap_means`, which draws whole rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
import torch


Scores: TypeAlias = Sequence[float] | np.ndarray | torch.Tensor
Statistic: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

EXACT_PAIRS = 15  # 2^15 sign flips are all counted; more are drawn
EXACT_DISCORDANT = 25  # McNemar's chi-square is an approximation that needs at least so many
NUMBERS_AT_ONCE = 2**22  # of resampled scores: 32 MiB


def mean(values: torch.Tensor) -> torch.Tensor:
    """`(..., n)` -> `(...)`."""
    return values.mean(-1)


def as_scores(values: Scores, name: str = "values") -> torch.Tensor:
    """One finite number per example, `(n,)` float64.

    Raises:
        ValueError: of another shape, empty, or not finite.
    """
    scores = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"`{name}` is one score per example, (n,); got {tuple(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError(f"`{name}` holds {int((~scores.isfinite()).sum())} numbers that are not finite")
    return scores


def as_pairs(ours: Scores, theirs: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """[`as_scores`] of both.

    Raises:
        ValueError: as there, or of different numbers of examples.
    """
    pair = as_scores(ours, "ours"), as_scores(theirs, "theirs")
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"pairs are scores of the same examples in the same order; got {len(pair[0])} and {len(pair[1])} of them"
        )
    return pair


def row_counts(rows: int, n: int) -> list[int]:
    """`rows` of n numbers each, in parts of at most [`NUMBERS_AT_ONCE`]."""
    step = max(1, NUMBERS_AT_ONCE // n)
    return [min(step, rows - start) for start in range(0, rows, step)]


def statistic_of_rows(statistic: Statistic, rows: torch.Tensor) -> torch.Tensor:
    """`(rows, n)` -> `(rows,)`.

    Raises:
        ValueError: the statistic reduces other dimensions than the last.
    """
    found = statistic(rows)
    if found.shape != rows.shape[:1]:
        raise ValueError(
            f"a statistic takes (..., n) to (...), as `values.mean(-1)` does; of {tuple(rows.shape)} this one made "
            f"{tuple(found.shape)}"
        )
    return found


def bootstrap_statistics(
    values: torch.Tensor, statistic: Statistic = mean, resamples: int = 10_000, seed: int = 0
) -> torch.Tensor:
    """The statistic of n examples drawn with replacement, `(n,)` -> `(R,)`."""
    n, generator = len(values), torch.Generator().manual_seed(seed)
    draws = (torch.randint(n, (rows, n), generator=generator) for rows in row_counts(resamples, n))
    return torch.cat([statistic_of_rows(statistic, values.take(drawn)) for drawn in draws])


def jackknife_statistics(values: torch.Tensor, statistic: Statistic = mean) -> torch.Tensor:
    """The statistic of all examples but one, `(n,)` -> `(n,)`."""
    n = len(values)
    places = torch.arange(n - 1)
    parts = torch.arange(n).split(row_counts(n, n))
    return torch.cat([statistic_of_rows(statistic, values.take(places + (places >= left[:, None]))) for left in parts])


def percentile_interval(drawn: torch.Tensor, low: float, high: float) -> tuple[float, float]:
    """Quantiles `low` and `high` of `(R,)`, linear between neighbours."""
    edges = torch.quantile(drawn, torch.tensor([low, high], dtype=torch.float64))
    return float(edges[0]), float(edges[1])


def bca_interval(
    drawn: torch.Tensor, estimate: float, left_out: torch.Tensor, level: float = 0.95
) -> tuple[float, float]:
    """Percentiles of a bootstrap, moved by its bias and its skewness (Efron, JASA 82, 1987; with the acceleration of
    the jackknife, as in Efron and Tibshirani, 1993, equations 14.9 to 14.15).

    Args:
        drawn: `(R,)`, of the resamples.
        estimate: of the sample. Draws equal to it count half as below it, without which scores of 0 and 1 are biased.
        left_out: `(n,)`, of the sample without each example. All equal: bias alone is corrected.
        level: of the interval.

    Raises:
        ValueError: all resamples lie on one side of the estimate, which no correction mends.
    """
    below = float(((drawn < estimate).double() + (drawn <= estimate).double()).mean() / 2)
    if below in (0.0, 1.0):
        raise ValueError(
            "every resample's statistic lies on one side of the sample's, so BCa knows no bias: take a statistic that "
            "does not depend on the number of different examples, or method='percentile'"
        )
    influence = left_out.mean() - left_out
    spread = float(influence.square().sum())
    acceleration = float(influence.pow(3).sum()) / (6 * spread**1.5) if spread else 0.0
    normal = NormalDist()
    bias = normal.inv_cdf(below)

    def moved(share: float) -> float:
        z = bias + normal.inv_cdf(share)
        return normal.cdf(bias + z / (1 - acceleration * z))

    return percentile_interval(drawn, moved((1 - level) / 2), moved((1 + level) / 2))


def bootstrap_interval(
    values: Scores,
    statistic: Statistic = mean,
    level: float = 0.95,
    resamples: int = 10_000,
    method: Literal["bca", "percentile"] = "bca",
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of a statistic of examples like these, low and high, in the statistic's unit.

    Args:
        values: `(n,)`. Where all are equal the interval is the statistic alone.
        statistic: `(..., n)` to `(...)`, of every row on its own.
        level: share of such intervals that should hold the truth; of few examples (below 20, say) fewer do.
        resamples: R. With 10 000 the ends of a 95 % interval vary between seeds by about 1 % of its width.
        method: `bca` (see [`bca_interval`]) or `percentile`, which is off where the statistic is biased or skewed.
        seed: of the draw; the same seed and n draw the same examples.

    Raises:
        ValueError: fewer than two scores, scores that are not finite, a level outside (0, 1), no resample, another
            method; or as [`bca_interval`] and [`statistic_of_rows`] say.
    """
    scores = as_scores(values)
    if len(scores) < 2:
        raise ValueError("an interval needs at least two examples: one says nothing of how much others differ")
    if not 0 < level < 1:
        raise ValueError(f"`level` is a share between 0 and 1, such as 0.95; got {level}")
    if resamples < 1:
        raise ValueError(f"`resamples` is at least 1; got {resamples}")
    if method not in ("bca", "percentile"):
        raise ValueError(f"`method` is 'bca' or 'percentile'; got {method!r}")
    estimate = float(statistic_of_rows(statistic, scores[None])[0])
    if bool((scores == scores[0]).all()):
        return estimate, estimate  # every resample is the sample
    drawn = bootstrap_statistics(scores, statistic, resamples, seed)
    if method == "percentile":
        return percentile_interval(drawn, (1 - level) / 2, (1 + level) / 2)
    return bca_interval(drawn, estimate, jackknife_statistics(scores, statistic), level)


def sign_flip_p(differences: torch.Tensor, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of a mean difference, where the sign of each pair's difference were a coin's (Fisher, The Design of
    Experiments, 1935, section 21).

    Differences of 0 change no sum. Of up to [`EXACT_PAIRS`] others all flips are counted; of more, `resamples` are
    drawn, and the data count as one more: without that p could be 0 (Phipson and Smyth, arXiv 1603.05766).

    Args:
        differences: `(n,)` float64, finite.
        resamples, seed: of the draw.
    """
    differences = differences[differences != 0]
    n = len(differences)
    total = differences.sum()
    # sums that are equal but for rounding are as far out as the data: counted as smaller they would lower p
    bound = total.abs() - 1e-12 * differences.abs().sum()

    def as_far(flips: torch.Tensor) -> int:
        return int((total - 2 * (flips.double() @ differences)).abs().ge(bound).sum())

    if n <= EXACT_PAIRS:
        return as_far(torch.arange(2**n)[:, None] >> torch.arange(n) & 1) / 2**n
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(2, (rows, n), generator=generator, dtype=torch.int8) for rows in row_counts(resamples, n))
    found = sum(as_far(flips) for flips in draws)
    return (found + 1) / (resamples + 1)


def paired_difference(
    ours: Scores, theirs: Scores, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Mean of ours less theirs over the same examples: how much, how sure, and whether it could be chance.

    Args:
        ours, theirs: `(n,)`, scores of the same examples in the same order; higher need not be better.
        level, resamples, seed: of the interval and of p.

    Returns:
        `difference` and `interval` (BCa, low and high) in the scores' unit; `p`, two-sided, of [`sign_flip_p`], and
        whether it is `exact` or drawn (then it is at least 1 / (R + 1)); `examples`, n.

    Raises:
        ValueError: different numbers of examples, or as [`bootstrap_interval`] says.
    """
    first, second = as_pairs(ours, theirs)
    differences = first - second
    return {
        "difference": float(differences.mean()),
        "interval": list(bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)),
        "p": sign_flip_p(differences, resamples, seed),
        "exact": int((differences != 0).sum()) <= EXACT_PAIRS,
        "examples": len(differences),
    }


def mcnemar(ours_correct: Scores, theirs_correct: Scores) -> dict[str, Any]:
    """Whether two models that are right or wrong on the same examples are right equally often (McNemar, Psychometrika
    12, 1947). Only examples count on which one is right and the other wrong.

    Args:
        ours_correct, theirs_correct: `(n,)`, booleans, or 0 and 1.

    Returns:
        `only_ours` and `only_theirs`, examples that one alone has right; `p`, two-sided: of the binomial with a half
        where there are fewer than [`EXACT_DISCORDANT`] of them (`exact`), else of the chi-square with one degree of
        freedom and Edwards's continuity correction.

    Raises:
        ValueError: different numbers of examples, none, or a score between right and wrong.
    """
    first, second = as_pairs(ours_correct, theirs_correct)
    if not all(bool(((x == 0) | (x == 1)).all()) for x in (first, second)):
        raise ValueError("McNemar's test is of answers that are right (1) or wrong (0): see `paired_difference`")
    only_ours, only_theirs = int((first > second).sum()), int((first < second).sum())
    discordant = only_ours + only_theirs
    exact = discordant < EXACT_DISCORDANT
    if exact:
        tail = sum(math.comb(discordant, k) for k in range(min(only_ours, only_theirs) + 1)) / 2**discordant
        p = min(1.0, 2 * tail)
    else:
        # where both are equal the correction would carry the statistic past zero, to the other side
        distance = max(0, abs(only_ours - only_theirs) - 1)
        p = math.erfc(distance / math.sqrt(2 * discordant))  # P(chi-square > x) = erfc(sqrt(x / 2))
    return {"only_ours": only_ours, "only_theirs": only_theirs, "p": p, "exact": exact}


def holm(pvalues: Sequence[float]) -> list[float]:
    """p of each of m comparisons, adjusted so that one below alpha is a false alarm in at most alpha of all such
    families, however the comparisons hang together (Holm, Scandinavian Journal of Statistics 6, 1979).

    The smallest is multiplied by m, the next by m - 1, and so on; none is below one before it, or above 1. The order
    of the comparisons is kept.

    Raises:
        ValueError: a number that is no probability.
    """
    wrong = [p for p in pvalues if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"p-values are between 0 and 1; got {wrong}")
    adjusted, largest = [0.0] * len(pvalues), 0.0
    for rank, place in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[place]))
        adjusted[place] = largest
    return adjusted


def seeds_summary(values_by_seed: Mapping[int, float]) -> dict[str, float | None]:
    """One figure of trainings that differ in their seed alone.

    Args:
        values_by_seed: a figure of each seed, of any unit.

    Returns:
        `mean`, `std` (of the seeds, over their number less one; None of one seed, which has none), `min`, `max`, in
        that unit, and `seeds`, how many.

    Raises:
        ValueError: no seed, or a figure that is not finite.
    """
    values = as_scores(list(values_by_seed.values()), "values_by_seed")
    return {
        "mean": float(values.mean()),
        "std": float(values.std()) if len(values) > 1 else None,
        "min": float(values.min()),
        "max": float(values.max()),
        "seeds": len(values),
    }

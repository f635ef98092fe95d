import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from trainers.evaluation import paired_statistics
from trainers.evaluation.brier import bootstrap_means
from trainers.evaluation.paired_statistics import (
    as_scores,
    bca_interval,
    bootstrap_interval,
    bootstrap_statistics,
    holm,
    jackknife_statistics,
    mcnemar,
    paired_difference,
    seeds_summary,
    sign_flip_p,
)


# skewed, of scipy's own test against R's `boot`
SKEWED = (10, 12, 12.5, 12.5, 13.9, 15, 21, 22, 23, 34, 50, 81, 89, 121, 134, 213)
# Efron and Tibshirani, An Introduction to the Bootstrap, 1993, table 14.1, first column
SPATIAL = (48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6, 0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26, 30, 41)
# Darwin's maize, crossed less selfed, in eighths of an inch: Fisher, The Design of Experiments, 1935
MAIZE = (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)


def variance(values: torch.Tensor) -> torch.Tensor:
    return values.var(-1, correction=0)


def pairs(only_ours: int, only_theirs: int, both: int = 3) -> tuple[list[int], list[int]]:
    """Right and wrong answers of two models."""
    return [1] * only_ours + [0] * only_theirs + [1] * both, [0] * only_ours + [1] * only_theirs + [1] * both


@pytest.mark.parametrize("method, published", [("percentile", (28.86, 84.21)), ("bca", (32.31, 91.43))])
def test_intervals_of_a_mean_are_those_of_another_program(method, published):
    """R's `boot.ci` of a million resamples: an interval of our own making would convince nobody."""
    interval = bootstrap_interval(SKEWED, resamples=300_000, method=method)
    assert interval == pytest.approx(published, rel=0.005)


def test_the_interval_of_another_statistic_is_the_published_one():
    """A bias correction that is tested on unbiased means alone may have any sign. Table 14.2, of 2000 resamples."""
    interval = bootstrap_interval(SPATIAL, variance, level=0.9, resamples=100_000)
    assert interval == pytest.approx((115.8, 259.6), rel=0.015)


def test_bca_is_its_formula_over_all_resamples():
    """Random draws hide a wrong correction: here all 5^5 are there, and the mean's acceleration has a closed form."""
    data = [1.0, 2.0, 2.5, 4.0, 9.0]
    drawn = [sum(x) / 5 for x in itertools.product(data, repeat=5)]
    center = sum(data) / 5
    spread, skew = (sum((x - center) ** power for x in data) for power in (2, 3))
    acceleration = skew / (6 * spread**1.5)
    below = (sum(x < center - 1e-9 for x in drawn) + sum(x < center + 1e-9 for x in drawn)) / (2 * len(drawn))
    bias = NormalDist().inv_cdf(below)
    expected = []
    for z in (-1.959964, 1.959964):
        place = NormalDist().cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        expected.append(float(np.percentile(drawn, 100 * place)))
    values = as_scores(data)
    found = bca_interval(torch.tensor(drawn, dtype=torch.float64), center, jackknife_statistics(values))
    assert found == pytest.approx(expected, abs=1e-6)
    assert bootstrap_interval(data, resamples=50_000) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    "data, statistic, level", [(SKEWED, None, 0.95), (SPATIAL, "var", 0.9), ((1,) * 7 + (0,) * 23, None, 0.95)]
)
def test_bca_is_scipys_of_the_same_resamples(data, statistic, level):
    """Two programs that draw differently agree about anything that is roughly right."""
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.bootstrap(
        (data,), np.var if statistic else np.mean, method="BCa", confidence_level=level, random_state=1
    )
    values, ours = as_scores(data), variance if statistic else paired_statistics.mean
    drawn = torch.tensor(theirs.bootstrap_distribution)
    found = bca_interval(drawn, float(ours(values)), jackknife_statistics(values, ours), level)
    assert found == pytest.approx(tuple(theirs.confidence_interval), abs=1e-10)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert bootstrap_interval(data, ours, level) == pytest.approx(tuple(theirs.confidence_interval), abs=0.05 * width)


def test_an_interval_of_right_and_wrong_answers_is_the_binomials():
    """Accuracies are the commonest score, and all ties: 60 of 100 right, of which resamples have a known law."""
    shares = np.cumsum([math.comb(100, k) * 0.6**k * 0.4 ** (100 - k) for k in range(101)])
    expected = tuple(float(np.searchsorted(shares, edge)) / 100 for edge in (0.025, 0.975))
    found = bootstrap_interval([1.0] * 60 + [0.0] * 40, method="percentile", resamples=50_000)
    assert found == pytest.approx(expected, abs=0.0101)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """95 % that are 80 % sell noise as progress. 400 samples of 50: three standard errors are 3.3 points."""
    samples = torch.randn(400, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    intervals = [bootstrap_interval(sample, resamples=500) for sample in samples]
    assert 0.91 < sum(low <= 0 <= high for low, high in intervals) / 400 < 0.98


def test_equal_scores_have_an_interval_of_no_width():
    """A model that is right everywhere must not end a long evaluation with not-a-number, as scipy's BCa would."""
    assert bootstrap_interval([0.1] * 7) == (pytest.approx(0.1), pytest.approx(0.1))
    assert bootstrap_interval([1, 1, 1], variance) == (0, 0)
    assert paired_difference([1, 0, 1], [1, 0, 1])["interval"] == [0, 0]


def test_a_seed_draws_the_same_examples_as_brier_scores_do():
    """Intervals of one report that rest on other resamples differ for no reason; and nobody's random state moves."""
    state = torch.random.get_rng_state()
    values = as_scores(SKEWED)
    means = bootstrap_means(values[:, None], torch.ones(16), resamples=50, seed=3)[:, 0]
    torch.testing.assert_close(bootstrap_statistics(values, resamples=50, seed=3), means)
    assert bootstrap_interval(SKEWED, seed=3) == bootstrap_interval(SKEWED, seed=3) != bootstrap_interval(SKEWED)
    assert torch.equal(state, torch.random.get_rng_state())


def test_parts_give_what_the_whole_gives(monkeypatch):
    """Ten thousand resamples of ten thousand scores are taken in parts, which no other test's scores are."""
    ours, theirs = np.sin(np.arange(40)), np.cos(np.arange(40))
    whole = paired_difference(ours, theirs, resamples=200)
    monkeypatch.setattr(paired_statistics, "NUMBERS_AT_ONCE", 130)
    assert paired_difference(ours, theirs, resamples=200) == whole


@pytest.mark.parametrize(
    "values, options, complaint",
    [
        ([0.5], {}, "at least two examples"),
        ([], {}, "one score per example"),
        ([[0.5, 1]], {}, "one score per example"),
        ([0.5, math.nan], {}, "not finite"),
        ([0.5, 1], {"level": 95}, "between 0 and 1"),
        ([0.5, 1], {"resamples": 0}, "at least 1"),
        ([0.5, 1], {"method": "basic"}, "'bca' or 'percentile'"),
        ([0.5, 1], {"statistic": torch.mean}, "values.mean"),
        (range(30), {"statistic": lambda x: (x.sort(-1).values.diff() > 0).double().sum(-1)}, "one side"),
    ],
)
def test_an_interval_that_would_mean_nothing_is_refused(values, options, complaint):
    """One example has no spread: an interval of it would look like certainty."""
    with pytest.raises(ValueError, match=complaint):
        bootstrap_interval(list(values), **options)


def test_p_of_few_pairs_is_fishers():
    """Fisher counted 863 of 32768 on either side; not one sum more."""
    found = paired_difference(MAIZE, [0] * 15)
    assert found["p"] == 2 * 863 / 32768 and found["exact"] and found["examples"] == 15
    assert found["difference"] == pytest.approx(314 / 15)


def test_p_is_scipys_permutation_test():
    """Fisher's data are integers: scores are not."""
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for n in (2, 7, 12):
        ours, theirs = generator.normal(size=(2, n)).round(1)
        expected = stats.permutation_test(
            (ours, theirs), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", vectorized=True
        )
        assert paired_difference(ours, theirs)["p"] == pytest.approx(expected.pvalue, abs=1e-12)


def test_p_of_a_large_difference_is_small():
    """The p that was read off the bootstrap itself was about 1 for 60 % against 5 %: see the module."""
    found = paired_difference([1] * 60 + [0] * 40, [0] * 95 + [1] * 5)
    assert found["p"] == 1 / 10_001 and found["interval"][0] > 0.4 and not found["exact"]


def test_p_below_a_tenth_is_as_rare_as_a_tenth():
    """A test that cries wolf. 1000 pairs of equal models: three standard errors are 2.8 points."""
    differences = torch.randn(1000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ps = [sign_flip_p(row) for row in differences]
    assert abs(sum(p <= 0.1 for p in ps) / 1000 - 0.1) < 0.028
    assert abs(sum(p <= 0.5 for p in ps) / 1000 - 0.5) < 0.048


def test_p_of_many_pairs_is_the_exact_one_within_chance():
    """Drawn flips must come from all of them: here the sums of 30 whole numbers are counted one by one."""
    differences = [7, -3, 5, 4, -2, 9, 1, -6, 8, 3] * 3
    counts = {0: 1}
    for d in differences:
        counts = {s: counts.get(s - d, 0) + counts.get(s + d, 0) for s in {x + y for x in counts for y in (d, -d)}}
    expected = sum(count for s, count in counts.items() if abs(s) >= sum(differences)) / 2**30
    found = paired_difference(differences, [0] * 30, resamples=40_000)
    assert found["p"] == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 40_000))


def test_sums_that_differ_by_rounding_are_equal():
    """Scores of 0.1 more and 0.1 less are never quite 0.1: p would depend on which comes first."""
    found = paired_difference([0.3, 0.4, 0.9, 0.0], [0.2, 0.3, 0.8, 0.1])
    assert found["p"] == 10 / 16  # three alike and one against, either way: 8, and all alike: 2


def test_examples_without_a_difference_leave_p_alone():
    """Most questions are right or wrong for both: a thousand of them must not turn an exact p into a drawn one."""
    found = paired_difference([*MAIZE, *range(1000)], [0] * 15 + list(range(1000)), resamples=100)
    assert found["p"] == 2 * 863 / 32768 and found["exact"] and found["examples"] == 1015
    assert paired_difference([1, 2], [1, 2])["p"] == 1


@pytest.mark.parametrize("test", [paired_difference, mcnemar])
def test_pairs_are_of_the_same_examples(test):
    """Scores of another subset would be compared as if they were of this one."""
    with pytest.raises(ValueError, match="same examples"):
        test([1, 0], [1, 0, 1])


@pytest.mark.parametrize(
    "only_ours, only_theirs, p",
    [(0, 0, 1), (1, 0, 1), (0, 6, 2 / 64), (8, 2, 2 * 56 / 1024), (5, 5, 1), (12, 12, 1)],
)
def test_few_discordant_answers_are_tested_by_the_binomial(only_ours, only_theirs, p):
    """Chi-square calls 0 against 6 twice as unlikely as it is."""
    found = mcnemar(*pairs(only_ours, only_theirs))
    assert found == {"only_ours": only_ours, "only_theirs": only_theirs, "p": p, "exact": True}


# two-sided, from a table of the normal distribution: z = (|20 - 5| - 1) / 5 = 2.8, then 0, 0, 1.6 and 1.6
@pytest.mark.parametrize(
    "only_ours, only_theirs, p",
    [(20, 5, 0.0051103), (12, 13, 1), (30, 30, 1), (17, 8, 0.1095986), (8, 17, 0.1095986)],
)
def test_many_discordant_answers_are_tested_by_chi_square_with_its_correction(only_ours, only_theirs, p):
    """Without the correction p is too small; where both are equal it must not carry p below 1."""
    found = mcnemar(*(torch.tensor(answers).bool() for answers in pairs(only_ours, only_theirs)))
    assert (found["only_ours"], found["only_theirs"], found["exact"]) == (only_ours, only_theirs, False)
    assert found["p"] == pytest.approx(p, abs=1e-7)


def test_mcnemar_is_scipys_binomial_and_chi_square():
    """Two tails that are added wrongly show in one table of a hundred."""
    stats = pytest.importorskip("scipy.stats")
    for ours, theirs in itertools.product(range(0, 40, 3), range(1, 40, 4)):
        found = mcnemar(*pairs(ours, theirs))
        if ours + theirs < 25:
            expected = stats.binomtest(ours, ours + theirs).pvalue
        else:
            expected = stats.chi2.sf(max(0, abs(ours - theirs) - 1) ** 2 / (ours + theirs), 1)
        assert found["p"] == pytest.approx(expected, rel=1e-9)


def test_mcnemar_refuses_partial_credit():
    """An F1 of 0.4 is neither right nor wrong: rounding it would be a choice that nobody made."""
    with pytest.raises(ValueError, match="paired_difference"):
        mcnemar([0.4, 1], [0, 1])


def test_holm_by_hand_and_in_the_order_given():
    """Adjusted values that come back sorted are read as another comparison's."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.02]) == pytest.approx([1, 1, 0.06])
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_holm_rejects_what_its_procedure_rejects():
    """An adjusted p that is not monotone calls a comparison sure where one with a smaller p is not."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        pvalues = (generator.random(6) ** 3).round(2).tolist()
        adjusted = holm(pvalues)
        for alpha in (0.011, 0.053, 0.21):
            rejected: list[int] = []
            for step, place in enumerate(sorted(range(6), key=pvalues.__getitem__)):
                if pvalues[place] > alpha / (6 - step):
                    break
                rejected.append(place)
            assert sorted(rejected) == [i for i, p in enumerate(adjusted) if p <= alpha]


@pytest.mark.parametrize("wrong", [-0.1, 1.2, math.nan])
def test_holm_refuses_what_is_no_probability(wrong):
    """Not-a-number sorts anywhere and takes its neighbours with it."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, wrong])


def test_seeds_vary_by_the_sample_deviation():
    """Of three seeds the population's deviation is a fifth too small, and one seed has none, not 0."""
    found = seeds_summary({42: 1.0, 123: 2.0, 456: 6.0})
    assert found == {"mean": 3, "std": pytest.approx(math.sqrt(7)), "min": 1, "max": 6, "seeds": 3}
    assert seeds_summary({42: 0.5}) == {"mean": 0.5, "std": None, "min": 0.5, "max": 0.5, "seeds": 1}
    with pytest.raises(ValueError, match="values_by_seed"):
        seeds_summary({})

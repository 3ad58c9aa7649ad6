"""Statistics: against textbook values, exact enumeration and theory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import norm

from dfqbench.analysis.stats import Bootstrap, average_ranks, binomial_error, holm, mcnemar


def bits(*rows: list[int]) -> np.ndarray:
    return np.packbits(np.array(rows, np.uint8), axis=1)


def test_mcnemar_is_the_exact_binomial_test_on_the_images_that_differ() -> None:
    # 6 images only the first gets right, 1 only the second: p = 2 (C(7,0) + C(7,1)) / 2^7 = 16 / 128
    first = [1] * 6 + [0] + [1, 1, 0, 0]
    second = [0] * 6 + [1] + [1, 1, 0, 0]
    found = mcnemar(bits(first)[0], bits(second)[0])
    assert (found.only_first, found.only_second) == (6, 1)
    assert found.p == pytest.approx(0.125)
    assert mcnemar(bits(second)[0], bits(first)[0]).p == pytest.approx(0.125)
    assert mcnemar(bits(first)[0], bits(first)[0]).p == 1.0


def test_mcnemar_does_not_count_the_bits_that_fill_the_last_byte() -> None:
    found = mcnemar(bits([1, 0, 1])[0], bits([0, 0, 1])[0])
    assert (found.only_first, found.only_second) == (1, 0)


def test_holm_adjusts_as_in_the_worked_example() -> None:
    # p = 0.01, 0.04, 0.03, 0.005 (four hypotheses): 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 may not fall below 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_what_closed_testing_with_bonferroni_rejects() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        p = random.random(5) ** 3
        adjusted = holm(list(p))
        for i in range(5):
            others = [j for j in range(5) if j != i]
            # closed testing: i is rejected at the largest Bonferroni p of all intersections that contain it
            closed = max(min(1.0, min(p[[i, *s]]) * (len(s) + 1)) for k in range(5) for s in itertools.combinations(others, k))
            assert adjusted[i] == pytest.approx(closed)


# Demsar, JMLR 2006, table 6: AUC of C4.5 without and with m, cf, m and cf on 14 sets; average ranks 3.143, 2.000, 2.893, 1.964; chi2_F = 9.28;
# q_0.05 for four = 2.569, so CD = 2.569 sqrt(4 * 5 / (6 * 14)) = 1.25. Of the two 0.975 the paper ranks the former higher.
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967], [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931], [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875], [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
    ]
)  # fmt: skip


def test_average_ranks_are_those_of_the_textbook_example() -> None:
    ranks = average_ranks(DEMSAR)
    assert ranks.average == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=6e-4)
    assert ranks.critical_difference == pytest.approx(1.25, abs=0.006)
    assert ranks.blocks == 14
    from scipy.stats import chi2

    # SciPy corrects Friedman's statistic for ties, the example does not: 9.28 becomes a little larger
    assert chi2.sf(9.28 * 1.15, 3) < ranks.p < chi2.sf(9.28, 3)
    assert ranks.tellable
    with pytest.raises(ValueError, match="two blocks"):
        average_ranks(DEMSAR[:1])


def one_column(n: int, share: float, random: np.random.Generator) -> np.ndarray:
    return (random.random(n) < share).astype(np.uint8)


def test_the_standard_error_over_images_is_the_binomial_one() -> None:
    random = np.random.default_rng(1)
    correct = one_column(4000, 0.8, random)
    found = Bootstrap(np.packbits(correct[None], axis=1), 4000).mean([0])
    assert found.value == pytest.approx(100 * correct.mean())
    assert found.error == pytest.approx(binomial_error(found.value, 4000), rel=0.1)
    reach = norm.ppf(0.975) * found.error
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach), rel=1e-6)


def test_differences_are_paired_over_images() -> None:
    """Two networks that agree on nearly all images: the difference is far surer than either mean."""
    random = np.random.default_rng(2)
    first = one_column(5000, 0.7, random)
    second = first.copy()
    second[np.flatnonzero(first)[:40]] = 0
    found = Bootstrap(np.packbits([first, second], axis=1), 5000).difference([0], [1])
    exact = 100 * float(np.std(first.astype(float) - second)) / 5000**0.5
    assert found.value == pytest.approx(0.8)
    assert found.error == pytest.approx(exact, rel=0.1)
    assert found.error < binomial_error(70, 5000) / 4
    assert found.p < 1e-6
    assert Bootstrap(np.packbits([first, first], axis=1), 5000).difference([0], [1]).p == 1.0


def test_seeds_add_their_variance_without_bias() -> None:
    """Of n seeds, n - 1 are drawn: the variance of the mean over seeds alone must come out as s^2 / n."""
    values = [0.70, 0.74, 0.72]
    images = 20_000
    columns = [np.arange(images) < v * images for v in values]  # nested: the same images count everywhere
    found = Bootstrap(np.packbits(columns, axis=1), images, resamples=4000)
    mean = found.mean([0, 1, 2])
    between = np.var([100 * v for v in values], ddof=1) / 3
    within = binomial_error(72, images) ** 2
    assert mean.error**2 == pytest.approx(between + within, rel=0.12)
    assert mean.high - mean.value > 3.5 * mean.error, "three seeds leave little more than two degrees of freedom: t is near 4, not 2"


def test_two_equal_methods_are_found_different_no_more_often_than_promised() -> None:
    random = np.random.default_rng(3)
    rejected = 0
    for _ in range(200):
        easy = random.random(600)
        cells = [(easy + random.normal(0, 0.2, 600) < 0.8).astype(np.uint8) for _ in range(6)]
        rejected += Bootstrap(np.packbits(cells, axis=1), 600, resamples=300).difference([0, 1, 2], [3, 4, 5]).p < 0.05
    assert rejected <= 22, "5 % of 200, and three standard deviations"


def test_what_is_drawn_does_not_depend_on_which_other_cells_there_are() -> None:
    random = np.random.default_rng(4)
    packed = np.packbits(random.random((7, 900)) < 0.6, axis=1)
    few, many = Bootstrap(packed[:2], 900), Bootstrap(packed, 900)
    assert few.difference([0], [1]).error == pytest.approx(many.difference([0], [1]).error, rel=1e-5)

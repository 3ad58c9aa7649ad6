"""Statistics: against textbook values, exact enumeration and theory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dfqbench.analysis import seeds
from dfqbench.analysis.seeds import degrees_of_freedom, moderated
from dfqbench.analysis.stats import Bootstrap, Column, average_ranks, binomial_error, holm, interval, mcnemar


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


def alone(packed: np.ndarray, images: int) -> Column:
    """Every cell a row."""
    return Column(Bootstrap(packed, images), [[cell] for cell in range(len(packed))])


def one_column(n: int, share: float, random: np.random.Generator) -> np.ndarray:
    return (random.random(n) < share).astype(np.uint8)


def test_the_standard_error_over_images_is_the_binomial_one() -> None:
    random = np.random.default_rng(1)
    correct = one_column(4000, 0.8, random)
    found = alone(np.packbits(correct[None], axis=1), 4000).mean(0)
    assert found.value == pytest.approx(100 * correct.mean())
    assert found.error == pytest.approx(binomial_error(found.value, 4000), rel=0.1)
    assert (found.low, found.high) == pytest.approx(interval(found.value, found.error), rel=1e-6)


def test_differences_are_paired_over_images() -> None:
    """Two networks that agree on nearly all images: the difference is far surer than either mean."""
    random = np.random.default_rng(2)
    first = one_column(5000, 0.7, random)
    second = first.copy()
    second[np.flatnonzero(first)[:40]] = 0
    found = alone(np.packbits([first, second], axis=1), 5000).difference(0, 1)
    exact = 100 * float(np.std(first.astype(float) - second)) / 5000**0.5
    assert found.value == pytest.approx(0.8)
    assert found.error == pytest.approx(exact, rel=0.1)
    assert found.error < binomial_error(70, 5000) / 4
    assert found.p < 1e-6
    assert alone(np.packbits([first, first], axis=1), 5000).difference(0, 1).p == 1.0


def test_seeds_add_their_variance_to_that_of_images() -> None:
    """One row has nobody to learn from: the variance of its mean over seeds is s^2 / n, with n - 1 degrees of freedom."""
    values, images = [0.70, 0.74, 0.72], 20_000
    columns = [np.arange(images) < v * images for v in values]  # nested: the same images count everywhere
    column = Column(Bootstrap(np.packbits(columns, axis=1), images, resamples=4000), [[0, 1, 2]])
    mean = column.mean(0)
    between = np.var([100 * v for v in values], ddof=1) / 3
    assert mean.error**2 == pytest.approx(between + binomial_error(72, images) ** 2, rel=0.12)
    assert column.seeds.bases == ["own"]
    assert 2 <= mean.degrees < 3.5


def test_what_seeds_differ_in_on_single_images_counts_once() -> None:
    """Seeds of one accuracy whose errors fall on other images each: their whole scatter is the test set's, and is in the variance over images."""
    random, images = np.random.default_rng(7), 4000
    cells = random.random((40, images)) < 0.7
    bootstrap = Bootstrap(np.packbits(cells, axis=1), images)
    assert bootstrap.scatter(range(40)) == pytest.approx(binomial_error(70, images) ** 2, rel=0.03)
    assert bootstrap.values.var(ddof=1) == pytest.approx(bootstrap.scatter(range(40)), rel=0.6)
    column = Column(bootstrap, [list(range(i, i + 2)) for i in range(0, 40, 2)])
    assert np.mean([column.mean(i).error ** 2 for i in range(20)]) == pytest.approx(binomial_error(70, images) ** 2 / 2, rel=0.5)


@pytest.mark.parametrize(("value", "error"), [(0.4, 0.5), (99.9, 0.4), (13.7, 5.0), (50.0, 40.0)])
def test_intervals_stay_between_0_and_100_percent_and_around_their_value(value: float, error: float) -> None:
    for quantile in (1.96, 12.7):
        low, high = interval(value, error, quantile)
        assert 0 <= low < value < high <= 100
    low, high = interval(72.0, 0.4)
    assert (low, high) == pytest.approx((72 - 1.96 * 0.4, 72 + 1.96 * 0.4), abs=0.02)


def test_an_interval_is_wilsons_where_all_or_no_image_is_right() -> None:
    from scipy.stats import binomtest

    for right in (0, 599, 300):
        exact = binomtest(right, 599).proportion_ci(method="wilson")
        found = interval(100 * right / 599, binomial_error(100 * right / 599, 599), images=599)
        assert found == pytest.approx((100 * exact.low, 100 * exact.high), abs=1e-6)


# --- variance between seeds -------------------------------------------------------------------------------------------


def test_variances_that_agree_are_pooled_and_one_alone_is_its_own() -> None:
    random = np.random.default_rng(5)
    many = moderated(0.09 * random.chisquare(1, 200), [1] * 200)
    assert np.median(many.variances) == pytest.approx(0.09, rel=0.2)
    assert degrees_of_freedom(many.doubt[0, 0]) > 12, "of one degree of freedom alone it would be 1"
    assert list(np.round(moderated([0.09], [1]).variances, 9)) == [0.09]
    one = moderated([0.09, 0.0], [1, 0])
    assert (list(one.variances), one.bases) == ([0.09, 0.0], ["own", "unknown"])
    assert degrees_of_freedom(one.doubt[0, 0]) == pytest.approx(1, rel=0.15)
    assert moderated([0.0, 0.0], [0, 0]).bases == ["unknown", "unknown"]


def test_a_row_with_one_seed_takes_the_variance_of_the_others() -> None:
    found = moderated([0.08, 0.1, 0.0, 0.09, 0.11], [3, 3, 0, 3, 3])
    assert found.bases[2] == "column"
    assert found.variances[2] == pytest.approx(0.095, rel=0.35)
    assert degrees_of_freedom(found.doubt[2, 2]) < degrees_of_freedom(found.doubt[0, 0])


def test_a_row_that_diverges_keeps_its_variance_and_widens_no_other() -> None:
    random = np.random.default_rng(6)
    calm = 0.09 * random.chisquare(1, 19)
    before, after = moderated(calm, [1] * 19), moderated([*calm, 400.0], [1] * 20)
    assert after.bases == ["column"] * 19 + ["outlying"]
    assert after.variances[-1] == pytest.approx(400, rel=0.01)
    assert after.variances[:-1] == pytest.approx(before.variances, rel=0.1)


def test_seeds_that_agree_to_the_digit_do_not_make_a_row_certain() -> None:
    found = moderated([0.0, 0.05, 0.11, 0.02, 0.3], [1] * 5)
    assert found.variances[0] > 0.01


class Simulated(Column):
    """A column whose means and variances are drawn instead of counted; 0.02: of a mean over 10,000 images, as far as rows do not share it."""

    def __init__(self, random: np.random.Generator, true: np.ndarray, spreads: np.ndarray, runs: int):
        accuracies = 80 + true[:, None] + random.normal(0, 1, (len(true), runs)) * spreads[:, None]
        self.means, self.sizes, self.images = accuracies.mean(1) + random.normal(0, 0.02**0.5, len(true)), np.full(len(true), runs), 10_000
        self.seeds = moderated(list(accuracies.var(1, ddof=1)), [runs - 1] * len(true))
        self.covariance, self.between = np.eye(len(true)) * 0.02, self.seeds.variances / self.sizes

    def bold(self) -> set[int]:
        return self.against_best(list(np.argsort(-self.means)))[1]


SPREADS = {
    "equal": lambda random: np.full(20, 0.3),
    "unequal": lambda random: 0.3 * (8 / random.chisquare(8, 20)) ** 0.5,
    "one diverges": lambda random: np.r_[np.full(19, 0.3), 6.0],
    "unequal, one diverges": lambda random: np.r_[0.3 * (8 / random.chisquare(8, 19)) ** 0.5, 6.0],
}


@pytest.mark.slow
@pytest.mark.parametrize("spreads", SPREADS)
def test_with_20_rows_and_2_seeds_the_test_keeps_its_level(spreads: str) -> None:
    """Two rows of equal accuracy are found different in 5 +- 1 % of tables, and the best of 19 equal ones loses its bold in no more."""
    random, wrong, lost, last = np.random.default_rng(11), list[bool](), 0, np.r_[np.zeros(19), -30.0 if "diverges" in spreads else 0.0]
    for _ in range(700):
        column = Simulated(random, last, SPREADS[spreads](random), 2)
        wrong += [column.difference(i, i + 1).p < 0.05 for i in range(0, 18, 2)]
        lost += 0 not in column.bold()
    assert 0.04 < np.mean(wrong) < 0.06
    assert lost / 700 < 0.06


@pytest.mark.slow
def test_with_20_rows_and_2_seeds_the_test_has_power() -> None:
    """Spread 0.3 between seeds: a row 1.8 points, six spreads, below the best is told from it in more than 80 % of tables."""
    random, found = np.random.default_rng(12), 0
    for _ in range(300):
        column = Simulated(random, np.r_[0.0, np.full(18, -0.1), -1.8], np.full(20, 0.3), 2)
        found += 19 not in column.bold()
    assert found / 300 > 0.8


@pytest.mark.parametrize("rows", [2, 3, 5, 20])
@pytest.mark.parametrize("runs", [2, 3, 5])
def test_five_points_below_with_a_third_of_that_as_spread_is_never_bold(rows: int, runs: int) -> None:
    random = np.random.default_rng(rows)
    for usual in (0.02, 0.3, 0.9):
        column = Simulated(random, np.zeros(rows), np.full(rows, usual), runs)
        column.means = np.r_[85.0, np.full(rows - 2, 85 - 1e-3), 80.0]
        spreads = usual * np.linspace(0.5, 1.3, rows)
        spreads[-1] = 5 / 3
        column.seeds = moderated(list(spreads**2), [runs - 1] * rows)
        column.between = column.seeds.variances / runs
        assert rows - 1 not in column.bold()


def test_no_row_is_bold_below_one_that_is_not() -> None:
    column = Simulated(np.random.default_rng(1), np.zeros(4), np.full(4, 0.3), 5)
    column.means = np.array([86.0, 85.9, 84.0, 83.5])
    column.seeds = seeds.Seeds(np.array([0.01, 0.01, 0.01, 25.0]), np.eye(4) / 20, ["column", "column", "column", "column"])
    column.between = column.seeds.variances / 5
    found, good = column.against_best([0, 1, 2, 3])
    assert found[3].p > 0.05 > found[2].p
    assert good == {0, 1}


def test_what_is_drawn_does_not_depend_on_which_other_cells_there_are() -> None:
    random = np.random.default_rng(4)
    packed = np.packbits(random.random((7, 900)) < 0.6, axis=1)
    few, many = alone(packed[:2], 900), alone(packed, 900)
    assert few.difference(0, 1).error == pytest.approx(many.difference(0, 1).error, rel=1e-5)


def test_a_method_that_draws_nothing_has_no_variance_of_seeds() -> None:
    """Rounding's one result is all that there is: only the test images make it unsure."""
    random = np.random.default_rng(0)
    packed = np.packbits(random.random((21, 4000)) < 0.8, axis=1)
    rows = [[0], *([1 + 2 * i, 2 + 2 * i] for i in range(10))]
    seeded, seedless = (Column(Bootstrap(packed, 4000), rows, given) for given in (None, [True, *[False] * 10]))
    assert (seeded.seeds.bases[0], seedless.seeds.bases[0]) == ("column", "none")
    assert seedless.mean(0).error == pytest.approx(float(seedless.covariance[0, 0] ** 0.5))
    assert seedless.mean(0).error <= seeded.mean(0).error
    assert seedless.mean(1) == seeded.mean(1)

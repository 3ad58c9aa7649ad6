"""How sure a number is: paired over test images, with the variance of seeds; exact McNemar, average ranks, Holm. No torch here.

Accuracies are in percent everywhere, probabilities between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from dfqbench.analysis.seeds import Floats, degrees_of_freedom, moderated

Packed = NDArray[np.uint8]
RESAMPLES = 1000
DENSE_RESAMPLES = 200  # of scores that have to be put together anew for each
LEVEL = 0.95
Z = 1.959963984540054  # of the normal distribution, two-sided at LEVEL
TESTABLE = 5.0  # degrees of freedom; with fewer, a row that scatters widely is never told from the best of many, however bad it is
FAR = 3.0  # spreads between seeds, or standard errors where these are larger


@dataclass(frozen=True)
class Estimate:
    """A mean accuracy or a difference of two, with its standard error, confidence interval and (for a difference) two-sided p-value.

    degrees: of freedom, that are left of seeds and test images.
    """

    value: float
    error: float
    low: float
    high: float
    p: float
    degrees: float = np.inf


class Bootstrap:
    """Accuracies of cells on the same test images, as they are and resampled.

    Every resample draws as many images as there are, with replacement, the same for all cells: that makes comparisons paired.

    packed: one row of packed bits (images + 7) // 8 per cell, a bit per image.
    """

    def __init__(self, packed: Packed, images: int, resamples: int = RESAMPLES):
        self.packed, self.images = packed, images
        self.values = np.bitwise_count(packed).sum(1, dtype=np.int64) / images * 100
        self.samples = _resampled(packed, images, resamples)

    def covariance(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Of the rows' means over seeds, over test images: rows x rows, squared points."""
        return np.atleast_2d(np.cov([self.samples[:, list(cells)].mean(1, dtype=np.float64) for cells in rows], ddof=0))

    def scatter(self, cells: Sequence[int]) -> float:
        """How much of the variance between one row's seeds is due to their differing on single images, as on other images they would on others.

        The residual of the two-way layout of seeds by images: it is in the variance over images, too, and counts once. Squared points, of one seed.
        """
        n, packed = len(cells), self.packed[list(cells)]
        differing = sum(int(np.bitwise_count(packed[i] ^ packed[i + 1 :]).sum()) for i in range(n - 1)) / n
        residual = max(differing - self.images * float(np.var(self.values[list(cells)] / 100)) * n, 0.0)
        return 1e4 * residual / ((self.images - 1) * (n - 1) * self.images)


class DenseBootstrap(Bootstrap):
    """The same of a score that is no mean over images (mIoU, AP): score(cell, times) of each cell, with each image in the set so many times.

    What seeds differ in on single images is not told from the rest: their whole variance counts on top, which errs on the side of caution.
    """

    def __init__(self, score: Callable[[int, NDArray[np.int64] | None], float], cells: int, images: int, resamples: int = DENSE_RESAMPLES):
        self.images = images
        self.values = np.array([score(cell, None) for cell in range(cells)])
        times = _image_counts(images, resamples).astype(np.int64)
        self.samples = np.array([[score(cell, often) for cell in range(cells)] for often in times], np.float32)

    def scatter(self, cells: Sequence[int]) -> float:
        return 0.0


class Column:
    """The rows of one column of a table, each with the indices of its cells, a cell per seed.

    The variance of a difference is that over test images, paired, and on top what seeds scatter beyond it (`moderated`). Intervals and p-values use
    Student's t with the degrees of freedom of Satterthwaite (1946). seedless: the rows whose methods draw nothing at random.
    """

    def __init__(self, bootstrap: Bootstrap, rows: Sequence[Sequence[int]], seedless: Sequence[bool] | None = None):
        values, several = [bootstrap.values[list(cells)] for cells in rows], [len(cells) > 1 for cells in rows]
        self.images, self.sizes = bootstrap.images, np.array([len(cells) for cells in rows])
        self.means, self.covariance = np.array([its.mean() for its in values]), bootstrap.covariance(rows)
        self.seeds = moderated([float(its.var(ddof=1)) if more else 0.0 for its, more in zip(values, several, strict=True)], self.sizes - 1)
        self.seeds = self.seeds.without(seedless) if seedless is not None else self.seeds
        scatter = [bootstrap.scatter(cells) if more else np.nan for cells, more in zip(rows, several, strict=True)]
        usual = float(np.nanmedian(scatter)) if any(several) else 0.0
        self.between = np.maximum(self.seeds.variances - np.nan_to_num(np.array(scatter), nan=usual), 0) / self.sizes

    def mean(self, row: int) -> Estimate:
        return self._estimate(np.eye(len(self.means))[row])

    def difference(self, ours: int, theirs: int) -> Estimate:
        """Mean of row `ours` minus mean of row `theirs`, over the same images."""
        return self._estimate(np.eye(len(self.means))[ours] - np.eye(len(self.means))[theirs])

    def _estimate(self, signs: Floats) -> Estimate:
        from scipy.special import stdtr, stdtrit

        value, used = float(signs @ self.means), np.abs(signs)
        total = float(signs @ self.covariance @ signs + used @ self.between)
        if total <= 1e-12:
            error, degrees = 0.0, np.inf
        else:
            seeds = used * self.seeds.variances / self.sizes
            error, degrees = total**0.5, degrees_of_freedom(float(seeds @ self.seeds.doubt @ seeds) / total**2)
        p = float(2 * stdtr(degrees, -abs(value) / error)) if error else float(abs(value) < 1e-12)
        quantile = float(stdtrit(min(degrees, 1e9), 0.5 + LEVEL / 2))
        if signs.sum() > 0.5:
            return Estimate(value, error, *interval(value, error, quantile, self.images), p, degrees)
        return Estimate(value, error, max(value - quantile * error, -100.0), min(value + quantile * error, 100.0), p, degrees)

    def against_best(self, rows: Sequence[int]) -> tuple[dict[int, Estimate], set[int]]:
        """Of rows, best first: the others' differences to the best, p after Holm's correction, and which are as good: from the best down to the
        first that can be told from it.

        A row with so few degrees of freedom that no test can tell it from anything, or with a variance of its own, is told from the best where it is
        below it by FAR times its spread or more.
        """
        best, *others = rows
        found = [self.difference(row, best) for row in others]
        adjusted = holm([each.p for each in found])
        good = {best}
        for row, each, p in zip(others, found, adjusted, strict=True):
            spread = max(self.seeds.variances[row], self.seeds.variances[best], each.error**2) ** 0.5
            untestable = each.degrees < TESTABLE or self.seeds.bases[row] == "outlying"
            if p < 1 - LEVEL or (untestable and -each.value > FAR * spread - 1e-9):
                break
            good.add(row)
        return {row: replace(each, p=p) for row, each, p in zip(others, found, adjusted, strict=True)}, good


def interval(value: float, error: float, quantile: float = Z, images: int | None = None) -> tuple[float, float]:
    """Of a percentage, within [0, 100]: Wilson's score interval (1927) for as many images as would give this standard error.

    quantile: of the error's distribution. images: how many there were, for a percentage of 0 or 100, whose error says nothing.
    """
    share = value / 100
    count = share * (1 - share) / (error / 100) ** 2 if error > 0 and 0 < share < 1 else images
    if not count or (not error and 0 < share < 1):
        return value, value
    middle, reach = share + quantile**2 / (2 * count), quantile * (share * (1 - share) / count + (quantile / (2 * count)) ** 2) ** 0.5
    low, high = ((middle + sign * reach) / (1 + quantile**2 / count) * 100 for sign in (-1, 1))
    return min(max(low, 0.0), value), max(min(high, 100.0), value)


def _resampled(packed: Packed, images: int, resamples: int) -> NDArray[np.float32]:
    """Accuracies in percent, resamples x cells, in pieces that keep memory low."""
    counts = _image_counts(images, resamples)
    samples = np.empty((resamples, len(packed)), np.float32)
    piece = max(1, 8_000_000 // images)
    for first in range(0, resamples, piece):
        weights = counts[first : first + piece].astype(np.float32) * np.float32(100 / images)
        for cell in range(0, len(packed), piece):
            correct = np.unpackbits(packed[cell : cell + piece], axis=1, count=images).astype(np.float32)
            samples[first : first + len(weights), cell : cell + piece] = weights @ correct.T
    return samples


@lru_cache(maxsize=2)
def _image_counts(images: int, resamples: int) -> Packed:
    """How often each image is drawn, resamples x images."""
    random = np.random.default_rng(0)
    counts = np.empty((resamples, images), np.uint8)
    for row in counts:  # a byte is enough: of n images one is drawn once on average, and 255 times with a probability below 1e-300
        row[:] = np.bincount(random.integers(0, images, images), minlength=images)
    return counts


@dataclass(frozen=True)
class McNemar:
    """Images that only the one and only the other network got right, and the exact two-sided p-value of such an imbalance."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Packed, second: Packed) -> McNemar:
    """Exact test of two cells on the same images (McNemar 1947): given those on which they differ, each is as likely to be the right one."""
    from scipy.stats import binomtest

    ours = int(np.bitwise_count(first & ~second).sum())
    theirs = int(np.bitwise_count(second & ~first).sum())
    return McNemar(ours, theirs, float(binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): below 0.05 in all tests together whatever their dependence."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(v) for v in adjusted]


@dataclass(frozen=True)
class Ranks:
    """Average ranks over blocks (1 is best), Friedman's p-value for their being all equal, and Nemenyi's critical difference at 5 %."""

    average: list[float]
    blocks: int
    p: float
    critical_difference: float

    @cached_property
    def tellable(self) -> bool:
        return self.p < 1 - LEVEL


def average_ranks(scores: Floats) -> Ranks:
    """scores: blocks x methods, higher is better, ties share their mean rank; two methods and two blocks at least (ValueError).

    Friedman's test and Nemenyi's critical difference as in Demsar, JMLR 2006, section 3.2.2.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    blocks, methods = scores.shape
    if blocks < 2 or methods < 2:
        raise ValueError(f"ranks need two blocks and two methods, not {blocks} and {methods}")
    average = rankdata(-scores, axis=1).mean(0)
    p = float(friedmanchisquare(*scores.T).pvalue) if methods > 2 else float("nan")
    quantile = float(studentized_range.ppf(LEVEL, methods, np.inf)) / 2**0.5
    return Ranks([float(r) for r in average], blocks, p, quantile * (methods * (methods + 1) / (6 * blocks)) ** 0.5)


def binomial_error(top1: float, images: int) -> float:
    """One standard error of an accuracy in percent from the size of the test set."""
    share = top1 / 100
    return float(100 * (share * (1 - share) / images) ** 0.5)

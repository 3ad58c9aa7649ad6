"""How sure a number is: bootstrap over test images and seeds, exact McNemar, average ranks, Holm. No torch here.

Accuracies are in percent everywhere, probabilities between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Packed = NDArray[np.uint8]
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean accuracy or a difference of two, with its standard error, confidence interval and (for a difference) two-sided p-value."""

    value: float
    error: float
    low: float
    high: float
    p: float


class Bootstrap:
    """Resampled accuracies of cells that were tested on the same images.

    Every resample draws as many images as there are, with replacement, the same for all cells: that makes comparisons paired. Seeds are drawn
    n - 1 of n with replacement (Rao & Wu, JASA 1988), which makes the variance between few seeds unbiased, and the same for all rows with n
    seeds. Intervals and p-values use Student's t with the degrees of freedom of Welch and Satterthwaite: two seeds say little about a third.

    packed: one row of packed bits (images + 7) // 8 per cell, a bit per image.
    """

    def __init__(self, packed: Packed, images: int, resamples: int = RESAMPLES):
        self.images, self.resamples = images, resamples
        self.values = np.bitwise_count(packed).sum(1, dtype=np.int64) / images * 100
        self.samples = _resampled(packed, images, resamples)
        self._draws: dict[int, NDArray[np.int64]] = {}

    def mean(self, cells: Sequence[int]) -> Estimate:
        """The mean over seeds: `cells` are the indices of one row's cells, sorted by seed."""
        return self._estimate(float(self.values[cells].mean()), *self._series(cells), len(cells))

    def difference(self, ours: Sequence[int], theirs: Sequence[int]) -> Estimate:
        """Mean of `ours` minus mean of `theirs`, over the same images."""
        value = float(self.values[ours].mean() - self.values[theirs].mean())
        images_a, both_a = self._series(ours)
        images_b, both_b = self._series(theirs)
        counts = [n for n in (len(ours), len(theirs)) if n > 1]
        return self._estimate(value, images_a - images_b, both_a - both_b, min(counts, default=1))

    def _series(self, cells: Sequence[int]) -> tuple[Floats, Floats]:
        """Resampled means (resamples): over images alone, and over images and seeds."""
        chosen = self.samples[:, list(cells)].astype(np.float64)
        if len(cells) == 1:
            return chosen[:, 0], chosen[:, 0]
        return chosen.mean(1), np.take_along_axis(chosen, self._drawn(len(cells)), axis=1).mean(1)

    def _drawn(self, n: int) -> NDArray[np.int64]:
        if n not in self._draws:
            self._draws[n] = np.random.default_rng(n).integers(0, n, (self.resamples, n - 1))
        return self._draws[n]

    def _estimate(self, value: float, over_images: Floats, over_both: Floats, seeds: int) -> Estimate:
        from scipy.special import stdtr, stdtrit

        total, images = float(over_both.var()), float(over_images.var())
        between = max(total - images, 0.0)
        if total <= 1e-18:
            return Estimate(value, 0.0, value, value, 1.0 if abs(value) < 1e-12 else 0.0)
        degrees = (seeds - 1) * (total / between) ** 2 if seeds > 1 and between > 0 else 1e9
        degrees = min(degrees, 1e9)
        error = total**0.5
        reach = float(stdtrit(degrees, 0.5 + LEVEL / 2)) * error
        return Estimate(value, error, value - reach, value + reach, float(2 * stdtr(degrees, -abs(value) / error)))


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

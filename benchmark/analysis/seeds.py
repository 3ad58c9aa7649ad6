"""How far seeds scatter, estimated over all rows of a column: two seeds of one row say next to nothing, those of twenty rows do. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Basis = Literal["column", "outlying", "own", "unknown", "none"]  # what a row's variance was taken from; none: it has no seeds
PRIOR_DEGREES = 2.0 ** np.arange(2, 8)[:, None, None]  # d0: how alike rows are, from variances of a factor of four either way to all the same
SCALES = np.exp(np.linspace(-5, 5, 81))[None, :, None]  # s0^2, in mean variances of all rows but the widest
CENSORED = 0.2  # of the rows that the first fit does not look at closely, if there are FEW or more
FEW = 4
OUTLYING = 0.5  # rows as wide as this one that a column would have by chance; with fewer it is on its own


@dataclass(frozen=True)
class Seeds:
    """Variances between seeds of a column's rows, in squared points and of one seed.

    doubt (rows x rows): covariance of their logarithms, of which the rows share what is not known of the prior.
    """

    variances: Floats
    doubt: Floats
    bases: list[Basis]

    def without(self, seedless: Sequence[bool]) -> Seeds:
        """With no variance for the rows that draw nothing at random."""
        some = ~np.asarray(seedless, bool)
        bases: list[Basis] = [basis if draws else "none" for basis, draws in zip(self.bases, some, strict=True)]
        return Seeds(self.variances * some, self.doubt * np.outer(some, some), bases)


def moderated(variances: Sequence[float] | Floats, degrees: Sequence[int] | NDArray[np.integer]) -> Seeds:
    """Sample variances over seeds and their degrees of freedom, 0 for a row with one seed, whose variance is then that of the others.

    Empirical Bayes as in limma (Smyth 2004): true variances are d0 s0^2 / chi^2_d0, so a row's becomes (d0 s0^2 + d s^2) / (d0 + d). With so few
    degrees of freedom as here d0 and s0 are not known well, so they are averaged over a grid, by likelihood. It is robust, in the spirit of Phipson
    et al. (2016): a first fit takes the widest rows for no more than "wider than the rest"; those too wide for it then count little, or nothing, and
    keep their own variance.
    """
    from scipy.special import polygamma

    v, d = np.asarray(variances, float), np.asarray(degrees, float)
    several = d > 0
    rows = int(several.sum())
    if rows < 2:  # nothing to learn from others
        doubt = np.diag(np.where(several, polygamma(1, np.maximum(d, 1) / 2), 0.0))
        return Seeds(np.where(several, v, 0.0), doubt, ["own" if some else "unknown" for some in several])
    counted, weights, order = several.nonzero()[0], np.ones(rows), np.argsort(v[several], kind="stable")
    censored = int(np.ceil(CENSORED * rows)) if rows >= FEW else 0
    narrow, wide = counted[order[: rows - censored]], counted[order[rows - censored :]]
    scales = (v[narrow].mean() + 1e-9) * SCALES
    if censored:
        likely = _likelihood(v[narrow], d[narrow], scales, np.ones(len(narrow)), v[narrow].max(), d[wide])
        chance = (likely * _beyond(v[counted], d[counted], scales)).sum((0, 1))
        weights = np.minimum(1.0, chance * rows / OUTLYING)
    likely = _likelihood(v[counted], d[counted], scales, weights)
    log = np.log((PRIOR_DEGREES * scales + d * v) / (PRIOR_DEGREES + d))
    mean = (likely * log).sum((0, 1))
    away = (log - mean).reshape(-1, len(v))
    doubt = (away * likely.reshape(-1, 1)).T @ away + np.diag((likely * polygamma(1, (PRIOR_DEGREES + d) / 2)).sum((0, 1)))
    kept = np.ones(len(v))
    kept[counted] = weights
    values = (likely * np.exp(log)).sum((0, 1))
    if rows < FEW:  # the grid's end, and not the rows, would say how wide they may be
        values = np.minimum(values, np.maximum(v, v[counted].mean()))
    values = kept * values + (1 - kept) * np.maximum(v, values)
    return Seeds(values, doubt, ["outlying" if share < 1 else "column" for share in kept])


def degrees_of_freedom(doubt: float) -> float:
    """Of a variance whose logarithm has the variance `doubt`: the inverse of trigamma(degrees / 2), of 1 / x + 1 / 2x^2."""
    return float(min((1 + (1 + 2 * doubt) ** 0.5) / max(doubt, 1e-9), 1e9))


def _likelihood(v: Floats, d: Floats, scales: Floats, weights: Floats, least: float = 0.0, wide: Floats | None = None) -> Floats:
    """Of every d0 and s0^2 (d0 x s0^2 x 1), summing to 1: s^2 / s0^2 is F-distributed. wide: degrees of freedom of rows that are `least` or wider."""
    from scipy.special import gammaln

    log = gammaln((d + PRIOR_DEGREES) / 2) - gammaln(PRIOR_DEGREES / 2) + d / 2 * np.log(d / PRIOR_DEGREES / scales)
    log = ((log - (d + PRIOR_DEGREES) / 2 * np.log1p(d * v / PRIOR_DEGREES / scales)) * weights).sum(-1, keepdims=True)
    if wide is not None:
        log += np.log(_beyond(np.full(len(wide), least), wide, scales) + 1e-300).sum(-1, keepdims=True)
    likely = np.exp(log - log.max())
    return np.asarray(likely / likely.sum())


def _beyond(v: Floats, d: Floats, scales: Floats) -> Floats:
    """The probability of a sample variance of `v` or more."""
    from scipy.special import fdtrc

    return np.asarray(fdtrc(d, PRIOR_DEGREES, v / scales))


def in_words(bases: Mapping[Basis, Iterable[str]], singles: bool) -> list[str]:
    """Sentences for below a table. bases: which cells' variance is from what; singles: some rows with one seed take the others' variance."""
    known, said = {basis for basis, names in bases.items() if list(names)}, []
    if known & {"column", "outlying"}:
        one = "; rows with one seed take that of the others" if singles else ""
        said.append(f"the variance between seeds is estimated over all rows of a column (empirical Bayes){one}")
    if "outlying" in known:
        said.append(
            f"far more scatter between seeds than in the rest of the column: {', '.join(bases['outlying'])}; "
            "their variance is their own and widens no other bar"
        )
    if "unknown" in known:
        where = "; rows with one seed: no other rows" if known - {"unknown"} else "one seed each: no rows"
        said.append(f"{where} say how far seeds scatter, so theirs is left out, and test images alone count".removeprefix("; "))
    return said

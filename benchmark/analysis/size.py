"""Size and work of finished cells as their results hold them; nothing where an earlier version wrote the result. No torch here.

A megabyte is 2^20 bytes, as in the tables of HAWQ-V3 (arXiv:2011.10680) and most papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEGABYTE = 2**20


@dataclass(frozen=True)
class Size:
    """bytes: of all that inference needs. weight_bits: of an average weight. macs, bops: for one image; see export/size.py. quantized: shares of the
    multiplications, 0..1: by a quantized weight, and of quantized activations; None where an earlier version did not count them."""

    bytes: int
    weight_bits: float
    macs: int
    bops: int
    quantized: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sizes:
    """A student's size and its teacher's."""

    student: Size
    teacher: Size

    @property
    def compression(self) -> float:
        return self.teacher.bytes / self.student.bytes

    def as_columns(self) -> dict[str, float]:
        """As data frames name them."""
        student, teacher = self.student, self.teacher
        return (
            {"bytes": student.bytes, "teacher_bytes": teacher.bytes, "compression": round(self.compression, 4)}
            | {"mean_weight_bits": student.weight_bits, "macs": student.macs, "bops": student.bops, "teacher_bops": teacher.bops}
        )  # fmt: skip


def sizes_of(result: dict[str, Any]) -> Sizes | None:
    """None where the result has no size, or none that can be true."""
    try:
        student, teacher = (_size(result["size"][whose]) for whose in ("student", "teacher"))
        positive = all(value > 0 for each in (student, teacher) for value in (each.bytes, each.weight_bits, each.macs, each.bops))
    except (KeyError, TypeError, AttributeError):
        return None
    return Sizes(student, teacher) if positive else None


def _size(written: dict[str, Any]) -> Size:
    shares = written.get("quantized")
    known = {key: written[key] for key in ("bytes", "weight_bits", "macs", "bops")}
    return Size(**known, quantized=(shares["weights"], shares["activations"]) if shares else None)


def common_sizes(results: Iterable[dict[str, Any]]) -> Sizes | None:
    """Of cells that differ in their seeds alone, and so not in size: that of any that knows it."""
    return next((sizes for result in results if (sizes := sizes_of(result))), None)


@dataclass(frozen=True)
class Column:
    """A column that a table can have beside an accuracy; value: what rows are sorted by, the least first; means: in a note."""

    head: str
    text: Callable[[Sizes], str]
    value: Callable[[Sizes], float]
    means: str


def three_digits(value: float) -> str:
    """Three significant digits at least, without an exponent: 0.0700, 41.5, 1858."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def megabytes(size: Size) -> float:
    return size.bytes / MEGABYTE


def gigabops(size: Size) -> float:
    return size.bops / 1e9


COLUMNS = {
    "size": Column(
        "MB",
        lambda s: three_digits(megabytes(s.student)),
        lambda s: s.student.bytes,
        "MB: weights, grids and all that stays float, packed, in 2^20 bytes",
    ),
    "compression": Column(
        "smaller", lambda s: f"{s.compression:.2f}x", lambda s: 1 / s.compression, "smaller: the teacher's bytes over the student's"
    ),
    "weight-bits": Column(
        "bits/weight", lambda s: f"{s.student.weight_bits:.2f}", lambda s: s.student.weight_bits, "bits/weight: the mean over all weights of layers"
    ),
    "bops": Column(
        "GBOPs",
        lambda s: three_digits(gigabops(s.student)),
        lambda s: s.student.bops,
        "GBOPs: 10^9 MACs x weight bits x activation bits, per image",
    ),
}


WEIGHTS_ENOUGH, ACTIVATIONS_ENOUGH = 0.99, 0.95  # below these shares of the multiplications a table says so: a first layer alone is no news


def in_float(of_teachers: Mapping[str, Sequence[Sizes | None]]) -> list[str]:
    """Where much of a student's work is not quantized, whatever the bits in the heading say: a note each."""
    notes = []
    for teacher, its in of_teachers.items():
        for weights, activations in sorted({sizes.student.quantized for sizes in its if sizes and sizes.student.quantized}):
            if weights < WEIGHTS_ENOUGH or activations < ACTIVATIONS_ENOUGH:
                shares = f"{100 * weights:.3g} % of its multiplications by weights have quantized weights, {100 * activations:.3g} % of all quantized"
                notes.append(f"{teacher} under this protocol: {shares} activations; the rest is in float")
    return notes


def text_of(name: str, sizes: Sizes | None) -> str:
    """What is printed in the column `name`."""
    return COLUMNS[name].text(sizes) if sizes else "-"


def in_words(beside: Sequence[str], of_teachers: Mapping[str, Sequence[Sizes | None]]) -> list[str]:
    """What these columns mean, and the teachers' own figures: a note each. of_teachers: of the entries that a table shows, by the teacher's name.

    beside: of what stands there, what is none of these columns has its notes elsewhere.
    """
    beside = [name for name in beside if name in COLUMNS]
    if not beside:
        return []
    known = {teacher: next((sizes.teacher for sizes in its if sizes), None) for teacher, its in of_teachers.items()}
    teachers = [f"{teacher}: {three_digits(megabytes(its))} MB, {three_digits(gigabops(its))} GBOPs" for teacher, its in known.items() if its]
    lacking = any(sizes is None for its in of_teachers.values() for sizes in its)
    heads = ", ".join(COLUMNS[name].head for name in beside)
    notes = [COLUMNS[name].means for name in beside] + [f"in full precision, {'; '.join(teachers)}"] * bool(teachers)
    return notes + [f"- in {heads}: the results were written by an earlier version, which did not count it"] * lacking

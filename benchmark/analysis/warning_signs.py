"""When a run shows that its method fails, read from its history alone: while it runs, in its result, and of results that were written before.

| kind | the rule |
|---|---|
| loss | the mean loss of five epochs in a row is above that of the first epoch in which the student was trained |
| agreement | on the last batch the student agrees with the teacher less than plain rounding: by five points, and more than chance (5 %, one-sided) |
| clipped | after an epoch of training a layer clips more than 10 % of its activations, and twice as many as before training |
| ranges | in an epoch of training a layer's range became wider or narrower by more than a factor of two |
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EPOCHS = 5  # that a loss is averaged over: the loss of a single one follows its images
POINTS, ERRORS = 5.0, 1.64  # of agreement, and of its standard errors
CLIPPED = 10.0  # percent; students that learned clipped less than 1 % with ranges of extremes, less than 5 % with those of least error
FACTOR = 2.0  # of a range, in one epoch; of what is clipped, since training began
BELOW_ROUNDING = "below"  # seen where rows are compared
REASONS = {  # what a table says, where several cells have one
    "loss": "the loss rose above that of the first epoch",
    "agreement": "the student agrees with the teacher on synthetic images less than plain rounding does",
    "clipped": "a layer clips a large share of its activations",
    "ranges": "an activation range jumped in training",
    BELOW_ROUNDING: "below plain rounding (`round`) by more than a standard error",
}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sign:
    """What is wrong since which epoch, in words."""

    kind: str
    epoch: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def signs(history: Sequence[Row]) -> list[Sign]:
    """Of each kind the first. history: rows of history.csv, the newest last; what a row does not hold is not judged."""
    first = next((i for i, row in enumerate(history) if "loss" in row), None)
    if first is None:
        return []
    before, training = history[:first], history[first:]
    return [sign for rule in (_loss, _agreement, _clipped, _ranges) for sign in itertools.islice(rule(before, training), 1)]


def _loss(before: Sequence[Row], training: Sequence[Row]) -> Iterator[Sign]:
    rows = [row for row in training if "loss" in row]
    losses = [float(row["loss"]) for row in rows]
    for i in range(EPOCHS, len(rows)):
        mean = sum(losses[i + 1 - EPOCHS : i + 1]) / EPOCHS
        if mean > losses[0]:
            yield _sign("loss", rows[i], f"the loss rises: {mean:.3g} on average over {EPOCHS} epochs, {losses[0]:.3g} in the first")


def _agreement(before: Sequence[Row], training: Sequence[Row]) -> Iterator[Sign]:
    for row in training:
        if {"student_agrees", "rounding_agrees", "agreement_error"} <= row.keys():
            ours, plain, error = (float(row[name]) for name in ("student_agrees", "rounding_agrees", "agreement_error"))
            if plain - ours > max(POINTS, ERRORS * error):
                text = f"the student agrees with the teacher on {ours:.0f} % of the last synthetic images, plain rounding on {plain:.0f} %"
                yield _sign("agreement", row, text)


def _clipped(before: Sequence[Row], training: Sequence[Row]) -> Iterator[Sign]:
    usual = max((float(row["clipped"]) for row in before if "clipped" in row), default=0.0)
    for row in training:
        if float(row.get("clipped", 0.0)) > max(CLIPPED, FACTOR * usual):
            yield _sign("clipped", row, f"a layer clips {float(row['clipped']):.0f} % of its activations, {usual:.2g} % before training")


def _ranges(before: Sequence[Row], training: Sequence[Row]) -> Iterator[Sign]:
    for row in training:
        if float(row.get("range_change", 1.0)) > FACTOR:
            yield _sign("ranges", row, f"an activation range changed by a factor of {float(row['range_change']):.3g} in one epoch")


def _sign(kind: str, row: Row, text: str) -> Sign:
    return Sign(kind, int(row["epoch"]), text)


def signs_of(result: Mapping[str, Any], history: Path) -> list[dict[str, Any]]:
    """Those of a finished cell as its result.json has them; where an earlier version wrote it, what its history.csv shows, none if it is damaged."""
    if "warnings" in result:
        known = result["warnings"] if isinstance(result["warnings"], list) else []
        return [sign for sign in known if isinstance(sign, dict) and {"epoch", "text"} <= sign.keys() and sign.get("kind") in REASONS]
    try:
        return [sign.as_dict() for sign in signs(read_rows(history))]
    except (ValueError, TypeError, csv.Error):
        return []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """history.csv, a dictionary per epoch with numbers as numbers; what is empty or not finite is left out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{k: v for k, text in row.items() if (v := _number(text)) is not None} for row in csv.DictReader(file) if row.get("epoch")]
    except OSError:
        return []


def _number(text: str | None) -> float | str | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else None

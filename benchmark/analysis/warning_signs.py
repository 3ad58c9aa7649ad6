"""When a run shows that its method fails, read from its history alone: while it runs, in its result, and of results that were written before.

| kind | the rule |
|---|---|
| loss | the mean loss of five epochs in a row is above that of the first epoch in which the student was trained |
| agreement | the student gives the teacher's answer on fewer images of the last batch than the plainly rounded teacher, by over two standard errors |
| clipped | after an epoch of training a layer clips more than 20 % of its activations, and twice as many as before training |
| ranges | in an epoch of training a layer's range became wider or narrower by more than a factor of two |
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EPOCHS = 5  # that a loss is averaged over: the loss of a single one follows its images
ERRORS = 2.0  # standard errors
CLIPPED = 20.0  # percent
FACTOR = 2.0  # of a range, in one epoch; of what is clipped, since training began

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
    found: dict[str, Sign] = {}
    for end in range(1, len(history) + 1):
        for sign in newest(history[:end]):
            found.setdefault(sign.kind, sign)
    return list(found.values())


def newest(history: Sequence[Row]) -> list[Sign]:
    """What the newest row shows, whether or not earlier ones did."""
    first = next((i for i, row in enumerate(history) if "loss" in row), None)
    if first is None:
        return []
    said = {kind: rule(history, first) for kind, rule in RULES.items()}
    return [Sign(kind, int(history[-1]["epoch"]), text) for kind, text in said.items() if text]


def _loss(history: Sequence[Row], first: int) -> str:
    losses = [float(row["loss"]) for row in history[first:] if "loss" in row]
    mean = sum(losses[-EPOCHS:]) / EPOCHS
    rises = len(losses) > EPOCHS and mean > losses[0]
    return f"the loss rises: {mean:.3g} on average over {EPOCHS} epochs, {losses[0]:.3g} in the first" if rises else ""


def _agreement(history: Sequence[Row], first: int) -> str:
    row = history[-1]
    if not {"student_agrees", "rounding_agrees", "agreement_error"} <= row.keys():
        return ""
    ours, plain = float(row["student_agrees"]), float(row["rounding_agrees"])
    if plain - ours <= ERRORS * float(row["agreement_error"]):
        return ""
    return f"the student agrees with the teacher on {ours:.0f} % of the last synthetic images, plain rounding on {plain:.0f} %"


def _clipped(history: Sequence[Row], first: int) -> str:
    if "clipped" not in history[-1]:
        return ""
    now, before = float(history[-1]["clipped"]), max((float(row["clipped"]) for row in history[:first] if "clipped" in row), default=0.0)
    return f"a layer clips {now:.0f} % of its activations, {before:.2g} % before training" if now > max(CLIPPED, FACTOR * before) else ""


def _ranges(history: Sequence[Row], first: int) -> str:
    change = float(history[-1].get("range_change", 1.0))
    return f"an activation range changed by a factor of {change:.3g} in one epoch" if change > FACTOR else ""


RULES: dict[str, Callable[[Sequence[Row], int], str]] = {"loss": _loss, "agreement": _agreement, "clipped": _clipped, "ranges": _ranges}


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

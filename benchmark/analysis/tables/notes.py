"""What is said below a table: the rule, what ± and bold mean, whose rules differ, what is published. No torch here."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dfqbench.analysis.tables.blocks import Block

ABOUT_RULES = {
    "last": "the last epoch's accuracy, as a user without test labels would get it",
    "best-on-test": "the best of all evaluated epochs, chosen on the test labels (optimistic; at most as many choices as evaluations)",
}


class Noted(Protocol):
    """A row of a block, or of blocks side by side."""

    label: str

    @property
    def fidelity(self) -> str: ...


def marks_of(rules: Sequence[str]) -> dict[str, str]:
    """A mark for each printed list of rules but the commonest, which has none."""
    counts = Counter(rules)
    usual = min(counts, key=lambda given: (-counts[given], given))
    own = [given for given in counts if given != usual]
    return {usual: ""} | {given: "*" * (i + 1) for i, given in enumerate(own)}


def block_notes(block: Block, marks: dict[str, str]) -> list[str]:
    """The notes of one block; `marks` as `marks_of` gives them."""
    return table_notes([block], block.rows, marks, [f"{block.time} per cell, images included, on {', '.join(block.devices)}"])


def table_notes(parts: Sequence[Block], rows: Sequence[Noted], marks: dict[str, str], own: Sequence[str]) -> list[str]:
    """The notes of one table made of these blocks (all under one rule); `own` are those that only this kind of table has."""
    entries = [entry for block in parts for row in block.rows for entry in row.entries.values()]
    rule, error, uncompared = parts[0].rule, max(block.error for block in parts), sum(block.uncompared for block in parts)
    notes = [
        f"top-1 in %, rule '{rule}': {ABOUT_RULES[rule]}",
        f"± is the standard deviation over seeds; one standard error from the test set's size is at most {error:.2f}; drop: below the teacher",
    ]
    if any(entry.best for entry in entries):
        once = any(entry.n == 1 for entry in entries)
        notes.append(
            "bold: the best of a column with all that cannot be told from it (paired bootstrap over test images and seeds, Holm, 5 %)"
            + ("; where there is one seed, over test images alone" if once else "")
        )
    elif rule != "last":
        notes.append("nothing is bold: per-image results are stored for the last epoch only")
    if uncompared:
        notes.append(f"{uncompared} entries are not compared: their per-image results (correct.npy) are missing or damaged")
    notes += own
    for rules, mark in marks.items():
        if mark:
            notes.append(f"{mark} the method's own rules: {_difference(rules, next(r for r, m in marks.items() if not m))}")
    if any("[" in row.label for row in rows):
        notes.append("[1], [2]: same name and budget, but other settings or versions; the report shows them per cell")
    if any(row.fidelity == "abstract" for row in rows):
        notes.append("follows 'abstract': reconstructed, details of the method are not public")
    if any(block.has_claims for block in parts):
        notes.append(
            "published: what papers claim (a range where sources disagree), and how far we are from it in our standard errors; "
            "papers print one figure each, most of them the best epoch on the test set"
        )
    return notes + _why_no_claims(parts)


def _why_no_claims(parts: Sequence[Block]) -> list[str]:
    """Why nothing published is beside some of the blocks; a reason that does not hold for all of them says for which it does."""
    without = [block for block in parts if not block.has_claims]
    found = []
    for why in sorted({why for block in without for why in block.why_no_claims}):
        where = [f"{block.teacher} on {block.evaluation}" for block in without if why in block.why_no_claims]
        found.append(why if len(where) == len(parts) else f"{why} ({', '.join(dict.fromkeys(where))})")
    return found


def _difference(rules: str, usual: str) -> str:
    """`ranges mse (protocol: ema)`: the entries in which two printed rule lists differ."""
    own, theirs = dict(ast.literal_eval(rules)), dict(ast.literal_eval(usual))
    return ", ".join(f"{key} {own[key]} (protocol: {theirs[key]})" for key in own if own[key] != theirs[key])

"""What is printed of a table, in whatever format: a pandas frame of texts with the notes below; and how methods rank over all tables."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import pandas as pd

from dfqbench.analysis import seeds, size
from dfqbench.analysis.cost import in_column, in_words
from dfqbench.analysis.tables.blocks import Block, Entry, Row
from dfqbench.analysis.tables.choice import Choice, Columns
from dfqbench.analysis.tables.wide import JOINED, WideTable
from dfqbench.analysis.warning_signs import REASONS
from dfqbench.metrics import DENSE


@dataclass(frozen=True)
class Written:
    """A table whose texts are made elsewhere (without_data.py), as `texts_of` gives them; means: its lines for `means_frame`."""

    title: str
    texts: pd.DataFrame
    notes: list[str]
    means: list[dict[str, Any]]


Table = Block | WideTable | Written
Tables = Sequence[Table]
T = TypeVar("T", bound=Block | WideTable | Written)
HEADS = {"follows": "follows", "steps": "steps x batch", "seeds": "seeds"}  # of columns.OF_ROWS; that of seconds says which
NAMING = ("method", "images", *HEADS.values())  # columns that say what a row is
LEFT = ("method", "images", "follows")  # columns that are set flush left
GAP = 2  # characters between columns
WARNED = " !"  # behind an accuracy: see `notes_on_warnings`


def arranged(table: T, choice: Choice) -> T:
    """With the chosen columns, and rows in the chosen order."""
    if isinstance(table, Written):
        return table
    if isinstance(table, WideTable):
        return replace(table, rows=choice.ordered(table.rows, table.columns), order=choice.in_words(table.rows, table.columns))
    widths = choice.widths(table.widths)
    return replace(table, rows=choice.ordered(table.rows, widths), widths=widths, shown=choice.columns, order=choice.in_words(table.rows, widths))


def texts_of(table: Table, significant: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is printed, and which of it is bold (of the same shape).

    Columns: (group, name), where a group is a bit width of a block or a network of several. Index: (row, what its line holds). Drops and what is
    published stand in columns beside a block's accuracies, but in lines below those of several blocks. significant: with as many decimals of an
    accuracy as its standard error allows.
    """
    if isinstance(table, Written):
        return table.texts, table.texts.map(lambda _: False)
    rows, wide, entries = table.rows, isinstance(table, WideTable), entries_of(table)
    accuracies = [[accuracy_of(row, column, wide, significant) for column in columns_of(table)] for row in rows]
    more = {_head(name): entries.map(partial(_beside, name, significant), na_action="ignore") for name in shown_of(table).beside}
    if isinstance(table, WideTable):
        frame = pd.DataFrame(accuracies, entries.index, entries.columns, dtype=object)
        lines = [frame, *(its.rename(index={"accuracy": name}) for name, its in more.items())]
        texts = pd.concat(lines).sort_index(level=0, sort_remaining=False, kind="stable").dropna(how="all").fillna("-")
        naming = [(rows[i].label + rows[i].mark, rows[i].budget) if says == "accuracy" else (says, "") for i, says in texts.index]
        lead = [(name, [names[place] for names in naming]) for place, name in enumerate(("method", "steps x batch"))]
        lead = lead if "steps" in shown_of(table).lead else lead[:1]
    else:
        frame = pd.DataFrame(accuracies, entries.index, entries.columns, dtype=object)
        beside = [frame, *(its.rename(columns=dict.fromkeys(table.widths, name), level=1) for name, its in more.items())]
        order = [(width, name) for width in table.widths for name in (width, *more)]
        texts = pd.concat(beside, axis=1)[order].dropna(how="all", axis=1).fillna("-")
        lead = [("method", [row.label + row.mark for row in rows]), *of_rows(rows, table.shown.lead)]
        for name, figures in of_rows(rows, table.shown.last):
            texts[name, name] = figures
    for place, (name, figures) in enumerate(lead):
        texts.insert(place, (name, name), figures)
    return texts, entries.map(lambda entry: bool(entry and entry.best)).reindex(index=texts.index, columns=texts.columns, fill_value=False)


def entries_of(table: Block | WideTable) -> pd.DataFrame:
    """What stands behind the accuracies that are printed, at their places."""
    heads = {(i, w): (table.blocks[i].heading, w) for i, w in table.columns} if isinstance(table, WideTable) else {w: (w, w) for w in table.widths}
    index, columns = pd.MultiIndex.from_product([range(len(table.rows)), ["accuracy"]]), pd.MultiIndex.from_tuples(heads.values())
    return pd.DataFrame([[row.entries.get(column) for column in heads] for row in table.rows], index, columns, dtype=object)


def columns_of(table: Block | WideTable) -> Sequence[Any]:
    return table.columns if isinstance(table, WideTable) else table.widths


def shown_of(table: Block | WideTable) -> Columns:
    return (table.blocks[0] if isinstance(table, WideTable) else table).shown


def of_rows(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(heading, figures) of columns with one figure for a row, names of choice.OF_ROWS."""
    seeds = ["-".join(map(str, sorted({min(row.seeds), max(row.seeds)}))) for row in rows]
    known = {"follows": [row.fidelity for row in rows], "steps": [row.budget for row in rows], "seeds": seeds}
    return [in_column([row.cost for row in rows]) if name == "seconds" else (HEADS[name], known[name]) for name in names]


def _head(name: str) -> str:
    return size.COLUMNS[name].head if name in size.COLUMNS else name


def _beside(name: str, significant: bool, entry: Entry) -> str | None:
    """What stands in the column `name` beside an accuracy."""
    if name == "published":
        return claim_of(entry)
    return entry.drop_text(significant) if name == "drop" else size.text_of(name, entry.sizes)


def accuracy_of(row: Row, column: Any, counted: bool, significant: bool = False) -> str | None:
    """`64.20 ± 1.31 (1 of 3 diverged) !`, with what `notes_on_warnings` explains; counted: with the number of seeds. None where nothing was tried."""
    entry, lost = row.entries.get(column), row.lost.get(column)
    if entry is None:
        return lost.told if lost else None
    text = entry.text(significant) + f" ({lost.told if lost else len(entry.ids)})" * bool(lost or counted)
    return text + WARNED * bool(entry.warnings)


def claim_of(entry: Entry) -> str | None:
    """`90.11-90.25 (-3.2 se)`: what is published, and how far the measured mean is from it in its own standard errors."""
    if entry.published is None:
        return None
    distance = entry.published.distance(entry.mean)
    return f"{entry.published} ({distance / entry.error:+.1f} se)" if entry.error > 0 else f"{entry.published} ({distance:+.2f})"


def names_of(texts: pd.DataFrame) -> list[str]:
    """Of the columns, without their groups."""
    return list(texts.columns.get_level_values(1))


def groups_of(texts: pd.DataFrame) -> list[tuple[str, list[int]]]:
    """(heading, positions of its columns) from left to right; a group that is called as its first column needs no heading."""
    groups = [(str(head), [i for i, _ in its]) for head, its in groupby(enumerate(texts.columns.get_level_values(0)), key=lambda column: column[1])]
    return [("" if names_of(texts)[places[0]] == head else head, places) for head, places in groups]


def widths_of(texts: pd.DataFrame) -> list[int]:
    """Characters of every column, its name and the space to the next included."""
    return [max(len(name), longest) + GAP for name, longest in zip(names_of(texts), texts.map(len).max(), strict=True)]


def in_pieces(texts: pd.DataFrame, widths: Sequence[int], room: int) -> list[list[int]]:
    """Positions of columns, in tables of at most `room` characters; each has what names the rows, a group is whole, a column wider if it must be."""
    naming = range(lead_of(texts))
    left, pieces = room - sum(widths[i] for i in naming), list[list[int]]([[]])
    for _, group in groups_of(texts)[len(naming) :]:
        for part in [group] if sum(widths[i] for i in group) <= left else [[i] for i in group]:
            if pieces[-1] and sum(widths[i] for i in pieces[-1] + part) > left:
                pieces.append([])
            pieces[-1] += part
    return [[*naming, *piece] for piece in pieces]


def lead_of(texts: pd.DataFrame) -> int:
    """How many columns stand before the accuracies."""
    names = names_of(texts)
    return next((place for place, name in enumerate(names) if name not in NAMING and not name.endswith("s/cell")), len(names))


def notes_of(table: Table) -> list[str]:
    """What the accuracies, ±, bold and marks mean and what else is to be known, a sentence each."""
    if isinstance(table, Written):
        return table.notes
    parts, rows = table.blocks if isinstance(table, WideTable) else [table], table.rows
    entries = [entry for row in rows for entry in row.entries.values()]
    sized = {part.teacher: [entry.sizes for row in part.rows for entry in row.entries.values()] for part in parts}
    rule, error, best = parts[0].rule, max(block.error for block in parts), any(entry.best for entry in entries)
    uncompared = sum(block.uncompared for block in parts)
    claimed = "published" in shown_of(table).beside
    drop = "drop: below the teacher; " * ("drop" in shown_of(table).beside)
    of_images = "one standard error from the test set's size"
    bases: dict[seeds.Basis, list[str]] = {"column": [], "outlying": [], "own": [], "unknown": [], "none": []}
    for row in rows:
        for width, entry in row.entries.items():
            bases[entry.basis if entry.estimate else "own"].append(f"{row.label} ({width if isinstance(width, str) else width[1]})")
    if isinstance(table, WideTable):
        differs = "is not the same everywhere, it differs in"
        own = [f"{JOINED} {row.label} ({row.budget}) {differs} {', '.join(row.differing)}" for row in rows if row.differing]
        fidelities = groupby(sorted({(row.fidelity, row.method) for row in rows}), key=lambda pair: pair[0])
        own.append("follows " + "; ".join(f"'{fidelity}': {', '.join(method for _, method in its)}" for fidelity, its in fidelities))
    else:
        own = in_words([row.cost for row in rows if row.entries], table.devices) * ("seconds" in (*table.shown.lead, *table.shown.last))
    own += notes_on_marks(table.marks)
    said = {
        "no data-free methods: students were trained on real images, so nothing is bold, compared or ranked": parts[0].yardstick,
        "in a cell: mean ± sd (seeds)": isinstance(table, WideTable),
        f"{_scores_of(parts)} in %, rule 'last': the last epoch's {_word_of(parts)}, as a user without test labels would get it": rule == "last",
        f"{_scores_of(parts)} in %, rule 'best-on-test': the best of all evaluated epochs, chosen on the test labels "
        "(optimistic; at most as many choices as evaluations)": rule == "best-on-test",
        f"± is the standard deviation over seeds; {drop}{of_images} is at most {error:.2f}": bool(entries),
        "bold: the best of a column and those next to it, down to the first that can be told from it (paired over test images, with the variance "
        "between seeds; Holm, 5 %; or three spreads below it, where seeds are too few for a test)": best,
        **dict.fromkeys(seeds.in_words(bases, any(entry.sd is None for entry in entries)) if best else [], True),
        **dict.fromkeys(size.in_float(sized), True),
        **dict.fromkeys(notes_on_images(rows), True),
        **dict.fromkeys(notes_on_lost(rows) + notes_on_warnings(rows), True),
        "nothing is bold: per-image results are stored for the last epoch only": rule != "last" and not best,
        f"{uncompared} entries are not compared: their per-image results (correct.npy) are missing or damaged": uncompared > 0,
        table.order: bool(table.order),
        **dict.fromkeys(own + size.in_words(shown_of(table).beside, sized), True),
        **dict.fromkeys(notes_on_names(rows), True),
        "published: what papers claim (a range where sources disagree), and how far we are from it in our standard errors; "
        "papers print one figure each, most of them the best epoch on the test set": claimed and any(entry.published for entry in entries),
    }
    notes = [note for note, holds in said.items() if holds]
    unclaimed = {why for block in parts for why in block.why_no_claims} if claimed else set()
    for why in sorted(unclaimed):  # one that does not hold for all says where it does
        where = [f"{block.teacher} on {block.evaluation}" for block in parts if why in block.why_no_claims]
        notes.append(why if len(where) == len(parts) else f"{why} ({', '.join(dict.fromkeys(where))})")
    return notes


def _scores_of(parts: Sequence[Block]) -> str:
    return ", ".join(dict.fromkeys(block.metric.name for block in parts))


def _word_of(parts: Sequence[Block]) -> str:
    return "score" if any(block.metric.key in DENSE for block in parts) else "accuracy"


def notes_on_images(rows: Sequence[Row]) -> list[str]:
    """Whose seeds are not all of their noise: hundreds of steps on pixels make what differs in its last digit another image."""
    long = {row.method for row in rows if row.entries and int(row.settings.get("config", {}).get("synthesis_iterations") or 0) >= 100}
    why = "images are optimised for hundreds of steps, where another order of summation (machine, threads, version of torch) is as another seed"
    return [f"{why}: {', '.join(sorted(long))}"] * bool(long)


def notes_on_lost(rows: Sequence[Row]) -> list[str]:
    """What is said where there is no result."""
    all_lost = [lost for row in rows for lost in row.lost.values()]
    said = {
        "diverged: the training loss became infinite or NaN, so there is no student to measure": any(lost.diverged for lost in all_lost),
        "failed: the cell ended with an error; `dfqbench run --retry-failed` tries it again": any(lost.failed for lost in all_lost),
        "(1 of 3 diverged): the mean is over the seeds that are left; it is in no comparison and no ranking": any(
            column in row.entries for row in rows for column in row.lost
        ),
    }
    return [note for note, holds in said.items() if holds]


def notes_on_warnings(rows: Sequence[Row]) -> list[str]:
    """Why accuracies have a `!`, and which."""
    which: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for width, entry in row.entries.items():
            for kind in entry.warnings:
                which.setdefault(kind, {}).setdefault(row.label, []).append(width if isinstance(width, str) else width[1])
    said = {kind: "; ".join(f"{label} ({', '.join(dict.fromkeys(widths))})" for label, widths in its.items()) for kind, its in which.items()}
    return [f"! {reason}: {said[kind]}" for kind, reason in REASONS.items() if kind in said]


def notes_on_marks(marks: Mapping[str, str]) -> list[str]:
    """In which rules a marked row differs from those without a mark."""
    usual, notes = dict(next(ast.literal_eval(rules) for rules, mark in marks.items() if not mark)), list[str]()
    for rules, mark in marks.items():
        differing = ", ".join(f"{key} {value} (protocol: {usual[key]})" for key, value in ast.literal_eval(rules) if value != usual[key])
        notes += [f"{mark} the method's own rules: {differing}"] * bool(mark)
    return notes


def notes_on_names(rows: Sequence[Row]) -> list[str]:
    """What stands behind a row's name and below `follows`."""
    numbered, fidelities = any(re.search(r" \[\d+\]", row.label) for row in rows), {row.fidelity for row in rows}
    said = {
        "[1], [2]: same name and budget, but other settings or versions; the report shows them per cell": numbered,
        "follows 'abstract': reconstructed, details of the method are not public": "abstract" in fidelities,
        "follows 'released': trained elsewhere, evaluated here": "released" in fidelities,
    }
    said |= {f"by bit width, as its preset has it: {row.label} {row.by_width}": True for row in rows if row.by_width}
    left_out: dict[str, list[str]] = {}
    for method, common in sorted({(row.method, row.left_out) for row in rows if row.left_out}):
        left_out.setdefault(common, []).append(method)
    settings = "; ".join(f"{', '.join(methods)} {common}" for common, methods in left_out.items())
    said = {f"left out of the names, as it tells no rows of a method apart: {settings}": bool(settings)} | said
    return [note for note, holds in said.items() if holds]

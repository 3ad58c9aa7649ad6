"""Cells without an evaluation set: agreement with the teacher and KL divergence, in tables of their own, never beside an accuracy. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dfqbench.analysis import cost, size
from dfqbench.analysis.records import Reading
from dfqbench.analysis.stats import binomial_error
from dfqbench.analysis.tables.blocks import YARDSTICKS, Entry, marks_of, rows_of
from dfqbench.analysis.tables.cells import Cell, comparable, told_apart
from dfqbench.analysis.tables.choice import EVERYTHING, Choice
from dfqbench.analysis.tables.means import costs_of, line_of
from dfqbench.analysis.tables.printed import Written, accuracy_of, notes_on_lost, notes_on_marks, notes_on_names, of_rows

TINY = 1e-5  # nats: less than that is nothing that differs


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, with their standard deviation where there are several."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def nats(mean: float, sd: float | None = None) -> str:
    """Three significant digits of the mean."""
    digits = max(0, 2 - int(np.floor(np.log10(max(mean, TINY)))))
    return (f"{mean:.{digits}f}" if mean >= TINY else f"<{TINY:g}") + (f" ± {sd:.{digits}f}" if sd is not None else "")


@dataclass(kw_only=True)
class Agreement(Entry):
    """agreement in percent, kl in nats. `mean`, by which rows are ordered, is minus the KL divergence; drop and error are NaN: nothing is known."""

    agreement: Spread
    kl: Spread

    def text(self, significant: bool = False) -> str:
        return f"{self.agreement.mean:.2f}" + (f" ± {self.agreement.sd:.2f}" if self.agreement.sd is not None else "")

    @property
    def divergence(self) -> str:
        return nats(self.kl.mean, self.kl.sd)


def agreements(reading: Reading, choice: Choice = EVERYTHING) -> list[Written]:
    """A table for each teacher, protocol, precision and set of synthetic images."""
    tables: list[tuple[str, str, list[Cell]]] = []
    for key, group in comparable([*reading.without_data, *reading.unfinished_without_data]).items():
        shown: dict[str, list[Cell]] = {}
        for cell in group:  # the same settings give other images where rounding differs; a cell that diverged was scored on none
            if cell["status"] == "done":
                shown.setdefault(cell["result"].get("unseen_sha256", ""), []).append(cell)
        lost = [cell for cell in group if cell["status"] != "done"]
        for number, (images, its) in enumerate(sorted(shown.items()) or [("", [])]):
            tables.append((told_apart(key), f" [images {images[:8]}]" * (len(shown) > 1), its + lost * (number == 0)))
    titles = Counter(_title(cells) for _, _, cells in tables)
    return [_table(_title(cells) + apart * (titles[_title(cells)] > 1) + images, cells, choice) for apart, images, cells in tables]


def _title(cells: list[Cell]) -> str:
    first = cells[0]
    on = f"{first['images']} synthetic images ({first['result']['cell']['evaluation'].get('made', 'unknown')})"
    said = f"{YARDSTICKS * first['yardstick']}{first['teacher']} without data, no accuracy: agreement with the teacher on {on}, %"
    return f"{said}; protocol {first['protocol']}, {first['precision']}"


def _entry(cells: list[Cell]) -> Agreement:
    ids, seeds, results = [cell["id"] for cell in cells], [int(cell["seed"]) for cell in cells], [cell["result"] for cell in cells]
    agreement, kl = (Spread.of([float(cell[name]) for cell in cells]) for name in ("agreement", "kl"))
    known: dict[str, Any] = {"ids": ids, "seeds": seeds, "cost": cost.cost_of(results), "sizes": size.common_sizes(results), "estimate": None}
    return Agreement(mean=-kl.mean, sd=kl.sd, drop=np.nan, error=np.nan, agreement=agreement, kl=kl, **known)


def _table(title: str, cells: list[Cell], choice: Choice) -> Written:
    done, marks = [cell for cell in cells if cell["status"] == "done"], marks_of([cell["rules"] for cell in cells])
    rows, found = rows_of(cells, marks, _entry)
    widths, beside = choice.widths(found), [name for name in choice.columns.beside if name in size.COLUMNS]
    rows, plain, columns = choice.ordered(rows, widths), _plain(done, marks), choice.columns
    entries, lines, means = [entry for row in rows for entry in row.entries.values()], list[dict[Any, str]](), list[dict[str, Any]]()
    lead, last = of_rows(rows, columns.lead), of_rows(rows, columns.last)
    for i, row in enumerate(rows):
        line = {("method", "method"): row.label + row.mark} | {(head, head): figures[i] for head, figures in lead}
        for width in widths:
            entry = row.entries.get(width)
            line[width, "agreement"] = accuracy_of(row, width, False) or "-"
            line[width, "KL"] = entry.divergence if isinstance(entry, Agreement) else "-"
            line |= {(width, size.COLUMNS[name].head): size.text_of(name, entry.sizes) if entry else "-" for name in beside}
            if entry or width in row.lost:
                means.append(line_of(cells[0], row, width) | (_numbers(entry, cells) if isinstance(entry, Agreement) else {}))
        lines.append(line | {(head, head): figures[i] for head, figures in last})
    for mark, of in plain.items():
        first = {("method", "method"): f"plain rounding{mark}", ("steps x batch", "steps x batch"): "none"}
        first = {head: text for head, text in first.items() if head in lines[0]}
        lines.append(first | {(width, name): text for width, texts in of.items() for name, text in zip(("agreement", "KL"), texts, strict=True)})
    texts = pd.DataFrame(lines).fillna("-").iloc[[*range(len(rows), len(lines)), *range(len(rows))]]  # plain rounding, then the methods
    texts.index = pd.MultiIndex.from_product([range(len(lines)), ["accuracy"]])
    texts.columns = pd.MultiIndex.from_tuples(list(texts.columns))  # type: ignore[arg-type]
    devices = sorted({cell["device"] for cell in done})
    error = max((binomial_error(cell["agreement"], cell["images"]) for cell in done), default=0.0)
    notes = [
        "no accuracy is known: these cells have no evaluation set (`evaluate: none`)",
        "agreement: on how many of the images student and teacher give the same class, after the last epoch",
        "KL: mean divergence of the student's class probabilities from the teacher's, in nats, the lower the better",
        f"one standard error of an agreement from the number of images is at most {error:.2f}"
        + "; ± is the standard deviation over seeds" * any(entry.sd is not None for entry in entries),
        f"{choice.in_words(rows, widths)} (lowest KL first); nothing is bold: how a student does on real images is not known",
        *["plain rounding: the same teacher, rounded without any training, on the same images"] * bool(plain),
        *["no plain rounding where the teacher's batch norms do not say enough for it"] * any(cell["plain_kl"] is None for cell in done),
        *notes_on_lost(rows),
        *(cost.in_words([row.cost for row in rows if row.entries], devices) if "seconds" in columns.lead + columns.last else ()),
        *notes_on_marks(marks),
        *size.in_words(beside, {cells[0]["teacher"]: [entry.sizes for entry in entries]}),
        *notes_on_names(rows),
    ]
    return Written(title, texts, notes, means)


def _numbers(entry: Agreement, cells: list[Cell]) -> dict[str, Any]:
    spreads, own = {"agreement": entry.agreement, "kl": entry.kl}, pd.DataFrame(cell for cell in cells if cell["id"] in entry.ids)
    line = {f"{name}{end}": value for name, its in spreads.items() for end, value in (("", its.mean), ("_sd", its.sd))}
    return line | {name: own[name].astype(float).mean() for name in ("plain_agreement", "plain_kl")} | costs_of(entry)


def _plain(done: list[Cell], marks: dict[str, str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Agreement and KL of plain rounding by mark and bit width; one row, without a mark, where the methods' own rules make no difference to it."""
    known = [cell for cell in done if cell["plain_kl"] is not None]
    frame = pd.DataFrame([(marks[cell["rules"]], cell["bits"], cell["plain_agreement"], cell["plain_kl"]) for cell in known], columns=list("mbak"))
    if (frame.groupby("b")[["a", "k"]].nunique() <= 1).all(axis=None):
        frame["m"] = ""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for (mark, bits), its in frame.groupby(["m", "b"]):
        found.setdefault(str(mark), {})[str(bits)] = (
            _range([f"{value:.2f}" for value in sorted(its.a)]),
            _range([nats(value) for value in sorted(its.k)]),
        )
    return found


def _range(texts: list[str]) -> str:
    return "-".join(dict.fromkeys([texts[0], texts[-1]]))

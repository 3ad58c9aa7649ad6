"""Accuracies of finished cells as rows by bit widths. One block per teacher, evaluation set, protocol and precision: these are never mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd

from dfqbench.analysis.ledger import METHODS_OWN, Ledger, Published
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.stats import Estimate, binomial_error, holm
from dfqbench.sweep.cell import fingerprint

Rule = Literal["last", "best-on-test"]
Cell = dict[str, Any]  # a line of `load_frame` with what `blocks` adds
ALPHA = 0.05
NOT_OF_A_ROW = ("bits", "seed", "teacher", "evaluation", "precision")  # of a cell's identity: they say which column, seed or table it is in
KEYS = ("evaluation", "digest", "teacher", "teacher_key", "protocol", "shared_rules", "precision")  # what a block's cells agree in
SHARED = ("teacher", "teacher_top1", "evaluation", "protocol", "shared_rules", "precision")  # what a block has of its cells
TIMES = {("cuda",): "GPU-seconds", ("cpu",): "CPU-seconds"}


@dataclass
class Entry:
    """One row at one bit width. Accuracies in percent; seconds: a cell's mean cost; sd: over seeds, None for one; error: one standard error.

    estimate: the mean with its interval over test images and seeds, None where per-image results are missing. best: the best of its column, or not
    distinguishable from it. against_best: the difference to the best (p Holm-adjusted in the column); pair: both cells' ids at their lowest seed.
    """

    ids: list[str]
    seeds: list[int]
    mean: float
    sd: float | None
    drop: float
    error: float
    seconds: float
    estimate: Estimate | None
    published: Published | None = None
    why_unpublished: str = ""
    best: bool = False
    against_best: Estimate | None = None
    pair: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


@dataclass
class Row:
    """One method with its settings and budget. `label` is unique within its table; `mark` refers to a note.

    entries: by bit width; of blocks side by side by (index of the block, bit width). name: as its cells call it, which others may share.
    settings: its cells' identity without what tells columns and seeds apart. differing: those in which blocks side by side differ.
    """

    label: str
    name: str
    method: str
    fidelity: str
    steps: int
    batch: int
    changed: dict[str, Any]
    settings: dict[str, Any]
    entries: dict[Any, Entry]
    seconds: float
    mark: str
    differing: Sequence[str] = ()

    @property
    def budget(self) -> str:
        return f"{self.steps} x {self.batch}" if self.steps else "none"

    @property
    def mean(self) -> float:
        return float(np.mean([entry.mean for entry in self.entries.values()]))


@dataclass
class Block:
    """Results that can be compared with each other: rows from worst to best, widths from wide to narrow.

    heading: what was measured, over a table of several blocks. shared_rules: without what a method may declare for itself. marks: by printed rules.
    time: what a second is of. error: a cell's largest standard error from the test set's size, in percent. uncompared: without per-image results.
    """

    title: str
    heading: str
    teacher: str
    teacher_top1: float
    evaluation: str
    protocol: str
    shared_rules: str
    precision: str
    rule: Rule
    widths: list[str]
    rows: list[Row]
    marks: dict[str, str]
    time: str
    devices: list[str]
    error: float
    uncompared: int

    @property
    def why_no_claims(self) -> set[str]:
        """Why nothing published is beside it; empty where something is."""
        entries = [entry for row in self.rows for entry in row.entries.values()]
        return set() if any(entry.published for entry in entries) else {entry.why_unpublished for entry in entries} - {""}


def load_frame(results: list[Any]) -> pd.DataFrame:
    """One row per finished cell: accuracies and drop in percent, seconds of its own and its share-free total (own + shared)."""
    return pd.DataFrame([_record(result) for result in results])


def asked_for(cell: dict[str, Any]) -> Cell:
    """What a cell's record says before anything is measured."""
    identity = cell["identity"]
    return (
        {"method": cell["label"], "plain_method": cell.get("method", cell["label"]), "fidelity": cell["fidelity"]}
        | {"teacher": cell["teacher"]["label"], "weights": cell["teacher"]["weights_sha256"]}
        | {"evaluation": cell["evaluation"]["name"], "digest": identity["evaluation"]}
        | {"protocol": cell["protocol"], "precision": cell["precision"], "bits": cell["bits"], "seed": cell["seed"]}
        | {"batch": int(identity["config"].get("batch_size") or 0)}
    )


def _record(r: dict[str, Any]) -> Cell:
    made, seconds = r["provenance"], r["seconds"]
    return (
        {"id": r["id"], **asked_for(r["cell"]), "teacher_top1": r["teacher"]["top1"], "images": r["images"], "finished": r.get("finished", 0.0)}
        | {"top1": r["top1"], "best": r["best"]["top1"], "drop": round(r["teacher"]["top1"] - r["top1"], 10), "evaluations": r["evaluations"]}
        | {"steps": r["steps"], "seconds": round(seconds["own"] + seconds["shared"], 3)}
        | {"device": made["device_name"], "device_kind": made.get("device", "cpu"), "commit": made.get("git")}
    )


def blocks(results: list[Any], rule: Rule = "last", *, ledger: Ledger | None = None, per_image: PerImage | None = None) -> list[Block]:
    """Tables of top-1 accuracy under one reporting rule. Without `per_image` nothing is compared, without `ledger` nothing is matched."""
    cells = [_record(result) | {"result": result} for result in results]
    for cell in cells:
        identity = cell["result"]["cell"]["identity"]
        cell["teacher_key"] = fingerprint([identity.get("teacher"), cell["weights"]])
        cell["rules"] = str(sorted(identity["protocol"].items()))
        cell["shared_rules"] = str(sorted((k, v) for k, v in identity["protocol"].items() if k not in METHODS_OWN))
        # what makes two cells the same row is everything in their identity but bits and seed
        cell["settings"] = fingerprint([cell["method"], {k: v for k, v in identity.items() if k not in ("bits", "seed")}, cell["steps"]])
    # a set is what its content says, a teacher its weights and task, a protocol its rules: names are only what somebody called them last
    by_age = sorted(cells, key=lambda cell: cell["finished"])
    sets, teachers = ({cell[key]: cell[name] for cell in by_age} for key, name in (("digest", "evaluation"), ("teacher_key", "teacher")))
    for cell in cells:
        cell |= {"evaluation": sets[cell["digest"]], "teacher": teachers[cell["teacher_key"]]}
        cell["block"] = tuple(cell[key] for key in KEYS)
    groups = {key: list(its) for key, its in groupby(sorted(cells, key=lambda cell: cell["block"]), key=lambda cell: cell["block"])}
    per_image = per_image if rule == "last" else None  # only the last epoch's per-image results are stored
    made = [_block(group, rule, ledger, per_image) for group in groups.values()]
    titles = Counter(block.title for block in made)
    for block, (_, digest, _, teacher, _, rules, _) in zip(made, groups, strict=True):
        if titles[block.title] > 1:
            told_apart = f" [teacher {teacher[:8]}, images {digest[:8]}, rules {fingerprint(rules)[:8]}]"
            block.title, block.heading = block.title + told_apart, block.heading + told_apart
    return made


def marks_of(rules: Sequence[str]) -> dict[str, str]:
    """A mark for each printed list of rules but the commonest, which has none."""
    counts = Counter(rules)
    usual = min(counts, key=lambda given: (-counts[given], given))
    return {usual: ""} | {given: "*" * i for i, given in enumerate((given for given in counts if given != usual), 1)}


def _block(cells: list[Cell], rule: Rule, ledger: Ledger | None, per_image: PerImage | None) -> Block:
    # what a method declares about ranges or BN changes the protocol's rules for its own rows: they are marked, not mixed silently
    first, marks = cells[0], marks_of([cell["rules"] for cell in cells])
    widths = sorted({cell["bits"] for cell in cells}, reverse=True)
    rows = []
    for _, (own, *more) in groupby(sorted(cells, key=lambda cell: (cell["settings"], int(cell["seed"]))), key=lambda cell: cell["settings"]):
        entries = {w: _entry(there, rule, ledger, per_image) for w in widths if (there := [cell for cell in (own, *more) if cell["bits"] == w])}
        settings = {k: v for k, v in own["result"]["cell"]["identity"].items() if k not in NOT_OF_A_ROW}
        seconds, changed = float(np.mean([cell["seconds"] for cell in (own, *more)])), own["result"]["cell"].get("changed", {})
        label, fidelity, steps, batch = (own[key] for key in ("method", "fidelity", "steps", "batch"))
        rows.append(Row(label, label, own["plain_method"], fidelity, steps, batch, changed, settings, entries, seconds, marks[own["rules"]]))
    rows.sort(key=lambda row: (row.mean, row.label, row.budget))
    make_unique(rows)
    for width in widths:
        _compare([row.entries[width] for row in rows if width in row.entries], per_image)
    top1, where = f"{first['teacher_top1']:.2f} %", f"on {first['evaluation']} ({first['images']} images)"
    title = f"{first['teacher']} {where}: teacher {top1}, protocol {first['protocol']}, {first['precision']}"
    heading = f"{first['teacher']}, {top1}, {where}"
    shared = {name: first[name] for name in SHARED} | {"devices": sorted({cell["device"] for cell in cells})}
    time, error = TIMES.get(tuple({cell["device_kind"] for cell in cells}), "seconds"), max(binomial_error(c["top1"], c["images"]) for c in cells)
    uncompared = sum(entry.estimate is None for row in rows for entry in row.entries.values()) if per_image else 0
    return Block(title, heading, **shared, rule=rule, widths=widths, rows=rows, marks=marks, time=time, error=error, uncompared=uncompared)


def _entry(cells: list[Cell], rule: Rule, ledger: Ledger | None, per_image: PerImage | None) -> Entry:
    first, ids, seeds = cells[0], [cell["id"] for cell in cells], [int(cell["seed"]) for cell in cells]
    values = np.array([cell["top1" if rule == "last" else "best"] for cell in cells], float)
    mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
    estimate = per_image.mean(ids) if per_image else None
    error = estimate.error if estimate else (binomial_error(mean, first["images"]) ** 2 + (sd or 0.0) ** 2 / len(values)) ** 0.5
    claims = ledger.published(first["result"]) if ledger else ()
    return Entry(ids, seeds, mean, sd, first["teacher_top1"] - mean, error, float(np.mean([cell["seconds"] for cell in cells])), estimate, *claims)


def _compare(column: list[Entry], per_image: PerImage | None) -> None:
    """Marks the best of a column and all that cannot be told from it."""
    top = max(column, key=lambda entry: entry.mean)
    others = [entry for entry in column if entry.estimate and entry is not top]
    if per_image is None or not top.estimate or not others:
        return
    top.best = True
    differences = [per_image.difference(entry.ids, top.ids) for entry in others]
    for entry, difference, p in zip(others, differences, holm([d.p for d in differences]), strict=True):
        entry.best, entry.against_best = p >= ALPHA, replace(difference, p=p)
        if common := set(entry.seeds) & set(top.seeds):
            entry.pair = entry.ids[entry.seeds.index(min(common))], top.ids[top.seeds.index(min(common))]


def make_unique(rows: Sequence[Row]) -> None:
    """Rows whose labels and budgets agree differ in something that neither shows: they are numbered, so that nothing is taken for the same."""
    named, seen = Counter((row.label, row.budget) for row in rows), Counter[tuple[str, str]]()
    for row in rows:
        name = row.label, row.budget
        seen[name] += 1
        row.label += f" [{seen[name]}]" if named[name] > 1 else ""
    labels = Counter(row.label for row in rows)
    for row in rows:
        row.label += f" {row.steps}x{row.batch}" if labels[row.label] > 1 else ""

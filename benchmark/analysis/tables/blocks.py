"""Accuracies, or what diverged, as rows by bit widths. One block per teacher, evaluation set, protocol and precision: these are never mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd

from dfqbench.analysis.cost import Cost, cost_of, processor_seconds
from dfqbench.analysis.ledger import METHODS_OWN, Ledger, Published
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.seeds import Basis
from dfqbench.analysis.size import Sizes, common_sizes
from dfqbench.analysis.stats import Estimate, binomial_error
from dfqbench.sweep.cell import fingerprint, without_data

Rule = Literal["last", "best-on-test"]
Cell = dict[str, Any]  # a line of `load_frame` with what `blocks` adds
NOT_OF_A_ROW = ("bits", "seed", "teacher", "evaluation", "precision")  # of a cell's identity: they say which column, seed or table it is in
KEYS = ("evaluation", "digest", "teacher", "teacher_key", "protocol", "shared_rules", "precision")  # what a block's cells agree in
SHARED = ("teacher", "teacher_top1", "evaluation", "protocol", "shared_rules", "precision")  # what a block has of its cells


@dataclass
class Entry:
    """The finished cells of one row at one bit width. Accuracies in percent; sd: over seeds, None for one; error: one standard error.

    estimate: the mean with its interval over test images and seeds, None where per-image results are missing; basis: where it has the variance of
    seeds from. best: the best of its column, or not below any row that can be told from it. against_best: the difference to the best (p Holm-adjusted
    in the column); pair: both cells' ids at their lowest seed. sizes: None where no cell knows it.
    """

    ids: list[str]
    seeds: list[int]
    mean: float
    sd: float | None
    drop: float
    error: float
    cost: Cost
    sizes: Sizes | None
    estimate: Estimate | None
    published: Published | None = None
    why_unpublished: str = ""
    best: bool = False
    against_best: Estimate | None = None
    pair: tuple[str, str] | None = None
    basis: Basis = "unknown"

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


@dataclass(frozen=True)
class Lost:
    """Cells of one row at one bit width that have no result: how many diverged, how many ended with an error, of how many that were tried; which."""

    diverged: int
    failed: int
    tried: int
    ids: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return (self.diverged + self.failed) / self.tried

    def __str__(self) -> str:
        """`diverged`, `1 of 3 diverged`, `1 diverged, 1 failed of 3`."""
        counts = {what: count for what, count in (("diverged", self.diverged), ("failed", self.failed)) if count}
        if len(counts) > 1:
            return ", ".join(f"{count} {what}" for what, count in counts.items()) + f" of {self.tried}"
        ((what, count),) = counts.items()
        return what if count == self.tried else f"{count} of {self.tried} {what}"


@dataclass
class Row:
    """One method with its settings and budget. `label` is unique within its table; `mark` refers to a note.

    entries: by bit width; of blocks side by side by (index of the block, bit width). lost: the same way, where cells diverged or failed: an entry
    beside it is the mean of those that are left, and is in no comparison. name: as its cells call it, which others may share. steps: None where no
    cell says it. settings: its cells' identity without what tells columns and seeds apart. differing: those in which blocks side by side differ.
    above: see `worst_first`.
    """

    label: str
    name: str
    method: str
    fidelity: str
    steps: int | None
    batch: int
    changed: dict[str, Any]
    settings: dict[str, Any]
    entries: dict[Any, Entry]
    lost: dict[Any, Lost]
    cost: Cost
    mark: str
    differing: Sequence[str] = ()
    above: float = 0.0

    @property
    def budget(self) -> str:
        return "-" if self.steps is None else f"{self.steps} x {self.batch}" if self.steps else "none"

    @property
    def seeds(self) -> list[int]:
        """How many were tried, by bit width."""
        return [lost.tried for lost in self.lost.values()] + [len(entry.ids) for w, entry in self.entries.items() if w not in self.lost]

    def complete(self, width: Any) -> Entry | None:
        """What may be compared and ranked."""
        return None if width in self.lost else self.entries.get(width)


@dataclass
class Block:
    """Results that can be compared with each other: rows from worst to best, widths from wide to narrow.

    heading: what was measured, over a table of several blocks. shared_rules: without what a method may declare for itself. marks: by printed rules.
    teacher_top1: NaN where it was not measured. devices: of finished cells. error: a cell's largest standard error from the test set's size, in
    percent. uncompared: without per-image results. beside: names of size.COLUMNS that are printed beside each accuracy.
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
    devices: list[str]
    error: float
    uncompared: int
    beside: Sequence[str] = ()

    @property
    def why_no_claims(self) -> set[str]:
        """Why nothing published is beside it; empty where something is."""
        entries = [entry for row in self.rows for entry in row.entries.values()]
        return set() if any(entry.published for entry in entries) else {entry.why_unpublished for entry in entries} - {""}


def load_frame(results: list[Any]) -> pd.DataFrame:
    """One row per cell: accuracies and drop, or agreement, in percent, seconds by the clock (of a GPU: by its events) and of processor time.

    status: done, or diverged or failed, without numbers (see `Reading.unfinished`).
    """
    frame = pd.DataFrame([_record(result) for result in results])
    return frame.astype({"steps": "Int64"}) if len(frame) else frame


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
        {"id": r["id"], "status": r.get("status", "done"), **asked_for(r["cell"]), **_scores(r), "images": r["images"]}
        | {"finished": r.get("finished", 0.0), "evaluations": r["evaluations"]}
        | {"steps": r["steps"], "seconds": round(seconds["own"] + seconds["shared"], 3)}
        | {"cpu_seconds": processor_seconds(r), "device": made["device_name"], "device_kind": made.get("device", "cpu")}
        | {"host": made.get("host"), "threads": made.get("threads"), "commit": made.get("git")}
    )


def _scores(r: dict[str, Any]) -> Cell:
    """What has no accuracy has no column of that name: whatever takes it for one fails."""
    if not without_data(r["cell"]):
        top1, of_teacher = r["top1"], r["teacher"]["top1"]
        return {"metric": "top1", "top1": top1, "best": r["best"]["top1"], "teacher_top1": of_teacher, "drop": round(of_teacher - top1, 10)}
    plain = r.get("plain_rounding") or {}
    return {"metric": "agreement", "agreement": r["agreement"], "kl": r["kl"]} | {f"plain_{k}": plain.get(k) for k in ("agreement", "kl")}


def blocks(
    results: list[Any], rule: Rule = "last", *, ledger: Ledger | None = None, per_image: PerImage | None = None, beside: Sequence[str] = ()
) -> list[Block]:
    """Tables of top-1 accuracy under one reporting rule. Without `per_image` nothing is compared, without `ledger` nothing is matched.

    results: finished cells, and those of `Reading.unfinished` that are to be named as well.
    """
    groups = comparable(results)
    per_image = per_image if rule == "last" else None  # only the last epoch's per-image results are stored
    made = [_block(group, rule, ledger, per_image) for group in groups.values()]
    titles = Counter(block.title for block in made)
    for block in made:
        block.beside = beside
    for block, key in zip(made, groups, strict=True):
        if titles[block.title] > 1:
            block.title, block.heading = block.title + told_apart(key), block.heading + told_apart(key)
    return made


def comparable(results: list[Any]) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells by KEYS, under the names that are newest, with what tells rows apart (`settings`) and marks them (`rules`)."""
    cells = [_record(result) | {"result": result} for result in results]
    for cell in cells:
        identity = cell["result"]["cell"]["identity"]
        cell["teacher_key"] = fingerprint([identity.get("teacher"), cell["weights"]])
        cell["rules"] = str(sorted(identity["protocol"].items()))
        cell["shared_rules"] = str(sorted((k, v) for k, v in identity["protocol"].items() if k not in METHODS_OWN))
        cell["plan"] = fingerprint([cell["method"], identity["config"]])
    steps = {cell["plan"]: cell["steps"] for cell in cells if cell["steps"] is not None}  # a failure need not know how many it was to have
    # a set is what its content says, a teacher its weights and task, a protocol its rules: names are only what somebody called them last
    by_age = sorted(cells, key=lambda cell: cell["finished"])
    sets, teachers = ({cell[key]: cell[name] for cell in by_age} for key, name in (("digest", "evaluation"), ("teacher_key", "teacher")))
    for cell in cells:
        cell |= {"evaluation": sets[cell["digest"]], "teacher": teachers[cell["teacher_key"]]}
        cell["steps"] = steps.get(cell["plan"]) if cell["steps"] is None else cell["steps"]
        # what makes two cells the same row is everything in their identity but bits and seed
        same = {k: v for k, v in cell["result"]["cell"]["identity"].items() if k not in ("bits", "seed")}
        cell["settings"] = fingerprint([cell["method"], same, cell["steps"]])
        cell["block"] = tuple(cell[key] for key in KEYS)
    return {key: list(its) for key, its in groupby(sorted(cells, key=lambda cell: cell["block"]), key=lambda cell: cell["block"])}


def told_apart(key: tuple[Any, ...]) -> str:
    """Behind a title that two tables have."""
    _, digest, _, teacher, _, rules, _ = key
    return f" [teacher {teacher[:8]}, images {digest.split()[-1][:8]}, rules {fingerprint(rules)[:8]}]"


def marks_of(rules: Sequence[str]) -> dict[str, str]:
    """A mark for each printed list of rules but the commonest, which has none."""
    counts = Counter(rules)
    usual = min(counts, key=lambda given: (-counts[given], given))
    return {usual: ""} | {given: "*" * i for i, given in enumerate((given for given in counts if given != usual), 1)}


def _block(cells: list[Cell], rule: Rule, ledger: Ledger | None, per_image: PerImage | None) -> Block:
    # what a method declares about ranges or BN changes the protocol's rules for its own rows: they are marked, not mixed silently
    done, marks = [cell for cell in cells if cell["status"] == "done"], marks_of([cell["rules"] for cell in cells])
    first = (done or cells)[0]
    rows, widths = rows_of(cells, marks, lambda there: _entry(there, rule, ledger))
    for width in widths:
        _compare(
            [e for row in rows if (e := row.complete(width))],
            [row.entries[width] for row in rows if {width} <= row.lost.keys() & row.entries.keys()],
            per_image,
        )
    top1 = "accuracy not measured" if np.isnan(first["teacher_top1"]) else f"{first['teacher_top1']:.2f} %"
    where = f"on {first['evaluation']} ({first['images']} images)"
    title = f"{first['teacher']} {where}: teacher {top1}, protocol {first['protocol']}, {first['precision']}"
    heading = f"{first['teacher']}, {top1}, {where}"
    shared = {name: first[name] for name in SHARED} | {"devices": sorted({cell["device"] for cell in done})}
    error = max((binomial_error(c["top1"], c["images"]) for c in done), default=0.0)
    uncompared = sum(entry.estimate is None for row in rows for entry in row.entries.values()) if per_image else 0
    return Block(title, heading, **shared, rule=rule, widths=widths, rows=rows, marks=marks, error=error, uncompared=uncompared)


def rows_of(cells: list[Cell], marks: dict[str, str], entry_of: Callable[[list[Cell]], Entry]) -> tuple[list[Row], list[str]]:
    """Rows from worst to best and widths from wide to narrow. entry_of: of the finished cells of one row at one width."""
    widths, rows = sorted({cell["bits"] for cell in cells}, reverse=True), []
    for _, (own, *more) in groupby(sorted(cells, key=lambda cell: (cell["settings"], int(cell["seed"]))), key=lambda cell: cell["settings"]):
        at = {w: [cell for cell in (own, *more) if cell["bits"] == w] for w in widths}
        entries = {w: entry_of(there) for w in widths if (there := [cell for cell in at[w] if cell["status"] == "done"])}
        states = [(w, Counter(cell["status"] for cell in there), [c["id"] for c in there if c["status"] != "done"]) for w, there in at.items()]
        lost = {w: Lost(n["diverged"], n["failed"], n.total(), tuple(ids)) for w, n, ids in states if ids}
        settings = {k: v for k, v in own["result"]["cell"]["identity"].items() if k not in NOT_OF_A_ROW}
        cost, changed = cost_of([cell["result"] for cell in (own, *more) if cell["status"] == "done"]), own["result"]["cell"].get("changed", {})
        label, fidelity, steps, batch = (own[key] for key in ("method", "fidelity", "steps", "batch"))
        rows.append(Row(label, label, own["plain_method"], fidelity, steps, batch, changed, settings, entries, lost, cost, marks[own["rules"]]))
    return worst_first(rows), widths


def _entry(cells: list[Cell], rule: Rule, ledger: Ledger | None) -> Entry:
    first, ids, seeds = cells[0], [cell["id"] for cell in cells], [int(cell["seed"]) for cell in cells]
    values = np.array([cell["top1" if rule == "last" else "best"] for cell in cells], float)
    mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
    error = (binomial_error(mean, first["images"]) ** 2 + (sd or 0.0) ** 2 / len(values)) ** 0.5
    claims = ledger.published(first["result"]) if ledger else ()
    results = [cell["result"] for cell in cells]
    return Entry(ids, seeds, mean, sd, first["teacher_top1"] - mean, error, cost_of(results), common_sizes(results), None, *claims)


def _compare(complete: list[Entry], partial: list[Entry], per_image: PerImage | None) -> None:
    """Estimates of a column, and which of its complete rows are the best or as good. partial: what is left of rows, each on its own."""
    for together in (complete, *([entry] for entry in partial)):
        for entry, found in zip(together, per_image.column([entry.ids for entry in together]) if per_image else (), strict=False):
            if found:
                entry.estimate, entry.basis, entry.error = *found, found[0].error
    compared = sorted((entry for entry in complete if entry.estimate), key=lambda entry: -entry.mean)
    if per_image is None or len(compared) < 2 or compared[0].mean < max(entry.mean for entry in complete):
        return
    for entry, (against, good) in zip(compared, per_image.against_best([entry.ids for entry in compared]), strict=True):
        entry.best, entry.against_best = good, against
        if against and (common := set(entry.seeds) & set(compared[0].seeds)):
            entry.pair = entry.ids[entry.seeds.index(min(common))], compared[0].ids[compared[0].seeds.index(min(common))]


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """Ordered by how far they are above their columns' means, as a row need not be in every column; labels are made unique.

    A cell that diverged or failed counts as the worst of its column: a row is not the better for what is missing from its mean.
    """
    columns = {column: [row.entries[column].mean for row in rows if column in row.entries] for row in rows for column in row.entries}
    for row in rows:
        away = []
        for column, means in columns.items():
            entry, lost = row.entries.get(column), row.lost.get(column)
            if entry or lost:
                missing = lost.share if lost else 0.0
                away.append((entry.mean * (1 - missing) if entry else 0.0) + min(means) * missing - float(np.mean(means)))
        row.above = round(float(np.mean(away)), 9) if away else -np.inf
    ordered = sorted(rows, key=lambda row: (row.above, len(row.entries), row.label, row.budget))
    # rows whose labels and budgets agree differ in something that neither shows: they are numbered, so that nothing is taken for the same
    named, seen = Counter((row.label, row.budget) for row in ordered), Counter[tuple[str, str]]()
    for row in ordered:
        name = row.label, row.budget
        seen[name] += 1
        row.label += f" [{seen[name]}]" if named[name] > 1 else ""
    labels = Counter(row.label for row in ordered)
    for row in ordered:
        row.label += f" {row.budget.replace(' ', '')}" if labels[row.label] > 1 else ""
    return ordered

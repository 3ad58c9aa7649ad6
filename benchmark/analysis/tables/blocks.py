"""Accuracies, or what diverged, as rows by bit widths. One block per teacher, evaluation set, protocol and precision: these are never mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from dfqbench.analysis.cost import Cost, cost_of
from dfqbench.analysis.ledger import Ledger, Published
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.seeds import Basis
from dfqbench.analysis.size import Sizes, common_sizes
from dfqbench.analysis.stats import Estimate, binomial_error
from dfqbench.analysis.tables.cells import Cell, comparable, told_apart
from dfqbench.analysis.tables.choice import USUAL, Columns
from dfqbench.analysis.warning_signs import BELOW_ROUNDING
from dfqbench.metrics import DENSE, METRICS, Metric
from dfqbench.quantization import Bits

Rule = Literal["last", "best-on-test"]
NOT_OF_A_ROW = ("bits", "seed", "teacher", "evaluation", "precision")  # of a cell's identity: they say which column, seed or table it is in
DECIMALS = 2  # of percentages
SHARED = ("teacher", "teacher_top1", "evaluation", "protocol", "shared_rules", "precision", "yardstick")  # what a block has of its cells
YARDSTICKS = "Yardsticks, trained on real images: "  # before a title


@dataclass
class Entry:
    """The finished cells of one row at one bit width. Accuracies in percent; sd: over seeds, None for one; error: one standard error.

    estimate: the mean with its interval over test images and seeds, None where per-image results are missing; basis: where it has the variance of
    seeds from. best: the best of its column, or not below any row that can be told from it; second: the next one. against_best: the difference to
    the best (p Holm-adjusted in the column); pair: both cells' ids at their lowest seed. sizes: None where no cell knows it. warnings: kinds of signs
    that one of its cells fails (warning_signs.py), and whether it is below plain rounding.
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
    second: bool = False
    against_best: Estimate | None = None
    pair: tuple[str, str] | None = None
    basis: Basis = "unknown"
    warnings: Sequence[str] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self, significant: bool = False) -> str:
        """`84.69 ± 0.18`; significant: with `decimals`."""
        digits = self.decimals if significant else DECIMALS
        return f"{self.mean:.{digits}f}" + (f" ± {self.sd:.{digits}f}" if self.sd is not None else "")

    def drop_text(self, significant: bool = False) -> str:
        return f"{self.drop:.{self.decimals if significant else DECIMALS}f}".replace("-0.00", "0.00").replace("-0.0", "0.0")

    @property
    def decimals(self) -> int:
        """As far as the first digit of the standard error, or the second where the first is 1, and no further than DECIMALS.

        Two for an error of 0.15, one for 0.7 and 1.2, none for 3.
        """
        return min(DECIMALS, max(0, -int(np.floor(np.log10(self.error / 2))))) if self.error > 0 else DECIMALS


@dataclass(frozen=True)
class Lost:
    """Cells of one row at one bit width that have no result: how many diverged, how many ended with an error, of how many that were tried; which.

    epochs: in which they diverged, as far as it is known.
    """

    diverged: int
    failed: int
    tried: int
    ids: tuple[str, ...] = ()
    epochs: tuple[int, ...] = ()

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

    @property
    def told(self) -> str:
        """With the epochs: `diverged, epoch 5`; `1 of 3 diverged, epochs 5-7`."""
        ends = sorted({min(self.epochs), max(self.epochs)}) if self.epochs else []
        return f"{self}, epoch{'s' * (len(ends) > 1)} {'-'.join(map(str, ends))}" if ends else str(self)


@dataclass
class Row:
    """One method with its settings and budget. `label` is unique within its table; `mark` refers to a note.

    entries: by bit width; of blocks side by side by (index of the block, bit width). lost: the same way, where cells diverged or failed: an entry
    beside it is the mean of those that are left, and is in no comparison. name: as its cells call it, which others may share. steps: None where
    no cell says it. settings: its cells' identity without what tells columns and seeds apart. group: see Choice.ordered. left_out: changed
    settings that its name does not show, as all rows of the method have them. by_width: settings with their values where its preset has others at
    other bit widths. differing: settings in which blocks side by side differ. above: see `worst_first`.
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
    group: str = ""
    left_out: str = ""
    by_width: str = ""
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
    """Results that can be compared with each other: rows from worst to best, widths from wide to narrow, until they are `arranged`.

    heading: what was measured, over a table of several blocks. shared_rules: without what a method may declare for itself. marks: by printed rules.
    teacher_top1: NaN where it was not measured. devices: of finished cells. error: a cell's largest standard error from the test set's size, in
    percent. uncompared: without per-image results. yardstick: whether students were trained on real images; then nothing is compared, as no row is a
    data-free method. shown: which columns are printed; order: of its rows, in words. metric: what its figures are.
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
    yardstick: bool = False
    shown: Columns = USUAL
    order: str = ""
    metric: Metric = METRICS["top1"]

    @property
    def why_no_claims(self) -> set[str]:
        """Why nothing published is beside it; empty where something is."""
        entries = [entry for row in self.rows for entry in row.entries.values()]
        return set() if any(entry.published for entry in entries) else {entry.why_unpublished for entry in entries} - {""}


def blocks(results: list[Any], rule: Rule = "last", *, ledger: Ledger | None = None, per_image: PerImage | None = None) -> list[Block]:
    """Tables of top-1 accuracy under one reporting rule. Without `per_image` nothing is compared, without `ledger` nothing is matched.

    results: finished cells, and those of `Reading.unfinished` that are to be named as well.
    """
    groups = comparable(results)
    per_image = per_image if rule == "last" else None  # only the last epoch's per-image results are stored
    made = [_block(group, rule, ledger, per_image) for group in groups.values()]
    titles = Counter(block.title for block in made)
    for block, key in zip(made, groups, strict=True):
        if titles[block.title] > 1:
            block.title, block.heading = block.title + told_apart(key), block.heading + told_apart(key)
    return made


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
        complete = [e for row in rows if (e := row.complete(width))]
        partial = [row.entries[width] for row in rows if {width} <= row.lost.keys() & row.entries.keys()]
        _compare(*(([], complete + partial) if first["yardstick"] else (complete, partial)), per_image)
        _mark_below_rounding(rows, width)
    metric = METRICS[first["metric"]]
    score = f"{first['teacher_top1']:.2f} %" + f" {metric.name}" * (metric.key != "top1")
    top1 = "accuracy not measured" if np.isnan(first["teacher_top1"]) else score
    where = f"on {first['evaluation']} ({first['images']} images)"
    before = YARDSTICKS * first["yardstick"]
    title = f"{before}{first['teacher']} {where}: teacher {top1}, protocol {first['protocol']}, {first['precision']}"
    heading = f"{before}{first['teacher']}, {top1}, {where}"
    shared = {name: first[name] for name in SHARED} | {"devices": sorted({cell["device"] for cell in done})}
    entries = [entry for row in rows for entry in row.entries.values()]
    error = max((_size_error(c, c["top1"]) for c in done), default=0.0) if metric.key not in DENSE else max((e.error for e in entries), default=0.0)
    uncompared = sum(entry.estimate is None for row in rows for entry in row.entries.values()) if per_image else 0
    return Block(title, heading, **shared, rule=rule, widths=widths, rows=rows, marks=marks, error=error, uncompared=uncompared, metric=metric)


def rows_of(cells: list[Cell], marks: dict[str, str], entry_of: Callable[[list[Cell]], Entry]) -> tuple[list[Row], list[str]]:
    """Rows from worst to best and widths from wide to narrow. entry_of: of the finished cells of one row at one width."""
    widths, rows = sorted({cell["bits"] for cell in cells}, key=lambda bits: Bits.parse(bits, average=True), reverse=True), []
    for _, (own, *more) in groupby(sorted(cells, key=lambda cell: (cell["settings"], int(cell["seed"]))), key=lambda cell: cell["settings"]):
        at = {w: [cell for cell in (own, *more) if cell["bits"] == w] for w in widths}
        entries = {w: entry_of(there) for w in widths if (there := [cell for cell in at[w] if cell["status"] == "done"])}
        lost = {w: _lost(there) for w, there in at.items() if any(cell["status"] != "done" for cell in there)}
        settings = {k: v for k, v in own["result"]["cell"]["identity"].items() if k not in NOT_OF_A_ROW}
        cost, cell = cost_of([cell["result"] for cell in (own, *more) if cell["status"] == "done"]), own["result"]["cell"]
        label, method, fidelity, steps, batch = (own[key] for key in ("method", "plain_method", "fidelity", "steps", "batch"))
        called = {"label": label, "name": label, "mark": marks[own["rules"]], "group": cell.get("group") or "", "left_out": cell.get("left_out", "")}
        asked = {"method": method, "fidelity": fidelity, "steps": steps, "batch": batch, "changed": cell.get("changed", {}), "settings": settings}
        rows.append(Row(**called, **asked, entries=entries, lost=lost, cost=cost, by_width=_by_width([own, *more])))
    return worst_first(rows), widths


def _by_width(cells: list[Cell]) -> str:
    """`mixed_classes 100 (w5a5), 500 (w4a4, w3a3)`: what the preset of one row's cells has otherwise at other widths."""
    records = [cell["result"]["cell"] for cell in cells]
    texts = []
    for name in sorted({name for record in records for name in record.get("by_width", ())}):
        widths: dict[str, list[str]] = {}
        for record in records:
            widths.setdefault(str(record["identity"]["config"].get(name)), []).append(record["bits"])
        texts.append(f"{name} " + ", ".join(f"{value} ({', '.join(dict.fromkeys(its))})" for value, its in widths.items()))
    return "; ".join(texts)


def _lost(cells: list[Cell]) -> Lost:
    """Of the cells of one row at one width."""
    states, ids = Counter(cell["status"] for cell in cells), tuple(cell["id"] for cell in cells if cell["status"] != "done")
    epochs = tuple(epoch for cell in cells if (epoch := cell["result"].get("diverged_in")) is not None)
    return Lost(states["diverged"], states["failed"], len(cells), ids, epochs)


def _entry(cells: list[Cell], rule: Rule, ledger: Ledger | None) -> Entry:
    first, ids, seeds = cells[0], [cell["id"] for cell in cells], [int(cell["seed"]) for cell in cells]
    values = np.array([cell["top1" if rule == "last" else "best"] for cell in cells], float)
    mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
    error = (_size_error(first, mean) ** 2 + (sd or 0.0) ** 2 / len(values)) ** 0.5
    claims = ledger.published(first["result"]) if ledger else ()
    results = [cell["result"] for cell in cells]
    entry = Entry(ids, seeds, mean, sd, first["teacher_top1"] - mean, error, cost_of(results), common_sizes(results), None, *claims)
    entry.warnings = list(dict.fromkeys(sign["kind"] for result in results for sign in result.get("warnings", ())))
    return entry


def _size_error(cell: Cell, score: float) -> float:
    """From the test set's size, where each image is right or wrong; scores of dense tasks get theirs from a bootstrap (`_compare`)."""
    return 0.0 if cell["metric"] in DENSE else binomial_error(score, cell["images"])


def _mark_below_rounding(rows: Sequence[Row], width: str) -> None:
    """Warns of what is more than its standard error below nearest rounding with its own settings, where that is in the table."""
    plain = [entry for row in rows if row.method == "round" and not row.changed and (entry := row.entries.get(width))]
    for entry in [entry for row in rows if (entry := row.entries.get(width))] if plain else ():
        if max(its.mean for its in plain) - entry.mean > entry.error:
            entry.warnings = [*entry.warnings, BELOW_ROUNDING]


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
        entry.second = not good and not any(other.second for other in compared)
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

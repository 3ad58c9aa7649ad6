"""Tables of finished cells. One block per teacher, evaluation set, protocol and precision: these are never mixed. No torch here.

What the tables mean is decided here, what is said below them in table_notes.py; wide_tables.py puts blocks side by side; how all that looks in a
terminal, in markdown, LaTeX or HTML is decided in table_formats.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from dfqbench.analysis.ledger import METHODS_OWN, Ledger, Published
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.stats import Estimate, binomial_error, holm
from dfqbench.analysis.tables.notes import block_notes, marks_of
from dfqbench.sweep.cell import fingerprint

Rule = Literal["last", "best-on-test"]
ALPHA = 0.05
NOT_OF_A_ROW = ("bits", "seed", "teacher", "evaluation", "precision")  # of a cell's identity: they say which column, seed or table it is in


@dataclass
class Comparison:
    """A row against the best of its column: the difference (p Holm-adjusted within the column), and both cells' ids at the lowest common seed."""

    difference: Estimate
    pair: tuple[str, str] | None


@dataclass
class Entry:
    """One row at one bit width. Accuracies in percent.

    sd: standard deviation over seeds, None for one. error: one standard error. seconds: a cell's mean cost. estimate: the mean with its interval
    over test images and seeds, None where per-image results are missing. best: the best of its column, or not distinguishable from it.
    """

    ids: list[str]
    seeds: list[int]
    mean: float
    sd: float | None
    drop: float
    error: float
    seconds: float
    estimate: Estimate | None = None
    best: bool = False
    against_best: Comparison | None = None
    published: Published | None = None

    @property
    def n(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


@dataclass
class Row:
    """One method with its settings and budget. `label` is unique within its block; `mark` refers to a note.

    name: as its cells call it, which others may share. settings: its cells' identity without what tells columns and seeds apart.
    """

    label: str
    name: str
    method: str
    changed: dict[str, Any]
    fidelity: str
    steps: int
    batch: int
    seconds: float
    entries: dict[str, Entry]
    settings: dict[str, Any]
    mark: str = ""

    @property
    def budget(self) -> str:
        return budget_in_words(self.steps, self.batch)

    @property
    def seeds(self) -> str:
        counts = sorted({entry.n for entry in self.entries.values()})
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"

    @property
    def mean(self) -> float:
        return float(np.mean([entry.mean for entry in self.entries.values()]))


@dataclass
class Block:
    """Results that can be compared with each other: rows from worst to best, widths from wide to narrow.

    shared_rules: the protocol's without what a method may declare for itself. told_apart: what to add to a name that another block has too.
    error: the largest standard error of a cell from the test set's size, in percent. uncompared: entries without per-image results.
    """

    title: str
    teacher: str
    teacher_top1: float
    evaluation: str
    images: int
    protocol: str
    shared_rules: str
    precision: str
    widths: list[str]
    rows: list[Row]
    time: str  # what a second is: of a GPU, of a CPU, or of several kinds
    rule: Rule
    error: float
    devices: list[str]
    uncompared: int
    why_no_claims: list[str]
    told_apart: str = ""
    notes: list[str] = field(default_factory=list)

    def row(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)

    @property
    def has_claims(self) -> bool:
        return any(entry.published for row in self.rows for entry in row.entries.values())


def budget_in_words(steps: int, batch: int) -> str:
    return f"{steps} x {batch}" if steps else "none"


def load_frame(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row per finished cell: accuracies and drop in percent, seconds of its own and its share-free total (own + shared)."""
    return pd.DataFrame([_record(r) for r in results])


def _record(r: dict[str, Any]) -> dict[str, Any]:
    cell, identity = r["cell"], r["cell"]["identity"]
    return {
        "id": r["id"],
        "method": cell["label"],
        "plain_method": cell.get("method", cell["label"]),
        "fidelity": cell["fidelity"],
        "teacher": cell["teacher"]["label"],
        "weights": cell["teacher"]["weights_sha256"],
        "teacher_top1": r["teacher"]["top1"],
        "evaluation": cell["evaluation"]["name"],
        "digest": identity["evaluation"],
        "images": r["images"],
        "finished": r.get("finished", 0.0),
        "protocol": cell["protocol"],
        "precision": cell["precision"],
        "bits": cell["bits"],
        "seed": cell["seed"],
        "top1": r["top1"],
        "best": r["best"]["top1"],
        "drop": round(r["teacher"]["top1"] - r["top1"], 10),
        "evaluations": r["evaluations"],
        "steps": r["steps"],
        "batch": int(identity["config"].get("batch_size") or 0),
        "seconds": round(r["seconds"]["own"] + r["seconds"]["shared"], 3),
        "device": r["provenance"]["device_name"],
        "device_kind": r["provenance"].get("device", "cpu"),
        "commit": r["provenance"].get("git"),
    }


def blocks(
    results: list[dict[str, Any]], rule: Rule = "last", *, ledger: Ledger | None = None, per_image: PerImage | None = None, notes: bool = True
) -> list[Block]:
    """Tables of top-1 accuracy under one reporting rule. Without `per_image` nothing is compared, without `ledger` nothing is matched."""
    if not results:
        return []
    frame = load_frame(results)
    rules = [r["cell"]["identity"]["protocol"] for r in results]
    frame["result"] = pd.Series(results, dtype=object)
    frame["rules"] = [str(sorted(given.items())) for given in rules]
    # a set is what its content says, a teacher its weights and task, a protocol its rules: names are only what somebody called them
    frame["teacher_key"] = [fingerprint([r["cell"]["identity"].get("teacher"), r["cell"]["teacher"]["weights_sha256"]]) for r in results]
    frame["shared_rules"] = [str(sorted((k, v) for k, v in given.items() if k not in METHODS_OWN)) for given in rules]
    frame["settings"] = [_settings(r) for r in results]
    keys = ["evaluation", "digest", "teacher", "teacher_key", "protocol", "shared_rules", "precision"]
    newest_last = frame.sort_values("finished", kind="stable")
    names = newest_last.groupby("digest", sort=False).evaluation.last()
    frame["evaluation"] = frame.digest.map(names)  # one set under two names is one block, called as it was last
    teachers = newest_last.groupby("teacher_key", sort=False).teacher.last()
    frame["teacher"] = frame.teacher_key.map(teachers)
    groups = [group for _, group in frame.groupby(keys, sort=True)]
    found = [_Builder(group.reset_index(drop=True), rule, ledger, per_image).block(notes) for group in groups]
    titles = [block.title for block in found]
    for block, group in zip(found, groups, strict=True):
        if titles.count(block.title) > 1:
            first = group.iloc[0]
            block.told_apart = f" [teacher {first.teacher_key[:8]}, images {first.digest[:8]}, rules {fingerprint(first.shared_rules)[:8]}]"
            block.title += block.told_apart
    return found


def _settings(result: dict[str, Any]) -> str:
    """What makes two cells the same row: everything in their identity but bits and seed."""
    identity = {k: v for k, v in result["cell"]["identity"].items() if k not in ("bits", "seed")}
    return fingerprint([result["cell"]["label"], identity, result["steps"]])


class _Builder:
    """Makes one block of the cells that belong into it."""

    def __init__(self, group: pd.DataFrame, rule: Rule, ledger: Ledger | None, per_image: PerImage | None):
        self.group, self.rule, self.ledger = group, rule, ledger
        self.per_image = per_image if rule == "last" else None  # only the last epoch's per-image results are stored
        self.why_no_claims: set[str] = set()
        self.uncompared = 0

    def block(self, with_notes: bool) -> Block:
        group, first = self.group, self.group.iloc[0]
        title = f"{first.teacher} on {first.evaluation} ({first.images} images): teacher {first.teacher_top1:.2f} %, protocol {first.protocol}"
        widths = sorted(group.bits.unique(), reverse=True)
        # what a method declares about ranges or BN changes the protocol's rules for its own rows: they are marked, not mixed silently
        marks = marks_of(list(group.rules))
        same: dict[str, list[Any]] = {}
        for cell in group.to_dict("records"):
            same.setdefault(cell["settings"], []).append(cell)
        rows = [self._row(cells, widths, marks) for cells in same.values()]
        rows.sort(key=lambda row: (row.mean, row.label, row.budget))
        make_unique(rows)
        if self.per_image:
            for width in widths:
                self._compare(rows, width)
        kinds = set(group.device_kind)
        time = {frozenset({"cuda"}): "GPU-seconds", frozenset({"cpu"}): "CPU-seconds"}.get(frozenset(kinds), "seconds")
        block = Block(
            title=f"{title}, {first.precision}",
            teacher=first.teacher,
            teacher_top1=float(first.teacher_top1),
            evaluation=first.evaluation,
            images=int(first.images),
            protocol=first.protocol,
            shared_rules=first.shared_rules,
            precision=first.precision,
            widths=widths,
            rows=rows,
            time=time,
            rule=self.rule,
            error=max(binomial_error(v, first.images) for v in group.top1),
            devices=sorted(group.device.unique()),
            uncompared=self.uncompared,
            why_no_claims=sorted(why for why in self.why_no_claims if why),
        )
        if with_notes:
            block.notes = block_notes(block, marks)
        return block

    def _row(self, cells: list[dict[str, Any]], widths: list[str], marks: dict[str, str]) -> Row:
        first = cells[0]
        cells = sorted(cells, key=lambda cell: int(cell["seed"]))
        by_width = {width: [cell for cell in cells if cell["bits"] == width] for width in widths}
        return Row(
            label=first["method"],
            name=first["method"],
            method=first["plain_method"],
            changed=first["result"]["cell"].get("changed", {}),
            fidelity=first["fidelity"],
            steps=int(first["steps"]),
            batch=int(first["batch"]),
            seconds=float(np.mean([cell["seconds"] for cell in cells])),
            entries={width: self._entry(there) for width, there in by_width.items() if there},
            settings={k: v for k, v in first["result"]["cell"]["identity"].items() if k not in NOT_OF_A_ROW},
            mark=marks[first["rules"]],
        )

    def _entry(self, cells: list[dict[str, Any]]) -> Entry:
        first = cells[0]
        values = np.array([cell["top1" if self.rule == "last" else "best"] for cell in cells], float)
        ids = [cell["id"] for cell in cells]
        mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
        estimate = self.per_image.mean(ids) if self.per_image else None
        error = estimate.error if estimate else (binomial_error(mean, first["images"]) ** 2 + (sd or 0.0) ** 2 / len(values)) ** 0.5
        seconds = float(np.mean([cell["seconds"] for cell in cells]))
        entry = Entry(ids, [int(cell["seed"]) for cell in cells], mean, sd, first["teacher_top1"] - mean, error, seconds, estimate)
        if self.ledger:
            entry.published, why = self.ledger.published(first["result"])
            self.why_no_claims.add(why)
        return entry

    def _compare(self, rows: list[Row], width: str) -> None:
        """Marks the best of a column and all that cannot be told from it."""
        assert self.per_image is not None
        there = [row.entries[width] for row in rows if width in row.entries]
        known = [entry for entry in there if entry.estimate is not None]
        self.uncompared += len(there) - len(known)
        top = max(there, key=lambda entry: entry.mean)
        if len(known) < 2 or top.estimate is None:
            return
        others = [entry for entry in known if entry is not top]
        differences = [self.per_image.difference(entry.ids, top.ids) for entry in others]
        top.best = True
        for entry, difference, p in zip(others, differences, holm([d.p for d in differences]), strict=True):
            entry.best = p >= ALPHA
            common = sorted(set(entry.seeds) & set(top.seeds))
            pair = (entry.ids[entry.seeds.index(common[0])], top.ids[top.seeds.index(common[0])]) if common else None
            adjusted = Estimate(difference.value, difference.error, difference.low, difference.high, p)
            entry.against_best = Comparison(adjusted, pair)


class Numbered(Protocol):
    """A row of a block, or of blocks side by side."""

    label: str
    steps: int
    batch: int


def make_unique(rows: Sequence[Numbered]) -> None:
    """Rows whose labels and budgets agree differ in something that neither shows: they are numbered, so that nothing is taken for the same."""
    seen: dict[tuple[str, str], list[Numbered]] = {}
    for row in rows:
        seen.setdefault((row.label, budget_in_words(row.steps, row.batch)), []).append(row)
    for (label, _), same in seen.items():
        for number, row in enumerate(same, 1):
            row.label = label if len(same) == 1 else f"{label} [{number}]"
    labels = [row.label for row in rows]
    for row in rows:
        if labels.count(row.label) > 1:
            row.label += f" {row.steps}x{row.batch}"


@dataclass
class Ranking:
    """Average ranks (1 is best) of the rows that are in every column of every block. left_out: rows that are not."""

    labels: list[str]
    average: list[float]
    columns: int
    p: float
    critical_difference: float
    left_out: list[str]


def ranking(found: list[Block]) -> Ranking | None:
    """None where there are fewer than three columns or fewer than two common rows: ranks over two columns say nothing."""
    columns = [
        {(row.label, row.budget): row.entries[width].mean for row in block.rows if width in row.entries} for block in found for width in block.widths
    ]
    if len(columns) < 3:
        return None
    every = {key for column in columns for key in column}
    common = sorted(key for key in every if all(key in column for column in columns))
    if len(common) < 2:
        return None
    from dfqbench.analysis.stats import average_ranks

    ranked = average_ranks(np.array([[column[key] for key in common] for column in columns]))
    order = np.argsort(ranked.average, kind="stable")
    labels = [label for label, _ in common]
    return Ranking(
        labels=[labels[i] if labels.count(labels[i]) == 1 else " ".join(common[i]) for i in order],
        average=[ranked.average[i] for i in order],
        columns=len(columns),
        p=ranked.p,
        critical_difference=ranked.critical_difference,
        left_out=sorted({label for label, _ in every - set(common)}),
    )

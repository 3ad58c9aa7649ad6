"""The ledger of claims: numbers that somebody published, each with its source, checked, and matched to what was measured here. No torch here.

published.csv            one row per claim, as its source prints it
published-names.csv      every name that the ledger may use, and what it is called here (wildcards for networks; empty: not built)
published-allowed.csv    rows that break a check and stay, each with the reason
"""

from __future__ import annotations

import csv
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dfqbench.errors import UserError
from dfqbench.files import shipped
from dfqbench.quantization import PROTOCOLS

IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 50_000}
SAME_TEACHER = 1.0  # percentage points; a teacher further than this from the published one is another teacher. Chosen here.
METHODS_OWN = ("ranges", "batch_norm")  # rules that a method may declare for itself


@dataclass(frozen=True)
class Claim:
    """One published number. Accuracies in percent; full_precision is None where the source does not print it."""

    dataset: str
    network: str
    bits: str
    method: str
    top1: float
    full_precision: float | None
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What was measured: claims that agree in it and differ in their figure dispute each other."""
        return self.dataset, self.network, self.bits, self.method


@dataclass(frozen=True)
class Published:
    """What is claimed about one measured cell: all claims, lowest and highest."""

    claims: tuple[Claim, ...]

    @property
    def low(self) -> float:
        return min(c.top1 for c in self.claims)

    @property
    def high(self) -> float:
        return max(c.top1 for c in self.claims)

    @property
    def disputed(self) -> bool:
        return self.low != self.high

    def __str__(self) -> str:
        return f"{self.low:.2f}-{self.high:.2f}" if self.disputed else f"{self.low:.2f}"

    def distance(self, top1: float) -> float:
        """From the nearest claim, in percentage points; negative below all of them, 0 between two."""
        return top1 - min(max(top1, self.low), self.high)


@dataclass(frozen=True)
class Ledger:
    claims: list[Claim]
    names: dict[str, dict[str, list[str]]]  # kind -> the ledger's name -> what it is called here
    allowed: dict[tuple[str, ...], str]

    @cached_property
    def by_key(self) -> dict[tuple[str, str, str, str], tuple[Claim, ...]]:
        found: dict[tuple[str, str, str, str], list[Claim]] = defaultdict(list)
        for claim in self.claims:
            found[claim.key].append(claim)
        return {key: tuple(claims) for key, claims in found.items()}

    @cached_property
    def disputes(self) -> list[Published]:
        """Measurements for which sources print different numbers."""
        return [found for claims in self.by_key.values() if (found := Published(claims)).disputed]

    def problems(self) -> list[str]:
        """Every row that breaks a check and is not allowed to, and every allowance that nothing needs."""
        broken = list(self._broken())
        lines = [f"{_where(claim)}: {check}: {what}" for check, claim, what in broken if _allowance(check, claim) not in self.allowed]
        needed = {_allowance(check, claim) for check, claim, _ in broken}
        return lines + [f"published-allowed.csv: {', '.join(key)}: allowed, but it breaks nothing" for key in self.allowed if key not in needed]

    def _broken(self) -> Iterator[tuple[str, Claim, str]]:
        """(check, claim, what is wrong)"""
        by_source: dict[tuple[str, ...], list[Claim]] = defaultdict(list)
        for claim in self.claims:
            by_source[claim.source, claim.dataset, claim.network, claim.method].append(claim)
            for kind, name in (("dataset", claim.dataset), ("network", claim.network), ("method", claim.method)):
                if name not in self.names[kind]:
                    yield f"unknown {kind}", claim, f"{name!r} is not in published-names.csv"
            if not claim.source.strip():
                yield "no source", claim, "a claim needs one"
            if not 0 <= claim.top1 <= 100:
                yield "not a percentage", claim, f"{claim.top1}"
            if claim.full_precision is not None and claim.top1 > claim.full_precision:
                yield "above full precision", claim, f"{claim.top1:.2f} of {claim.full_precision:.2f}"
            if "corrected" in claim.source:
                yield "corrected", claim, "differs from what the source prints"
        for group in by_source.values():
            for claim in group:
                for wider in group:
                    if _narrower(claim.bits, wider.bits) and claim.top1 > wider.top1:
                        yield "bits not monotone", claim, f"{claim.top1:.2f} at {claim.bits}, {wider.top1:.2f} at {wider.bits}"

    @cached_property
    def _teachers(self) -> dict[tuple[str, str], list[float]]:
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for claim in self.claims:
            if claim.full_precision is not None:
                found[claim.dataset, claim.network].append(claim.full_precision)
        return found

    def published(self, result: dict[str, Any]) -> tuple[Published | None, str]:
        """The claims about what a result measured, or None and why there are none.

        A claim is about a method as published: no changed setting, the lineage's protocol (but for what the method declares for itself), the
        papers' test set, and a teacher as good as theirs. Budgets may differ: tables show them.
        """
        cell = result["cell"]
        dataset = self._name("dataset", cell["evaluation"]["name"])
        if dataset is None or result["images"] != IMAGES.get(cell["evaluation"]["name"]):
            return None, "no published number is about this test set"
        network = next(
            (n for n, patterns in self.names["network"].items() if any(fnmatch.fnmatchcase(cell["teacher"]["model"], p) for p in patterns)), None
        )
        if network is None:
            return None, "no published number is about this network"
        theirs = self._teachers.get((dataset, network), [])
        if theirs and min(abs(result["teacher"]["top1"] - f) for f in theirs) > SAME_TEACHER:
            return None, f"the published numbers are about a teacher of {' or '.join(f'{f:.2f}' for f in sorted(set(theirs)))} %"
        if _without_own(cell["identity"]["protocol"]) != _without_own(PROTOCOLS["lineage"].fingerprint()):
            return None, "the published numbers follow another protocol"
        method = self._name("method", cell["method"])
        claims = self.by_key.get((dataset, network, cell["bits"], method or ""), ())
        if cell["changed"] or not claims:
            return None, ""
        return Published(claims), ""

    def _name(self, kind: str, here: str) -> str | None:
        return next((name for name, names in self.names[kind].items() if here in names), None)


def load_ledger(folder: Path | None = None) -> Ledger:
    """The ledger in `folder`, or the one that comes with the suite. Raises UserError, naming file and line, where it cannot be read."""
    if folder is None:
        folder = shipped("results")
    names: dict[str, dict[str, list[str]]] = {"dataset": {}, "network": {}, "method": {}}
    for where, row in _rows(folder / "published-names.csv", ("kind", "name", "here")):
        if row["kind"] not in names:
            raise UserError(f"{where}: {row['kind']!r} is none of {', '.join(names)}")
        names[row["kind"]][row["name"]] = row["here"].split()
    claims = [
        _claim(where, row)
        for where, row in _rows(folder / "published.csv", ("dataset", "model", "w_bits", "a_bits", "method", "top1", "fp_top1", "source"))
    ]
    allowed: dict[tuple[str, ...], str] = {}
    for where, row in _rows(folder / "published-allowed.csv", ("check", "dataset", "model", "w_bits", "a_bits", "method", "source", "reason")):
        if not row["reason"].strip():
            raise UserError(f"{where}: an allowance needs a reason")
        allowed[row["check"], row["dataset"], row["model"], f"w{row['w_bits']}a{row['a_bits']}", row["method"], row["source"]] = row["reason"]
    return Ledger(claims, names, allowed)


def _rows(path: Path, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != list(columns):
                raise UserError(f"{path}: the columns {', '.join(columns)} are expected")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{reader.line_num}: {len(list(columns))} values are expected")
                yield f"{path}:{reader.line_num}", row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _claim(where: str, row: dict[str, str]) -> Claim:
    try:
        full = float(row["fp_top1"]) if row["fp_top1"] else None
        bits = f"w{int(row['w_bits'])}a{int(row['a_bits'])}"
        return Claim(row["dataset"], row["model"], bits, row["method"], float(row["top1"]), full, row["source"])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _allowance(check: str, claim: Claim) -> tuple[str, ...]:
    return check, claim.dataset, claim.network, claim.bits, claim.method, claim.source


def _where(claim: Claim) -> str:
    return f"published.csv: {claim.dataset} {claim.network} {claim.bits} {claim.method} ({claim.source})"


def _narrower(bits: str, other: str) -> bool:
    """Whether `bits` has no more weight bits and no more activation bits than `other`, and is not the same."""
    (w, a), (v, b) = ([int(n) for n in re.findall(r"\d+", text)] for text in (bits, other))
    return bits != other and w <= v and a <= b


def _without_own(rules: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rules.items() if key not in METHODS_OWN}

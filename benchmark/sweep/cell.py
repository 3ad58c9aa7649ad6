"""A cell: one experiment, with the identity that makes its number citable; a bundle: cells that run in lockstep. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any, Literal

from dfqbench.quantization import Bits, Protocol
from dfqbench.sweep.allocation import Allocation
from dfqbench.teachers import TeacherCard

# Raise the first wherever the engine gives other numbers than before for the same settings: what was run before are other cells.
# Raise the second where only rounding differs: to a cell that means as much as another version of torch, its results are replicates.
ENGINE_VERSION, ROUNDING_VERSION = 2, 5
Precision = Literal["fp32", "tf32", "bf16"]


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """The first 12 hexadecimal digits of the sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def leaves(identity: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`config.epochs`, 400): every value of nested mappings under its whole name; an empty key stands for its parent."""
    for key, value in identity.items():
        name = f"{prefix}.{key}".strip(".")
        if isinstance(value, dict):
            yield from leaves(value, name)
        else:
            yield name, value


def without_data(record: dict[str, Any]) -> bool:
    """Whether a cell's record is of one that has no evaluation set (`evaluate: none`): what is known of it is no accuracy."""
    return str(record["identity"]["evaluation"]).startswith("none ")


def coordinates_of(record: dict[str, Any]) -> str:
    """Those of the cell that has this record, whatever version wrote it."""
    method, changed, protocol, precision, bits, seed = (record.get(key) for key in ("method", "changed", "protocol", "precision", "bits", "seed"))
    weights, evaluation = record.get("teacher", {}).get("weights_sha256"), record.get("identity", {}).get("evaluation")
    return canonical_json([method, changed, weights, evaluation, protocol, precision, bits, seed])


@dataclass(frozen=True)
class EvaluationCard:
    """An evaluation set as a cell knows it: by its content's digest, never by its path.

    made: with `evaluate: none`, what makes the synthetic images on which student and teacher are compared; the digest is of its settings then.
    selection: the same as the `selection` of a config that makes these images. set: as a config names it, `digits` or `imagefolder:`, whose place is
    nobody's business. source: of a plug-in's code, as a method's.
    """

    name: str
    digest: str
    classes: int
    images: int
    made: str = ""
    selection: dict[str, Any] | None = field(default=None, compare=False)
    set: str = field(default="", compare=False)
    source: dict[str, str] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Cell:
    """Method and its complete settings, teacher, evaluation set, protocol, bits, seed and precision.

    config holds every setting with its value; `changed` those that differ from the method's defaults (for labels only). `plugin` and `source`
    (package, version, file, sha256) are provenance of the method's code; only its declared `version` takes part in the identity. `files`: where those
    lie that settings name, which `config` has by their sha256. `steps` by phase is for estimates only; None where nobody asked. `name` and `group`:
    what tables are to call the settings and where they belong, where the sweep says so. `preset`: the method's that settings started from, if any;
    `by_width`: settings that it has otherwise at other bit widths of the same sweep, which is one row for tables. `allocation`: who chooses the width
    of each tensor, where `bits` are an average; None where all have the same.
    """

    method: str
    method_version: int
    config: dict[str, Any]
    teacher: TeacherCard
    evaluation: EvaluationCard
    protocol: Protocol
    bits: Bits
    seed: int
    precision: Precision
    shares_synthesis: bool = False
    changed: dict[str, Any] = field(default_factory=dict)
    fidelity: str = ""
    plugin: str = ""
    source: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict, compare=False)
    name: str = field(default="", compare=False)
    group: str = field(default="", compare=False)
    preset: str = field(default="", compare=False)
    by_width: tuple[str, ...] = field(default=(), compare=False)
    steps: dict[str, int] | None = field(default=None, compare=False)
    allocation: Allocation | None = None

    def identity(self) -> dict[str, Any]:
        """Everything that can change the number."""
        return {
            "engine": ENGINE_VERSION,
            "method": self.method,
            "method_version": self.method_version,
            "config": self.config,
            "teacher": {
                "model": self.teacher.model,
                "weights": self.teacher.weights_sha256,
                "source": self.teacher.source_sha256,
                "task": self.teacher.task.as_dict(),
                **({"form": self.teacher.form} if self.teacher.form else {}),
            },
            "evaluation": self.evaluation.digest,
            "protocol": self.protocol.fingerprint(),
            "bits": str(self.bits),
            "seed": self.seed,
            "precision": self.precision,
            **({"widths": self.allocation.identity()} if self.allocation else {}),
        }

    @property
    def width(self) -> str:
        """`w4a4`, or `w4a4 dnq` where dnq chooses the width of each tensor: unique in a bundle."""
        return f"{self.bits} {self.allocation.text}" if self.allocation else str(self.bits)

    @property
    def allocation_key(self) -> str:
        """Equal for cells that share a choice of widths: whatever the method declares for itself has no part in it."""
        assert self.allocation is not None
        own = {key: value for key, value in self.protocol.fingerprint().items() if key not in ("ranges", "batch_norm")}
        folded = self.protocol.batch_norm == "folded"
        return fingerprint([ENGINE_VERSION, self.identity()["teacher"], own, folded, str(self.bits), self.allocation.identity()])

    @property
    def yardstick(self) -> dict[str, Any]:
        """Digest and count of the real images that it trains on in place of a method's; empty for what is data-free."""
        found: dict[str, Any] = self.config.get("yardstick") or {}
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What the method's Config is made of on this machine: `config` with the paths of files."""
        return self.config | self.files

    def at(self, bits: Bits, seed: int) -> Cell:
        """The same at another bit width and seed. Sweeps can be large: what is common to all of these cells is put into words once."""
        other = replace(self, bits=bits, seed=seed)
        other.__dict__["_common"] = self._common
        return other

    @cached_property
    def _common(self) -> tuple[str, str, str]:
        """Canonical JSON of the identity without bits and seed, before and after the place of the seed; and of the coordinates without them."""
        identity = {key: value for key, value in self.identity().items() if key not in ("bits", "seed")}
        after = {key: identity.pop(key) for key in list(identity) if key > "seed"}
        place = [self.method, self.changed, self.teacher.weights_sha256, self.evaluation.digest, self.protocol.name, self.precision]
        return canonical_json(identity)[1:-1], canonical_json(after)[1:-1], canonical_json(place)[1:-1]

    @cached_property
    def id(self) -> str:
        """The fingerprint of the identity."""
        before, after, _ = self._common
        return hashlib.sha256(f'{{"bits":"{self.bits}",{before},"seed":{self.seed},{after}}}'.encode()).hexdigest()[:12]

    @cached_property
    def coordinates(self) -> str:
        """What a table's reader takes for the same experiment, `coordinates_of` its record: cells that differ in nothing but their id are stale."""
        return f'[{self._common[2]},"{self.bits}",{self.seed}]'

    @cached_property
    def bundle_key(self) -> tuple[str, ...]:
        """Equal for cells that can run in lockstep: all but the bits is the same, and the images do not depend on the student."""
        common = replace(self, allocation=None)._common if self.allocation else self._common
        return (*common[:2], str(self.seed), "" if self.shares_synthesis else self.width)

    @property
    def label(self) -> str:
        """`gdfq`, or `gdfq(bn_weight=1.0)` where settings differ from the method's own."""
        settings = ", ".join(f"{k}={_short(v)}" for k, v in sorted(self.changed.items()))
        return f"{self.method}({settings})" if settings else self.method

    def __str__(self) -> str:
        return f"{self.label} {self.teacher.label} {self.evaluation.name} {self.bits} seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """What cell.json holds."""
        return {
            "id": self.id,
            "label": self.label,
            **{key: value for key, value in (("name", self.name), ("group", self.group)) if value},
            "identity": self.identity(),
            "method": self.method,
            "changed": self.changed,
            "fidelity": self.fidelity,
            "plugin": self.plugin,
            "source": self.source,
            **({"by_width": list(self.by_width)} if self.by_width else {}),
            **({"allocation": self.allocation.record()} if self.allocation else {}),
            **({"files": {name: PurePath(path).name for name, path in self.files.items()}} if self.files else {}),
            "teacher": {**self.teacher.as_dict(), "weights": PurePath(self.teacher.weights).name},
            "evaluation": {key: value for key, value in vars(self.evaluation).items() if key != "digest" and value not in ("", None)},
            "protocol": self.protocol.name,
            "bits": str(self.bits),
            "seed": self.seed,
            "precision": self.precision,
        }


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


@dataclass(frozen=True)
class Bundle:
    """Cells that share their images and run in lockstep in one process, widest first."""

    cells: tuple[Cell, ...]

    @cached_property
    def id(self) -> str:
        return fingerprint(sorted(cell.id for cell in self.cells))

    def __str__(self) -> str:
        first = self.cells[0]
        bits = ", ".join(c.width for c in self.cells)
        return f"{first.label} on {first.teacher.label} ({first.evaluation.name}), {bits}, seed {first.seed}"


def bundles(cells: Iterable[Cell]) -> list[Bundle]:
    """Groups cells by what they can share, in the order in which they first appear."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.bundle_key, []).append(cell)
    return [Bundle(tuple(sorted(group, key=lambda c: c.bits, reverse=True))) for group in groups.values()]

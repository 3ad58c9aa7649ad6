"""How long work will take: by what finished cells of the store took, else scaled from what `dfqbench speed` measured. No torch here.

A finished cell counts for cells of the same method, teacher, precision and kind of device, in proportion to the images they go through. Where there
is none, a file of results/speed counts for the same method, network, precision and kind of device, in proportion to steps and batch size:

    one step of n bit widths in lockstep = shared + n own,   from the figures for the fewest and the most widths that were measured
    a bundle = steps that make images x seconds of one (once for all widths) + steps that train x seconds of one

Evaluation, loading and queueing are in neither. Warm-up and calibration count as steps that train.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dfqbench.errors import counted
from dfqbench.files import read_json
from dfqbench.sweep.cell import Bundle, Cell, canonical_json

Kind = Literal["cuda", "cpu"]
FINISHED = "by finished cells of this store"
HOUR = 3600.0
NOTHING = "without training, not counted"
OVERHEADS = "overheads-"  # so begin the names of files beside them that tell something else
OLD_NETWORK, OLD_SIZE = "resnet20", 32  # what files that do not say it were measured on
OF_A_SET = re.compile(r"_(cifar10|cifar100|svhn)$")


@dataclass(frozen=True)
class Expectation:
    """Seconds that a bundle will take, and by what: finished cells, or a file of measured speeds."""

    seconds: float
    source: str


@dataclass(frozen=True)
class SpeedFile:
    """One file of results/speed. rates: by (method, phase, precision), for each number of widths the seconds of one step of one width."""

    source: str
    device: str
    network: str
    size: int
    batch: int
    rates: dict[tuple[str, str, str], dict[int, float]]

    def seconds(self, bundle: Bundle, steps: dict[str, int]) -> float | None:
        """None where a phase of this method was not measured in this precision, or the settings name no batch size."""
        cell, total = bundle.cells[0], 0.0
        for phase, count in steps.items():
            rates, batch = self.rates.get((cell.method, phase, cell.precision)), _batch(cell.config, phase)
            if not rates or batch is None:
                return None
            widths = 1 if phase == "images" else len(bundle.cells)
            total += count * step_seconds(rates, widths) * batch / self.batch
        return total


def step_seconds(rates: dict[int, float], widths: int) -> float:
    """Seconds of one step that trains so many widths: shared + widths x own, through the fewest and the most that were measured.

    rates: seconds per width, by the number of widths in lockstep. With a single figure nothing is known to be shared.
    """
    fewest, most = min(rates), max(rates)
    if fewest == most:
        return widths * rates[fewest]
    own = max((most * rates[most] - fewest * rates[fewest]) / (most - fewest), 0.0)
    shared = fewest * (rates[fewest] - own)
    return shared + widths * own


def read_speed_files(folders: Iterable[Path]) -> tuple[list[SpeedFile], list[str]]:
    """What `dfqbench speed` wrote into these folders, and a line for every file that is not of it."""
    found: list[SpeedFile] = []
    skipped: list[str] = []
    for path in dict.fromkeys(path for folder in folders for path in sorted(folder.glob("*.json"))):
        if path.name.startswith(OVERHEADS):
            continue
        try:
            found.append(_speed_file(path, read_json(path)))
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            skipped.append(f"{path}: not a file of `dfqbench speed`: {type(error).__name__}: {error}")
    return found, skipped


def _speed_file(path: Path, record: dict[str, Any]) -> SpeedFile:
    rates: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in record["rows"]:
        if row["contender"] == "engine":
            rates.setdefault((row["method"], row["phase"], row["precision"]), {})[int(row["widths"])] = float(row["seconds"])
    place, batch = record["provenance"], int(record["batch_size"])
    if batch < 1:
        raise ValueError(f"batch_size {batch}")
    threads = f", {place['threads']} threads" if place["device"] == "cpu" else ""
    source = f"scaled by steps and batch size from {path} ({place['device_name']}{threads})"
    return SpeedFile(source, place["device"], record.get("network", OLD_NETWORK), record.get("size", OLD_SIZE), batch, rates)


def steps_of(cell: Cell) -> dict[str, int] | None:
    """Steps by phase: as the sweep knows them, else as the method says; None where it cannot tell them before it is set up."""
    if cell.steps is not None:
        return cell.steps
    from dfqbench.method.registry import find_method
    from dfqbench.sweep import variants

    return variants.steps_of(find_method(cell.method), cell.settings, cell.teacher.task)


def _batch(config: dict[str, Any], phase: str) -> int | None:
    """Images of one step, by the names that settings have for it; a method that wraps another has the other's settings in `host_identity`."""
    for settings in (config, config.get("host_identity") or {}):
        for name in ("batch_size",) if phase == "train" else ("synthesis_batch", "images"):
            if name in settings:
                return int(settings[name])
    return None


def network_of(model: str) -> str:
    """`resnet20` for cifar:resnet20 and pytorchcv:resnet20_cifar10: the architecture, whoever trained it."""
    return OF_A_SET.sub("", model.rpartition(":")[2])


class Speeds:
    """What is known of one kind of device."""

    def __init__(self, results: Iterable[dict[str, Any]], device: str, measured: Sequence[SpeedFile] = ()):
        """device: cpu or cuda; `auto` counts as cuda."""
        self.device: Kind = "cpu" if device == "cpu" else "cuda"
        self.measured = [record for record in measured if record.device == self.device]
        self._finished: dict[tuple[str, str, str], list[float]] = {}  # cells, sums of seconds per image: own, shared
        self._steps: dict[str, dict[str, int] | None] = {}
        self._expected: dict[str, Expectation | None] = {}
        for result in results:
            with contextlib.suppress(KeyError, TypeError):  # what lacks something is named by `table`
                self._add(result)

    def _add(self, result: dict[str, Any]) -> None:
        cell, seconds = result["cell"], result["seconds"]
        if result["provenance"]["device"] == self.device:
            key = (cell["method"], cell["identity"]["teacher"]["weights"], cell["precision"])
            work = _work(cell["identity"]["config"])
            costs = (1.0, seconds["own"] / work, seconds["shared"] / work)
            self._finished[key] = [a + b for a, b in zip(self._finished.get(key, [0.0] * 3), costs, strict=True)]

    @property
    def known(self) -> bool:
        """Whether there is any figure at all."""
        return bool(self._finished or self.measured)

    def seconds(self, bundle: Bundle) -> float | None:
        """By finished cells alone; None where nothing like it has finished."""
        cell = bundle.cells[0]
        known = self._finished.get((cell.method, cell.teacher.weights_sha256, cell.precision))
        if known is None:
            return None
        cells, own, shared = known
        return (shared + own * len(bundle.cells)) / cells * _work(cell.config)

    def expected(self, bundle: Bundle) -> Expectation | None:
        """By finished cells, else by measured speeds; of several files that fit, the one that says the longest."""
        if bundle.id not in self._expected:
            self._expected[bundle.id] = self._expect(bundle)
        return self._expected[bundle.id]

    def _expect(self, bundle: Bundle) -> Expectation | None:
        seconds = self.seconds(bundle)
        if seconds is not None:
            return Expectation(seconds, FINISHED)
        steps = self._steps_of(bundle.cells[0])
        if steps is None:
            return None
        if not steps:
            return Expectation(0.0, NOTHING)
        cell = bundle.cells[0]
        place = (network_of(cell.teacher.model), cell.teacher.task.size)
        fitting = [record for record in self.measured if (record.network, record.size) == place]
        found = [Expectation(seconds, r.source) for r in fitting if (seconds := r.seconds(bundle, steps)) is not None]
        return max(found, key=lambda e: e.seconds, default=None)

    def _steps_of(self, cell: Cell) -> dict[str, int] | None:
        """Each set of settings is asked once."""
        key = canonical_json([cell.method, cell.config, cell.teacher.task.as_dict()])
        if key not in self._steps:
            self._steps[key] = steps_of(cell)
        return self._steps[key]


def _work(config: dict[str, Any]) -> float:
    """Images that a run of these settings goes through; 1 for methods without such settings, which then always take the same time."""
    work = 1.0
    for setting in ("epochs", "iterations", "batch_size"):
        work *= float(config.get(setting) or 1)
    return work


def hours(bundles: Sequence[Bundle], speeds: Speeds, side_by_side: int = 1) -> str:
    """`about 12.5 GPU-hours by finished cells of this store`: of how many bundles by what, and for how many no figure is known."""
    expected = [speeds.expected(bundle) for bundle in bundles]
    known = [e for e in expected if e is not None]
    sources = Counter(e.source for e in known)
    missing = [bundle for bundle, e in zip(bundles, expected, strict=True) if e is None]
    if not set(sources) - {NOTHING}:
        return f"{unit_of(speeds.device)}: {no_figure(bundles, missing, f' on {speeds.device}')}"
    seconds = sum(e.seconds for e in known) / side_by_side
    total = f"about {amount(seconds)} {unit_of(speeds.device, seconds)}"
    said = f" {next(iter(sources))}" if len(sources) == 1 else ": " + ", ".join(f"{counted(n, 'bundle')} {source}" for source, n in sources.items())
    rest = f"; no figure is known for {len(missing)} of {counted(len(bundles), 'bundle')}{_remedy(missing)}" if missing else ""
    return total + said + rest


def hours_anywhere(bundles: Sequence[Bundle], known: Sequence[Speeds]) -> list[str]:
    """`hours` for each kind of device of which something is known; one line that says so where that is none."""
    said = [hours(bundles, speeds) for speeds in known if any(e is not None and e.source != NOTHING for e in map(speeds.expected, bundles))]
    nothing = Speeds([], "cuda")
    return said or [f"expected hours: {no_figure(bundles, [bundle for bundle in bundles if nothing.expected(bundle) is None], '')}"]


def no_figure(bundles: Sequence[Bundle], missing: Sequence[Bundle], where: str) -> str:
    """Why nothing is known, and what would mend it."""
    if not missing:
        return f"{counted(len(bundles), 'bundle')} {NOTHING}"
    return f"no figure is known (nothing of these methods and teachers has finished{where} in this store){_remedy(missing)}"


def unit_of(device: Kind, seconds: float = HOUR) -> str:
    unit = "hours" if seconds >= HOUR else "minutes"
    return f"GPU-{unit}" if device == "cuda" else f"job-{unit} on CPUs"


def _remedy(missing: Sequence[Bundle]) -> str:
    """The commands that measure what is missing."""
    methods: dict[str, set[str]] = {}
    for bundle in missing:
        methods.setdefault(bundle.cells[0].teacher.model, set()).add(bundle.cells[0].method)
    commands = [
        f"`dfqbench speed --methods {','.join(sorted(names))} --network {network} --out results/speed/NAME.json`"
        for network, names in sorted(methods.items())
    ]
    return f"; on such a device {' and '.join(commands)} would make one" if commands else ""


def in_words(bundle: Bundle, known: Iterable[Speeds]) -> str:
    """`about 3.2 h on a GPU by finished cells of this store`, for each kind of device of which something is known; empty where nothing is."""
    found = [(speeds, e) for speeds in known if (e := speeds.expected(bundle)) is not None]
    if found and all(e.source == NOTHING for _, e in found):
        return NOTHING
    return ", ".join(
        f"about {amount(e.seconds)} {'h' if e.seconds >= HOUR else 'min'} on a {'GPU' if speeds.device == 'cuda' else 'CPU'} {e.source}"
        for speeds, e in found
    )


def amount(seconds: float) -> str:
    """Hours from one hour on, else whole minutes."""
    return rounded(seconds / HOUR) if seconds >= HOUR else str(max(1, round(seconds / 60)))


def rounded(number: float) -> str:
    """Two digits, and never an exponent."""
    two = float(f"{number:.2g}")
    return f"{two:.0f}" if two >= 10 else f"{two:.6f}".rstrip("0").rstrip(".") or "0"

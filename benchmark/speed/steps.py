"""How fast each method trains here, next to yardsticks measured in the same run: the textbook loop, a competent eager loop, and the floor.

Everything is measured in turn, round after round, so that what else the machine does falls on all alike; the median round counts, and for ratios the
median of every round's own. Ratios within one file can be trusted, seconds of two files cannot be compared unless the machine was idle.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfqbench.engine.device import keep_freed_memory, products_in
from dfqbench.engine.evaluate import Evaluation
from dfqbench.engine.lockstep import Lockstep
from dfqbench.engine.step_graph import WARM_UP
from dfqbench.errors import UserError
from dfqbench.method.contract import Method, Phase
from dfqbench.method.hosting import needs_of
from dfqbench.method.info import lacking
from dfqbench.method.registry import find_method
from dfqbench.method.settings import preset_of
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.speed.floor import Bytes, Device, measured_device, timed
from dfqbench.sweep.cell import Bundle, Cell, EvaluationCard
from dfqbench.task import Task
from dfqbench.teachers import TeacherCard

WIDTHS = ("w5a5", "w4a4", "w3a3", "w2a2")
AT_ONCE = "replayed at once"  # students on streams of their own
WAYS = ("engine", "replayed", AT_ONCE)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One contender. Seconds are those of one step of one bit width: a lockstep's time is divided by its widths.

    against: textbook seconds / these, round by round; floor: the least seconds that arithmetic and bytes of this step could take;
    spread: slowest round / fastest.
    """

    method: str
    phase: str
    contender: str
    precision: str
    widths: int
    seconds: float
    spread: float
    against: float | None
    floor: float | None


@dataclass
class Contender:
    name: str
    precision: str
    widths: int
    steps: int  # in one go
    run: Callable[[], None]
    rounds: list[float]
    floor: float | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


class Stand:
    """A network, a task and settings on which contenders are set up.

    name: the network's, for the record. preset: the methods' own set of settings, where they have one of that name. settings: what every method gets
    where it has such a setting.
    """

    def __init__(self, network: nn.Module, task: Task, batch_size: int, device: torch.device, name: str = "", preset: str | None = None):
        self.network, self.task, self.batch_size, self.device, self.name, self.preset = network, task, batch_size, device, name, preset
        self.settings: dict[str, Any] = {
            "batch_size": batch_size,
            "synthesis_batch": batch_size,
            "images": batch_size,
            "iterations": 1,
            "epochs": 2,
            "warmup_epochs": 1,
        }
        self.settings |= {"calibration_epochs": 1, "confidence": 0.0}

    def config(self, method: type[Method], phase: str) -> Any:
        """The phases before the measured one take a step each; while the making of images is measured, none is finished."""
        making = 10**9 if phase == "images" else 1
        wanted = method.Config.presets.get(preset_of(method.Config.presets, self.preset or ""), {}) | self.settings | {"synthesis_iterations": making}
        return method.Config(**{name: value for name, value in wanted.items() if name in method.Config.model_fields})

    def lockstep(self, method: type[Method], phase: str, widths: tuple[str, ...], precision: str) -> tuple[Lockstep, Phase]:
        """A lockstep that stands before a step of its phase: one that makes images, or one that trains students. None of its steps is evaluated."""
        protocol = PROTOCOLS["lineage"].for_method(method.info.name, method.ranges, method.batch_norm)
        card = TeacherCard("speed", "speed", "none", "0" * 64, None, self.task, 0)
        cells = tuple(
            Cell(
                method=method.info.name,
                method_version=method.version,
                config=self.config(method, phase).model_dump(mode="json"),
                teacher=card,
                evaluation=EvaluationCard("none", "0" * 64, self.task.classes, 1),
                protocol=protocol,
                bits=Bits.parse(width),
                seed=0,
                precision=precision,  # type: ignore[arg-type]
                shares_synthesis=method.info.shares_synthesis,
            )
            for width in widths
        )
        lockstep = Lockstep(
            Bundle(cells), Teacher(self.network, self.task), self.device, lambda student: Evaluation(np.array([True]), 0.0, None, 0.0)
        )
        for planned in lockstep.phases:
            if (planned.step is not None and phase == "images") or (planned.distill and phase == "train"):
                lockstep.begin_epoch(planned, calibrating=planned.calibration_epochs > 0)
                return lockstep, planned
            lockstep.begin_epoch(planned, calibrating=planned.calibration_epochs > 0)
            for _ in range(lockstep.iterations_of(planned)):
                lockstep.step(planned, calibrating=planned.calibration_epochs > 0)
        raise ValueError(f"{method.info.name} has no phase that makes images or trains: nothing to measure")


def phases_of(method: type[Method], stand: Stand) -> list[str]:
    """`images`, where a method optimises images before students train; `train`, where students do. UserError where the network will not do."""
    teacher, config = Teacher(stand.network, stand.task), stand.config(method, "train")
    lacks = lacking(needs_of(method, config), teacher.offers)
    if lacks:
        raise UserError(f"{stand.name or 'the network'} does not have what method {method.info.name} needs: {'; '.join(lacks)}")
    planned = method(teacher, config, 0)
    torch.manual_seed(0)
    planned.setup()
    found = planned.phases()
    return ["images"] * any(p.step is not None for p in found) + ["train"] * any(p.distill for p in found)


def contenders(
    name: str, phase: str, stand: Stand, textbook: type[Any] | None, precisions: list[str], widths: tuple[str, ...], say: Progress = print
) -> list[Contender]:
    """This engine with one bit width and, where synthesis is shared, several; on a GPU also with replayed steps; and the loops to compare with."""
    method, found = find_method(name), []
    steps = int(getattr(stand.config(method, phase), "student_steps", 1))  # a whole turn, where students and generator take turns
    several = [widths] if method.info.shares_synthesis and phase == "train" else []
    for precision in precisions:
        for chosen, way in itertools.product([("w4a4",), *several], WAYS if stand.device.type == "cuda" else WAYS[:1]):
            if way == AT_ONCE and len(chosen) == 1:
                continue
            lockstep, planned = stand.lockstep(method, phase, chosen, precision)

            def run(lockstep: Lockstep = lockstep, planned: Phase = planned, precision: str = precision) -> None:
                with products_in(precision):
                    for _ in range(steps):
                        lockstep.step(planned, calibrating=planned.calibration_epochs > 0)

            if way != "engine" and not _replays(lockstep, run, say, way == AT_ONCE):
                continue
            found.append(Contender(way, precision, len(chosen), steps, run, []))
    if textbook is None:
        return found
    for label in ("competent", "textbook"):
        loop = textbook(stand.network, stand.task, 4, 0, stand.config(method, phase), stand.device)
        if label == "competent":
            loop.become_competent()
        if phase == "train":
            if "images" in phases_of(method, stand):
                loop.step(False, False)
            loop.step(True, False)

        def plain(loop: Any = loop, distilling: bool = phase == "train") -> None:
            for _ in range(steps):
                loop.step(False, distilling)

        found.append(Contender(label, "fp32", 1, steps, plain, []))
    return found


def _replays(lockstep: Lockstep, run: Callable[[], None], say: Progress, streams: bool) -> bool:
    """Has a lockstep record its steps, and says why where it does not."""
    why_not: list[str] = []
    lockstep.replay_steps(why_not.append, streams=streams)
    for _ in range(0 if why_not else WARM_UP + 1):
        run()
    for line in why_not:
        say(line)
    return not why_not


def floor_of(contender: Contender, device: Device) -> float:
    """Seconds per step and bit width, from the operations that one step of it does."""
    with FlopCounterMode(display=False) as flops, Bytes() as moved:
        contender.run()
    return device.floor(flops.get_total_flops(), moved.total, contender.precision) / contender.steps / contender.widths


def measure(
    names: list[str],
    textbooks: Mapping[str, type[Any]],
    stand: Stand,
    precisions: list[str],
    rounds: int,
    seconds: float,
    say: Progress,
    widths: tuple[str, ...] = WIDTHS,
) -> Iterator[Row]:
    """Rows, method after method. Every contender runs about `seconds` in each round."""
    keep_freed_memory()  # for all contenders alike
    planned = {name: phases_of(find_method(name), stand) for name in names}
    device = measured_device(stand.device, precisions)
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in device.flops.items())
    say(f"this device: {rates}, {device.bandwidth / 1e9:.1f} GB/s")
    for name, phases in planned.items():
        for phase in phases:
            found = contenders(name, phase, stand, textbooks.get(name), precisions, widths, say)
            repeats = []
            for contender in found:
                contender.run()  # warm
                once = timed(contender.run, stand.device)
                repeats.append(max(1, round(seconds / once)))
                contender.floor = floor_of(contender, device) if contender.name == "engine" else None
            for number in range(rounds):
                say(f"{name}, {phase}: round {number + 1} of {rounds}")
                for contender, repeat in zip(found, repeats, strict=True):
                    taken = timed(lambda c=contender, n=repeat: [c.run() for _ in range(n)], stand.device)  # type: ignore[misc]
                    contender.rounds.append(taken / repeat / contender.steps / contender.widths)
            plain = next((c.rounds for c in found if c.name == "textbook"), None)
            for contender in found:
                yield Row(
                    method=name,
                    phase=phase,
                    contender=contender.name,
                    precision=contender.precision,
                    widths=contender.widths,
                    seconds=contender.seconds,
                    spread=max(contender.rounds) / min(contender.rounds),
                    against=statistics.median(slow / own for slow, own in zip(plain, contender.rounds, strict=True)) if plain else None,
                    floor=contender.floor,
                )


def file_name(provenance: dict[str, Any]) -> str:
    """The device's name in letters that files may have, with the threads of a CPU."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", provenance["device_name"]).strip("-").lower()
    return f"{name}-{provenance['threads']}-threads" if provenance["device"] == "cpu" else name


def record(rows: list[Row], stand: Stand, command: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """What results/speed/<device>.json holds."""
    measured_on = {"network": stand.name, "size": stand.task.size, "batch_size": stand.batch_size, "preset": stand.preset}
    return {"command": command, **measured_on, "rows": [asdict(row) for row in rows], "provenance": provenance}

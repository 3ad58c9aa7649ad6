"""Before a bundle begins on a GPU: a few steps of each of its phases, in small.

What has no deterministic kernel there is named now: torch refuses such an operation where it is met, which may be after hours. The bundle is run all
the same, by the kernel that there is; its results say that they do not promise the same bits again (`deterministic: false`).

And steps are replayed as CUDA graphs only where, here and now, replayed steps end with the bits of steps that are run as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dfqbench.engine.device import is_lost
from dfqbench.engine.evaluate import Evaluation
from dfqbench.engine.lockstep import Lockstep
from dfqbench.engine.state_difference import difference
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.sweep.cell import Bundle, Cell, canonical_json
from dfqbench.testing import BUDGET

STEPS = 16  # of an epoch at most; what the methods' `quick` settings leave is less
REFUSED = " does not have a deterministic implementation"  # so torch says it
REPLAYED = 20  # of each kind of step, that are compared
_known: dict[str, str | None] = {}
_replays: dict[str, str | None] = {}


def rehearse(bundle: Bundle, teacher: Teacher, device: torch.device, say: Callable[[str], None]) -> None:
    """Sets torch to refuse what is not deterministic, or, where a step of this bundle has such an operation, to take it; `say` names it then."""
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(True)
    cell, key = bundle.cells[0], _question(bundle.cells[0])
    if key not in _known:
        _known[key] = _refused(cell, teacher, device)
    if found := _known[key]:
        say(f"{cell.method}: {found} has no deterministic kernel on a GPU: the same settings need not give the same bits again")
        warnings.filterwarnings("ignore", f".*{REFUSED.strip()}")
        torch.use_deterministic_algorithms(True, warn_only=True)


def why_not_replayed(bundle: Bundle, teacher: Teacher, device: torch.device, streams: bool = False) -> str | None:
    """Runs each kind of step of the bundle in small, as it is and replayed. None where both end with the same bits, or why not to replay them.

    streams: with all students, replayed at once; else with one. "" where the method does not promise steps that are all alike. Raises RuntimeError
    where the GPU is dead afterwards.
    """
    cells = bundle.cells if streams else bundle.cells[:1]
    key = " ".join([_question(cells[0]), *(str(cell.bits) for cell in cells)] if streams else [_question(cells[0])])
    if key not in _replays:
        _replays[key] = _difference(cells, teacher, device, streams)
    return _replays[key]


def _difference(cells: Sequence[Cell], teacher: Teacher, device: torch.device, streams: bool) -> str | None:
    found = [small(cell, {"iterations": REPLAYED, "synthesis_iterations": REPLAYED}) for cell in cells]
    quick = {cell.width: cell for cell in found if cell is not None}  # without their allocations, two may be alike
    if not quick:
        return "the few steps of a check do not go with its settings"
    said, plain = list[str](), None
    try:
        small_bundle = Bundle(tuple(quick.values()))
        if not _lockstep(small_bundle, teacher, device).method.static_step:
            return ""
        plain = _steps(small_bundle, teacher, device, REPLAYED)
        replayed = _steps(small_bundle, teacher, device, REPLAYED, said.append, streams)
    except Exception as error:
        if is_lost(error, device) and plain is not None:
            raise RuntimeError("steps were replayed as CUDA graphs, as a check: try again with --no-graphs") from error
        if is_lost(error, device):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if said:
        return said[0].partition(": ")[2]
    if not replayed.parts.replayed:
        return "no kind of step is taken often enough to be recorded"
    alike = all(difference(*(lockstep.state()[part] for lockstep in (plain, replayed))) is None for part in ("method", "students"))
    return None if alike else "replayed steps end with other bits than steps that are run as they are"


def _question(cell: Cell) -> str:
    """Cells that give the same answer have the same."""
    teacher = [cell.teacher.task.as_dict(), cell.teacher.model, cell.teacher.weights_sha256]
    return canonical_json([cell.method, cell.config, teacher, cell.protocol.fingerprint(), cell.precision])


def small(cell: Cell, more: dict[str, Any] | None = None) -> Cell | None:
    """The cell with settings that take seconds: those of the conformance checks, and `more`. None where they do not go with its own."""
    method = find_method(cell.method)
    fields = method.Config.model_fields
    config = {name: value for name, value in cell.config.items() if name != "host_identity"}
    for name, value in {**BUDGET, **method.quick, **(more or {})}.items():
        if name in fields:
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
    try:
        return replace(cell, config=method.Config(**config).model_dump(mode="json"), changed={}, allocation=None)
    except ValidationError:
        return None


def _refused(cell: Cell, teacher: Teacher, device: torch.device) -> str | None:
    """The operation that torch refuses. Whatever else goes wrong will go wrong in the run, which tells it."""
    quick = small(cell)
    if quick is None:
        return None
    with suppress(Exception):
        try:
            _steps(Bundle((quick,)), teacher, device, STEPS)
        except RuntimeError as error:
            if REFUSED in str(error):
                return str(error).partition(REFUSED)[0].split()[-1]
    return None


def _lockstep(bundle: Bundle, teacher: Teacher, device: torch.device) -> Lockstep:
    return Lockstep(bundle, teacher, device, _not_evaluated, yardstick=_noise(bundle.cells[0], teacher))


def _steps(
    bundle: Bundle, teacher: Teacher, device: torch.device, most: int, replayed: Callable[[str], None] | None = None, streams: bool = False
) -> Lockstep:
    """The plan with so many steps of an epoch at most. replayed: steps are, and this takes the line where they cannot be."""
    lockstep = _lockstep(bundle, teacher, device)
    if replayed is not None:
        lockstep.replay_steps(replayed, streams=streams)
    for index, (phase, number) in enumerate(lockstep.epochs):
        calibrating = number < phase.calibration_epochs
        lockstep.begin_epoch(phase, calibrating)
        for _ in range(min(lockstep.iterations_of(phase), most)):
            lockstep.step(phase, calibrating)
        lockstep.epoch = index + 1
    for trainee in lockstep.trainees:
        lockstep.method.finish(trainee.student)
    return lockstep


def _noise(cell: Cell, teacher: Teacher) -> Tensor | None:
    """In place of the images of a yardstick."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(BUDGET["batch_size"], *teacher.task.image_shape, generator=random) if cell.yardstick else None


def _not_evaluated(student: object) -> Evaluation:
    raise AssertionError("nothing is evaluated in a rehearsal")

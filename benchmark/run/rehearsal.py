"""Before a bundle begins on a GPU: a few steps of each of its phases, in small, so that what has no deterministic kernel there is named now.

Torch refuses such an operation where it is met, which may be after hours. The bundle is run all the same, by the kernel that there is; its results
say that they do not promise the same bits again (`deterministic: false`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from pydantic import ValidationError

from dfqbench.engine.evaluate import Evaluation
from dfqbench.engine.lockstep import Lockstep
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.sweep.cell import Bundle, Cell, canonical_json
from dfqbench.testing import BUDGET

STEPS = 16  # of an epoch at most; what the methods' `quick` settings leave is less
REFUSED = " does not have a deterministic implementation"  # so torch says it
_known: dict[str, str | None] = {}


def rehearse(bundle: Bundle, teacher: Teacher, device: torch.device, say: Callable[[str], None]) -> None:
    """Sets torch to refuse what is not deterministic, or, where a step of this bundle has such an operation, to take it; `say` names it then."""
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(True)
    cell = bundle.cells[0]
    key = canonical_json([cell.method, cell.config, cell.teacher.task.as_dict(), cell.teacher.model, cell.protocol.name, cell.precision])
    if key not in _known:
        _known[key] = _refused(cell, teacher, device)
    if found := _known[key]:
        say(f"{cell.method}: {found} has no deterministic kernel on a GPU: the same settings need not give the same bits again")
        warnings.filterwarnings("ignore", f".*{REFUSED.strip()}")
        torch.use_deterministic_algorithms(True, warn_only=True)


def small(cell: Cell) -> Cell | None:
    """The cell with settings that take seconds: those of the conformance checks. None where they do not go with its own."""
    method = find_method(cell.method)
    fields = method.Config.model_fields
    config = {name: value for name, value in cell.config.items() if name != "host_identity"}
    for name, value in {**BUDGET, **method.quick}.items():
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
            _steps(quick, teacher, device)
        except RuntimeError as error:
            if REFUSED in str(error):
                return str(error).partition(REFUSED)[0].split()[-1]
    return None


def _steps(cell: Cell, teacher: Teacher, device: torch.device) -> None:
    noise = torch.randn(BUDGET["batch_size"], *teacher.task.image_shape) if cell.yardstick else None
    lockstep = Lockstep(Bundle((cell,)), teacher, device, _not_evaluated, yardstick=noise)
    for index, (phase, number) in enumerate(lockstep.epochs):
        calibrating = number < phase.calibration_epochs
        lockstep.begin_epoch(phase, calibrating)
        for _ in range(min(lockstep.iterations_of(phase), STEPS)):
            lockstep.step(phase, calibrating)
        lockstep.epoch = index + 1
    for trainee in lockstep.trainees:
        lockstep.method.finish(trainee.student)


def _not_evaluated(student: object) -> Evaluation:
    raise AssertionError("nothing is evaluated in a rehearsal")

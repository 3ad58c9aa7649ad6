"""Allocators: plug-ins that choose a bit width for each tensor. One class in one file, found as methods are.

Built in are the files of methods/allocators/; others are in plug-in files or in installed packages (entry-point group `dfqbench.allocators`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dfqbench.errors import UserError, nearest
from dfqbench.method import plugins, registry
from dfqbench.method.info import FIDELITY, Fidelity
from dfqbench.method.plugins import Origin
from dfqbench.method.settings import Field, MethodConfig
from dfqbench.task import KINDS, Kind

if TYPE_CHECKING:
    from dfqbench.method.allocation import AllocationProblem

ENTRY_POINTS, BUILT_IN = "dfqbench.allocators", "dfqbench_methods.allocators"
A = TypeVar("A", bound="type[Allocator]")
_allocators: dict[str, type[Allocator]] = plugins.table()


class AllocatorConfig(MethodConfig):
    """Settings of an allocator; every one takes part in a cell's identity."""

    source = "chosen here"

    seed: int = Field(0, ge=0, description="of the allocator's random numbers; the seeds of cells share one allocation")


@dataclass(frozen=True)
class AllocatorInfo:
    """What is known of an allocator beside its code; see `MethodInfo`."""

    name: str
    paper: str
    fidelity: Fidelity
    summary: str
    source: Origin


class Allocator:
    """Chooses a width for each tensor of a problem. Subclass it, decorate the class with `register_allocator`, and write `allocate`.

    The docstring's first line is what `dfqbench allocators` says. `self.problem` answers what a choice costs, `self.config` holds the settings.
    """

    Config: ClassVar[type[AllocatorConfig]] = AllocatorConfig
    version: ClassVar[int] = 1  # raise it whenever the same settings choose otherwise than before
    of_activations: ClassVar[bool] = True  # False: it can only choose for weights
    tasks: ClassVar[Collection[Kind]] = KINDS  # whose networks it can choose for
    quick: ClassVar[dict[str, Any]] = {}  # settings with which the checks take seconds
    info: ClassVar[AllocatorInfo]  # set by `register_allocator`

    def __init__(self, problem: AllocationProblem, config: Any):
        self.problem, self.config = problem, config

    @abstractmethod
    def allocate(self) -> Sequence[int]:
        """A width for each of `self.problem.tensors`, within the budget; of the problem's `widths`."""


def register_allocator(name: str, *, paper: str, fidelity: Fidelity) -> Callable[[A], A]:
    """Class decorator that makes an allocator known by `name`; paper and fidelity: as for methods. Raises UserError if the name is taken."""
    if fidelity not in FIDELITY:
        raise UserError(f"allocator {name}: fidelity {fidelity!r} is none of {', '.join(FIDELITY)}")

    def add(cls: A) -> A:
        file, known = Path(inspect.getfile(cls)), _allocators.get(name)
        first = Path(inspect.getfile(known)) if known else _built_in().get(name, file)  # one that is built in need not be imported yet
        if first.resolve() != file.resolve():
            raise UserError(f"two allocators are called {name!r}: {first} and {file}")
        cls.info = AllocatorInfo(name, paper, fidelity, (inspect.getdoc(cls) or "").split("\n")[0], plugins.origin(cls, file))
        _allocators[name] = cls
        return cls

    return add


@functools.cache
def _built_in() -> dict[str, Path]:
    """The files in methods/allocators/, without importing any: each is called as its allocator."""
    folders = map(Path, importlib.import_module(BUILT_IN).__path__)
    return {file.stem: file for folder in folders for file in folder.glob("[!_]*.py")}


@functools.cache
def _discover() -> None:
    registry.import_modules(BUILT_IN)
    plugins.load_entry_points(ENTRY_POINTS)


def untouched() -> bool:
    """As `registry.untouched`."""
    return not _allocators


def find_allocator(name: str) -> type[Allocator]:
    """The allocator of that name. Raises UserError with the nearest known name."""
    _discover()
    if name not in _allocators:
        hint = "".join(f"; broken plug-in {plugin}: {why}" for plugin, why in plugins.broken.items())
        raise UserError(f"unknown allocator {name!r}: {nearest(name, _allocators)}{hint}")
    return _allocators[name]


def list_allocators() -> list[type[Allocator]]:
    """All of them, sorted by name."""
    _discover()
    return [_allocators[name] for name in sorted(_allocators)]


def allocate(allocator: Allocator) -> tuple[int, ...]:
    """What the allocator chooses. Raises RuntimeError where that is not within the budget or not of the problem's widths."""
    problem, name = allocator.problem, allocator.info.name
    vector = tuple(int(width) for width in allocator.allocate())
    if len(vector) != len(problem.tensors) or not {*vector} <= {*problem.widths}:
        raise RuntimeError(f"allocator {name}: {vector} are not {len(problem.tensors)} widths of {', '.join(map(str, problem.widths))}")
    if not problem.is_feasible(vector):
        raise RuntimeError(f"allocator {name}: {vector} is over the budget")
    return vector

"""Whether the steps of a method are the same operations every time, told on a CPU: every operation of every step is looked at."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfqbench.engine.lockstep import Lockstep
from dfqbench.engine.method_state import anchors_of, streams_of
from dfqbench.engine.step_graph import WARM_UP, first_difference

T = TypeVar("T")
Operation = tuple[Any, ...]  # the name, then what it was given
ASKS = {  # operations whose result the program, or the size of a tensor, waits for
    "_local_scalar_dense": "reads a tensor's value (.item(), float(), `if`)",
    "equal": "reads a tensor's value (torch.equal)",
    "nonzero": "makes a tensor whose size depends on values (nonzero)",
    "masked_select": "makes a tensor whose size depends on values (masked_select)",
    "_unique2": "makes a tensor whose size depends on values (unique)",
    "unique_dim": "makes a tensor whose size depends on values (unique)",
    "unique_consecutive": "makes a tensor whose size depends on values (unique)",
    "bincount": "makes a tensor whose size depends on values (bincount)",
    "lift_fresh": "makes a tensor of Python numbers (torch.tensor, or a number that is logged)",
}
FETCHES = {"tolist", "numpy", "cpu", "__array__", "from_numpy"}  # calls that a CPU serves without any operation
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Operations(TorchDispatchMode):
    """Notes each operation with the shapes, types and numbers that it is given, and what a replayed step must not do.

    made: addresses of tensors that this step has made; any other has to lie at the same place in every step.
    """

    def __init__(self, made: set[int]):
        super().__init__()
        self.made, self.outside = made, set[int]()
        self.done: list[Operation] = []
        self.faults: list[str] = []
        self.quiet = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if not self.quiet:
            # the engine keeps the rates of fused optimizers in tensors on a GPU
            self.done.append((function.name(), self._given(args), self._given({k: v for k, v in kwargs.items() if k != "lr"})))
            if name in ASKS:
                self.faults.append(ASKS[name])
            if name in INDEXES and any(i.dtype in (torch.bool, torch.uint8) for i in _tensors(args[1])):
                self.faults.append("makes a tensor whose size depends on values (a mask as an index)")
        result = function(*args, **kwargs)
        self.made |= {place for place in map(_place, _tensors(result)) if place not in self.outside}
        return result

    def _given(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = _place(value)
            if place in self.made:
                return (tuple(value.shape), value.dtype, None)
            self.outside.add(place)
            return (tuple(value.shape), value.dtype, place)
        if isinstance(value, dict):
            return tuple((key, self._given(part)) for key, part in value.items())
        if isinstance(value, list | tuple):
            return tuple(self._given(part) for part in value)
        return value if value is None or isinstance(value, bool | int | float | str | torch.dtype) else type(value).__name__


class _Calls(TorchFunctionMode):
    """What only shows in the calls: those that fetch values, and `one_hot`, which looks at its labels on a CPU but not on a GPU."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in FETCHES:
            self.operations.faults.append(f"moves values between the device and Python ({name})")
        before, self.operations.quiet = self.operations.quiet, self.operations.quiet or name == "one_hot"
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.operations.quiet = before


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class ComparedParts:
    """Runs the parts of a lockstep's steps as they are, and raises AssertionError where one is not what it was in the step before.

    The first steps of a kind are left out, as they are where steps are recorded, and those of no kind. operations: of the others, without addresses,
    by the number of the kind of epoch, the kind of step and the part; None where all steps were left out. compared: how many were not.
    """

    def __init__(self, lockstep: Lockstep):
        self.method, self.students = lockstep.method, {t.name: (t.student, t.optimizer) for t in lockstep.trainees}
        self.operations: dict[tuple[int, Hashable, str], list[Operation] | None] = {}
        self.compared = self.replayed = self._number = 0
        self.streams = False
        self._epoch: object = None
        self._kind: Hashable = 0
        self._made: set[int] = {0}
        self.forget()

    def begin(self, epoch: object) -> None:
        if epoch != self._epoch:
            self._epoch, self._number = epoch, self._number + 1
            self.forget()

    def next(self, kind: Hashable) -> None:
        self._kind, self._made = kind, {0}
        if kind is None:
            self.forget()

    def join(self) -> None: ...

    def forget(self) -> None:
        self._seen: dict[tuple[str, Hashable], int] = {}
        self._before: dict[tuple[str, Hashable], list[Operation]] = {}

    def run(self, name: str, work: Callable[[], T]) -> T:
        if self._kind is None:
            return work()
        part_of_kind, place = (name, self._kind), (self._number, self._kind, name)
        self.operations.setdefault(place, None)
        operations, before = Operations(self._made), self._held()
        with operations, _Calls(operations):
            result = work()
        self._seen[part_of_kind] = self._seen.get(part_of_kind, 0) + 1
        if self._seen[part_of_kind] <= WARM_UP:
            return result
        part = "the making of images" if name == Lockstep.SHARED else "a student's step"
        assert not operations.faults, f"{part} {operations.faults[0]}"
        moved = first_difference(before, self._held())
        assert moved is None, f"{part} replaces or changes {moved}"
        first = self._before.setdefault(part_of_kind, operations.done)
        unlike = next((pair for pair in zip(first, operations.done, strict=False) if pair[0] != pair[1]), None)
        assert unlike is None, f"{part} does other operations than in the step before: {unlike and unlike[1][0]} on {unlike and unlike[1][1:]}"
        assert len(first) == len(operations.done), f"{part} does {len(operations.done)} operations, and {len(first)} in the step before"
        self.operations[place] = [_without_addresses(operation) for operation in operations.done]
        self.compared += 1
        return result

    def _held(self) -> dict[str, Any]:
        named = {f"random stream {name!r}": True for name in streams_of(self.method)}
        logged = {f"the log's {name!r}": True for _, name in self.method._log.counts()}
        return anchors_of(self.method, "self") | anchors_of(self.students, "students") | named | logged


def _without_addresses(given: Any) -> Any:
    if isinstance(given, tuple) and len(given) == 3 and isinstance(given[0], tuple) and isinstance(given[1], torch.dtype):
        return given[:2]
    return tuple(_without_addresses(part) for part in given) if isinstance(given, tuple) else given

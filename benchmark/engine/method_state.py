"""What a method holds: set up, saved into a checkpoint, loaded from one, and found by kind (modules, optimizers, random streams)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfqbench.method.contract import Method, stream_seed
from dfqbench.method.image_set import ImageSet
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.sweep.cell import Cell


def state_of(method: Method) -> dict[str, Any]:
    """Everything that a checkpoint must hold of a method. Raises TypeError naming an attribute that cannot be saved."""
    own = {name: value for name, value in vars(method).items() if name not in _GIVEN}
    return {
        "attributes": {name: _save(value, f"self.{name}") for name, value in own.items()},
        "streams": {name: stream.get_state() for name, stream in method._streams.items()},
        "log": {scope: {name: list(entry) for name, entry in values.items() if entry[1]} for scope, values in method._log.sums.items()},
    }


def restore_state(method: Method, state: dict[str, Any]) -> None:
    """Brings a method that was just set up to a saved state."""
    for name, value in state["attributes"].items():
        setattr(method, name, _load(value, getattr(method, name, None), f"self.{name}", method.device))
    for name, stream in state["streams"].items():
        method.random(name).set_state(stream.cpu())
    method._log.sums = {
        scope: {name: [total.to(method.device), count] for name, (total, count) in values.items()} for scope, values in state["log"].items()
    }


_GIVEN = {"teacher", "task", "config", "seed", "device", "_streams", "_schedules", "_log", "_work", "_image_sets"}  # what __init__ makes anew


def _save(value: Any, name: str) -> Any:
    if isinstance(value, Method):
        return {"method": state_of(value)}
    if hasattr(value, "state_dict"):
        return {"state_dict": value.state_dict()}
    if isinstance(value, torch.Generator):
        return {"generator": value.get_state()}
    if isinstance(value, Tensor):
        return {"tensor": value.detach()}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_save(v, f"{name}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {k: _save(v, f"{name}[{k!r}]") for k, v in value.items()}}
    raise TypeError(
        f"{name} is a {type(value).__name__}, which cannot be checkpointed: keep a tensor, a number, a list or dict of these, "
        "something with a state_dict, or compute it where it is needed"
    )


def _load(saved: dict[str, Any], current: Any, name: str, device: torch.device) -> Any:
    ((kind, content),) = saved.items()
    if kind == "method":
        restore_state(current, content)
        return current
    if kind in ("state_dict", "generator"):
        if current is None:
            raise TypeError(f"{name} was made after setup(), so it cannot be restored: make it in setup()")
        if kind == "state_dict":
            current.load_state_dict(content)
        else:
            current.set_state(content.cpu())
        return current
    if kind == "tensor":
        if isinstance(current, Tensor) and current.shape == content.shape and current.dtype == content.dtype:
            with torch.no_grad():
                current.copy_(content)  # in place: an optimizer may hold this very tensor
            return current
        return content.to(current.device if isinstance(current, Tensor) else device)  # a checkpoint is read onto the CPU
    if kind == "value":
        return content
    if kind == "dict":
        return {k: _load(v, current.get(k) if isinstance(current, dict) else None, f"{name}[{k!r}]", device) for k, v in content.items()}
    have = current if isinstance(current, list | tuple) else ()
    loaded = [_load(v, have[i] if i < len(have) else None, f"{name}[{i}]", device) for i, v in enumerate(content)]
    return tuple(loaded) if kind == "tuple" else loaded


def streams_of(method: Method, name: str = "") -> dict[str, torch.Generator]:
    """The random streams that a method, and the methods inside it, draw from, by their names."""
    found = {f"{name}{stream}": generator for stream, generator in method._streams.items()}
    for attribute, value in vars(method).items():
        if isinstance(value, Method):
            found |= streams_of(value, f"{name}{attribute}.")
        elif isinstance(value, torch.Generator):
            found[f"{name}self.{attribute}"] = value
    return found


def optimizers_of(method: Method) -> Iterator[torch.optim.Optimizer]:
    """The optimizers that a method, and the methods inside it, made for themselves."""
    for name, value in vars(method).items():
        if isinstance(value, Method):
            yield from optimizers_of(value)
        elif name not in _GIVEN:
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, torch.optim.Optimizer))


def image_sets_of(method: Method) -> Iterator[ImageSet]:
    """The image sets of a method, and of the methods inside it."""
    yield from method._image_sets
    for value in vars(method).values():
        if isinstance(value, Method):
            yield from image_sets_of(value)


def modules_of(method: Method) -> Iterator[nn.Module]:
    """The modules that a method, and the methods inside it, made for themselves."""
    for name, value in vars(method).items():
        if isinstance(value, Method):
            yield from modules_of(value)
        elif name not in _GIVEN:
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, nn.Module))


def anchors_of(value: Any, name: str) -> dict[str, Any]:
    """What a replayed step relies on to stay where and as it is: of everything in `value`, tensors by address, numbers and strings by value.

    value: a method, something with a `state_dict`, or lists, tuples and dicts of such. Random streams are left out: they move by themselves.
    """
    if isinstance(value, Tensor):
        return {name: value.data_ptr()}
    if isinstance(value, torch.Generator):
        return {}
    if isinstance(value, Method):
        parts = [(f"{name}.{attribute}", part) for attribute, part in vars(value).items() if attribute not in _GIVEN]
    elif hasattr(value, "state_dict"):
        parts = [(name, value.state_dict())]
    elif isinstance(value, dict):
        parts = [(f"{name}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{name}[{index}]", part) for index, part in enumerate(value)]
    else:
        return {name: value}
    return {anchor: place for part_name, part in parts for anchor, place in anchors_of(part, part_name).items()}


class Attributes:
    """What the attributes of a method, and of the methods inside it, are bound to now; `put_back` undoes what was bound since.

    Lists, tuples and dicts are looked into; the contents of tensors and modules are not kept.
    """

    def __init__(self, method: Method):
        self.method, self.streams = method, dict(method._streams)
        self.bound = {name: _copied(value) for name, value in vars(method).items() if name not in _GIVEN}

    def put_back(self) -> None:
        self.method._streams = dict(self.streams)
        for name in [name for name in vars(self.method) if name not in _GIVEN and name not in self.bound]:
            delattr(self.method, name)
        for name, value in self.bound.items():
            if isinstance(value, Attributes):
                value.put_back()
            else:
                setattr(self.method, name, value)


def _copied(value: Any) -> Any:
    if isinstance(value, Method):
        return Attributes(value)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        copies = [_copied(part) for part in value]
        return tuple(copies) if isinstance(value, tuple) else copies
    return value


def set_up(cell: Cell, teacher: Teacher, device: torch.device, work: Path | None) -> Method:
    """The method of a cell, set up: what it makes lands on the device, and its initial values depend on the seed alone."""
    method_class = find_method(cell.method)
    method = method_class(teacher, method_class.Config(**cell.config), cell.seed, device, work)
    torch.manual_seed(stream_seed(cell.seed, "setup"))
    with torch.device(device):
        method.setup()
    for module in modules_of(method):
        module.to(memory_format=torch.channels_last)
    state_of(method)  # what cannot be checkpointed is told now, not after an hour
    return method

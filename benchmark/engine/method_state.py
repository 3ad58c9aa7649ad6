"""What a method holds: set up, saved into a checkpoint, loaded from one, and found by kind (modules, optimizers, random streams)."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.method.contract import Method, stream_seed
from dfqbench.method.image_set import ImageSet
from dfqbench.method.registry import find_method
from dfqbench.method.yardstick import YardstickImages
from dfqbench.network import Teacher
from dfqbench.quantization import Bits
from dfqbench.sweep.cell import Cell

# a checkpoint is loaded with weights_only: these and tensors are what may be in it, as values and, without the last three, as keys
_PLAIN = (type(None), bool, int, float, str, Bits, torch.Size, torch.dtype, torch.device)
_DICTS = (dict, OrderedDict, defaultdict, Counter)  # other than a dict, they are restored into the one that `setup` made
_GIVEN = {"teacher", "task", "config", "seed", "device", "_streams", "_schedules", "_log", "_work", "_image_sets"}  # what __init__ makes anew
torch.serialization.add_safe_globals([Bits])


def state_of(method: Method, restorable: set[str] | None = None, name: str = "self") -> dict[str, Any]:
    """Everything that a checkpoint must hold of a method.

    restorable: what `restorable_of` named before the first step; None where that is now. Raises TypeError naming an attribute that cannot be saved,
    or could not be restored.
    """
    return {
        "attributes": {attribute: _save(value, f"{name}.{attribute}", restorable) for attribute, value in _own(method)},
        "streams": {stream: generator.get_state() for stream, generator in method._streams.items()},
        "on_cpu": [stream for stream, generator in method._streams.items() if generator.device.type == "cpu"],
        "log": {scope: {name: list(entry) for name, entry in values.items() if entry[1]} for scope, values in method._log.sums.items()},
    }


def restore_state(method: Method, state: dict[str, Any], name: str = "self") -> None:
    """Brings a method that was just set up to a saved state."""
    for attribute, value in state["attributes"].items():
        setattr(method, attribute, _load(value, getattr(method, attribute, None), f"{name}.{attribute}", method.device))
    for stream, generator in state["streams"].items():
        method.random(stream, on_cpu=stream in state.get("on_cpu", ())).set_state(generator.cpu())
    method._log.sums = {
        scope: {name: [total.to(method.device), count] for name, (total, count) in values.items()} for scope, values in state["log"].items()
    }


def restorable_of(method: Method) -> set[str]:
    """The names of what a state is restored into: methods, modules, optimizers, generators, and dicts of a kind of their own."""
    return {name for name, value in parts_of(method) if _is_restored_into(value)}


def parts_of(value: Any, name: str = "self") -> Iterator[tuple[str, Any]]:
    """What a method, or a list, tuple or dict of one, holds, with its name: containers and the methods inside it come before what they hold."""
    yield name, value
    if isinstance(value, Method):
        inside = [(f"{name}.{attribute}", part) for attribute, part in _own(value)]
    elif isinstance(value, dict):
        inside = [(_at(name, key), part) for key, part in value.items()]
    else:
        inside = [(f"{name}[{i}]", part) for i, part in enumerate(value)] if type(value) in (list, tuple) else []
    for part_name, part in inside:
        yield from parts_of(part, part_name)


def _own(method: Method) -> list[tuple[str, Any]]:
    return [(attribute, value) for attribute, value in vars(method).items() if attribute not in _GIVEN]


def _at(name: str, key: Any) -> str:
    return f"{name}[{key if isinstance(key, Bits) else repr(key)}]"


def _has_state(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict") and not isinstance(value, type)


def _is_restored_into(value: Any) -> bool:
    return isinstance(value, Method | torch.Generator) or _has_state(value) or type(value) in _DICTS[1:]


def _save(value: Any, name: str, restorable: set[str] | None) -> Any:
    if restorable is not None and name not in restorable and _is_restored_into(value):
        raise TypeError(f"{name}, a {type(value).__name__}, was made after setup(), so it could not be restored: make it in setup()")
    if isinstance(value, Method):
        return {"method": state_of(value, restorable, name)}
    if _has_state(value):
        state = value.state_dict()
        _check_loadable(state, f"{name}.state_dict()")
        return {"state_dict": state}
    if isinstance(value, torch.Generator):
        return {"generator": value.get_state()}
    if isinstance(value, Tensor):
        return {"tensor": value.detach()}
    if type(value) in _PLAIN:
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_save(v, f"{name}[{i}]", restorable) for i, v in enumerate(value)]}
    if type(value) in _DICTS:
        _check_keys(value, name)
        return {"dict": {k: _save(v, _at(name, k), restorable) for k, v in value.items()}}
    raise TypeError(
        f"{name} is a {type(value).__name__}, which cannot be checkpointed: keep a tensor, a number, a list or dict of these, "
        "something with a state_dict, or compute it where it is needed"
    )


def _check_keys(value: dict[Any, Any], name: str) -> None:
    for key in value:
        for part in key if type(key) is tuple else (key,):
            if type(part) not in _PLAIN[:6]:
                raise TypeError(
                    f"{name} has the key {key!r}, a {type(part).__name__}, which cannot be checkpointed: "
                    "take text, a number, the student's bits, or a tuple of these"
                )


def _check_loadable(value: Any, name: str) -> None:
    """Raises TypeError for a part of a state_dict with which the whole checkpoint could not be loaded."""
    if type(value) in (dict, OrderedDict, Counter):
        _check_keys(value, name)
        for key, part in value.items():
            _check_loadable(part, _at(name, key))
    elif type(value) in (list, tuple, set):
        for part in value:
            _check_loadable(part, name)
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(f"{name} holds a {type(value).__name__}, which cannot be checkpointed: a tensor, a number or text can")


def _load(saved: dict[str, Any], current: Any, name: str, device: torch.device) -> Any:
    ((kind, content),) = saved.items()
    if kind in ("method", "state_dict", "generator"):
        if current is None:
            raise TypeError(f"{name} was made after setup(), so it cannot be restored: make it in setup()")
        if kind == "method":
            restore_state(current, content, name)
        elif kind == "state_dict":
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
        have = current if isinstance(current, dict) else {}
        loaded = {k: _load(v, have.get(k), _at(name, k), device) for k, v in content.items()}
        return _filled(have, loaded) if type(have) in _DICTS[1:] else loaded
    there = current if isinstance(current, list | tuple) else ()
    items = [_load(v, there[i] if i < len(there) else None, f"{name}[{i}]", device) for i, v in enumerate(content)]
    return tuple(items) if kind == "tuple" else items


def _filled(like: dict[Any, Any], content: dict[Any, Any]) -> dict[Any, Any]:
    """`content` in a dict of the kind of `like`: a defaultdict keeps its default."""
    made = copy.copy(like)
    made.clear()
    made.update(content)
    return made


def streams_of(method: Method) -> dict[str, torch.Generator]:
    """The random streams that a method, and the methods inside it, draw from, by their names."""
    found: dict[str, torch.Generator] = {}
    for name, value in parts_of(method):
        if isinstance(value, Method):
            found |= {f"{name}.".removeprefix("self.") + stream: generator for stream, generator in value._streams.items()}
        elif isinstance(value, torch.Generator):
            found[name] = value
    return found


def optimizers_of(method: Method) -> Iterator[torch.optim.Optimizer]:
    """The optimizers that a method, and the methods inside it, made for themselves."""
    return (value for _, value in parts_of(method) if isinstance(value, torch.optim.Optimizer))


def image_sets_of(method: Method) -> Iterator[ImageSet]:
    """The image sets of a method, and of the methods inside it."""
    return (images for _, value in parts_of(method) if isinstance(value, Method) for images in value._image_sets)


def modules_of(method: Method) -> Iterator[nn.Module]:
    """The modules that a method, and the methods inside it, made for themselves."""
    return (value for _, value in parts_of(method) if isinstance(value, nn.Module))


def anchors_of(value: Any, name: str, numbers: bool = True) -> dict[str, Any]:
    """What a replayed step relies on to stay where and as it is: of everything in `value`, tensors by address, numbers and strings by value.

    value: a method, something with a `state_dict`, or lists, tuples and dicts of such. Random streams are left out: they move by themselves. numbers:
    False leaves out all but tensors.
    """
    if isinstance(value, Tensor):
        return {name: value.data_ptr()}
    if isinstance(value, torch.Generator):
        return {}
    if isinstance(value, Method):
        parts = [(f"{name}.{attribute}", part) for attribute, part in _own(value)]
    elif hasattr(value, "state_dict"):
        parts = [(name, value.state_dict())]
    elif isinstance(value, dict):
        parts = [(_at(name, key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{name}[{index}]", part) for index, part in enumerate(value)]
    else:
        return {name: value} if numbers else {}
    return {anchor: place for part_name, part in parts for anchor, place in anchors_of(part, part_name, numbers).items()}


class Attributes:
    """What the attributes of a method, and of the methods inside it, are bound to now; `put_back` undoes what was bound since.

    Lists, tuples and dicts are looked into; the contents of tensors and modules are not kept.
    """

    def __init__(self, method: Method):
        self.method, self.streams = method, dict(method._streams)
        self.bound = {name: _copied(value) for name, value in _own(method)}

    def put_back(self) -> Method:
        self.method._streams = dict(self.streams)
        for name in [name for name, _ in _own(self.method) if name not in self.bound]:
            delattr(self.method, name)
        for name, value in self.bound.items():
            setattr(self.method, name, _copied(value))
        return self.method


def _copied(value: Any) -> Any:
    """Containers anew, a method as its `Attributes` and these as the method, put back."""
    if isinstance(value, Attributes):
        return value.put_back()
    if isinstance(value, Method):
        return Attributes(value)
    if isinstance(value, dict):
        return _filled(value, {key: _copied(part) for key, part in value.items()})
    if type(value) in (list, tuple):
        return type(value)([_copied(part) for part in value])
    return value


def set_up(cell: Cell, teacher: Teacher, device: torch.device, work: Path | None, yardstick: Tensor | None = None) -> Method:
    """The method of a cell, set up: what it makes lands on the device, and its initial values depend on the seed alone.

    yardstick: the real images (N x C x H x W, normalised) of a cell that has some in a method's place. They are handed to that place alone.
    """
    method_class = find_method(cell.method)
    config = method_class.Config(**cell.settings)
    for name in cell.files:
        if config.model_dump(mode="json")[name] != cell.config[name]:
            raise UserError(f"{cell.method}.{name}: {cell.files[name]} is not the file any more that it was when the sweep was read")
    method = method_class(teacher, config, cell.seed, device, work)
    if cell.yardstick:
        if yardstick is None:
            raise UserError(f"{cell.method}: its images are a yardstick's, and there is none here")
        for _, place in parts_of(method):
            if isinstance(place, YardstickImages):
                place.handed = yardstick
    torch.manual_seed(stream_seed(cell.seed, "setup"))
    with torch.device(device):
        method.setup()
    for module in modules_of(method):
        module.to(memory_format=torch.channels_last)
    state_of(method)  # what cannot be checkpointed is told now, not after an hour
    return method

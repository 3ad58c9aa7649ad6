"""Networks of other people: factories in a file or an installed module."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dfqbench.errors import UserError, nearest
from dfqbench.task import KINDS, SCORES, Task, size_of_images
from dfqbench.teachers.neighbours import Neighbours
from dfqbench.teachers.packages import package_files
from dfqbench.teachers.spec import Built, TeacherSpec
from dfqbench.teachers.weights import fit, one_line, weights_of

OF_A_TASK = ("classes", "size", "mean", "std", "kind", "scores", "exits")


def from_file(name: str, spec: TeacherSpec) -> Built:
    """Calls a factory in a user's file or module. What the network expects stands in the config, or in its attributes of the same names."""
    where = f"teacher {spec.model!r}"
    beside = _neighbours(spec)
    with beside or nullcontext():
        module = _imported(spec, beside)
        factory = getattr(module, name, None)
        if not callable(factory):
            raise UserError(f"{where}: {spec.source_module or spec.source_file} has no factory {name!r}: {nearest(name, _own(module))}")
        try:
            network = factory()
        except (Exception, SystemExit) as error:
            raise UserError(f"{where}: the factory failed: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{where}: the factory returns {type(network).__name__}, not a torch.nn.Module")
    refuse_torchscript(network, where)
    shells = [network]
    while (inner := wrapped(network)) is not None:
        network = inner
        shells.append(network)
    if spec.weights is not None:
        fit(network, weights_of(spec), spec)
    unwrap_parts(network)  # after the weights, whose names are those of the network as it was saved
    task = task_of(where, shells, {key: getattr(spec, key) for key in OF_A_TASK})
    if task.kind == "detect":
        network.decode, network.boxes = decode_of(where, [*shells, module]), boxes_of([*shells, module])
    if beside is not None:
        return Built(network, task, beside.files)
    package = package_files(str(spec.source_module))
    return Built(network, task, {place: found for place, found in package.items() if found[0] != spec.source_file})


def function_of(text: str) -> Any:
    """The function that `path/to/file.py:name` or `package.module:name` says. UserError where there is none."""
    place, _, name = text.rpartition(":")
    file = Path(place).expanduser()
    if not place or (file.suffix == ".py" and not file.is_file()):
        raise UserError(f"{text!r}: there is no such file; write path/to/file.py:name or package.module:name")
    beside = Neighbours(file) if file.suffix == ".py" else None
    with beside or nullcontext():
        try:
            found = getattr(beside.run() if beside else importlib.import_module(place), name, None)
        except (Exception, SystemExit) as error:
            raise UserError(f"{text!r}: importing {place} failed: {one_line(error)}") from error
    if not callable(found):
        raise UserError(f"{text!r}: there is no function {name!r} in {place}")
    return found


def decode_of(where: str, places: Sequence[Any]) -> Any:
    """A detector's `decode`: the network's, else that of the file or module that its factory is in."""
    found = next((place.decode for place in places if callable(getattr(place, "decode", None))), None)
    if found is None:
        raise UserError(f"{where}: a detector needs decode(answer, height, width), as a method or beside its factory: it makes boxes of the answer")
    return found


def boxes_of(places: Sequence[Any]) -> Any:
    """Where the box of every position is (`Network.boxes`), from the same places; None where nothing says it."""
    return next((place.boxes for place in places if callable(getattr(place, "boxes", None))), None)


def task_of(where: str, shells: Sequence[nn.Module], settings: Mapping[str, Any]) -> Task:
    """From the settings, else from the attributes of the network or of what it is wrapped in."""
    known: dict[str, Any] = {}
    for key in OF_A_TASK:
        given = settings.get(key)
        known[key] = given if given is not None else next((getattr(shell, key) for shell in shells if hasattr(shell, key)), None)
    said = {key: known.pop(key) for key in ("kind", "scores", "exits")}
    exits = said["exits"] if isinstance(said["exits"], int) else 1
    kind, scores = (value if isinstance(value := said[key], str) else usual for key, usual in (("kind", "classify"), ("scores", "sigmoid")))
    missing = [key for key, value in known.items() if value is None]
    if missing:
        how = "give them in the config, or as attributes of the network (`dfqbench quantize` has --classes, --size, --mean, --std)"
        raise UserError(f"{where}: {', '.join(missing)} missing: {how}")
    try:
        mean, std = (tuple(float(value) for value in known[key]) for key in ("mean", "std"))
        height, width = map(int, known["size"] if isinstance(known["size"], Sequence) else (known["size"],) * 2)
        task = Task(int(known["classes"]), len(mean), mean=mean, std=std, kind=kind, scores=scores, exits=exits, **size_of_images(height, width))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: classes and size must be whole numbers, mean and std one number per channel ({error})") from None
    for key, value, allowed in (("kind", kind, KINDS), ("scores", scores, SCORES)):
        if value not in allowed:
            raise UserError(f"{where}: {key} {value!r}: {nearest(value, allowed)}")
    if max(mean, default=0) > 1:
        raise UserError(f"{where}: mean {mean} is of images scaled to [0, 1]: divide mean and std by 255")
    if len(mean) != len(std) or min(std, default=0) <= 0:
        raise UserError(f"{where}: mean {mean} and std {std} must have a number per channel each, and std must be above 0")
    return task


def unwrap_parts(network: nn.Module) -> None:
    """Takes the parts of a network, in place, out of what they are wrapped in."""
    for parent in list(network.modules()):
        for part, child in list(parent.named_children()):
            while (inner := wrapped(child)) is not None:
                child = inner
                setattr(parent, part, child)


def wrapped(network: nn.Module) -> nn.Module | None:
    """What DataParallel, DistributedDataParallel or torch.compile was wrapped around; None where nothing is wrapped."""
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module = network.module
        return inner
    return network._modules.get("_orig_mod")  # torch.compile's class is not asked for: importing it takes seconds


def refuse_torchscript(network: nn.Module, where: str) -> None:
    """UserError naming a part that is a torch.jit.ScriptModule."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            part = f"its part {name!r}" if name else "the network"
            raise UserError(f"{where}: {part} is TorchScript (torch.jit), which cannot be taken apart: return the module that it was made from")


def factory_names(spec: TeacherSpec) -> list[str]:
    """What a user's file or module defines and could be a factory: its functions and network classes, sorted."""
    return sorted(name for name in _own(_imported(spec, _neighbours(spec))) if not name.startswith("_"))


def _own(module: ModuleType) -> list[str]:
    own = {key: value for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", None) == module.__name__}
    return [key for key, value in own.items() if not isinstance(value, type) or issubclass(value, nn.Module)]


def _imported(spec: TeacherSpec, beside: Neighbours | None) -> ModuleType:
    what = spec.source_module or spec.source_file
    try:
        return beside.run() if beside else importlib.import_module(str(what))
    except (Exception, SystemExit) as error:
        raise UserError(f"teacher {spec.model!r}: importing {what} failed: {one_line(error)}") from error


def _neighbours(spec: TeacherSpec) -> Neighbours | None:
    """None for an installed module, which is imported once in a process, as all packages are."""
    if spec.source_module is not None:
        return None
    assert spec.source_file is not None
    return Neighbours(spec.source_file)

"""Networks of other people: factories in a file or an installed module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import nn

from dfqbench.errors import UserError, nearest
from dfqbench.task import Task
from dfqbench.teachers.spec import Built, TeacherSpec
from dfqbench.teachers.weights import fit, one_line, weights_of


def from_file(name: str, spec: TeacherSpec) -> Built:
    """Calls a factory in a user's file or module. What the network expects stands in the config, or in its attributes of the same names."""
    where = f"teacher {spec.model!r}"
    module = _import_file(spec)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UserError(f"{where}: {spec.source_module or spec.source_file} has no factory {name!r}: {nearest(name, _own(module))}")
    try:
        network = factory()
    except Exception as error:
        raise UserError(f"{where}: the factory failed: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{where}: the factory returns {type(network).__name__}, not a torch.nn.Module")
    if spec.weights is not None:
        fit(network, weights_of(spec), spec)
    known: dict[str, Any] = {}
    for key in ("classes", "size", "mean", "std"):
        given = getattr(spec, key)
        known[key] = given if given is not None else getattr(network, key, None)
    missing = [key for key, value in known.items() if value is None]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing: give them in the config, or as attributes of the network")
    try:
        mean, std = (tuple(float(value) for value in known[key]) for key in ("mean", "std"))
        task = Task(int(known["classes"]), len(mean), int(known["size"]), mean, std)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: classes and size must be whole numbers, mean and std one number per channel ({error})") from None
    if len(mean) != len(std) or min(std, default=0) <= 0:
        raise UserError(f"{where}: mean {mean} and std {std} must have a number per channel each, and std must be above 0")
    return Built(network, task)


def factory_names(spec: TeacherSpec) -> list[str]:
    """What a user's file or module defines and could be a factory: its functions and network classes, sorted."""
    return sorted(name for name in _own(_import_file(spec)) if not name.startswith("_"))


def _own(module: ModuleType) -> list[str]:
    own = {key: value for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", None) == module.__name__}
    return [key for key, value in own.items() if not isinstance(value, type) or issubclass(value, nn.Module)]


def _import_file(spec: TeacherSpec) -> ModuleType:
    if spec.source_module is not None:
        try:
            return importlib.import_module(spec.source_module)
        except Exception as error:
            raise UserError(f"teacher {spec.model!r}: importing {spec.source_module} failed: {one_line(error)}") from error
    path = spec.source_file
    assert path is not None
    qualified = f"dfqbench_teacher_{path.stem}"
    found = importlib.util.spec_from_file_location(qualified, path)
    assert found is not None  # true of every path that ends with .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # a network's file may import its neighbours
    sys.modules[qualified] = module  # dataclasses and pickles look a class's module up by name
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"teacher {spec.model!r}: importing {path} failed: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    return module

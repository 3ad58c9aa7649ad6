"""Finds methods: the built-in ones, those of installed packages (entry points `dfqbench.methods`), and single files."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dfqbench.errors import UserError, nearest
from dfqbench.method import plugins
from dfqbench.method.info import FIDELITY, NEEDS, Fidelity, MethodInfo
from dfqbench.task import KINDS

if TYPE_CHECKING:
    from dfqbench.method.contract import Method

ENTRY_POINTS = "dfqbench.methods"
M = TypeVar("M", bound="type[Method]")

_methods: dict[str, type[Method]] = plugins.table()
_clashes: dict[str, str] = {}  # a name that two places claim -> what is said about it
broken = plugins.broken


def register(name: str, *, paper: str, fidelity: Fidelity, shares_synthesis: bool = False) -> Callable[[M], M]:
    """Class decorator that makes a method known by `name`.

    paper: where it is published ("arXiv:2003.03603"). fidelity: what the implementation follows: the authors' `code`, the `paper`, only an
    `abstract` (reconstructed), or nothing: it evaluates what others have `released`. shares_synthesis: the images never depend on a student, so one
    stream of them serves all bit widths.

    Raises UserError if the name is taken, naming both places.
    """
    if fidelity not in FIDELITY:
        raise UserError(f"method {name}: fidelity {fidelity!r} is none of {', '.join(FIDELITY)}")

    def add(cls: M) -> M:
        unknown = sorted(set(cls.needs) - set(NEEDS))
        if unknown:
            raise UserError(f"method {name}: needs {unknown[0]!r}: {nearest(unknown[0], NEEDS)}")
        strange = sorted(set(cls.tasks) - set(KINDS))
        if strange or not cls.tasks:
            raise UserError(f"method {name}: tasks {strange[0]!r}: {nearest(strange[0], KINDS)}" if strange else f"method {name}: no tasks")
        no_setting = sorted(cls.Config.after_images - cls.Config.model_fields.keys())
        if no_setting:
            raise UserError(f"method {name}: after_images {no_setting[0]!r}: {nearest(no_setting[0], cls.Config.model_fields)}")
        file, known = Path(inspect.getfile(cls)), _methods.get(name)
        if known is not None and (where := _two_places(known, cls)):
            _clashes[name] = f"two methods are called {name!r}: {where}"
            raise UserError(_clashes[name])
        source = plugins.origin(cls, file)
        cls.info = MethodInfo(
            name=name,
            paper=paper,
            fidelity=fidelity,
            shares_synthesis=shares_synthesis,
            origin=str(source),
            source_sha256=source.sha256,
            summary=(inspect.getdoc(cls) or "").split("\n")[0],
            needs=tuple(need for need in NEEDS if need in cls.needs),
            tasks=tuple(kind for kind in KINDS if kind in cls.tasks),
            source=source,
        )
        _methods[name] = cls
        return cls

    return add


def _two_places(one: type, other: type) -> str:
    """Where two classes stand; "" where the other is the one, defined again."""
    first, second = (Path(inspect.getfile(cls)) for cls in (one, other))
    if first.resolve() != second.resolve():
        return f"{first} and {second}"
    return f"{one.__qualname__} and {other.__qualname__} in {first}" if one.__qualname__ != other.__qualname__ else ""


@functools.cache
def discover() -> None:
    """Imports the built-in methods and the installed plug-ins, once. What is broken is noted in `broken` and leaves nothing behind."""
    import_modules("dfqbench_methods")
    plugins.load_entry_points(ENTRY_POINTS)


def import_modules(package: str) -> None:
    """Imports every file of a package that is built in. What is broken is noted in `broken`."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if not module.ispkg:
            plugins.guarded(module.name, functools.partial(importlib.import_module, module.name))


def untouched() -> bool:
    """Whether no method is known to this process yet and no installed package brings one: then the suite's files decide what methods will say."""
    return not (_methods or discover.cache_info().currsize or importlib.metadata.entry_points(group=ENTRY_POINTS))


def clashes() -> dict[str, str]:
    """Names that two places claim, each with what is said about it."""
    discover()
    return dict(_clashes)


def load_plugin(path: str | Path) -> None:
    """Runs a plug-in file, so that the methods and evaluation sets that it registers are known. Raises UserError where it is missing or fails.

    A name that is taken by a built-in method or an installed package is such a failure, whichever was asked for first.
    """
    discover()
    clashes = dict(_clashes)
    try:
        plugins.run_file(path)
    except UserError:
        _clashes.clear()  # whoever asked for this file is told now; the method that had the name is still there
        _clashes.update(clashes)
        raise


def built_in_names() -> list[str]:
    """The files in methods/, without importing any, in their declared order; what is not in it comes behind, by name."""
    import dfqbench_methods

    place = {name: i for i, name in enumerate(dfqbench_methods.ORDER)}
    found = [module.name for module in pkgutil.iter_modules(dfqbench_methods.__path__) if not module.ispkg]
    return sorted(found, key=lambda name: (place.get(name, len(place)), name))


def built_in_folders() -> list[Path]:
    """Where the files of the built-in methods are."""
    import dfqbench_methods

    return [Path(folder) for folder in dfqbench_methods.__path__]


def find_method(name: str) -> type[Method]:
    """The method of that name. Raises UserError with the nearest known name, or with both places where two claim it."""
    discover()
    if name in _clashes:
        raise UserError(f"{_clashes[name]}: rename one of them")
    if name not in _methods:
        hint = "".join(f"; broken plug-in {plugin}: {why}" for plugin, why in broken.items())
        raise UserError(f"unknown method {name!r}: {nearest(name, _methods)}{hint}")
    return _methods[name]


def list_methods(pattern: str = "*") -> Iterable[type[Method]]:
    """All methods whose names match the wildcard, sorted by name."""
    discover()
    return [_methods[name] for name in sorted(_methods) if fnmatch.fnmatchcase(name, pattern)]

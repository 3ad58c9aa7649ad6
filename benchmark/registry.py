"""Finds methods: the built-in ones, those of installed packages (entry points `dfqbench.methods`), and single files."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmark.errors import UserError, nearest

if TYPE_CHECKING:
    from benchmark.method import Method

Fidelity = Literal["code", "paper", "abstract"]
ENTRY_POINTS = "dfqbench.methods"


@dataclass(frozen=True)
class MethodInfo:
    """What is known about a method beside its code. `origin` says where it came from: a package and version, or a file."""

    name: str
    paper: str
    fidelity: Fidelity
    shares_synthesis: bool
    origin: str
    source_sha256: str
    summary: str


_methods: dict[str, type[Method]] = {}
broken: dict[str, str] = {}  # plug-in -> last line of its traceback; reported, never fatal to the others


def register(name: str, *, paper: str, fidelity: Fidelity, shares_synthesis: bool = False) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that makes a method known by `name`.

    paper: where it is published ("arXiv:2003.03603"). fidelity: what the implementation follows: the authors' `code`, the `paper`, or only an
    `abstract` (reconstructed). shares_synthesis: the images never depend on a student, so one stream of them serves all bit widths.

    Raises UserError if the name is taken, naming both places.
    """
    if fidelity not in ("code", "paper", "abstract"):
        raise UserError(f"method {name}: fidelity {fidelity!r} is none of code, paper, abstract")

    def add(cls: type[Method]) -> type[Method]:
        source = Path(inspect.getfile(cls))
        known = _methods.get(name)
        if known is not None and Path(inspect.getfile(known)).resolve() != source.resolve():
            raise UserError(f"two methods are called {name!r}: {inspect.getfile(known)} and {source}")
        cls.info = MethodInfo(
            name=name,
            paper=paper,
            fidelity=fidelity,
            shares_synthesis=shares_synthesis,
            origin=_origin(cls, source),
            source_sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
            summary=(inspect.getdoc(cls) or "").split("\n")[0],
        )
        _methods[name] = cls
        return cls

    return add


def _origin(cls: type, source: Path) -> str:
    package = cls.__module__.split(".")[0]
    if package == "methods":
        return "built in"
    if package.startswith("dfqbench_plugin_"):
        return source.name
    for distribution in importlib.metadata.packages_distributions().get(package, []):
        return f"{distribution} {importlib.metadata.version(distribution)}"
    return source.name


def load_plugin(path: str | Path) -> None:
    """Runs a plug-in file, so that what it registers is known. Raises UserError where it is missing or fails."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"plug-in {path}: no such file")
    name = f"dfqbench_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"plug-in {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        raise UserError(f"plug-in {path}: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


@functools.cache
def _discover() -> None:
    """Imports the built-in methods and the installed plug-ins, once."""
    import methods

    for module in pkgutil.iter_modules(methods.__path__, "methods."):
        if not module.ispkg:
            _import(module.name, functools.partial(importlib.import_module, module.name))
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        _import(f"{entry.name} ({entry.value})", entry.load)


def _import(name: str, load: Callable[[], object]) -> None:
    try:
        load()
    except Exception as error:
        broken[name] = _last_line(error)


def built_in_names() -> list[str]:
    """The files in methods/, sorted, without importing any: what has a colour of its own in every plot."""
    import methods

    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__) if not module.ispkg)


def find_method(name: str) -> type[Method]:
    """The method of that name. Raises UserError with the nearest known name."""
    _discover()
    if name not in _methods:
        hint = "".join(f"; broken plug-in {plugin}: {why}" for plugin, why in broken.items())
        raise UserError(f"unknown method {name!r}: {nearest(name, _methods)}{hint}")
    return _methods[name]


def list_methods(pattern: str = "*") -> Iterable[type[Method]]:
    """All methods whose names match the wildcard, sorted by name."""
    _discover()
    return [_methods[name] for name in sorted(_methods) if fnmatch.fnmatchcase(name, pattern)]

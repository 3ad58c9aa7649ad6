"""Other people's code: single files and installed packages that register methods or evaluation sets, and where each came from."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfqbench.errors import UserError

GROUPS = ("dfqbench.methods", "dfqbench.sets", "dfqbench.allocators")  # entry points of installed packages
FILES = "dfqbench_plugin_"  # what the module of a single file is called
broken: dict[str, str] = {}  # plug-in -> the last line of its traceback; reported, never fatal to the others
_tables: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Origin:
    """Where code came from. package: the installed distribution ("" for a single file); sha256: of the file, or of all Python files of a package."""

    package: str
    version: str
    file: str
    sha256: str

    def __str__(self) -> str:
        if self.package == "dfqbench":
            return "built in"
        return f"{self.package} {self.version}" if self.package else self.file

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def origin(cls: type, file: Path) -> Origin:
    """The origin of a class that stands in `file`."""
    top = cls.__module__.split(".")[0]
    if top in ("dfqbench", "dfqbench_methods"):
        return Origin("dfqbench", _version("dfqbench"), file.name, _digest([file]))
    if top.startswith(FILES):
        return Origin("", "", file.name, _digest([file]))
    root = Path(getattr(sys.modules.get(top), "__file__", None) or file)
    files = sorted(root.parent.rglob("*.py")) if root.name == "__init__.py" else [root]
    package = _packages().get(top) or next(iter(importlib.metadata.packages_distributions().get(top, [])), "")
    return Origin(package, _version(package) if package else "", file.name, _digest(files, root.parent))


def _digest(files: list[Path], root: Path | None = None) -> str:
    """sha256 of one file's content; of several, with their places below `root`."""
    if len(files) == 1:
        return hashlib.sha256(files[0].read_bytes()).hexdigest()
    parts = [f"{file.relative_to(root or file.parent)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _packages() -> dict[str, str]:
    """Top-level module -> distribution of everything that brings plug-ins. (An editable installation does not list its modules.)"""
    entries = (entry for group in GROUPS for entry in importlib.metadata.entry_points(group=group))
    return {entry.module.split(".")[0]: entry.dist.name for entry in entries if entry.dist is not None}


def table() -> dict[str, Any]:
    """An empty table for what plug-ins register. What one that fails has written to it is taken out again."""
    _tables.append({})
    return _tables[-1]


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    before = [dict(registered) for registered in _tables]
    try:
        yield
    except BaseException:
        for registered, old in zip(_tables, before, strict=False):
            registered.clear()
            registered.update(old)
        raise


def load_entry_points(group: str) -> None:
    """Imports what installed packages name in an entry-point group."""
    for entry in importlib.metadata.entry_points(group=group):
        guarded(f"{entry.name} ({entry.value})", entry.load)


def guarded(name: str, load: Callable[[], object]) -> None:
    """Calls `load`; where it fails, that is noted in `broken`."""
    try:
        with _all_or_nothing():
            load()
    except (Exception, SystemExit) as error:
        broken[name] = last_line(error)


def run_file(path: str | Path) -> None:
    """Runs a plug-in file, once. Raises UserError where it is missing or fails."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"plug-in {path}: no such file")
    name = f"{FILES}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"plug-in {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _all_or_nothing():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        raise UserError(f"plug-in {path}: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The last line of the traceback, with the place: `NameError: name 'x' is not defined (mine.py, line 3)`."""
    said = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{said} ({Path(error.filename or '?').name}, line {error.lineno})" if "line " not in said else said
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else said

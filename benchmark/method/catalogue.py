"""What `dfqbench methods` says of every method, remembered for as long as no file and no installed package changes: no torch the second time.

Where a plug-in is broken or two methods claim a name, nothing is taken from memory, so that a mended one shows at once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqbench.files import PACKAGE
from dfqbench.method import registry
from dfqbench.method.info import MethodInfo
from dfqbench.method.plugins import GROUPS, Origin
from dfqbench.method.settings import Setting, settings_of
from dfqbench.store.cache import remembered

if TYPE_CHECKING:
    from dfqbench.method.contract import Method


@dataclass(frozen=True)
class Entry:
    """One method. rules: quantization rules of its own; presets: as text, by name; hosted: what it changes of hosts, as text, by host and preset."""

    info: MethodInfo
    rules: list[str]
    expected_failures: dict[str, str]
    settings: list[Setting]
    presets: dict[str, str]
    hosted: dict[str, str]

    @classmethod
    def of(cls, method: type[Method]) -> Entry:
        rules = [f"{rule} {value}" for rule, value in (("ranges", method.ranges), ("batch norm", method.batch_norm)) if value]
        wrapped: dict[str, dict[str, dict[str, Any]]] = getattr(method.Config, "hosts", {})
        hosts = {f"{host}, {name or 'no preset'}": values for host, sets in wrapped.items() for name, values in sets.items()}
        presets, hosted = ({n: ", ".join(f"{k}={v}" for k, v in values.items()) for n, values in s.items()} for s in (method.Config.presets, hosts))
        return cls(method.info, rules, dict(method.expected_failures), list(settings_of(method.Config)), presets, hosted)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Entry:
        info = given["info"]
        info = MethodInfo(**{**info, "needs": tuple(info["needs"]), "tasks": tuple(info["tasks"]), "source": Origin(**info["source"])})
        return cls(**{**given, "info": info, "settings": [Setting(**setting) for setting in given["settings"]]})


@dataclass(frozen=True)
class Catalogue:
    """The built-in methods and those of installed packages by name, sorted; what is broken, and names that two places claim, with what is said."""

    entries: dict[str, Entry]
    broken: dict[str, str]
    clashes: dict[str, str]


def catalogue(cache: Path | None) -> Catalogue:
    """With `cache` (a folder) from memory, where that holds and nothing is wrong. Without, methods of plug-in files that were run are in it too."""

    def ask() -> dict[str, Any]:
        entries = {method.info.name: asdict(Entry.of(method)) for method in registry.list_methods()}
        return {"entries": entries, "broken": registry.broken, "clashes": registry.clashes()}

    found = remembered(cache, "methods", code_state(), ask, lambda answer: not answer["broken"] and not answer["clashes"])
    return Catalogue(**{**found, "entries": {name: Entry.from_dict(entry) for name, entry in found["entries"].items()}})


def code_state() -> list[Any]:
    """What methods depend on: digests of our own files and of those of the packages that bring methods or sets, and the versions of all packages."""
    entries = [entry for group in GROUPS for entry in importlib.metadata.entry_points(group=group)]
    files = {file for entry in entries for file in _files_of(entry)}
    for folder in (PACKAGE, *registry.built_in_folders()):
        files |= set(folder.rglob("*.py"))
    installed = sorted(
        name for folder in map(Path, sys.path) if folder.is_dir() for name in os.listdir(folder) if name.endswith((".dist-info", ".egg-info"))
    )
    digests = [[str(file), hashlib.sha256(file.read_bytes()).hexdigest()] for file in sorted(files) if file.is_file()]
    return [sys.version, sorted([entry.name, entry.value] for entry in entries), installed, digests]


def _files_of(entry: importlib.metadata.EntryPoint) -> Iterator[Path]:
    """Python files of a plug-in's distribution, and, where that does not list them (an editable one), of its top-level module and beside it."""
    for file in (entry.dist.files if entry.dist else None) or []:
        if file.suffix == ".py":
            yield Path(str(file.locate()))
    try:
        found = importlib.util.find_spec(entry.module.split(".")[0])
    except (ImportError, ValueError):
        return
    if found is not None and found.origin is not None:
        root = Path(found.origin)
        installed = any(root.parent.glob("*.dist-info"))
        yield from [root] if installed else root.parent.rglob("*.py") if root.name == "__init__.py" else root.parent.glob("*.py")

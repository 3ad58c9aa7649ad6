"""What a network of an installed module (`package.module:factory`) consists of, so that an edit of any of it is a change of the network."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path

from dfqbench.teachers.neighbours import INSTALLED, LOADED_ONCE

SUFFIXES = (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)


def package_files(module: str) -> dict[str, tuple[Path, str]]:
    """Place below the folder that is searched for modules -> (file, sha256): all Python files of the package that `module` is in, imported or not.

    And those of every package or module that its files import and that is nobody's installation: what stands in the user's own folders, as an
    editable installation does. What is in site-packages does not change without its version.
    """
    found: dict[str, tuple[Path, str]] = {}
    own = module.partition(".")[0]
    waiting, seen = [own], set(LOADED_ONCE)
    while waiting:
        top = waiting.pop()
        if top in seen:
            continue
        seen.add(top)
        for place, file in _files(top):
            if top != own and _is_installed(file):
                break
            content = file.read_bytes()
            found[place] = (file, hashlib.sha256(content).hexdigest())
            if file.suffix == ".py" and not _is_installed(file):
                waiting += _imported(content)
    return found


def _is_installed(file: Path) -> bool:
    return bool(INSTALLED & set(file.parts))


def _files(top: str) -> Iterator[tuple[str, Path]]:
    """The files of a top-level module or package. A folder without Python files (of data, say) is not entered."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    if spec.submodule_search_locations is None:
        if spec.has_location and spec.origin:
            yield Path(spec.origin).name, Path(spec.origin).absolute()
        return
    for root in spec.submodule_search_locations:
        for folder, below, names in os.walk(root):
            files = sorted(name for name in names if name.endswith(SUFFIXES))
            below[:] = sorted(name for name in below if name.isidentifier() and name != "__pycache__") if files or folder == root else []
            for file in files:
                yield Path(top, os.path.relpath(folder, root), file).as_posix(), Path(folder, file).absolute()


def _imported(content: bytes) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # a file that Python cannot read is imported by nobody
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    called = [node.args[0] for node in nodes if isinstance(node, ast.Call) and node.args and _name(node.func) in ("import_module", "__import__")]
    names += [first.value for first in called if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value[:1] != "."]
    return {name.partition(".")[0] for name in names}


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""

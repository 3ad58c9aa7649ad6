"""A user's network file with the files beside it that it imports: each network file has its own, however another one calls its."""

from __future__ import annotations

import builtins
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

INSTALLED = {"site-packages", "dist-packages"}  # folders of what pip has copied there: never a user's own files
# what cannot be loaded twice in a process, and so is never a neighbour once it is loaded
LOADED_ONCE = sys.stdlib_module_names | {"dfqbench", "dfqbench_methods", "dfqbench_slurm", "numpy", "torch", "torchvision"}


class Neighbours(MetaPathFinder):
    """The modules that a network file imports from its folder, or from folders that it puts on sys.path.

    Within `with neighbours:` they have their names in sys.modules, before whatever else is called so; outside, sys.modules and sys.path are as if
    the file had never run. An import statement in the file or in a neighbour opens such a block by itself, so that one in a `forward` works too.
    `files` grows with every neighbour that is imported: module name -> (file, sha256 of what was run).
    """

    def __init__(self, file: Path):
        self.file = file.resolve()
        self.alias = f"dfqbench_teacher_{file.stem}_{hashlib.sha256(str(self.file).encode()).hexdigest()[:8]}"
        self.files: dict[str, tuple[Path, str]] = {}
        self._places = [str(self.file.parent)]
        self._modules: dict[str, ModuleType] = {}
        self._hidden: dict[str, ModuleType] = {}
        self._before: dict[str, ModuleType] = {}
        self._path_before: list[str] = []
        self._depth = 0

    def run(self) -> ModuleType:
        """The network file, executed anew."""
        spec = spec_from_file_location(self.alias, self.file, loader=_Source(self, self.alias, str(self.file)))
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[self.alias] = module  # dataclasses and pickles look a class's module up by name
        with self:
            spec.loader.exec_module(module)
        return module

    def __enter__(self) -> Neighbours:
        self._depth += 1
        if self._depth == 1:
            self._before, self._path_before, self._hidden = dict(sys.modules), list(sys.path), {}
            sys.path[:0] = self._places
            sys.meta_path.insert(0, self)
            self._hide({entry.partition(".")[0] for place in self._places if os.path.isdir(place) for entry in os.listdir(place)})
            sys.modules.update(self._modules)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._places = self._search()
        tops = {name.partition(".")[0] for name in self.files} | {name for name in sys.modules if self._is_folder_without_init(name)}
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in tops and self._before.get(name) is not module:
                self._modules[name] = sys.modules.pop(name)
        sys.modules.update(self._hidden)
        sys.meta_path.remove(self)
        sys.path[:] = self._path_before
        self._before, self._hidden = {}, {}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Where a neighbour is. A folder without __init__.py is left to Python, which prefers an installed package of that name."""
        parents = name.split(".")[:-1]
        for place in self._search():
            folder = os.path.join(place, *parents)
            if path is not None and folder not in list(path):
                continue
            loaders: Any = ((partial(_Extension, self), EXTENSION_SUFFIXES), (partial(_Source, self), SOURCE_SUFFIXES))
            found = FileFinder(folder, *loaders).find_spec(name)  # a new finder: what an older one knows of the folder may be outdated
            if found is not None and found.origin is not None:
                return found
        return None

    def note(self, name: str, file: str, content: bytes) -> None:
        if name != self.alias:
            self.files[name] = (Path(file), hashlib.sha256(content).hexdigest())

    def importing(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """`__import__` of the network file and its neighbours."""
        with self:
            if not level:
                self._hide({name.partition(".")[0]})
            return builtins.__import__(name, globals, locals, fromlist, level)

    def _search(self) -> list[str]:
        """The file's folder and what it has put on sys.path, in the order of sys.path."""
        new = [place for place in sys.path if place in self._places or place not in self._path_before]
        return [place for place in dict.fromkeys(new) if not INSTALLED & set(Path(place).parts)]

    def _hide(self, tops: set[str]) -> None:
        """Takes out of sys.modules what others have loaded under a neighbour's name."""
        for top in tops - LOADED_ONCE:
            if top in sys.modules and sys.modules[top] is self._before.get(top) and self.find_spec(top) is not None:
                for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
                    self._hidden[name] = sys.modules.pop(name)

    def _is_folder_without_init(self, name: str) -> bool:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if "." in name or spec is None or spec.origin is not None or spec.submodule_search_locations is None:
            return False
        return any(os.path.join(place, name) in list(spec.submodule_search_locations) for place in self._places)


class _Source(SourceFileLoader):
    """Runs a file with the `__import__` of its neighbourhood. __pycache__ is neither read (its stamps cannot tell two edits in a second apart)
    nor written."""

    def __init__(self, neighbours: Neighbours, name: str, path: str):
        super().__init__(name, path)
        self._neighbours = neighbours

    def get_code(self, fullname: str) -> Any:
        content = self.get_data(self.path)
        self._neighbours.note(fullname, self.path, content)
        return self.source_to_code(content, self.path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._neighbours.importing}
        super().exec_module(module)
        if module.__name__ == self._neighbours.alias:
            return
        alias = f"{self._neighbours.alias}.{module.__name__}"
        sys.modules[alias] = module  # where pickles find what is defined here, whatever else is called like this module
        for value in vars(module).values():
            if isinstance(value, type | FunctionType) and value.__module__ == module.__name__:
                value.__module__ = alias


class _Extension(ExtensionFileLoader):
    """A compiled neighbour."""

    def __init__(self, neighbours: Neighbours, name: str, path: str):
        super().__init__(name, path)
        self._neighbours = neighbours

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._neighbours.note(spec.name, self.path, Path(self.path).read_bytes())
        return super().create_module(spec)

"""Writes a new method or allocator from the templates: a file with a sweep over it, or an installable package. No torch here."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from dfqbench.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
TEACHER = "results/weights/digits-resnet20.safetensors"


@dataclass(frozen=True)
class Kind:
    """What is written: `templates/WORD.py` and `.yaml`. what: it is, in a sentence. option: of `dfqbench methods check`."""

    word: str
    what: str
    option: str

    def filled(self, template: str, name: str) -> str:
        """A template with its names for `name`'s."""
        text = Template((TEMPLATES / template).read_text(encoding="utf-8")).safe_substitute(kind=self.word, what=self.what, option=self.option)
        words, mine = name.split("-"), ("my", self.word)
        for written, its in (("-".join(mine), name), ("_".join(mine), "_".join(words)), (_camel(mine), _camel(words))):
            text = text.replace(written, its)
        return text


def _camel(words: Iterable[str]) -> str:
    return "".join(map(str.capitalize, words))


METHOD = Kind("method", "a data-free quantizer", "")
ALLOCATOR = Kind("allocator", "an allocator of bit widths per layer", "--allocator ")


def write_file(name: str, kind: Kind = METHOD) -> tuple[list[Path], list[str]]:
    """NAME.py and NAME.yaml in this folder: their paths, and the commands to go on with. Raises UserError, and writes nothing, where it cannot be."""
    module = _module(name, kind)
    files = {f"{module}{ending}": kind.filled(f"{kind.word}{ending}", name) for ending in (".py", ".yaml")}
    paths = _write(files, Path())
    return paths, [f"dfqbench methods check {kind.option}{name} --plugin {module}.py", *_measured(f"{module}.yaml")]


def write_package(name: str, kind: Kind = METHOD) -> tuple[list[Path], list[str]]:
    """A folder NAME with an installable package: its files, and the commands to go on with. Raises UserError, and writes nothing, as above."""
    module, place = _module(name, kind), Path(name)
    sweep = "".join(line for line in kind.filled(f"{kind.word}.yaml", name).splitlines(keepends=True) if not line.startswith("plugins:"))
    files = {
        "pyproject.toml": kind.filled("package/pyproject.toml", name),
        "README.md": kind.filled("package/README.md", name),
        "digits.yaml": sweep,
        f"src/{module}/__init__.py": kind.filled(f"{kind.word}.py", name),
        f"tests/test_{module}.py": kind.filled(f"package/test_my_{kind.word}.py", name),
    }
    if place.exists():
        raise UserError(f"{place} is there already: nothing was written")
    paths = _write(files, place)
    check = f"dfqbench methods check {kind.option}{name}"
    return paths, [f"cd {name}", "pip install --no-deps --editable .", check, *_measured("digits.yaml", place)]


def _module(name: str, kind: Kind) -> str:
    """The name as Python writes it."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        asked = f"{kind.what.split()[0]} {kind.word}: lower-case letters and digits, words with hyphens between, like 'my-{kind.word}'"
        raise UserError(f"{name!r} is no name for {asked}")
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or _importable(module):
        raise UserError(f"{name!r}: Python knows a module or keyword of that name already; take another one")
    from dfqbench.method.allocator import list_allocators
    from dfqbench.method.registry import list_methods

    if kind is METHOD and any(method.info.name == name for method in list_methods()):
        raise UserError(f"{name!r}: there is a method of that name: dfqbench methods show {name}")
    if kind is ALLOCATOR and any(allocator.info.name == name for allocator in list_allocators()):
        raise UserError(f"{name!r}: there is an allocator of that name: dfqbench allocators")
    return module


def _importable(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.origin != str(Path(f"{module}.py").resolve())  # a file of ours is told apart as what it is, below


def _write(files: dict[str, str], folder: Path) -> list[Path]:
    """All or nothing."""
    there = [str(folder / file) for file in files if (folder / file).exists()]
    if there:
        raise UserError(f"{', '.join(there)} {'are' if len(there) > 1 else 'is'} there already: nothing was written")
    try:
        with tempfile.TemporaryDirectory(dir=Path(), prefix=".new-") as temporary:
            for file, text in files.items():
                path = Path(temporary, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            for part in sorted(Path(temporary).iterdir()):
                folder.mkdir(exist_ok=True)
                shutil.move(part, folder / part.name)
    except OSError as error:
        raise UserError(f"{Path.cwd() / folder}: {error.strerror}") from None
    return [folder / file for file in files]


def _measured(config: str, place: Path = Path()) -> list[str]:
    teacher = [] if (place / TEACHER).is_file() else [f"dfqbench pretrain digits --out {TEACHER}"]
    return [*teacher, f"dfqbench run {config}", f"dfqbench table {config}"]

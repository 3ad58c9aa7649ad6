"""Writes a new method from the templates: a file with a sweep over it, or an installable package. No torch here."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import tempfile
from pathlib import Path

from dfqbench.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
TEACHER = "results/weights/digits-resnet20.safetensors"


def write_file(name: str) -> tuple[list[Path], list[str]]:
    """NAME.py and NAME.yaml in this folder: their paths, and the commands to go on with. Raises UserError, and writes nothing, where it cannot be."""
    module = _module(name)
    files = {f"{module}.py": _filled("method.py", name), f"{module}.yaml": _filled("digits.yaml", name)}
    paths = _write(files, Path())
    return paths, [f"dfqbench methods check {name} --plugin {module}.py", *_measured(f"{module}.yaml")]


def write_package(name: str) -> tuple[list[Path], list[str]]:
    """A folder NAME with an installable package: its files, and the commands to go on with. Raises UserError, and writes nothing, as above."""
    module, place = _module(name), Path(name)
    sweep = "".join(line for line in _filled("digits.yaml", name).splitlines(keepends=True) if not line.startswith("plugins:"))
    files = {
        "pyproject.toml": _filled("package/pyproject.toml", name),
        "README.md": _filled("package/README.md", name),
        "digits.yaml": sweep,
        f"src/{module}/__init__.py": _filled("method.py", name),
        f"tests/test_{module}.py": _filled("package/test_my_method.py", name),
    }
    if place.exists():
        raise UserError(f"{place} is there already: nothing was written")
    paths = _write(files, place)
    then = [f"cd {name}", "pip install --no-deps --editable .", f"dfqbench methods check {name}", *_measured("digits.yaml", place)]
    return paths, then


def _module(name: str) -> str:
    """The name as Python writes it."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UserError(f"{name!r} is no name for a method: lower-case letters and digits, words with hyphens between, like 'my-method'")
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or _importable(module):
        raise UserError(f"{name!r}: Python knows a module or keyword of that name already; take another one")
    from dfqbench.method.registry import list_methods

    if any(method.info.name == name for method in list_methods()):
        raise UserError(f"{name!r}: there is a method of that name: dfqbench methods show {name}")
    return module


def _importable(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.origin != str(Path(f"{module}.py").resolve())  # a file of ours is told apart as what it is, below


def _filled(template: str, name: str) -> str:
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    words = name.split("-")
    return text.replace("my-method", name).replace("my_method", "_".join(words)).replace("MyMethod", "".join(w.capitalize() for w in words))


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

"""Config files as text: finding one, and the digest that tells whether it has changed. Light enough for `table`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from dfqbench.errors import UserError, nearest
from dfqbench.files import shipped as shipped_with
from dfqbench.yaml_file import read_yaml

LABELS = re.compile(r"^labels:.*(?:\n(?:[ \t#}].*)?$)*\n?", re.MULTILINE)  # the section, until another begins
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def find_config(given: str) -> Path:
    """A file by its path, or a shipped config by its name (`quickstart`)."""
    path = Path(given)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(shipped_with("configs").glob("*.yaml"))}
    if given in shipped:
        return shipped[given]
    if path.suffix in (".yaml", ".yml") and path.stem in shipped and path.parent.name == "configs" and not path.is_absolute():
        return shipped[path.stem]
    raise UserError(f"no config {given!r}: no such file, and {nearest(given, shipped)}")


def text_digest(path: Path) -> str:
    """Of the file without its labels and of the environment variables it names: what decides which cells it spans."""
    text = LABELS.sub("", path.read_text(encoding="utf-8"))
    variables = {name: os.environ.get(name) for name in sorted(set(VARIABLE.findall(text)))}
    return hashlib.sha256(f"{text}\n{variables}".encode()).hexdigest()


def sweep_name(path: Path) -> str:
    """The name of the sweep in a config file. Raises UserError where there is none."""
    try:
        name: Any = read_yaml(path)["name"]
    except (KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: no `name:` can be read from it: is it a sweep?")
    return name


def noted_cells(config: str, results: Path) -> dict[str, str] | None:
    """A sweep's cells, label by id, as its last run or submission noted them; None if the config has changed since (or never ran)."""
    noted = _noted(config, results)
    return None if noted is None else {cell: str(noted.get("labels", {}).get(cell, "")) for cell in noted["cells"]}


def noted_names(config: str, results: Path) -> dict[str, dict[str, str]] | None:
    """`name` and `group` by cell id, where the config gives cells any; None as in `noted_cells`."""
    noted = _noted(config, results)
    return None if noted is None else {str(cell): named for cell, named in noted.get("names", {}).items()}


def labels_of(config: str) -> dict[str, dict[str, str]]:
    """The section `labels` as the config has it now: `name` and `group` by what a row is called without a label."""
    given: Any = read_yaml(find_config(config))
    section = given.get("labels") if isinstance(given, dict) else None
    rows = section.items() if isinstance(section, dict) else ()
    called = ((str(row), {"label": called} if isinstance(called, str) else called) for row, called in rows)
    return {row: {"name": str(its.get("label", "")), "group": str(its.get("group", ""))} for row, its in called if isinstance(its, dict)}


def _noted(config: str, results: Path) -> dict[str, Any] | None:
    path = find_config(config)
    try:
        noted = json.loads((results / "sweeps" / f"{sweep_name(path)}.json").read_text(encoding="utf-8"))
        if noted["config"] == text_digest(path) and isinstance(noted["cells"], list):
            return dict(noted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        pass  # whatever is wrong with it, loading the sweep says so
    return None

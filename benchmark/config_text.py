"""Config files as text: finding one, and the digest that tells whether it has changed. Light enough for `table`."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from benchmark.errors import UserError, nearest

SHIPPED = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]  # in a wheel; in a checkout
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def find_config(given: str) -> Path:
    """A file by its path, or a shipped config by its name (`quickstart`)."""
    path = Path(given)
    if path.is_file():
        return path
    shipped = {file.stem: file for folder in SHIPPED if folder.is_dir() for file in sorted(folder.glob("*.yaml"))}
    if given in shipped:
        return shipped[given]
    if path.suffix in (".yaml", ".yml") and path.stem in shipped and path.parent.name == "configs" and not path.is_absolute():
        return shipped[path.stem]
    raise UserError(f"no config {given!r}: no such file, and {nearest(given, shipped)}")


def text_digest(path: Path) -> str:
    """Of the file and of the environment variables it names: what decides which cells it spans."""
    text = path.read_text()
    variables = {name: os.environ.get(name) for name in sorted(set(VARIABLE.findall(text)))}
    return hashlib.sha256(f"{text}\n{variables}".encode()).hexdigest()

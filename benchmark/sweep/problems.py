"""What is wrong with a config: all of it, each as one line with file, key and value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dfqbench.errors import UserError, UserErrors


class Problems:
    """Collects what is wrong with one file."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[str] = []

    def add(self, key: str, message: str) -> None:
        self.lines.append(f"{self.path}: {key}: {message}")

    def catch(self, key: str, call: Callable[[], Any]) -> Any:
        """What `call` returns; None, and the problem noted, if it raises UserError. A key with a known problem is not tried."""
        if any(line.startswith((f"{self.path}: {key}: ", f"{self.path}: {key}.", f"{self.path}: {key}[")) for line in self.lines):
            return None
        try:
            return call()
        except UserErrors as errors:
            for message in errors.messages:
                self.add(key, message)
        except UserError as error:
            self.add(key, str(error))
        return None

    def raise_all(self) -> None:
        if self.lines:
            raise UserErrors(dict.fromkeys(self.lines))


def described(error: ValidationError, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, message) for each finding of pydantic, in our words."""
    for finding in error.errors():
        key = prefix
        for part in finding["loc"]:
            if isinstance(part, int):
                key += f"[{part}]"
            elif part not in ("str", "average", "dict[str,any]") and not str(part).startswith("dict["):
                key = f"{key}.{part}".lstrip(".")
        if finding["type"] == "missing":
            yield key, "missing"
        else:
            yield key, f"{finding['input']!r}: {finding['msg'][0].lower()}{finding['msg'][1:]}"

"""Small answers that are slow to compute, remembered in a folder: one JSON file each, named by a hash of everything that the answer depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfqbench.files import temporary_name


def cache_folder() -> Path:
    """DFQBENCH_CACHE, or dfqbench in the user's cache folder. Whatever is in it can be found out again."""
    given = os.environ.get("DFQBENCH_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfqbench"


def remembered(
    folder: Path | None, kind: str, key: Any, compute: Callable[[], dict[str, Any]], valid: Callable[[dict[str, Any]], bool] = lambda answer: True
) -> dict[str, Any]:
    """`compute()`, or what it answered earlier for the same `key` (anything that JSON can hold); without a folder nothing is remembered.

    `valid` says whether an answer holds, where it depends on more than was known before it was computed: one that does not is not remembered.
    A file that cannot be read is written anew. Several processes may do the same at once: each replaces the file in one step.
    """
    if folder is None:
        return compute()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{kind}-{name}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and valid(found):
            return found
    except (OSError, ValueError):
        pass
    answer = compute()
    if not valid(answer):
        return answer
    with contextlib.suppress(OSError):  # a home folder that cannot be written only costs the time to find out again
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        temporary.write_text(json.dumps(answer), encoding="utf-8")
        temporary.replace(path)
    return answer

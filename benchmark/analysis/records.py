"""What tables, plots and the report read: a store's finished cells, each checked, and by name whatever had to be left out. No torch here."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfqbench.files import read_json
from dfqbench.store import Store
from dfqbench.sweep.cell import fingerprint

CELL_ID = re.compile(r"[0-9a-f]{12}")
OF_A_CELL = {"cell.json", "result.json", "failed.json", "lease.json", "log.txt", "history.csv"}
ABANDONED_S = 60.0  # a temporary file older than this has no writer any more

# what a result must hold, and of which type: whatever reads a checked result relies on it
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "top1": (int, float),
    "best.top1": (int, float),
    "best.epoch": int,
    "evaluations": int,
    "last_epoch": int,
    "images": int,
    "correct": int,
    "steps": int,
    "teacher.top1": (int, float),
    "seconds.own": (int, float),
    "seconds.shared": (int, float),
    "provenance.device_name": str,
    "cell.label": str,
    "cell.method": str,
    "cell.changed": dict,
    "cell.fidelity": str,
    "cell.teacher.label": str,
    "cell.teacher.model": str,
    "cell.teacher.weights_sha256": str,
    "cell.evaluation.name": str,
    "cell.protocol": str,
    "cell.bits": str,
    "cell.seed": int,
    "cell.precision": str,
    "cell.identity.evaluation": str,
    "cell.identity.protocol": dict,
    "cell.identity.config": dict,
}
_KEYS = {path: path.split(".") for path in REQUIRED}


@dataclass(frozen=True)
class Reading:
    """A store as it was found.

    results: checked ones, sorted by id. skipped: a line for every file that is damaged, half-written or not of this suite; all are left where they
    are. failures: failed cells that have no result, each with id, label, kind, message, traceback.
    """

    store: Store
    results: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def replicates(self) -> dict[str, list[dict[str, Any]]]:
        """The same cells measured again elsewhere, by cell id (see merge)."""
        found: dict[str, list[dict[str, Any]]] = {}
        wanted = {result["id"] for result in self.results}
        folder = self.store.root / "replicates"
        for path in sorted(folder.glob("*/*/result.json")) if folder.is_dir() else []:
            if path.parent.parent.name in wanted:
                with contextlib.suppress(ValueError, OSError):
                    result = read_json(path)
                    if not problem_of(result, path.parent.parent.name):
                        found.setdefault(result["id"], []).append(result)
        return found

    def correct(self, result: dict[str, Any]) -> NDArray[np.uint8] | None:
        """Which test images the cell got right, as packed bits; None where the file is missing, damaged or another cell's."""
        return read_correct(self.store.folder(result["id"]) / "correct.npy", result)


def read_store(store: Store, wanted: set[str] | None = None) -> Reading:
    """All finished and failed cells, or those among `wanted`."""
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    failures: list[dict[str, Any]] = []
    for folder, names in _folders(store, skipped):
        cell_id = folder.name
        if wanted is not None and cell_id not in wanted:
            continue
        skipped += [f"{folder / name}: half-written, its writer is gone" for name in sorted(names) if _abandoned(folder / name)]
        if "result.json" in names:
            result, why = _read(folder / "result.json")
            why = why or problem_of(result, cell_id)
            if why:
                skipped.append(f"{folder / 'result.json'}: {why}")
            else:
                results.append(result)
        elif "failed.json" in names:
            failure, why = _read(folder / "failed.json")
            cell, _ = _read(folder / "cell.json") if "cell.json" in names else ({}, "")
            if why or not isinstance(failure, dict) or not {"kind", "message"} <= failure.keys():
                skipped.append(f"{folder / 'failed.json'}: {why or 'not a failure of this suite'}")
            else:
                failures.append({"traceback": "", **failure, "id": cell_id, "cell": cell if isinstance(cell, dict) else {}})
        elif names and not names & OF_A_CELL and not any(name.startswith(".") for name in names):
            skipped.append(f"{folder}: not a cell of this suite")
    return Reading(store, results, skipped, failures)


def _folders(store: Store, skipped: list[str]) -> list[tuple[Path, set[str]]]:
    """The folders under runs/ with the names in them; what is no folder is named."""
    runs = store.root / "runs"
    found = []
    for entry in sorted(runs.iterdir()) if runs.is_dir() else []:
        if entry.name.startswith("."):
            continue
        try:
            found.append((entry, set(os.listdir(entry))))
        except NotADirectoryError:
            skipped.append(f"{entry}: a file where cells have folders")
        except OSError as error:
            skipped.append(f"{entry}: {error.strerror}")
    return found


def _abandoned(path: Path) -> bool:
    if not (path.name.startswith(".") and path.name.endswith(".tmp")):
        return False
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > ABANDONED_S
    return False


def _read(path: Path) -> tuple[Any, str]:
    """(content, "") or (None, why not)."""
    try:
        return read_json(path), ""
    except (ValueError, RecursionError) as error:
        return None, f"damaged: {error}"
    except OSError as error:
        return None, str(error.strerror)


def problem_of(result: Any, cell_id: str) -> str:
    """Why a result cannot be used; empty if it can."""
    if not isinstance(result, dict):
        return "not a result of this suite"
    for path, kind in REQUIRED.items():
        value: Any = result
        for key in _KEYS[path]:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            return f"not a result of this suite: {path} is {'missing' if value is None else repr(value)}"
    if not all(math.isfinite(v) and 0 <= v <= 100 for v in (result["top1"], result["best"]["top1"], result["teacher"]["top1"])):
        return "an accuracy is not between 0 and 100"
    if result["images"] < 1:
        return "no test image was evaluated"
    if result["id"] != cell_id:
        return f"it is cell {result['id']}'s"
    if fingerprint(result["cell"]["identity"]) != cell_id:
        return "its settings do not have this id: edited by hand, or another suite's"
    return ""


def read_correct(path: Path, result: dict[str, Any]) -> NDArray[np.uint8] | None:
    """Packed bits, one per test image, that agree with the result's count of correct images; None otherwise."""
    images = result["images"]
    usual = _header((images + 7) // 8)
    try:
        content = path.read_bytes()
        if content.startswith(usual):  # what a run writes: thousands of files are read without parsing each header
            packed = np.frombuffer(content, np.uint8, offset=len(usual))
        else:
            packed = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if packed.dtype != np.uint8 or packed.shape != ((images + 7) // 8,):
        return None
    return packed if int(np.bitwise_count(packed).sum()) == result["correct"] else None


@lru_cache(maxsize=8)
def _header(count: int) -> bytes:
    """What numpy writes before that many bytes."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(count, np.uint8))
    return buffer.getvalue()[:-count]


def read_history(path: Path, points: int = 60) -> dict[str, list[float | str | None]]:
    """history.csv by column, thinned to about `points` evenly spaced epochs and all that were evaluated; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if len(lines) < 2:
        return {}
    columns = lines[0].split(",")
    last = len(lines) - 1
    kept = {round(1 + i * (last - 1) / max(points - 1, 1)) for i in range(points)}
    at = columns.index("top1") if "top1" in columns else None
    rows = []
    for number, line in enumerate(lines[1:], 1):
        values = line.split(",")
        if len(values) == len(columns) and (number in kept or (at is not None and values[at])):
            rows.append(values)
    return {name: [_value(row[i]) for row in rows] for i, name in enumerate(columns)}


def _value(text: str) -> float | str | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else None

"""What tables, plots and the report read: a store's finished cells, each checked, and by name whatever had to be left out. No torch here."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfqbench.analysis.warning_signs import signs_of
from dfqbench.files import read_json
from dfqbench.metrics import DENSE, METRICS, metric_of
from dfqbench.store import Store
from dfqbench.sweep.cell import canonical_json, fingerprint, without_data
from dfqbench.tasks.detect import Matches, average_precision
from dfqbench.tasks.segment import mean_iou

CELL_ID = re.compile(r"[0-9a-f]{12}")
OF_A_CELL = {"cell.json", "result.json", "failed.json", "lease.json", "log.txt", "history.csv"}
DIVERGED = "Diverged"  # the kind of a failure
Counts = Matches | NDArray[np.int64]  # of an evaluation set, image by image: what AP, or mIoU (images x classes x 3), is made of
IN_EPOCH = re.compile(r"\bin epoch (\d+)")  # of its message
ABANDONED_S = 60.0  # a temporary file older than this has no writer any more

# what a result must hold, and of which type: whatever reads a checked result relies on it
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "best.epoch": int,
    "evaluations": int,
    "last_epoch": int,
    "images": int,
    "steps": int,
    "teacher": dict,
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
OF_ACCURACY: dict[str, type | tuple[type, ...]] = {"correct": int, "top1": (int, float), "best.top1": (int, float), "teacher.top1": (int, float)}
OF_DENSE: dict[str, type | tuple[type, ...]] = {"top1": (int, float), "best.top1": (int, float), "teacher.top1": (int, float)}  # see `scored`
OF_AGREEMENT: dict[str, type | tuple[type, ...]] = {"correct": int, "agreement": (int, float), "kl": (int, float), "best.agreement": (int, float)}
_OF_THE_CELL = {path: kind for path, kind in REQUIRED.items() if path.startswith("cell.")}


@dataclass(frozen=True)
class Reading:
    """A store as it was found.

    results: checked ones with an accuracy, sorted by id. without_data: those of cells that have none, only agreement with their teacher (`evaluate:
    none`). skipped: a line for every file that is damaged, half-written or not of this suite; all are left where they are. failures: failed cells
    that have no result, each with id, label, kind, message, traceback. unreadable: by id, the line among `skipped` of each cell that is there.
    """

    store: Store
    results: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    without_data: list[dict[str, Any]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> list[dict[str, Any]]:
        """All results, for what asks for no accuracy."""
        return sorted([*self.results, *self.without_data], key=lambda result: str(result["id"]))

    @cached_property
    def replicates(self) -> dict[str, list[dict[str, Any]]]:
        """The same cells measured again elsewhere, by cell id (see merge)."""
        found: dict[str, list[dict[str, Any]]] = {}
        wanted = {result["id"] for result in self.finished}
        folder = self.store.root / "replicates"
        for path in sorted(folder.glob("*/*/result.json")) if folder.is_dir() else []:
            if path.parent.parent.name in wanted:
                with contextlib.suppress(ValueError, OSError):
                    result = scored(read_json(path))
                    if not problem_of(result, path.parent.parent.name):
                        found.setdefault(result["id"], []).append(result)
        return found

    @cached_property
    def unfinished(self) -> list[dict[str, Any]]:
        """Cells that diverged or failed, in the form of results whose numbers are NaN, with `status`: what tables show beside results.

        Left out are failures whose cell.json cannot be used, and those that a newer result or failure of the same experiment stands for. Those of
        cells without data are in `unfinished_without_data`.
        """
        return [each for each in self._unfinished if not without_data(each["cell"])]

    @cached_property
    def unfinished_without_data(self) -> list[dict[str, Any]]:
        return [each for each in self._unfinished if without_data(each["cell"])]

    @property
    def diverged(self) -> bool:
        """Whether a cell among `unfinished` did: also where nothing has finished, that is a result."""
        return any(each["status"] == "diverged" for each in self._unfinished)

    @cached_property
    def _unfinished(self) -> list[dict[str, Any]]:
        found = [made for failure in self.failures if (made := _as_result(failure, self.store))]
        newest: dict[str, tuple[Any, ...]] = {}
        for each in [*self.finished, *found] if found else []:
            experiment = _experiment(each)
            newest[experiment] = max(newest.get(experiment, ()), _age(each))
        return [each for each in found if _age(each) == newest[_experiment(each)]]

    def counts(self, result: dict[str, Any]) -> Counts | None:
        """What a dense task's metric is made of, image by image; None where the file is missing, damaged or another result's."""
        return read_counts(self.store.folder(result["id"]) / "per_image.npz", result)

    def correct(self, result: dict[str, Any]) -> NDArray[np.uint8] | None:
        """Which test images the cell got right, as packed bits; None where the file is missing, damaged or another cell's."""
        return read_correct(self.store.folder(result["id"]) / "correct.npy", result)


def read_store(store: Store, wanted: set[str] | None = None) -> Reading:
    """All finished and failed cells, or those among `wanted`."""
    results: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    skipped: list[str] = []
    failures: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for folder, names, closed in _folders(store):
        cell_id = folder.name
        if wanted is not None and cell_id not in wanted:
            continue
        skipped += [f"{folder / name}: half-written, its writer is gone" for name in sorted(names) if _abandoned(folder / name)]
        if closed:
            unreadable[cell_id] = f"{folder}: {closed}"
        elif "result.json" in names:
            result, why = _read(folder / "result.json")
            result = scored(result)
            why = why or problem_of(result, cell_id)
            if why:
                unreadable[cell_id] = f"{folder / 'result.json'}: {why}"
            else:
                result["warnings"] = signs_of(result, folder / "history.csv")
                (others if without_data(result["cell"]) else results).append(result)
        elif "failed.json" in names:
            failure, why = _read(folder / "failed.json")
            cell, _ = _read(folder / "cell.json") if "cell.json" in names else ({}, "")
            if why or not isinstance(failure, dict) or not {"kind", "message"} <= failure.keys():
                unreadable[cell_id] = f"{folder / 'failed.json'}: {why or 'not a failure of this suite'}"
            else:
                failures.append({"traceback": "", **failure, "id": cell_id, "cell": cell if isinstance(cell, dict) else {}})
        elif names and not names & OF_A_CELL and not any(name.startswith(".") for name in names):
            skipped.append(f"{folder}: not a cell of this suite")
        skipped += [unreadable[cell_id]] if cell_id in unreadable else []
    return Reading(store, results, skipped, failures, others, unreadable)


def _folders(store: Store) -> list[tuple[Path, set[str], str]]:
    """What is under runs/, each with the names in it, or with why there are none."""
    runs = store.root / "runs"
    found = []
    for entry in sorted(runs.iterdir()) if runs.is_dir() else []:
        if entry.name.startswith("."):
            continue
        try:
            found.append((entry, set(os.listdir(entry)), ""))
        except NotADirectoryError:
            found.append((entry, set(), "a file where cells have folders"))
        except OSError as error:
            found.append((entry, set(), str(error.strerror)))
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
    if lacking := _lacking(result, REQUIRED):
        return f"not a result of this suite: {lacking}"
    blind = without_data(result["cell"])
    if result.get("metric", "top1") not in METRICS:
        return f"not a result of this suite: its metric is {result['metric']!r}"
    if lacking := _lacking(result, OF_AGREEMENT if blind else OF_DENSE if metric_of(result).key in DENSE else OF_ACCURACY):
        return f"not a result of this suite: {lacking}"
    if blind and "top1" in result:
        return "not a result of this suite: an accuracy, without an evaluation set"
    if blind and not all(math.isfinite(v) and 0 <= v <= 100 for v in (result["agreement"], result["best"]["agreement"])):
        return "an agreement is not between 0 and 100"
    if blind and not (math.isfinite(result["kl"]) and result["kl"] > -1e-6):  # rounding may give a little less than none
        return "a KL divergence is negative or not finite"
    if not blind and not all(math.isfinite(v) and 0 <= v <= 100 for v in (result["top1"], result["best"]["top1"], result["teacher"]["top1"])):
        return "an accuracy is not between 0 and 100"
    if result["images"] < 1:
        return "no test image was evaluated"
    if result["id"] != cell_id:
        return f"it is cell {result['id']}'s"
    if fingerprint(result["cell"]["identity"]) != cell_id:
        return "its settings do not have this id: edited by hand, or another suite's"
    cell = result["cell"]
    for key in ("bits", "seed"):
        if cell["identity"].get(key, cell[key]) != cell[key]:
            return f"its {key} {cell[key]!r} is not that of its settings: edited by hand"
    return ""


def scored(result: Any) -> Any:
    """A result of a dense task with its metric under the name by which everything here asks for the score of a network: `top1`."""
    if not isinstance(result, dict) or result.get("metric") not in DENSE:
        return result
    key = result["metric"]

    def with_score(part: Any) -> Any:
        return {**part, "top1": part[key]} if isinstance(part, dict) and key in part else part

    return with_score({**result, **{name: with_score(result[name]) for name in ("best", "teacher") if name in result}})


def _lacking(record: dict[str, Any], wanted: dict[str, type | tuple[type, ...]]) -> str:
    """The first of these keys that is missing or of another type; empty where all are as they must be."""
    for path, kind in wanted.items():
        value: Any = record
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            return f"{path} is {'missing' if value is None else repr(value)}"
    return ""


def said_of(failure: dict[str, Any]) -> str:
    """What became of a failed cell, in one line."""
    message = (str(failure["message"]).splitlines() or [""])[0]
    return message if failure["kind"] == DIVERGED and message.startswith("diverged") else f"failed: {failure['kind']}: {message}"


def _as_result(failure: dict[str, Any], store: Store) -> dict[str, Any] | None:
    """None where its cell.json is missing or not this cell's."""
    cell, steps, ended = failure["cell"], failure.get("steps"), failure.get("time")
    if _lacking({"cell": cell}, _OF_THE_CELL) or fingerprint(cell["identity"]) != failure["id"]:
        return None
    teacher, _ = _read(store.root / "teachers" / f"{fingerprint([cell['identity'].get('teacher'), cell['identity']['evaluation']])}.json")
    teacher = scored(teacher) if isinstance(teacher, dict) else {}
    top1, images = teacher.get("top1"), cell["evaluation"].get("images")
    scores: dict[str, Any] = {"top1": math.nan, "best": {"top1": math.nan}}
    if without_data(cell):
        scores = {"metric": "agreement", "agreement": math.nan, "kl": math.nan, "best": {"agreement": math.nan}}
    elif teacher.get("metric") in DENSE:
        scores["metric"] = teacher["metric"]
    epoch = IN_EPOCH.search(str(failure["message"])) if failure["kind"] == DIVERGED else None
    return {
        "id": failure["id"],
        "cell": cell,
        "status": "diverged" if failure["kind"] == DIVERGED else "failed",
        "diverged_in": int(epoch[1]) if epoch else None,
        **scores,
        "evaluations": 0,
        "images": images if isinstance(images, int) else 0,
        "steps": steps if isinstance(steps, int) else None,
        "teacher": {"top1": float(top1) if isinstance(top1, int | float) else math.nan},
        "seconds": {"own": math.nan, "shared": math.nan},
        "provenance": {"device_name": None, "device": None},
        "finished": float(ended) if isinstance(ended, int | float) else 0.0,
    }


def _experiment(result: dict[str, Any]) -> str:
    """Equal for cells that differ in nothing but versions and in what those change: of them the newest counts."""
    cell, identity = result["cell"], result["cell"]["identity"]
    same = [cell["method"], cell["changed"], cell["bits"], cell["seed"], cell["precision"], cell["teacher"]["weights_sha256"]]
    budget = [identity["config"].get(key) for key in ("epochs", "iterations", "batch_size")]
    return canonical_json([*same, *budget, *(identity.get(key) for key in ("teacher", "evaluation", "protocol"))])


def _age(result: dict[str, Any]) -> tuple[Any, ...]:
    """Greater for newer ones: versions, then time; a result counts before a failure."""
    identity = result["cell"]["identity"]
    versions = [n if isinstance(n := identity.get(key), int) else 0 for key in ("engine", "method_version")]
    return *versions, result.get("finished", 0.0), "status" not in result


def read_counts(path: Path, result: dict[str, Any]) -> Counts | None:
    """What a per_image.npz says, where it gives the result's own score; None otherwise."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = counts_of(result["metric"], {name: file[name] for name in file.files})
        images, score = len(found.boxes if isinstance(found, Matches) else found), score_of(found)
    except (OSError, ValueError, EOFError, KeyError, TypeError, IndexError, zipfile.BadZipFile):
        return None
    return found if images == result["images"] and abs(score - result["top1"]) < 1e-6 else None


def counts_of(metric: str, arrays: Mapping[str, NDArray[Any]]) -> Counts:
    """What an evaluation of a dense task keeps of every image, as comparisons take it."""
    return Matches(**arrays) if metric == "ap" else arrays["confusion"].astype(np.int64)


def score_of(counts: Counts, times: NDArray[np.int64] | None = None) -> float:
    """mIoU or AP in percent. times: how often each image is in the set; None: once."""
    if isinstance(counts, Matches):
        return average_precision(counts, times)["ap"]
    return float(mean_iou(counts if times is None else counts * times[:, None, None]))


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
    at = next((columns.index(metric) for metric in METRICS if metric in columns), None)
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

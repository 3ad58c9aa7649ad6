"""Results and curves in Python, as pandas data frames: `dfqbench.results` and `dfqbench.history`. No torch here."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dfqbench.analysis.merge import differences, setup_of
from dfqbench.analysis.records import Reading, read_store
from dfqbench.analysis.size import sizes_of
from dfqbench.analysis.tables.cells import load_frame
from dfqbench.errors import Notice, UserError, counted
from dfqbench.files import read_json
from dfqbench.metrics import DENSE, metric_of
from dfqbench.quantization import Bits
from dfqbench.store import Store
from dfqbench.sweep.cell import canonical_json, fingerprint

STATES = ("done", "diverged", "failed")
# the columns of `results` with their dtypes; results/README.md says what they hold
OF_DENSE_TASKS = ("miou", "pixel_accuracy", "teacher_miou", "ap", "ap50", "ap75", "teacher_ap")
OPTIONAL = ("allocator", *OF_DENSE_TASKS)  # columns that are there where a cell has them
COLUMNS = {
    "store": "string",
    "id": "string",
    "status": "category",
    "replicate": "int64",
    "replicates": "int64",
    "method": "string",
    "plain_method": "string",
    "fidelity": "string",
    "yardstick": "bool",
    "configuration": "string",
    "settings": "string",
    "teacher": "string",
    "weights": "string",
    "evaluation": "string",
    "digest": "string",
    "protocol": "string",
    "precision": "string",
    "bits": "category",
    "allocator": "string",
    "weight_bits": "Int64",
    "activation_bits": "Int64",
    "seed": "Int64",
    "metric": "string",
    "top1": "Float64",
    "top5": "Float64",
    "best": "Float64",
    "best_epoch": "Int64",
    "teacher_top1": "Float64",
    "drop": "Float64",
    **dict.fromkeys(OF_DENSE_TASKS, "Float64"),
    "agreement": "Float64",
    "kl": "Float64",
    "plain_agreement": "Float64",
    "plain_kl": "Float64",
    "images": "Int64",
    "evaluations": "Int64",
    "last_epoch": "Int64",
    "steps": "Int64",
    "batch": "Int64",
    "bytes": "Int64",
    "teacher_bytes": "Int64",
    "compression": "Float64",
    "mean_weight_bits": "Float64",
    "macs": "Int64",
    "bops": "Int64",
    "teacher_bops": "Int64",
    "seconds": "Float64",
    "cpu_seconds": "Float64",
    "device": "string",
    "device_kind": "string",
    "host": "string",
    "threads": "Int64",
    "commit": "string",
    "finished": "datetime64[ns, UTC]",
    "error": "string",
}


def results(stores: str | Path | Iterable[str | Path] = "results", *, replicates: bool = False) -> pd.DataFrame:
    """All cells that ended, one row each, from one results folder or from several; results/README.md describes the columns.

    Accuracies are in percent. Cells that failed or diverged are rows too (`status`), with missing values where nothing was measured: what is left
    out of a mean is there to be counted. A cell that several folders hold is one row, that of the first folder that has finished it; the same cell
    measured on another device or with other versions is counted in `replicates`, and has rows of its own only if `replicates` is true.

    Raises UserError for a folder that is no store. Files that are damaged or foreign, and results of one cell and setup that contradict each other,
    are left out with a Notice (a warning) each; so are failed cells that tables do not show, as a newer try counts.
    """
    folders = [stores] if isinstance(stores, str | Path) else list(stores)
    return frame_of([_read(Path(folder)) for folder in folders], replicates=replicates)


def frame_of(readings: Sequence[Reading], *, replicates: bool = False) -> pd.DataFrame:
    """See `results`."""
    done: dict[str, list[tuple[Store, Path, dict[str, Any]]]] = {}
    for reading in readings:
        for store, folder, result in _measured(reading):
            known = done.setdefault(result["id"], [])
            same = next((one for one in known if setup_of(one[2]) == setup_of(result)), None)
            if same is None:
                known.append((store, folder, result))
            elif differing := differences(same[2], same[1], result, folder):
                said = f"{folder} and {same[1]}: the same cell, device and versions, but another {differing[0]}: the former is left out"
                warnings.warn(said, Notice, stacklevel=3)
    rows = [
        (_place(store, number, len(measured) - 1), result)
        for measured in done.values()
        for number, (store, _, result) in enumerate(measured if replicates else measured[:1])
    ]
    seen = set(done)
    for reading in readings:
        failures = {failure["id"]: failure for failure in reading.failures}
        for cell in (*reading.unfinished, *reading.unfinished_without_data):
            if cell["id"] not in seen:
                rows.append((_place(reading.store) | {"error": _said(failures[cell["id"]])}, cell))
        seen |= failures.keys()
    return _frame(rows)


def _place(store: Store, replicate: int = 0, replicates: int = 0) -> dict[str, Any]:
    return {"store": str(store.root), "replicate": replicate, "replicates": replicates}


def _said(failure: dict[str, Any]) -> str:
    return f"{failure['kind']}: {failure['message']}"


def _store(folder: Path) -> Store:
    if not (folder / "runs").is_dir():
        raise UserError(f"{folder}: no results folder (it has no runs/)" if folder.exists() else f"results folder {folder}: there is no such folder")
    return Store(folder)


def _read(folder: Path) -> Reading:
    reading = read_store(_store(folder))
    for line in reading.skipped:
        warnings.warn(f"skipped: {line}", Notice, stacklevel=3)
    left_out = len(reading.failures) - len(reading.unfinished) - len(reading.unfinished_without_data)
    if left_out:
        why = "a newer try of the same experiment counts, or cell.json cannot be read"
        warnings.warn(f"{folder}: {counted(left_out, 'failed cell')} left out: {why}", Notice, stacklevel=3)
    return reading


def _measured(reading: Reading) -> Iterable[tuple[Store, Path, dict[str, Any]]]:
    """(store, folder, result) of all results of a store; a cell's own comes before its replicates."""
    for result in reading.finished:
        yield reading.store, reading.store.folder(result["id"]), result
    for cell_id, others in reading.replicates.items():
        for other in others:
            yield reading.store, reading.store.root / "replicates" / cell_id / setup_of(other), other


def _frame(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> pd.DataFrame:
    """Of (what is known of its place, result), sorted as tables are read: teacher, evaluation set, protocol, precision, method, bits, seed."""
    known = load_frame([result for _, result in rows]).to_dict("records")
    made = [{str(key): value for key, value in own.items()} | place | _more(result) for own, (place, result) in zip(known, rows, strict=True)]
    there = {name for line in made for name in OPTIONAL if line.get(name) is not None}
    frame = pd.DataFrame(made, columns=[name for name in COLUMNS if name in there or name not in OPTIONAL])
    widths = sorted({bits for bits in frame.bits if isinstance(bits, str)}, key=lambda bits: Bits.parse(bits, average=True))
    frame["bits"] = pd.Categorical(frame.bits, widths, ordered=True)
    frame["status"] = pd.Categorical(frame.status, STATES)
    frame["finished"] = pd.to_datetime(frame.finished.astype("Float64"), unit="s", utc=True)
    frame = frame.astype({name: kind for name, kind in COLUMNS.items() if kind != "category" and name in frame})
    order = ["teacher", "evaluation", "protocol", "precision", "method", "configuration", "bits", "seed", "id", "replicate"]
    return frame.sort_values(order, ignore_index=True)


def _more(result: dict[str, Any]) -> dict[str, Any]:
    """What a table does not need."""
    identity, bits, sizes = result["cell"]["identity"], Bits.parse(result["cell"]["bits"], average=True), sizes_of(result)
    chosen = identity.get("widths") or {}
    configuration = fingerprint({key: value for key, value in identity.items() if key not in ("bits", "seed")})
    return (
        {"method": result["cell"].get("settings") or result["cell"]["label"]}  # whatever it is called
        | {"configuration": configuration, "settings": canonical_json(identity["config"])}
        | {"allocator": chosen.get("allocator"), "weight_bits": None if chosen else bits.weights}
        | {"activation_bits": None if chosen.get("activations") else bits.activations, "top5": _number(result.get("top5"))}
        | _dense_scores(result)
        | {"best_epoch": result["best"].get("epoch") if "top1" in result["best"] else None, "last_epoch": result.get("last_epoch")}
        | {"finished": _number(result.get("finished")) or None}
        | (sizes.as_columns() if sizes else {})
    )


def _dense_scores(result: dict[str, Any]) -> dict[str, Any]:
    """mIoU or AP with what stands beside it, in columns of their own: they are no top-1 accuracy."""
    metric = metric_of(result)
    if metric.key not in DENSE:
        return {}
    own = {key: _number(result.get(key)) for key in (metric.key, *metric.beside)}
    return own | {f"teacher_{metric.key}": _number(result["teacher"].get(metric.key))}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def history(cell: str | Path, results: str | Path = "results") -> pd.DataFrame:
    """The curves of a finished cell: a row for each epoch, with `epoch` (Int64), `phase` (string) and what was logged (Float64 where numeric).

    cell: its id, the first characters of one if no other cell of the folder `results` has them, or its folder. top1, in percent, is there for epochs
    that were evaluated (agreement, where there is no evaluation set). A cell that trains nothing has no epochs. Raises UserError where there is no
    such cell, where it is not finished, and where its history.csv is missing or damaged.
    """
    folder = Path(cell)
    if not (isinstance(cell, Path) or os.sep in cell or (folder / "result.json").exists()):
        store = _store(Path(results))
        folder = store.folder(store.find(cell))
    elif not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    path = folder / "history.csv"
    try:
        result = read_json(folder / "result.json")
        epochs = None if result is None else int(result["last_epoch"])
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else [["epoch", "phase"]]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{folder}: damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None
    if epochs is None:
        raise UserError(f"{folder}: not a finished cell, there is no result.json")
    columns, rows = lines[0] if lines else [], lines[1:]
    at = columns.index("epoch") if "epoch" in columns else None
    if at is None or any(len(row) != len(columns) for row in rows) or [row[at] for row in rows] != [str(e) for e in range(1, epochs + 1)]:
        raise UserError(f"{path}: missing or damaged: it does not have the {epochs} epochs of the result")
    frame = pd.DataFrame(rows, columns=columns, dtype="string").replace("", pd.NA)
    for name in columns:
        frame[name] = _numeric(frame[name])
    return frame.astype({"epoch": "Int64"} | {name: "string" for name in ("phase",) if name in columns})


def _numeric(column: pd.Series[str]) -> pd.Series[Any]:
    """As Float64 if all that is there are numbers."""
    try:
        return column.astype("Float64")
    except ValueError:
        return column

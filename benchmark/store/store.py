"""The store: results as files. One folder per cell, small files, each written whole or not at all. No torch here.

<results>/runs/<cell id>/cell.json      what was asked for
                         result.json    exists = done
                         failed.json    the traceback of the last try
                         history.csv    one row per epoch
                         correct.npy    packed bits, one per test image in the set's order
                         student.safetensors  the quantized network (export/student_file.py)
                         samples.png, log.txt
<results>/runs/<cell id>/lease.json     some process works on it; its heartbeat is the file's time
                         progress.json  how far it is, or was when its process ended
<results>/bundles/<bundle id>/          the checkpoint of unfinished work
<results>/images/<key>/                 images that one cell made for itself and others (engine/synthesis_cache.py)
<results>/unseen/<key>.safetensors      images that nothing is trained on, for cells without an evaluation set
<results>/allocations/<key>.json        a width for each tensor, chosen once for all cells that share it; images to choose on
<results>/teachers/<key>.json           a teacher's own accuracy
<results>/sweeps/<name>.json            which cells a config's last run stood for
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dfqbench.errors import UserError
from dfqbench.files import read_json, temporary_name, write_atomically, write_json
from dfqbench.metrics import METRICS
from dfqbench.store.lease import Lease, kept_alive

WRITTEN = (
    "runs",
    "bundles",
    "images",
    "teachers",
    "sweeps",
    "selections",
    "replicates",
    "unseen",
    "allocations",
)  # folders, as far as they are there
CELL_ID = re.compile(r"[0-9a-f]{12}")
NAMED = 5  # cells that an ambiguous prefix stands for and that are named


class Store:
    """The results folder. Raises UserError if it cannot be one (a file, not writable)."""

    def __init__(self, root: str | Path, writable: bool = False):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"results folder {self.root} is a file: give a folder with --results")
        if writable:
            self._check_writable()

    def _check_writable(self) -> None:
        folder = self.root
        try:
            (self.root / "runs").mkdir(parents=True, exist_ok=True)
            for folder in (self.root, *(self.root / name for name in WRITTEN)):
                if folder.is_dir():
                    probe = folder / f".writable.{os.getpid()}"
                    probe.touch()
                    probe.unlink()
        except OSError as error:
            raise UserError(f"results folder {folder} cannot be written: {error.strerror}") from None

    def check_cells(self, cell_ids: Iterable[str]) -> None:
        """UserError where what is here of a cell may not be written: it is told before any is trained, not when its turn comes."""
        for cell_id in cell_ids:
            folder = self.folder(cell_id)
            for path in (folder, folder / "log.txt"):
                if path.exists() and not os.access(path, os.W_OK):
                    raise UserError(f"{path} cannot be written: {os.strerror(errno.EACCES)} (another user's? take other --results, and merge them)")

    def folder(self, cell_id: str) -> Path:
        return self.root / "runs" / cell_id

    def speed_folders(self) -> list[Path]:
        """Where `dfqbench speed` writes, and the same beside this store's runs."""
        return list(dict.fromkeys([self.root / "speed", Path("results/speed")]))

    def bundle_folder(self, bundle_id: str) -> Path:
        return self.root / "bundles" / bundle_id

    @property
    def images_folder(self) -> Path:
        """Images that cells of equal synthesis settings share; may be deleted at any time."""
        return self.root / "images"

    def ids(self) -> list[str]:
        runs = self.root / "runs"
        return sorted(p.name for p in runs.iterdir() if p.is_dir()) if runs.is_dir() else []

    def find(self, given: str) -> str:
        """The id of a cell that is `given` or, alone of all in the store, starts with it. Raises UserError where that is none, or several."""
        found = [cell_id for cell_id in self.ids() if CELL_ID.fullmatch(cell_id) and cell_id.startswith(given)]
        if not found:
            raise UserError(f"{given!r}: no cell in {self.root / 'runs'} has such an id; `dfqbench table --format csv` and the report show them")
        if len(found) > 1:
            named = ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
            raise UserError(f"{given!r}: {len(found)} cells have such an id: {named}")
        return found[0]

    def result(self, cell_id: str) -> dict[str, Any] | None:
        """The finished cell's result; None if there is none or it is damaged."""
        return self._read(cell_id, "result.json")

    def failure(self, cell_id: str) -> dict[str, Any] | None:
        return self._read(cell_id, "failed.json")

    def _read(self, cell_id: str, name: str) -> dict[str, Any] | None:
        """Raises PermissionError for a file that is there and may not be read: it is no missing one, which would be made again."""
        try:
            found = read_json(self.folder(cell_id) / name)
        except PermissionError:
            raise
        except (ValueError, OSError):
            return None
        return found if isinstance(found, dict) else None

    def lease(self, cell_id: str) -> Lease:
        return Lease(self.folder(cell_id) / "lease.json")

    def results(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All finished cells, and a line for every file that could not be read: those are left where they are."""
        found, damaged = [], []
        for cell_id in self.ids():
            path = self.folder(cell_id) / "result.json"
            try:
                result = read_json(path)
                if result is None:
                    continue
                if not {"id", "cell"} <= result.keys() or not METRICS.keys() & result.keys():
                    raise ValueError("not a result of this suite")
                found.append(result)
            except (ValueError, AttributeError) as error:
                damaged.append(f"{path}: {error}")
            except OSError as error:
                damaged.append(f"{path}: {error.strerror}")
        return found, damaged

    def write_cell(self, record: dict[str, Any]) -> None:
        write_json(self.folder(record["id"]) / "cell.json", record)

    def write_result(self, cell_id: str, result: dict[str, Any]) -> None:
        """Last of a cell's files: with it the cell is done."""
        write_json(self.folder(cell_id) / "result.json", result)
        for name in ("failed.json", "progress.json"):
            (self.folder(cell_id) / name).unlink(missing_ok=True)

    def write_failure(self, cell_id: str, kind: str, message: str, trace: str, **known: Any) -> None:
        """known: what else can be said of the try, like how many steps it was to have."""
        write_json(self.folder(cell_id) / "failed.json", {"kind": kind, "message": message, "traceback": trace, "time": time.time(), **known})

    def write_history(self, cell_id: str, rows: list[dict[str, Any]]) -> None:
        """history.csv, whole: columns are all keys of all rows, in the order in which they first appear."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.folder(cell_id) / "history.csv", text.getvalue())

    def write_progress(self, cell_id: str, progress: dict[str, Any]) -> None:
        """For those who watch; nothing depends on it."""
        path = self.folder(cell_id) / "progress.json"
        temporary = temporary_name(path)
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(progress), encoding="utf-8")
            temporary.replace(path)

    def progress(self, cell_id: str) -> dict[str, Any] | None:
        """phase, step, steps, rate (steps per second), time; None if the cell was never begun or is done."""
        with contextlib.suppress(ValueError, OSError):
            found = read_json(self.folder(cell_id) / "progress.json")
            return found if isinstance(found, dict) else None
        return None

    def append_log(self, cell_id: str, line: str) -> None:
        with open(self.folder(cell_id) / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def finished_bundle(self, bundle_id: str) -> None:
        """Removes the checkpoint of a bundle that needs it no more."""
        shutil.rmtree(self.bundle_folder(bundle_id), ignore_errors=True)

    @contextlib.contextmanager
    def leases(self, cell_ids: Iterable[str]) -> Iterator[list[str]]:
        """Claims cells for this process and keeps the claims alive; yields those that it got."""
        held = {}
        for cell_id in cell_ids:
            self.folder(cell_id).mkdir(parents=True, exist_ok=True)
            lease = self.lease(cell_id)
            if lease.acquire():
                held[cell_id] = lease
        with kept_alive(held.values()):
            yield list(held)

"""Brings stores of several people or clusters together. Nothing is ever overwritten. No torch here.

A cell that is not here yet is copied whole. The same cell with the same result is a duplicate and left where it is; measured on another
device or with other versions it is a replicate (kept under replicates/<cell>/<setup>/); with the same device and versions but another result
it is a conflict: reported, and left where it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqbench.analysis.records import read_correct, read_store
from dfqbench.errors import UserError
from dfqbench.files import read_json, write_atomically
from dfqbench.metrics import metric_of
from dfqbench.store import Store
from dfqbench.sweep.cell import fingerprint

SETUP = ("git", "packages", "python", "device", "device_name", "threads", "cpu_capability")  # of a result's provenance: what may change its bits
SCORES = ("top1", "top5", "miou", "pixel_accuracy", "ap", "ap50", "ap75", "agreement", "kl", "plain_rounding", "correct", "images", "loss", "best")
NUMBERS = (*SCORES, "evaluations", "last_epoch", "steps", "student_state")
NOT_COPIED = ("lease.json", "wandb.json")


@dataclass
class Merged:
    """What became of the other stores' cells; a line for each conflict and for all that could not be read."""

    copied: int = 0
    duplicates: int = 0
    replicates: int = 0
    failed: int = 0
    set_aside: int = 0
    conflicts: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            (self.copied, "new"),
            (self.duplicates, "already here"),
            (self.replicates, "replicates"),
            (self.failed, "failed ones, for the record"),
            (self.set_aside, "unfinished ones here set aside"),
            (len(self.conflicts), "conflicts"),
            (len(self.skipped), "skipped"),
        ]
        return ", ".join(f"{number} {name}" for number, name in parts if number) or "nothing to merge"


def merge(others: list[Path], into: Path) -> Merged:
    """Copies what `into` lacks. Raises UserError, before anything is written, where one of the folders is no store or is `into` itself."""
    for other in others:
        if not (other / "runs").is_dir():
            raise UserError(f"{other}: no results folder (it has no runs/)")
        if into.exists() and other.resolve() == into.resolve():
            raise UserError(f"{other}: cannot be merged into itself; name the folder to merge into with --results")
    store = Store(into, writable=True)
    done = Merged()
    try:
        for other in others:
            _merge_one(Store(other), store, done)
    except OSError as error:
        where = error.filename or f"results folder {into}"
        raise UserError(f"{where}: {error.strerror}; what was copied so far is whole, the same command goes on from there") from error
    return done


def _merge_one(other: Store, store: Store, done: Merged) -> None:
    reading = read_store(other)
    done.skipped += reading.skipped
    for result in reading.finished:
        with _unreadable_skipped(done):
            _merge_result(result, other.folder(result["id"]), store, done)
    for cell_id, replicates in reading.replicates.items():
        for replicate in replicates:
            with _unreadable_skipped(done):
                _merge_result(replicate, other.root / "replicates" / cell_id / setup_of(replicate), store, done)
    for failure in reading.failures:
        folder = store.folder(failure["id"])
        if not folder.exists():
            with _unreadable_skipped(done):
                _copy_whole(other.folder(failure["id"]), folder)
                done.failed += 1
    _merge_teachers(other, store, done)
    for images in sorted((other.root / "unseen").glob("*.safetensors")):  # for more cells on the images of those that came
        if not (mine := store.root / "unseen" / images.name).exists():
            with _unreadable_skipped(done):
                write_atomically(mine, images.read_bytes())


@contextlib.contextmanager
def _unreadable_skipped(done: Merged) -> Iterator[None]:
    """A folder of which a file cannot be copied is named and left out."""
    try:
        yield
    except shutil.Error as error:
        source, _, why = error.args[0][0]
        if "No space left" in str(why):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        done.skipped.append(f"{source}: {str(why).partition('] ')[2].partition(': ')[0] or why}")


def _merge_result(result: dict[str, Any], folder: Path, store: Store, done: Merged) -> None:
    cell_id = result["id"]
    here = store.folder(cell_id)
    if not (here / "result.json").exists():
        holder = store.lease(cell_id).holder()
        if holder is not None:
            done.skipped.append(
                f"{folder}: process {holder['pid']} on {holder['host']} is running this cell into {store.root}; merge again when it is done"
            )
            return
        if here.exists():
            _set_aside(here, store)
            done.set_aside += 1
        _copy_whole(folder, here)
        done.copied += 1
        return
    known = list(_known(cell_id, store))
    if not known:
        why = "damaged" if os.access(here / "result.json", os.R_OK) else os.strerror(errno.EACCES)
        done.skipped.append(f"{here / 'result.json'}: {why}, so {folder} cannot be compared with it; nothing was changed")
        return
    same_setup = [(place, mine) for place, mine in known if setup_of(mine) == setup_of(result)]
    if not same_setup:
        _copy_whole(folder, store.root / "replicates" / cell_id / setup_of(result))
        done.replicates += 1
        return
    place, mine = same_setup[0]
    differing = differences(mine, place, result, folder)
    if not differing:
        done.duplicates += 1
        return
    cell = result["cell"]
    what = ", ".join(
        f"{name} {_short(mine.get(name))} here, {_short(result.get(name))} there" if name != "correct.npy" else name for name in differing[:3]
    )
    name = f"{cell['label']} {cell['teacher']['label']} {cell['bits']} seed {cell['seed']}"
    done.conflicts.append(f"{folder}: {name}: same device and versions, another result: {what}; nothing was changed")


def differences(mine: dict[str, Any], here: Path, theirs: dict[str, Any], there: Path) -> list[str]:
    """In which numbers two results of one cell, in their folders, differ; of equal ones, whether they are about other images."""
    differing = [name for name in NUMBERS if mine.get(name) != theirs.get(name)]
    if not differing:
        ours, others = read_correct(here / "correct.npy", mine), read_correct(there / "correct.npy", theirs)
        differing = ["correct.npy"] if ours is not None and others is not None and (ours != others).any() else []
    return differing


def setup_of(result: dict[str, Any]) -> str:
    """Device and versions as one name."""
    return fingerprint({key: result["provenance"].get(key) for key in SETUP})


def _known(cell_id: str, store: Store) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, result) of the cell's own result and of its replicates."""
    for folder in (store.folder(cell_id), *sorted((store.root / "replicates" / cell_id).glob("*"))):
        with contextlib.suppress(ValueError, OSError):
            result = read_json(folder / "result.json")
            if isinstance(result, dict) and "provenance" in result:
                yield folder, result


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def _copy_whole(source: Path, target: Path) -> None:
    """Under a temporary name, then renamed: a folder that is there is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(source, temporary, ignore=lambda _, names: [n for n in names if n in NOT_COPIED or n.endswith(".tmp")])
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _set_aside(folder: Path, store: Store) -> None:
    """Moves an unfinished or failed try away, so that its files and a finished cell's never mix."""
    place = store.root / "set-aside"
    place.mkdir(parents=True, exist_ok=True)
    number = 1
    while (place / f"{folder.name}-{number}").exists():
        number += 1
    os.rename(folder, place / f"{folder.name}-{number}")


def _merge_teachers(other: Store, store: Store, done: Merged) -> None:
    for path in sorted((other.root / "teachers").glob("*.json")):
        mine = store.root / "teachers" / path.name
        try:
            record = read_json(path)
            known = read_json(mine)
        except ValueError as error:
            done.skipped.append(f"{path}: damaged here or there: {error}")
            continue
        except PermissionError as error:
            done.skipped.append(f"{error.filename}: {error.strerror}")
            continue
        if known is None:
            write_atomically(mine, path.read_bytes())
        elif (known.get("correct"), known.get(key := metric_of(record).key)) != (record.get("correct"), record.get(key)):
            done.conflicts.append(f"{path}: the teacher's own accuracy is {known.get(key)} here, {record.get(key)} there; nothing was changed")

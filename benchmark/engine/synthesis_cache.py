"""Images that one cell made and others take over: those whose settings make the same.

Leading phases with `Phase.step` only make images. What is kept is what they changed: of everything that the method holds (see `state_of`) and of
torch's own random state, the leaves that differ between the end of `setup` and the end of those phases. A cell that takes them over keeps
all else as its own settings made it: generators and optimizers of later phases, learning rates, sizes.

<results>/images/<key>/images.json   what they depend on, which cell made them, in how many seconds, and a sha256 of every file
                       state.pt      what the making changed, and the rows of its epochs
                       *.safetensors the method's image sets
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfqbench.engine.lockstep import Lockstep
from dfqbench.engine.method_state import image_sets_of, restore_state
from dfqbench.engine.state_difference import changed, difference
from dfqbench.files import read_json, write_atomically, write_json
from dfqbench.method.hosting import methods_of
from dfqbench.metrics import METRICS
from dfqbench.store.provenance import provenance
from dfqbench.sweep.cell import ENGINE_VERSION, ROUNDING_VERSION, fingerprint

MANIFEST, STATE = "images.json", "state.pt"
NOT_LOGGED = ("epoch", "phase", *METRICS, "seconds")  # of a row of the history: the engine's, not the method's


def dependencies(lockstep: Lockstep) -> dict[str, Any]:
    """Everything that can change the images which a bundle's leading phases make, down to the bit: JSON values."""
    cell, config = lockstep.bundle.cells[0], lockstep.method.config
    hosts = [host.info.source_sha256 for host, _ in methods_of(type(lockstep.method), config)[1:]]
    on = provenance(lockstep.device)
    device = ("device", "device_name") + (("threads", "cpu_capability") if lockstep.device.type == "cpu" else ())
    return {
        "engine": [ENGINE_VERSION, ROUNDING_VERSION],
        "method": cell.method,
        "method_version": cell.method_version,
        "method_source": lockstep.method.info.source_sha256,
        **({"host_source": hosts} if hosts else {}),
        "config": {name: value for name, value in cell.config.items() if name not in config.after_images},
        "plan": [[phase.name, lockstep.iterations_of(phase)] for phase, _ in lockstep.epochs[: lockstep.making_epochs]],
        "teacher": cell.identity()["teacher"],
        "seed": cell.seed,
        "precision": cell.precision,
        "device": {key: on[key] for key in device} | {"torch": torch.__version__},
    }


def state_before(lockstep: Lockstep) -> dict[str, Any]:
    """Whatever the making of images can change, before its first step; a copy."""
    lockstep.begin_epoch(lockstep.epochs[0][0], calibrating=False)  # learning rates by milestones are the settings' work, not the making's
    return _state(lockstep)


def made_since(before: dict[str, Any], lockstep: Lockstep) -> dict[str, Any] | None:
    """What has changed since `before`: the images with all that belongs to their making."""
    return difference(before, _state(lockstep))


def _state(lockstep: Lockstep) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(lockstep.device) if lockstep.device.type == "cuda" else None
    return copy.deepcopy({"method": lockstep.method_state(), "global_random": torch.get_rng_state(), "cuda_random": cuda})


@dataclass(frozen=True)
class _Kept:
    """What was read from a folder, whole and with the right hashes. made_by: a cell's id. files: of image sets."""

    made_by: str
    seconds: float
    cpu_seconds: float  # NaN where an earlier version did not measure them
    files: list[str]
    changes: dict[str, Any] | None
    epochs: list[dict[str, Any]]


class SynthesisCache:
    """The images of one bundle, taken over from the store or kept there. Make it before the bundle's first step and before `restore`.

    root: the folder of all kept images. work: the bundle's own folder, where the files of its image sets lie.
    """

    def __init__(self, root: Path, work: Path, lockstep: Lockstep):
        self.root, self.work, self.lockstep = root, work, lockstep
        self.shared = lockstep.method.info.shares_synthesis and lockstep.making_epochs > 0
        if self.shared:
            self.dependencies = dependencies(lockstep)
            self.folder = root / fingerprint(self.dependencies)
            self.before = state_before(lockstep)

    def take_over(self) -> str:
        """Brings the bundle, which has not begun, behind the phases that make images, if these images are kept; says what it did."""
        if not self.shared:
            return ""
        try:
            kept = self._read()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            why = (str(error).splitlines() or [type(error).__name__])[0]
            return f"kept images {self.folder} are damaged ({why}): removed, and made again"
        if kept is None:
            return ""
        for name in kept.files:
            link(self.folder / name, self.work / name)
        lockstep, state = self.lockstep, changed(self.before, kept.changes)
        restore_state(lockstep.method, state["method"])
        torch.set_rng_state(state["global_random"])
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"], lockstep.device)
        for row in kept.epochs:
            lockstep.skip_epoch(row["logged"], row["seconds"])
        lockstep.watch.totals[lockstep.SHARED] = kept.seconds
        lockstep.watch.cpu[lockstep.SHARED] = kept.cpu_seconds
        lockstep.images_from = {"cell": kept.made_by, "seconds": kept.seconds}
        return f"images taken over from cell {kept.made_by}, which made them in {kept.seconds:.1f} s: these seconds count here too"

    def _read(self) -> _Kept | None:
        """None where nothing is kept. Raises whatever shows that it is not what was written."""
        if not self.folder.exists():
            return None
        manifest = read_json(self.folder / MANIFEST)
        if manifest is None or manifest["depends_on"] != self.dependencies:
            raise ValueError(f"{MANIFEST} is missing or speaks of other images")
        for name, digest in manifest["files"].items():
            with open(self.folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ValueError(f"{name} is not the file that was written")
        state = torch.load(self.folder / STATE, map_location=_on(self.lockstep.device), weights_only=True)
        files = [name for name in manifest["files"] if name != STATE]
        seconds, cpu_seconds = float(manifest["seconds"]), float(manifest.get("cpu_seconds", math.nan))
        return _Kept(str(manifest["made_by"]), seconds, cpu_seconds, files, state["changes"], state["epochs"])

    def keep(self) -> str:
        """Keeps what the bundle made, once its making phases are over; says why where that is not possible.

        The folder appears whole or not at all. Where another process was faster, its images stay: they are the same.
        """
        if not self.shared or self.lockstep.images_from is not None or self.folder.exists():
            return ""
        partial = self.root / f".{self.folder.name}.{socket.gethostname()}.{os.getpid()}"
        try:
            self._write(partial)
            os.rename(partial, self.folder)
        except OSError as error:
            return "" if self.folder.exists() else f"images are not kept for other cells ({error.strerror or error}); going on"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return ""

    def _write(self, folder: Path) -> None:
        lockstep = self.lockstep
        rows = lockstep.trainees[0].history[: lockstep.making_epochs]
        epochs = [{"logged": {k: v for k, v in row.items() if k not in NOT_LOGGED}, "seconds": row["seconds"]} for row in rows]
        buffer = io.BytesIO()
        torch.save({"changes": made_since(self.before, lockstep), "epochs": epochs}, buffer)
        write_atomically(folder / STATE, buffer.getvalue())
        files = {STATE: hashlib.sha256(buffer.getvalue()).hexdigest()}
        for images in image_sets_of(lockstep.method):
            for name, digest in images.files:
                link(self.work / name, folder / name)
                files[name] = digest
        seconds = round(lockstep.watch.read().get(lockstep.SHARED, 0.0), 3)
        manifest = {"depends_on": self.dependencies, "made_by": lockstep.bundle.cells[0].id, "seconds": seconds, "files": files}
        if math.isfinite(cpu_seconds := lockstep.watch.cpu.get(lockstep.SHARED, 0.0)):
            manifest["cpu_seconds"] = round(cpu_seconds, 3)
        write_json(folder / MANIFEST, manifest)


def link(source: Path, target: Path) -> None:
    """The same file under another name, where the file system can; a copy elsewhere. Image sets never change a file that they wrote."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _on(device: torch.device) -> Callable[[Any, str], Any]:
    """Puts what was on a GPU on this one; what was on the CPU (random states, Adam's step counts) stays there."""
    return lambda storage, place: storage.to(device=device) if place.startswith("cuda") else storage

"""Choosing a method's settings without real data: whose student agrees best with the teacher on synthetic images that none was trained on.

Nothing here opens an evaluation set: neither images nor labels of it can reach the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from dfqbench.engine.device import autocast_of, keep_freed_memory, use_device
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.errors import UserError
from dfqbench.files import read_json, write_json
from dfqbench.method.contract import Phase
from dfqbench.network import Teacher
from dfqbench.run.agreement import agreement, kept_images
from dfqbench.run.allocations import Allocations
from dfqbench.run.progress import Progress
from dfqbench.run.rehearsal import rehearse
from dfqbench.store import Store
from dfqbench.store.provenance import provenance
from dfqbench.sweep.cell import Bundle, bundles, fingerprint
from dfqbench.sweep.load import LoadedSweep
from dfqbench.teachers import load

if TYPE_CHECKING:
    from dfqbench.run.options import StopFlag

SHOWN = 6
SECONDS = ("wall_seconds", "gpu_seconds")


def selected(loaded: LoadedSweep, store: Store, device_name: str, progress: Progress, stop: StopFlag) -> Iterator[dict[str, Any]]:
    """The records of all cells of a sweep with a `selection`, those of an earlier call included, as they are ready.

    A record: the cell, its mean `kl` in nats, its `agreement` in percent, the last row of its history, and on what it was measured.
    """
    selection = loaded.selection
    if selection is None:
        raise UserError(f"{loaded.path}: selection: missing; it says which images to compare on, like {{images: {{gznq: {{images: 1280}}}}}}")
    if loaded.yardsticks:
        raise UserError(f"{loaded.path}: yardsticks: nothing is selected on real images: leave these rows to `dfqbench run`")
    clash = {(cell.method, cell.seed) for cell in loaded.cells} & {(maker.method, maker.seed) for maker in selection.cells}
    if clash:  # told before another method's cells are trained
        method, seed = clash.pop()
        raise UserError(f"{loaded.path}: selection.seed: {seed} is also a seed of the sweep, and {method} one of its methods")
    device = use_device(device_name)
    keep_freed_memory()
    folder = store.root / "selections" / loaded.sweep.name
    allocations = Allocations(loaded, store.root, device, stop)
    progress.start(bundles(loaded.cells))
    for bundle in bundles(loaded.cells):
        card = bundle.cells[0].teacher
        maker = next(c for c in selection.cells if c.teacher == card)
        digest = fingerprint([maker.identity(), selection.count])
        paths = {cell.id: folder / f"{cell.id}-{digest}.json" for cell in bundle.cells}
        missing = tuple(cell for cell in bundle.cells if read_json(paths[cell.id]) is None)
        if missing:
            teacher = Teacher(load(loaded.teachers[card], card), card.task).to(device).to(memory_format=torch.channels_last)
            images = kept_images(folder / f"images-{digest}.safetensors", maker, teacher, device, selection.count, progress.say, stop)
            for record in _compared(Bundle(missing), teacher, images, device, progress, stop, allocations):
                write_json(paths[record["id"]], {**record, "images": {"cell": maker.record(), "count": len(images)}})
        yield from (record for record in map(read_json, paths.values()) if record is not None)


def _compared(
    bundle: Bundle, teacher: Teacher, images: Tensor, device: torch.device, progress: Progress, stop: StopFlag, allocations: Allocations
) -> Iterator[dict[str, Any]]:
    rehearse(bundle, teacher, device, progress.say)
    autocast, widths = autocast_of(bundle.cells[0], device), allocations.of(bundle, teacher, progress.say)
    lockstep = Lockstep(bundle, teacher, device, lambda student: agreement(student, teacher, images, autocast), widths=widths)
    progress.bundle(bundle, lockstep.steps, 0)
    lockstep.run(_Stopping(progress, stop))
    for trainee in lockstep.trainees:
        scores, seconds = trainee.evaluation.scores() if trainee.evaluation else {}, lockstep.watch.read()
        yield {
            "id": trainee.cell.id,
            "cell": trainee.cell.record(),
            "kl": scores.get("kl"),
            "agreement": scores.get("agreement"),
            "failed": trainee.failed,
            "last": trainee.history[-1] if trainee.history else {},
            "seconds": round(seconds.get(trainee.name, 0.0) + seconds.get(lockstep.SHARED, 0.0), 1),
            "provenance": provenance(device),
        }


def selection_frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per cell, the lowest mean KL over bit widths and seeds first, methods of which a cell diverged last.

    Behind the first SHOWN columns are the last epoch's logged values, and its seconds: a GPU's, or by the clock on the wall.
    """
    frame = pd.DataFrame(
        {"method": r["cell"]["label"], "bits": r["cell"]["bits"], "seed": r["cell"]["seed"], "kl": r["kl"], "agreement": r["agreement"]}
        | {"failed": r["failed"] or ""}
        | {SECONDS[r["provenance"]["device"] == "cuda"] if k == "seconds" else k: v for k, v in r["last"].items() if k not in ("phase", "agreement")}
        for r in records
    )
    mean = frame.astype({"kl": float}).groupby("method").kl.transform(lambda kl: kl.mean(skipna=False))  # survivors alone would look better
    return frame.assign(mean=mean).sort_values(["mean", "method", "bits", "seed"], ascending=[True, True, False, True]).drop(columns="mean")


class _Stopping:
    """Shows progress; a signal ends the bundle, whose work is lost: what was compared before stays."""

    def __init__(self, progress: Progress, stop: StopFlag):
        self.progress, self.stop = progress, stop

    def step(self, lockstep: Lockstep, phase: Phase) -> None:
        self.progress.step(phase.name)
        if self.stop.signal is not None:
            raise Interrupted

    def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
        self.progress.epoch(lockstep.epoch, len(lockstep.epochs), {t.name: t.history[-1] for t in lockstep.trainees})

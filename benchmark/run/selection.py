"""Choosing a method's settings without real data: whose student agrees best with the teacher on synthetic images that none was trained on.

Nothing here opens an evaluation set: neither images nor labels of it can reach the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from dfqbench.engine.device import autocast_of, check_device, keep_freed_memory
from dfqbench.engine.evaluate import Evaluation
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.engine.method_state import set_up
from dfqbench.errors import UserError
from dfqbench.files import read_json, write_json
from dfqbench.method.contract import Phase
from dfqbench.network import Network, Teacher
from dfqbench.run.progress import Progress
from dfqbench.store import Store
from dfqbench.store.provenance import provenance
from dfqbench.sweep.cell import Bundle, Cell, bundles, fingerprint
from dfqbench.sweep.load import LoadedSweep
from dfqbench.teachers import load

if TYPE_CHECKING:
    from dfqbench.run.options import StopFlag

BATCH = 256
SHOWN = 6
SECONDS = ("wall_seconds", "gpu_seconds")


@torch.inference_mode()
def agreement(student: Network, teacher: Network, images: Tensor, autocast: Any) -> Evaluation:
    """How far the student is from the teacher on images (N x C x H x W).

    `loss` is the mean KL(teacher || student) in nats, `top1` the share of equal answers in percent.
    """
    divergences, equal = [], []
    for batch in images.split(BATCH):
        with autocast:
            p, q = (F.log_softmax(network(batch).float(), 1) for network in (teacher, student))
        divergences.append(F.kl_div(q, p, reduction="none", log_target=True).sum(1))
        equal.append(p.argmax(1) == q.argmax(1))
    same = torch.cat(equal).cpu().numpy()
    return Evaluation(same, 100.0 * float(np.mean(same)), None, float(torch.cat(divergences).double().mean()))


def made_images(cell: Cell, teacher: Teacher, device: torch.device, count: int) -> Tensor:
    """At least one batch, at most `count` images (N x C x H x W) of the cell's method after its whole plan, without any student."""
    method = set_up(cell, teacher, device, None)
    with autocast_of(cell, device):
        for phase in method.phases():
            for _ in range(phase.epochs * (phase.iterations if phase.iterations is not None else int(method.config.iterations))):
                if phase.step is not None:
                    phase.step()
                elif phase.batch is None:
                    method.synthesize()
        made: list[Tensor] = []
        while sum(map(len, made)) < count:
            made.append(method.synthesize().images.detach().float())
    return torch.cat(made)[:count]


def selected(loaded: LoadedSweep, store: Store, device_name: str, progress: Progress, stop: StopFlag) -> Iterator[dict[str, Any]]:
    """The records of all cells of a sweep with a `selection`, those of an earlier call included, as they are ready.

    A record: the cell, its mean `kl` in nats, its `agreement` in percent, the last row of its history, and on what it was measured.
    """
    selection = loaded.selection
    if selection is None:
        raise UserError(f"{loaded.path}: selection: missing; it says which images to compare on, like {{images: {{gznq: {{images: 1280}}}}}}")
    clash = {(cell.method, cell.seed) for cell in loaded.cells} & {(maker.method, maker.seed) for maker in selection.cells}
    if clash:  # told before another method's cells are trained
        method, seed = clash.pop()
        raise UserError(f"{loaded.path}: selection.seed: {seed} is also a seed of the sweep, and {method} one of its methods")
    device = check_device(device_name)
    keep_freed_memory()
    folder = store.root / "selections" / loaded.sweep.name
    progress.start(len(loaded.cells), len(loaded.cells))
    for bundle in bundles(loaded.cells):
        card = bundle.cells[0].teacher
        maker = next(c for c in selection.cells if c.teacher == card)
        digest = fingerprint([maker.identity(), selection.count])
        paths = {cell.id: folder / f"{cell.id}-{digest}.json" for cell in bundle.cells}
        missing = tuple(cell for cell in bundle.cells if read_json(paths[cell.id]) is None)
        if missing:
            teacher = Teacher(load(loaded.teachers[card], card), card.task).to(device).to(memory_format=torch.channels_last)
            path = folder / f"images-{digest}.safetensors"
            if not path.exists():
                progress.say(f"making {selection.count} images with {maker.method}, seed {maker.seed}")
            images = _kept(path, maker, teacher, device, selection.count)
            for record in _compared(Bundle(missing), teacher, images, device, progress, stop):
                write_json(paths[record["id"]], {**record, "images": {"cell": maker.record(), "count": len(images)}})
        yield from (record for record in map(read_json, paths.values()) if record is not None)


def _kept(path: Path, maker: Cell, teacher: Teacher, device: torch.device, count: int) -> Tensor:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"images": made_images(maker, teacher, device, count).cpu().contiguous()}, partial)
        partial.replace(path)
    return load_file(path)["images"].to(device).contiguous(memory_format=torch.channels_last)


def _compared(bundle: Bundle, teacher: Teacher, images: Tensor, device: torch.device, progress: Progress, stop: StopFlag) -> Iterator[dict[str, Any]]:
    lockstep = Lockstep(bundle, teacher, device, lambda student: agreement(student, teacher, images, lockstep.autocast))
    progress.bundle(bundle, lockstep.steps, 0)
    lockstep.run(_Stopping(progress, stop))
    for trainee in lockstep.trainees:
        found, seconds = trainee.evaluation, lockstep.watch.read()
        yield {
            "id": trainee.cell.id,
            "cell": trainee.cell.record(),
            "kl": found.loss if found else None,
            "agreement": found.top1 if found else None,
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
        | {SECONDS[r["provenance"]["device"] == "cuda"] if k == "seconds" else k: v for k, v in r["last"].items() if k not in ("phase", "top1")}
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

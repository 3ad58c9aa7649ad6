"""A width for each tensor, chosen once for all cells that share teacher, images, budget and allocator, and kept in the store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfqbench.engine.device import use_device
from dfqbench.files import kept_once, read_json, write_json
from dfqbench.method.allocation import AllocationProblem
from dfqbench.method.allocator import allocate, find_allocator
from dfqbench.network import Teacher
from dfqbench.run.agreement import kept_images
from dfqbench.run.options import StopFlag
from dfqbench.store.provenance import provenance
from dfqbench.sweep.cell import Bundle, Cell
from dfqbench.sweep.load import LoadedSweep

Say = Callable[[str], None]


class Allocations:
    """Those of a sweep. The first process that chooses keeps its choice; all others, now and later, take it over."""

    def __init__(self, loaded: LoadedSweep, root: Path, device: torch.device, stop: StopFlag):
        self.loaded, self.folder, self.device, self.stop = loaded, root / "allocations", device, stop

    def of(self, bundle: Bundle, teacher: Teacher, say: Say) -> dict[str, dict[str, int]]:
        """Bits by tensor of each of the bundle's cells that has an allocation, by its id. Raises Interrupted after a signal."""
        return {cell.id: self._widths(cell, teacher, say) for cell in bundle.cells if cell.allocation}

    def record(self, cell: Cell) -> dict[str, Any]:
        """What is known of the choice that `of` made or found: what result.json holds."""
        found: dict[str, Any] | None = read_json(self._path(cell))
        if found is None:
            raise FileNotFoundError(f"{self._path(cell)}: the choice of widths is gone")
        return found

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.allocation_key}.json"

    def _widths(self, cell: Cell, teacher: Teacher, say: Say) -> dict[str, int]:
        path = self._path(cell)
        if read_json(path) is None:
            made = self._chosen(cell, teacher, say)
            with kept_once(path) as mine:
                write_json(mine, made)
        found: dict[str, int] = self.record(cell)["bits"]
        return found

    def _chosen(self, cell: Cell, teacher: Teacher, say: Say) -> dict[str, Any]:
        allocation, pool = cell.allocation, self.loaded.pool
        assert allocation is not None
        assert pool is not None
        use_device(str(self.device))
        teacher.to(self.device).to(memory_format=torch.channels_last)
        maker = pool.maker(cell.teacher)
        path = self.folder / f"images-{pool.digest(cell.teacher)}.safetensors"
        images = kept_images(path, maker, teacher, self.device, pool.count, say, self.stop)
        mine, others = images[: (len(images) + 1) // 2], images[(len(images) + 1) // 2 :]
        say(f"choosing widths for {cell.bits} with {allocation.text}, on {len(mine)} images")
        started, kind = time.perf_counter(), find_allocator(allocation.allocator)
        config = kind.Config(**allocation.settings)
        problem = AllocationProblem(teacher, cell.protocol, cell.bits, mine, config.seed, allocation.activations)
        vector = allocate(kind(problem, config))
        tried, seconds = problem.evaluations, time.perf_counter() - started
        costs = {"cost": problem.cost(vector), "uniform_cost": problem.cost(problem.uniform)}
        if len(others):
            costs |= {"unseen_cost": problem.cost_on(vector, others), "unseen_uniform_cost": problem.cost_on(problem.uniform, others)}
        weights = [(tensor.entries, width) for tensor, width in zip(problem.tensors, vector, strict=True) if tensor.is_weight]
        average = sum(n * width for n, width in weights) / sum(n for n, _ in weights)
        say(f"{allocation.text}: {average:.3f} bits on average, KL {costs['cost']:.3g} nats (equal widths: {costs['uniform_cost']:.3g})")
        return {
            "allocator": allocation.allocator,
            "bits": {tensor.name: width for tensor, width in zip(problem.tensors, vector, strict=True)},
            "entries": {tensor.name: tensor.entries for tensor in problem.tensors},
            "average_weight_bits": average,
            **costs,
            "evaluations": tried,
            "images": len(mine),
            "images_sha256": _sha256(images),
            "seconds": round(seconds, 3),
            "provenance": provenance(self.device),
        }


def _sha256(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()

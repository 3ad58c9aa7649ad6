"""The one way in which images come from a disk to where images are made: a yardstick's, for its own cells."""

from __future__ import annotations

import torch
from torch import Tensor

from dfqbench.engine.evaluate import normalise
from dfqbench.sweep.cell import Cell
from dfqbench.sweep.load import LoadedSweep


def yardstick_of(cell: Cell, loaded: LoadedSweep, device: torch.device) -> Tensor | None:
    """The real images that a cell has in a method's place, count x C x H x W, normalised; None for all that is data-free.

    Raises UserError where they are not those any more that they were when the sweep was read.
    """
    if not cell.yardstick:
        return None
    task, digest = cell.teacher.task, cell.yardstick["digest"]
    pixels = torch.from_numpy(loaded.yardsticks[digest].pixels(task, digest)).to(device)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (task.mean, task.std))
    return normalise(pixels, mean, std).contiguous(memory_format=torch.channels_last)

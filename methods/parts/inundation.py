"""How far AIT lengthens the steps of a small network's weights on a GPU: all layers in one tensor, all doublings at once, and no wait.

A layer at a time, a student's step is thousands of kernels of microseconds each, and waits for the device before every doubling. Here a row stands
for one grid (an output channel), filled up with copies of its first entry, which move no range.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

DOUBLINGS = 30  # at most: a step that is to be longer than 2^30 times is not lengthened
ENTRIES = 2**27  # of all doublings together: beyond it arithmetic is what takes time, and trying one after the other is less of it


class Layout(NamedTuple):
    """Where the entries of several weights, one after the other, lie in rows.

    place: rows x longest, an entry for each position; filled: where it is a copy. layer (rows) and layer_of_entry: numbers of layers; member: rows x
    layers, 1 for a row of that layer; sizes: entries of each layer.
    """

    place: Tensor
    filled: Tensor
    layer: Tensor
    layer_of_entry: Tensor
    member: Tensor
    sizes: Tensor


@functools.cache
def layout(shapes: tuple[torch.Size, ...], device: torch.device) -> Layout:
    rows = [(shape[0], shape[1:].numel()) for shape in shapes]
    longest, starts = max(length for _, length in rows), torch.tensor([0, *(shape.numel() for shape in shapes)]).cumsum(0)
    place, filled = [], []
    for (count, length), start in zip(rows, starts, strict=False):
        position = torch.arange(longest)
        place.append(start + torch.arange(count)[:, None] * length + torch.where(position < length, position, 0))
        filled.append((position >= length).expand(count, -1))
    numbers = torch.arange(len(shapes))
    layer = numbers.repeat_interleave(torch.tensor([count for count, _ in rows]))
    of_entry = numbers.repeat_interleave(torch.tensor([shape.numel() for shape in shapes]))
    member, sizes = torch.nn.functional.one_hot(layer, len(shapes)).double(), torch.tensor([shape.numel() for shape in shapes])
    return Layout(*(t.to(device) for t in (torch.cat(place), torch.cat(filled), layer, of_entry, member, sizes.double())))


def goes(layers: list[Any]) -> bool:
    """Whether these layers' weights can be looked at together: on a GPU, of one kind and with a grid for each channel, and not too many."""
    first, shapes = layers[0], [layer.layer.weight.shape for layer in layers]
    alike = all((layer.bits, layer.protocol) == (first.bits, first.protocol) for layer in layers)
    size = sum(shape[0] for shape in shapes) * max(shape[1:].numel() for shape in shapes) * (DOUBLINGS + 1)
    on_gpu = first.layer.weight.device.type == "cuda"
    rows = first.protocol.weight_granularity == "per-channel" and first.protocol.weight_grid == "uniform"
    return bool(on_gpu and alike and rows and size <= ENTRIES)


def lengthened(layers: list[Any], before: Tensor, step: Tensor, wanted: Any, limit: Any, bisections: int, close: float) -> tuple[Tensor, Tensor]:
    """The new weights, one after the other, and the factor of each layer: what `ait.step_factors` finds, by the same rules.

    before, step: all weights and their steps, one after the other. wanted: the share of integers that a step is to change; limit, bisections and
    close (a share of `wanted`): where doubling and bisection end. wanted and limit are numbers, or scalars on the device.
    """
    at = layout(tuple(layer.layer.weight.shape for layer in layers), before.device)
    weights, steps = before[at.place], step[at.place]
    old = layers[0].weight_levels(weights)

    def shares(factors: Tensor) -> Tensor:
        """Factors of n tries (n x layers) -> the share of integers that each changes in each layer, n x layers."""
        moved = weights - factors[:, at.layer, None] * steps
        levels = layers[0].weight_levels(moved.flatten(0, 1)).view_as(moved)
        changed = ((levels != old) & ~at.filled).sum(2)
        found: Tensor = changed.double() @ at.member / at.sizes
        return found

    powers = 2.0 ** torch.arange(DOUBLINGS + 1, device=before.device)
    tried = shares(powers[:, None].expand(-1, len(layers)).contiguous())
    enough = (tried >= wanted) | (powers >= limit)[:, None]
    last = enough[1:].long().argmax(0) + 1  # the first doubling that suffices
    far = (weights.abs().amax(1) / torch.finfo(weights.dtype).eps / steps.abs().amax(1)).nan_to_num(posinf=0.0)
    useful = torch.where(at.member > 0, far[:, None], 0.0).amax(0)
    high = powers[last]
    searched = (tried[0] < wanted) & enough[1:].any(0) & (high / 2 <= useful.clamp_min(1.0))
    low, factors = high / 2, torch.ones_like(high)
    for _ in range(bisections):
        middle = (low + high) / 2
        share = shares(middle[None])[0]
        factors = torch.where(searched, middle, factors)
        searched = searched & ((share - wanted).abs() >= close * wanted)
        low, high = torch.where(share < wanted, middle, low), torch.where(share < wanted, high, middle)
    return before - factors[at.layer_of_entry] * step, factors

"""The two modules that quantization puts into a network: a layer with quantized weights, and an activation quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.network.canonical import Layer, TransposedConv
from dfqbench.quantization.fake_quantize import fake_quantize, grid, levels, reached
from dfqbench.quantization.level_tables import find_table, indices, on_table
from dfqbench.quantization.protocol import Protocol
from dfqbench.quantization.ranges import RangeEstimator

Grid = tuple[Tensor, Tensor]  # scale and zero point; where a grid is not uniform, scale and table of levels (level_tables.py)
FIXED = ("fixed_scale", "fixed_levels")  # buffers of a grid that moves no more: scale, and zero point or table
FREE = "left_free"  # buffer: which entries of the weight are not on the grid while the layer is `loose`


class Codes(NamedTuple):
    """A weight as whole numbers: (levels - zero_point) * scale, in float32 and in this order, is the weight on its grid, to the bit.

    With a table (float32, ascending), levels are places in it, and table[levels] * scale is the weight; then there is no zero point.

    levels: the weight's shape, whole numbers in lowest..highest as float32. scale, zero_point: float32, one per output channel or scalars; a
    zero point is a whole number that need not lie within the levels, nor within any integer type.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor
    lowest: int
    highest: int
    table: Tensor | None = None

    def weight(self) -> Tensor:
        """The weight on its grid."""
        along = [-1, *[1] * (self.levels.dim() - 1)] if self.scale.dim() else []
        if self.table is not None:
            return self.table[self.levels.long()] * self.scale.view(along)
        return (self.levels - self.zero_point.view(along)) * self.scale.view(along)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer that computes with its weight on a grid; the float weight is what trains, the bias stays float.

    The grid is that of the weight as it is now, per output channel (or per tensor), found anew in every forward pass.
    """

    def __init__(self, layer: Layer | TransposedConv, bits: int, protocol: Protocol):
        super().__init__()
        self.layer, self.bits, self.protocol = layer, bits, protocol
        self.enabled, self.loose = True, False
        self._plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

    def quantized_weight(self, found: Grid | None = None) -> Tensor:
        """The weight on its grid: same shape, float32. found: that grid, where somebody knows it already (`grids_of`).

        While `loose` is set, what `leave_free` named is the float weight.
        """
        on_grid = self._on_grid(found)
        return torch.where(self.get_buffer(FREE), self.layer.weight, on_grid) if self.loose else on_grid

    def _on_grid(self, found: Grid | None) -> Tensor:
        weight, p = self.layer.weight, self.protocol
        scale, zero_point = found or self._grid(weight)
        if p.weight_grid != "uniform":
            rows, scales = self._table_rows(weight), scale.view(-1)
            return _like_rows(on_table(rows, scales, zero_point, p.weight_grid), weight)
        return fake_quantize(
            weight,
            scale,
            zero_point,
            self.bits,
            symmetric=p.weight_symmetric,
            channel_axis=0 if scale.dim() else None,
            clipped_gradient=p.gradient == "clipped",
        )

    @torch.no_grad()
    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each grid: one per output channel, or one; of `weight`, which has this layer's shape."""
        low, high = _extremes(_rows_of(weight))
        return (low, high) if self.protocol.weight_granularity == "per-channel" else (low.amin(0, keepdim=True), high.amax(0, keepdim=True))

    @torch.no_grad()
    def _limits(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each grid, with as many axes as the weight."""
        low, high = (v.view(-1, *[1] * (weight.dim() - 1)) for v in self.extremes(weight))
        if not self.protocol.weight_symmetric:
            return low, high
        widest = torch.maximum(low.abs(), high.abs())
        return -widest, widest

    @torch.no_grad()
    def _grid(self, weight: Tensor) -> Grid:
        if self.has_fixed_grid:
            return self.get_buffer(FIXED[0]), self.get_buffer(FIXED[1])
        if self.protocol.weight_grid != "uniform":
            scale, table = find_table(self._table_rows(weight), self.protocol.weight_grid, self.bits)
            return (scale if self.protocol.weight_granularity == "per-channel" else scale.view(())), table
        return self._shaped(*grid(*self.extremes(weight), self.bits, self.protocol.weight_symmetric))

    def _shaped(self, scale: Tensor, zero_point: Tensor) -> Grid:
        return (scale, zero_point) if self.protocol.weight_granularity == "per-channel" else (scale.view(()), zero_point.view(()))

    @torch.no_grad()
    def fix_grid(self) -> None:
        """From now on the grid is that of the weight as it is now, whatever becomes of the weight; it is part of the state.

        Raises ValueError for a ternary grid: its threshold is the weight's.
        """
        if self.protocol.weight_grid == "ternary":
            raise ValueError("a ternary grid moves with its weight")
        for name, value in zip(FIXED, self._grid(self.layer.weight), strict=True):
            self.register_buffer(name, value.clone())

    @torch.no_grad()
    def fix_weight(self) -> None:
        """Puts the weight itself on its levels, and from now on they are its grid, a ternary one too: all three levels map to themselves."""
        value, found = self.quantized_weight().clone(), self._grid(self.layer.weight)
        self.layer.weight.copy_(value)
        for name, part in zip(FIXED, found, strict=True):
            self.register_buffer(name, part.clone())

    @property
    def has_fixed_grid(self) -> bool:
        return FIXED[0] in self._buffers

    def leave_free(self, entries: Tensor | None) -> None:
        """entries: bool, the weight's shape, as part of the state; None: there are none any more, nor is the layer `loose`."""
        if entries is None:
            self.loose = False
            self._buffers.pop(FREE, None)
        elif FREE in self._buffers:
            self.get_buffer(FREE).copy_(entries)
        else:
            self.register_buffer(FREE, entries.clone())

    @property
    def free(self) -> Tensor | None:
        """What `leave_free` was given last."""
        return self._buffers.get(FREE)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in (*FIXED, FREE):
            if prefix + name in state_dict:
                self.register_buffer(name, state_dict[prefix + name].to(self.layer.weight.device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _table_rows(self, weight: Tensor) -> Tensor:
        """A row for each scale."""
        return _rows_of(weight) if self.protocol.weight_granularity == "per-channel" else _rows_of(weight).reshape(1, -1)

    @torch.no_grad()
    def weight_levels(self, weight: Tensor) -> Tensor:
        """The level of each entry of `weight` (of this layer's shape) on the grid that spans that very weight: whole numbers as float32."""
        if self.protocol.weight_grid != "uniform":
            scale, table = self._grid(weight)
            return _like_rows(indices(self._table_rows(weight), scale.view(-1), table, self.protocol.weight_grid), weight).float()
        return self._rounded(weight, self._grid(weight))

    def _rounded(self, weight: Tensor, found: Grid) -> Tensor:
        """Levels of a uniform grid."""
        scale, zero_point = (v if v.dim() == 0 else v.view(-1, *[1] * (weight.dim() - 1)) for v in found)
        return torch.round(weight * (1.0 / scale) + zero_point).clamp_(*levels(self.bits, self.protocol.weight_symmetric))

    @torch.no_grad()
    def codes(self) -> Codes:
        """The weight as it is now, in whole numbers. Raises ValueError where it has values that are not finite."""
        weight = self.quantized_weight()
        if not bool(torch.isfinite(weight).all() & torch.isfinite(self.layer.weight).all()):
            raise ValueError("a weight is not finite")
        scale, zero_point = self._grid(self.layer.weight)
        if self.protocol.weight_grid != "uniform":
            return Codes(self.weight_levels(self.layer.weight), scale, torch.zeros_like(scale), 0, len(zero_point) - 1, zero_point)
        codes = Codes(self.weight_levels(self.layer.weight), scale, zero_point, *levels(self.bits, self.protocol.weight_symmetric))
        if not torch.equal(codes.weight(), weight):  # a GPU's kernel may break a tie the other way: then what it computes with counts
            along = [-1, *[1] * (weight.dim() - 1)] if scale.dim() else []
            codes = codes._replace(levels=torch.round(weight / scale.view(along) + zero_point.view(along)).clamp_(codes.lowest, codes.highest))
        if not torch.equal(codes.weight(), weight):
            raise ValueError("a weight is not on its grid")
        return codes

    @torch.no_grad()
    def spans_grid(self) -> Tensor:
        """Which entries of the weight the grid reaches to, and is found from: bool, the weight's shape. They can be given no other level."""
        low, high = self._limits(self.layer.weight)
        return (self.layer.weight == low) | (self.layer.weight == high)

    @torch.no_grad()
    def can_have(self, levels: Tensor) -> Tensor:
        """Which entries of the weight could be given these levels (both of the weight's shape) on the uniform grid as it is: bool.

        Not those that the grid is found from, nor where the level begins half a step beyond them or further.
        """
        return (self._rounded(self._within(levels), self._grid(self.layer.weight)) == levels) & ~self.spans_grid()

    def _within(self, levels: Tensor) -> Tensor:
        """The weights of these levels, none beyond those that the grid is found from."""
        return self.codes()._replace(levels=levels).weight().clamp(*self._limits(self.layer.weight))

    @torch.no_grad()
    def set_levels(self, levels: Tensor) -> None:
        """Rounds otherwise: makes the float weight one that rounds to `levels` (the weight's shape, see `codes`) on the grid as it is now.

        Where the level is the old one, so is the float value. Raises ValueError, and changes nothing, where an entry cannot have its level (see
        `can_have`), or the grid is too narrow for float32 or not uniform.
        """
        if self.protocol.weight_grid != "uniform":
            raise ValueError("levels can be set on uniform grids only")
        codes, weight = self.codes(), self.layer.weight
        before = weight.clone()
        weight.copy_(torch.where((levels == codes.levels) | self.spans_grid(), weight, self._within(levels)))
        now = self.codes()
        if not all(map(torch.equal, (now.levels, now.scale, now.zero_point), (levels, codes.scale, codes.zero_point))):
            weight.copy_(before)
            raise ValueError("these levels cannot be had on the grid that the weight spans")

    def forward(self, x: Tensor, found: Grid | None = None) -> Tensor:
        """found: as for `quantized_weight`."""
        if not self.enabled:
            result: Tensor = self.layer(x)
            return result
        weight = self.quantized_weight(found)
        if self._plain and not isinstance(self.layer, nn.Linear):
            result = self.layer._conv_forward(x, weight, self.layer.bias)  # type: ignore[operator]
            return result
        if self._plain:
            return F.linear(x, weight, self.layer.bias)
        # a subclass may do more than convolve ("same" padding, standardised weights): run its own forward with the other weight
        result = torch.func.functional_call(self.layer, {"weight": weight}, (x,))
        return result

    def extra_repr(self) -> str:
        return f"weight bits={self.bits}"


def _rows_of(weight: Tensor) -> Tensor:
    """C x everything else, in whatever order lies in memory: a view wherever a channel's weights lie together, in channels_last too."""
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.flatten(1)


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each row: one pass, but on a CPU, where that pass is not done in vectors."""
    return (rows.amin(1), rows.amax(1)) if rows.device.type == "cpu" else torch.aminmax(rows, dim=1)


def _like_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Back from `_rows_of` (or all of them in one row) to the weight's shape and its order in memory."""
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return rows.reshape(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return rows.reshape(weight.shape)


@torch.no_grad()
def grids_of(layers: Sequence[QuantizedLayer]) -> list[Grid]:
    """The grid of each layer's weight as it is now, to the bit as the layer alone finds it: a few operations for all layers of a width.

    A GPU's host launches the dozen operations of each layer no faster than its convolution.
    """
    found, uniform = dict[int, Grid](), list[QuantizedLayer]()
    for layer in layers:
        if layer.protocol.weight_grid == "uniform" and not layer.has_fixed_grid:
            uniform.append(layer)
        else:
            found[id(layer)] = layer._grid(layer.layer.weight)
    kinds = {id(layer): (layer.bits, layer.layer.weight.dtype) for layer in uniform}
    for kind in dict.fromkeys(kinds.values()):
        alike = [layer for layer in uniform if kinds[id(layer)] == kind]
        extremes = [layer.extremes(layer.layer.weight) for layer in alike]
        low, high = (torch.cat(values) for values in zip(*extremes, strict=True))
        together = grid(low, high, kind[0], alike[0].protocol.weight_symmetric)
        parts = zip(*(values.split([len(low) for low, _ in extremes]) for values in together), strict=True)
        found |= {id(layer): layer._shaped(*part) for layer, part in zip(alike, parts, strict=True)}
    return [found[id(layer)] for layer in layers]


class WeightGrid(nn.Module):
    """Puts a weight that no layer holds (computed in the forward pass, say) on a grid that spans it as it is now, anew in every pass.

    axis: of its output channels, each of which has a grid; None: one grid for all of it.
    """

    def __init__(self, bits: int, protocol: Protocol, axis: int | None):
        super().__init__()
        self.bits, self.protocol = bits, protocol
        self.axis = axis if protocol.weight_granularity == "per-channel" else None
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        p, axis = self.protocol, None if self.axis is None else self.axis % weight.dim()
        if p.weight_grid != "uniform":
            turned = weight if axis is None else weight.transpose(0, axis)
            rows = turned.reshape(1 if axis is None else len(turned), -1)
            result = on_table(rows, *find_table(rows, p.weight_grid, self.bits), p.weight_grid).view(turned.shape)
            return result if axis is None else result.transpose(0, axis)
        with torch.no_grad():
            low, high = weight.aminmax() if axis is None else _extremes(weight.transpose(0, axis).flatten(1))
            scale, zero_point = grid(low, high, self.bits, p.weight_symmetric)
        clipped = p.gradient == "clipped"
        return fake_quantize(weight, scale, zero_point, self.bits, symmetric=p.weight_symmetric, channel_axis=axis, clipped_gradient=clipped)

    def extra_repr(self) -> str:
        return f"weight bits={self.bits}"


class ActivationQuantizer(nn.Module):
    """Puts a tensor on one grid. While `tracking` it also estimates the grid's range from what passes; otherwise nothing moves it."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, protocol: Protocol):
        super().__init__()
        self.bits, self.protocol = bits, protocol
        self.enabled, self.tracking = True, False
        self.range = RangeEstimator(protocol.ranges, bits, protocol.activation_symmetric, protocol.zero_in_range)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self._looked: tuple[tuple[int, int], bool] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.tracking:
            self.range(x)
            self._follow_range()
        if not self.enabled:
            return x
        return fake_quantize(
            x,
            self.scale,
            self.zero_point,
            self.bits,
            symmetric=self.protocol.activation_symmetric,
            clipped_gradient=self.protocol.gradient == "clipped",
            from_zero=self.is_from_zero(),
        )

    def is_from_zero(self) -> bool:
        """Whether the zero point is known to be 0: looked at once for each value that it gets, never on a GPU, where looking means waiting."""
        if self.tracking or self.zero_point.device.type != "cpu":
            return False
        now = (self.zero_point.data_ptr(), self.zero_point._version)
        if self._looked is None or self._looked[0] != now:
            self._looked = now, bool(self.zero_point == 0)
        return self._looked[1]

    @torch.no_grad()
    def clipped_share(self, x: Tensor) -> Tensor:
        """How much of x lies beyond the grid: a scalar in 0..1."""
        inside = reached(x, self.scale, self.zero_point, *levels(self.bits, self.protocol.activation_symmetric))
        return inside.logical_not().float().mean()

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """For ranges that come from elsewhere than from tracked batches."""
        self.range.set(low, high)
        self._follow_range()

    def set_bits(self, bits: int) -> None:
        """Another width, on the range as it is."""
        self.bits = self.range.bits = bits
        self._follow_range()

    @torch.no_grad()
    def _follow_range(self) -> None:
        p = self.protocol
        scale, zero_point = grid(self.range.low, self.range.high, self.bits, p.activation_symmetric, p.zero_in_range)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @property
    def has_range(self) -> bool:
        return bool(self.range.batches > 0)

    def extra_repr(self) -> str:
        return f"activation bits={self.bits}"

"""Pairs of layers between which a channel can be scaled and shifted: what cross-layer equalisation and bias absorption work on (DFQ, ICCV 2019)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dfqbench.network.canonical import TransposedConv
from dfqbench.quantization.bn_ranges import FLATTEN, KEEP, KEEP_MODULES, single_input_function
from dfqbench.quantization.insert import bn_distribution, module_of, readers, weighs_linearly
from dfqbench.quantization.layers import QuantizedLayer

_PROBE = torch.linspace(-8, 8, 65, dtype=torch.float64)


@dataclass
class Pair:
    """Two layers, the second the only reader of the first's C output channels, with nothing between them but functions f(s x) = s f(x) for s > 0.

    Batch norm may follow the first (its scale is folded into the weight when the pair is made equal) or be folded already; pooling and flattening
    may come between. Nothing is a pair across a sum, a concatenation or a gate.

    rectified: there is a ReLU between. ceiling: that of a ReLU6 between, else infinite: then scaling is not exact, see `DFQ`.
    """

    first: QuantizedLayer
    second: QuantizedLayer
    norm: nn.BatchNorm2d | nn.BatchNorm1d | None
    rectified: bool
    ceiling: float
    _node: fx.Node  # of the first layer: keeps the distribution where the norm is folded

    @property
    def distribution(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of what enters the function between: beta and |gamma|, C each, float64. None without batch norm."""
        moments = self._node.meta.get("folded") if self.norm is None else bn_distribution(self.norm)
        return (moments[0], moments[1].sqrt()) if moments is not None else None

    @torch.no_grad()
    def ranges(self) -> tuple[Tensor, Tensor]:
        """The range of the weights into and out of each channel, the norm's scale included: C each, float64.

        Largest less smallest, or twice the largest absolute value where grids are symmetric.
        """
        into, second = self.first.layer.weight.flatten(1), self.second.layer.weight
        groups = getattr(self.second.layer, "groups", 1)
        out = second.reshape(groups, second.shape[0] // groups, second.shape[1], -1)  # G x O/G x I/G x taps
        one, other = self._range(into.amin(1), into.amax(1)), self._range(out.amin((1, 3)).flatten(), out.amax((1, 3)).flatten())
        return one if self.norm is None else one * self._scale().abs(), other

    def _range(self, low: Tensor, high: Tensor) -> Tensor:
        low, high = low.double(), high.double()
        return 2 * torch.maximum(low.abs(), high.abs()) if self.first.protocol.weight_symmetric else high - low

    def _scale(self) -> Tensor:
        """By what the norm multiplies the layer's output: gamma / sqrt(variance + eps)."""
        n = self.norm
        assert n is not None
        assert n.running_var is not None
        return (n.weight.double() / (n.running_var.double() + n.eps).sqrt()).detach()

    @torch.no_grad()
    def divide(self, s: Tensor) -> None:
        """Divides the channels between the layers by `s` (C, positive), and makes the network the same again by the second layer's weight.

        A norm's scale goes into the first layer's weight, as if it were folded; it keeps beta, |gamma| and what they say of its output.
        """
        first, second, s = self.first.layer, self.second.layer, s.double()
        factor = 1 / s
        if self.norm is not None:
            assert self.norm.running_mean is not None
            assert self.norm.running_var is not None
            factor = self._scale() / s
            deviation = (self.norm.weight.double().abs() / s).clamp_min(math.sqrt(self.norm.eps))
            self.norm.running_mean.copy_(self.norm.running_mean.double() * factor)
            self.norm.running_var.copy_(deviation**2 - self.norm.eps)
            self.norm.weight.copy_((self.norm.running_var.double() + self.norm.eps).sqrt())
            self.norm.bias.copy_(self.norm.bias.double() / s)
        elif "folded" in self._node.meta:
            mean, variance = self._node.meta["folded"]
            self._node.meta["folded"] = mean / s.to(mean.device), variance / s.to(mean.device) ** 2
        first.weight.mul_(factor.to(first.weight).view(-1, *[1] * (first.weight.dim() - 1)))
        if first.bias is not None:
            first.bias.copy_(first.bias.double() * factor)
        groups = getattr(second, "groups", 1)
        per_input = s.view(groups, 1, -1).expand(-1, second.weight.shape[0] // groups, -1).flatten(0, 1)  # O x I/G
        second.weight.mul_(per_input.to(second.weight).view(*per_input.shape, *[1] * (second.weight.dim() - 2)))

    @torch.no_grad()
    def absorb(self, c: Tensor) -> None:
        """Lowers what enters the function between by `c` (C, not negative), and gives it to the second layer's bias.

        The same network where that function passes values above c unchanged, all values are, and no zeros are padded.
        """
        first, second, c = self.first.layer, self.second.layer, c.double()
        if self.norm is not None:
            self.norm.bias.copy_(self.norm.bias.double() - c)
        else:
            first.bias = nn.Parameter(first.bias - c.to(first.weight) if first.bias is not None else -c.to(first.weight))
            mean, variance = self._node.meta["folded"]
            self._node.meta["folded"] = mean - c.to(mean.device), variance
        taps = second.weight.double().flatten(2).sum(2) if second.weight.dim() > 2 else second.weight.double()
        groups = getattr(second, "groups", 1)
        added = torch.einsum("goi,gi->go", taps.view(groups, -1, taps.shape[1]), c.view(groups, -1)).flatten().to(second.weight)
        second.bias = nn.Parameter(added if second.bias is None else second.bias + added)


def find_pairs(traced: fx.GraphModule) -> list[Pair]:
    """All pairs of a network with quantizers, in the order of the forward pass."""
    used = Counter(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
    found = (_pair_from(node, traced, used) for node in traced.graph.nodes if _is_layer(node, traced, used))
    return [pair for pair in found if pair is not None]


def _is_layer(node: fx.Node, traced: fx.GraphModule, used: Counter[str]) -> bool:
    """A layer used once, whose channels are those of the second axis and whose output doubles with its weight."""
    layer = module_of(node, traced)
    if not isinstance(layer, QuantizedLayer) or used[str(node.target)] > 1 or isinstance(layer.layer, TransposedConv):
        return False
    shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
    return len(shape) == layer.layer.weight.dim() and weighs_linearly(layer.layer, shape)


def _pair_from(start: fx.Node, traced: fx.GraphModule, used: Counter[str]) -> Pair | None:
    """Follows the one reader of each value, from the layer `start` to the next layer."""
    first = module_of(start, traced)
    assert isinstance(first, QuantizedLayer)
    channels, at, norm, rectified, ceiling = first.layer.weight.shape[0], start, None, False, math.inf
    while True:
        reading = readers(at)
        if len(reading) != 1 or reading[0].op == "output" or len(at.meta.get("shape", ())) < 2 or at.meta["shape"][1] != channels:
            return None
        before, at = at, reading[0]
        module, function = module_of(at, traced), single_input_function(at, traced)
        if _is_layer(at, traced, used) and at.args[0] is before:
            return Pair(first, module, norm, rectified, ceiling, start)  # type: ignore[arg-type]
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            if before is not start or "folded" in start.meta or module.weight is None or module.running_mean is None or used[str(at.target)] > 1:
                return None
            norm = module
        elif function is not None:
            values = _answers(function[0], channels)
            if values is None or function[1] is not before:
                return None
            if torch.equal(values, _PROBE.clamp(0, 6).expand_as(values)):
                rectified, ceiling = True, 6.0
            elif not torch.allclose(_answers(lambda x: function[0](4 * x), channels), 4 * values):  # type: ignore[arg-type]  # noqa: B023
                return None
            rectified |= torch.equal(values, _PROBE.clamp_min(0).expand_as(values))
        elif not (isinstance(module, (*KEEP_MODULES, nn.Flatten)) or at.target in KEEP or at.target in FLATTEN):
            return None


def _answers(function: Callable[[Tensor], Tensor], channels: int) -> Tensor | None:
    """What an activation function gives for -8 to 8, in every channel (C x K); None where its answer has another shape."""
    values = function(_PROBE.expand(channels, -1))
    return values if values.shape == (channels, len(_PROBE)) else None

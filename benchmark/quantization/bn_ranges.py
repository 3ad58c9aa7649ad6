"""Activation ranges without a single image, from what BN layers say about their outputs (DFQ, Nagel et al., ICCV 2019, section 4.3).

The output of a BN layer has mean beta and standard deviation |gamma| per channel (of a group norm too, whose channels share their statistics).
From there mean and variance are followed through the graph under a Gaussian model: sums of independent terms add both; an activation function's
moments are integrals over the Gaussian; a convolution or linear layer without BN behind it weighs them by its weights.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqbench.errors import UserError
from dfqbench.network.activations import is_activation
from dfqbench.network.canonical import Layer, TransposedConv
from dfqbench.network.frozen_batch_norm import SUMS
from dfqbench.network.products import LAYERS
from dfqbench.quantization.insert import bn_distribution
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer
from dfqbench.task import Task

Moments = tuple[Tensor, Tensor]  # mean and variance, C each, float64

_GRID = torch.linspace(-8, 8, 2001, dtype=torch.float64)
_DENSITY = torch.exp(-0.5 * _GRID**2) / math.sqrt(2 * math.pi) * (_GRID[1] - _GRID[0])
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
KEEP_MODULES = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.ZeroPad2d,
    nn.Upsample,
    ActivationQuantizer,
)
KEEP = {
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, torch.mean, "mean", "contiguous", torch.clone, "clone",
    F.interpolate, torch.amax, "amax",
}  # fmt: skip
_PARTS = {torch.chunk, torch.split, "chunk", "split"}
FLATTEN = {torch.flatten, torch.reshape, "flatten", "view", "reshape", torch.squeeze, "squeeze"}


def activation_ranges(traced: fx.GraphModule, task: Task, n: float) -> dict[str, tuple[float, float]]:
    """(low, high) for every activation quantizer of `traced`, by the name of the node it follows.

    A quantizer behind an activation function f gets the extremes of f over mean +- n standard deviations of what enters f, over all
    channels; one elsewhere the extremes of mean +- n standard deviations; one at the input the range of a normalised pixel.

    Raises UserError, naming the node, where no BN layer says how a tensor is distributed.
    """
    moments: dict[fx.Node, Moments | None] = {}
    ranges: dict[str, tuple[float, float]] = {}
    for node in traced.graph.nodes:
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        known = bn_distribution(module) if isinstance(module, nn.GroupNorm) else _after(node, module, moments, traced)
        moments[node] = _of_this_shape(known, node)
        if not isinstance(module, ActivationQuantizer):
            continue
        source = node.args[0]
        if source.op == "placeholder":
            lows, highs = zip(*task.pixel_range(), strict=True)
            ranges[source.name] = (min(lows), max(highs))
            continue
        activation, entered = single_input_function(source, traced) or (None, source)
        entering = moments[entered]
        if entering is None:
            raise UserError(f"no batch norm says how {source.name!r} is distributed: ranges from BN statistics need BN layers")
        mean, std = entering[0], entering[1].clamp_min(0).sqrt()
        reach = mean[:, None] + std[:, None] * torch.linspace(-n, n, 401, dtype=torch.float64)
        values = activation(reach) if activation else reach
        ranges[source.name] = (float(values.min()), float(values.max()))
    return ranges


@torch.no_grad()
def mean_inputs(traced: fx.GraphModule) -> dict[str, Tensor | None]:
    """For every layer with a quantized weight, by its name, one input (a batch of 1) that has each channel's mean everywhere.

    None where no BN layer says it, and where a layer is used more than once.
    """
    moments: dict[fx.Node, Moments | None] = {}
    found: dict[str, Tensor | None] = {}
    for node in traced.graph.nodes:
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        moments[node] = _of_this_shape(_after(node, module, moments, traced), node)
        if isinstance(module, QuantizedLayer):
            entering, shape = moments.get(node.args[0]), node.args[0].meta["shape"]
            known = entering is not None and len(shape) == module.layer.weight.dim() and node.target not in found
            found[node.target] = entering[0].view([-1 if d == 1 else 1 for d in range(len(shape))]).expand(shape) if entering and known else None
    return found


def _of_this_shape(moments: Moments | None, node: fx.Node) -> Moments | None:
    """Moments count only where they are those of the second axis' channels (a mean over the channels, say, has none)."""
    shape = node.meta.get("shape", ())
    return moments if moments is not None and len(shape) > 1 and shape[1] == len(moments[0]) else None


def single_input_function(node: fx.Node, traced: fx.GraphModule) -> tuple[Callable[[Tensor], Tensor], fx.Node] | None:
    """The activation function that `node` computes, on float64 tensors of any shape C x K, and the node it is computed of.

    None if `node` computes something else, or a function with learned parameters that is no module.
    """
    if not is_activation(node, traced):
        return None
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if isinstance(module, nn.PReLU):
            slope = module.weight.detach().double().cpu()[:, None]
            return lambda x: torch.where(x > 0, x, slope * x), node.args[0]  # type: ignore[return-value]
        return lambda x: module(x.clone()), node.args[0]  # type: ignore[return-value]
    if node.target in _PRODUCTS:  # x * sigmoid(x), either way round
        gate = next(a for a in node.args if isinstance(a, fx.Node) and a.args and a.args[0] in node.args)
        return lambda x: x * _call(gate, traced, x), gate.args[0]  # type: ignore[return-value]
    if len(node.all_input_nodes) > 1:
        return None
    return lambda x: _call(node, traced, x), node.all_input_nodes[0]


def _call(node: fx.Node, traced: fx.GraphModule, x: Tensor) -> Tensor:
    """Runs the one-input function of `node` on x instead of its own input."""
    x = x.clone()
    if node.op == "call_module":
        result: Tensor = traced.get_submodule(str(node.target))(x)
    elif node.op == "call_method":
        result = getattr(x, str(node.target))(*node.args[1:], **node.kwargs)
    else:
        result = node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return result


def _after(node: fx.Node, module: nn.Module | None, moments: dict[fx.Node, Moments | None], traced: fx.GraphModule) -> Moments | None:
    """Moments of a node's output; None where nothing is known."""
    if "folded" in node.meta:
        return node.meta["folded"]  # type: ignore[no-any-return]
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        return bn_distribution(module)
    given = [moments.get(a) for a in node.args if isinstance(a, fx.Node)]
    if node.target in (torch.cat, torch.concat):
        return _concatenated(node, moments)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in _PARTS:
        return _part(node, moments)
    activation = single_input_function(node, traced)
    if activation is not None:
        entering = moments[activation[1]]
        return _through(activation[0], entering) if entering is not None else None
    first = given[0] if given else None
    if first is None:
        return None
    if isinstance(module, (*LAYERS, QuantizedLayer)):
        return _weighed(module.layer if isinstance(module, QuantizedLayer) else module, first)
    if node.target in SUMS:
        return _combined(node, given, lambda a, b: (a[0] + b[0], a[1] + b[1]), lambda a, c: (a[0] + c, a[1]))
    if node.target in _PRODUCTS:
        return _combined(
            node,
            given,
            lambda a, b: (a[0] * b[0], a[1] * b[1] + a[1] * b[0] ** 2 + b[1] * a[0] ** 2),
            lambda a, c: (a[0] * c, a[1] * c**2),
        )
    if isinstance(module, nn.Flatten) or node.target in FLATTEN:
        return _flattened(node, first)
    if node.target is F.pad:
        return _padded(node, first)
    if isinstance(module, KEEP_MODULES) or node.target in KEEP or getattr(node.target, "__name__", "") == "stochastic_depth":
        return first
    if node.target is operator.getitem and len(node.meta.get("shape", ())) > 1 and node.meta["shape"][1] == len(first[0]):
        return first
    return None


def _through(activation: Callable[[Tensor], Tensor], entering: Moments) -> Moments:
    mean, variance = entering
    values = activation(mean[:, None] + variance.clamp_min(0).sqrt()[:, None] * _GRID)
    first = (values * _DENSITY).sum(1)
    return first, ((values - first[:, None]) ** 2 * _DENSITY).sum(1)


def _weighed(layer: Layer | TransposedConv, entering: Moments) -> Moments | None:
    """Every weight sees its own independent input: means add by w, variances by w^2. Of a transposed convolution, not every weight sees one."""
    if isinstance(layer, TransposedConv):
        return None
    weight = layer.weight.detach().double().cpu()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    taps = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
    if len(entering[0]) != taps.shape[1] * groups:
        return None

    def apply(per_tap: Tensor, per_channel: Tensor) -> Tensor:
        grouped = per_tap.sum(2).view(groups, -1, per_tap.shape[1])  # G x O/G x I/G
        return torch.einsum("goi,gi->go", grouped, per_channel.view(groups, -1)).flatten()

    mean = apply(taps, entering[0])
    if layer.bias is not None:
        mean = mean + layer.bias.detach().double().cpu()
    return mean, apply(taps**2, entering[1])


def _combined(node: fx.Node, given: list[Moments | None], two: Callable[..., Moments], constant: Callable[..., Moments]) -> Moments | None:
    if node.kwargs:  # torch.add(a, b, alpha=2)
        return None
    if len(given) == 2:
        a, b = given
        return two(a, b) if a is not None and b is not None and len(a[0]) == len(b[0]) else None
    other = next((x for x in node.args if isinstance(x, int | float)), None)
    return constant(given[0], other) if other is not None else None


def _concatenated(node: fx.Node, moments: dict[fx.Node, Moments | None]) -> Moments | None:
    parts: Any = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    known = [moments.get(part) for part in parts]
    if axis not in (1, -3) or any(part is None for part in known):
        return None
    return torch.cat([k[0] for k in known if k]), torch.cat([k[1] for k in known if k])


def _part(node: fx.Node, moments: dict[fx.Node, Moments | None]) -> Moments | None:
    """Of one of the parts that channels are divided into."""
    whole, place = node.args
    assert isinstance(whole, fx.Node)
    given: Any = whole.args[1] if len(whole.args) > 1 else next(iter(whole.kwargs.values()), None)
    axis = whole.args[2] if len(whole.args) > 2 else whole.kwargs.get("dim", 0)
    known = moments.get(whole.args[0])  # type: ignore[arg-type]
    if known is None or axis not in (1, -3) or not isinstance(place, int) or place < 0 or not isinstance(given, int | tuple | list):
        return None
    counts = -(-len(known[0]) // given) if whole.target in (torch.chunk, "chunk") and isinstance(given, int) else given
    parts = [value.split(list(counts) if isinstance(counts, tuple | list) else counts) for value in known]
    return (parts[0][place], parts[1][place]) if place < len(parts[0]) else None


def _flattened(node: fx.Node, first: Moments) -> Moments | None:
    shape = node.meta.get("shape", ())
    if len(shape) != 2:
        return first
    repeats, rest = divmod(shape[1], len(first[0]))
    return (first[0].repeat_interleave(repeats), first[1].repeat_interleave(repeats)) if rest == 0 and repeats else None


def _padded(node: fx.Node, first: Moments) -> Moments | None:
    """Zeros may be added as channels (the CIFAR ResNets' shortcuts): the third pair of the padding."""
    padding: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
    before, after = padding[4:6] if len(padding) >= 6 else (0, 0)
    return F.pad(first[0], (before, after)), F.pad(first[1], (before, after))

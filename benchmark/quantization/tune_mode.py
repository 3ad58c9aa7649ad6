"""A convolution and the batch norm behind it computed as one, while both still train ("tune mode" of You et al., arXiv:2305.11624).

With fixed statistics a batch norm is affine per channel: y = s (W * x) + (beta - s mean), s = gamma / sqrt(variance + eps). Scaling the
rounded weight, a few thousand numbers, spares two passes over the layer's output and three over its gradient; by the chain rule
W, gamma and beta get the gradients that they get from two layers.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from dfqbench.network.frozen_batch_norm import is_listened_to, module_of
from dfqbench.quantization.fake_quantize import rectify_and_quantize
from dfqbench.quantization.layers import ActivationQuantizer, Grid, QuantizedLayer, grids_of

Affine = tuple[Tensor, Tensor]  # scale and shift


class NormalisedLayer(nn.Module):
    """norm(layer(x)), for a convolution with quantized weights; one convolution where the norm's statistics are fixed."""

    def __init__(self, layer: QuantizedLayer, norm: nn.BatchNorm2d):
        super().__init__()
        self.layer, self.norm = layer, norm

    @property
    def _is_affine(self) -> bool:
        """Not where the norm takes a batch's statistics, where quantization is off, or where somebody listens in between."""
        hooked = is_listened_to(self.layer) or is_listened_to(self.norm)
        return self.layer.enabled and not self.norm.training and self.norm.running_mean is not None and not hooked

    def forward(self, x: Tensor, found: tuple[Grid, Affine] | None) -> Tensor:
        """found: the weight's grid, and what the norm does; None where that takes both modules as they are."""
        norm, convolution = self.norm, self.layer.layer
        if found is None:
            result: Tensor = norm(self.layer(x))
            return result
        assert isinstance(convolution, nn.Conv2d)
        known, (scale, shift) = found
        shift = shift if convolution.bias is None else shift + convolution.bias * scale
        weight = self.layer.quantized_weight(known) * scale[:, None, None, None]
        return convolution._conv_forward(x, weight, shift)  # type: ignore[no-any-return]


def affine(norms: Sequence[nn.BatchNorm2d]) -> list[Affine]:
    """Each norm as y = scale x + shift, C each: a few operations for all norms that are alike."""
    found: dict[int, Affine] = {}
    kinds = {id(n): (n.eps, n.weight is None, n.bias is None, n.running_var.dtype) for n in norms}  # type: ignore[union-attr]
    for kind in dict.fromkeys(kinds.values()):
        alike = [norm for norm in norms if kinds[id(norm)] == kind]

        def together(name: str, alike: list[nn.BatchNorm2d] = alike) -> Tensor:
            return torch.cat([getattr(norm, name) for norm in alike])

        scale = torch.rsqrt(together("running_var") + kind[0])
        scale = scale if kind[1] else together("weight") * scale
        shift = -together("running_mean") * scale
        shift = shift if kind[2] else together("bias") + shift
        parts = zip(*(v.split([norm.num_features for norm in alike]) for v in (scale, shift)), strict=True)
        found |= {id(norm): part for norm, part in zip(alike, parts, strict=True)}
    return [found[id(norm)] for norm in norms]


class Together(nn.Module):
    """What small tensors say, for all layers at once: the grid of every weight, and what its norm does. In the order of `parts`."""

    def __init__(self, parts: Sequence[NormalisedLayer | QuantizedLayer]):
        super().__init__()
        self.parts = tuple(parts)

    def forward(self) -> list[Grid | tuple[Grid, Affine] | None]:
        usable = [p for p in self.parts if (p._is_affine if isinstance(p, NormalisedLayer) else p.enabled)]
        layers = [p.layer if isinstance(p, NormalisedLayer) else p for p in usable]
        grids = dict(zip(map(id, usable), grids_of(layers), strict=True))
        normalised = [p for p in usable if isinstance(p, NormalisedLayer)]
        norms = dict(zip(map(id, normalised), affine([p.norm for p in normalised]), strict=True))
        pairs = ((grids.get(id(p)), norms.get(id(p))) for p in self.parts)
        return [known if known is None or norm is None else (known, norm) for known, norm in pairs]


class RectifiedQuantizer(nn.Module):
    """quantizer(relu(x)), in one pass less where the grid starts at zero."""

    def __init__(self, relu: nn.ReLU, quantizer: ActivationQuantizer):
        super().__init__()
        self.relu, self.quantizer = relu, quantizer

    def forward(self, x: Tensor) -> Tensor:
        q, hooked = self.quantizer, is_listened_to(self.relu) or is_listened_to(self.quantizer)
        if q.enabled and q.protocol.gradient == "identity" and not q.protocol.activation_symmetric and not hooked and q.is_from_zero():
            return rectify_and_quantize(x, q.scale, q.bits)
        result: Tensor = q(self.relu(x))
        return result


def tuned(traced: fx.GraphModule) -> fx.GraphModule:
    """The same modules in a graph with fewer passes over the memory: see `NormalisedLayer` and `RectifiedQuantizer`."""
    return _with_rectified_quantizers(_with_normalised_layers(traced))


def _with_rectified_quantizers(traced: fx.GraphModule) -> fx.GraphModule:
    """Each quantizer behind a ReLU that it alone reads becomes a `RectifiedQuantizer`: in place."""
    for node in list(traced.graph.nodes):
        quantizer = module_of(node, traced)
        before = node.args[0] if isinstance(quantizer, ActivationQuantizer) else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        relu = traced.get_submodule(str(before.target))
        if type(relu) is not nn.ReLU:
            continue
        node.target = f"rectified_{before.name}"
        traced.add_submodule(node.target, RectifiedQuantizer(relu, quantizer))  # type: ignore[arg-type]
        node.args = before.args
        traced.graph.erase_node(before)
    traced.graph.lint()
    traced.recompile()
    return traced


def _with_normalised_layers(traced: fx.GraphModule) -> fx.GraphModule:
    """Each plain convolution whose output only a batch norm reads becomes a `NormalisedLayer`."""
    used = [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    tuned = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    for node in list(tuned.graph.nodes):
        norm = module_of(node, tuned)
        before = node.args[0] if isinstance(norm, nn.BatchNorm2d) else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        layer = tuned.get_submodule(str(before.target))
        once = used.count(str(before.target)) == 1 == used.count(str(node.target))
        if not (once and isinstance(layer, QuantizedLayer) and type(layer.layer) is nn.Conv2d):
            continue
        name = f"normalised_{before.name}"
        tuned.add_submodule(name, NormalisedLayer(layer, norm))  # type: ignore[arg-type]
        with tuned.graph.inserting_after(node):
            joined = tuned.graph.call_module(name, before.args)
        node.replace_all_uses_with(joined)
        tuned.graph.erase_node(node)
        tuned.graph.erase_node(before)
    return _with_all_grids_at_once(tuned)


def _with_all_grids_at_once(tuned: fx.GraphModule) -> fx.GraphModule:
    """`Together` begins the graph, and gives each layer its part: in place."""
    nodes = [n for n in tuned.graph.nodes if isinstance(module_of(n, tuned), NormalisedLayer | QuantizedLayer)]
    tuned.add_submodule("together", Together([module_of(n, tuned) for n in nodes]))  # type: ignore[misc]
    with tuned.graph.inserting_before(next(n for n in tuned.graph.nodes if n.op != "placeholder")):
        together = tuned.graph.call_module("together")
    for i, node in enumerate(nodes):
        with tuned.graph.inserting_before(node):
            node.args = (*node.args, tuned.graph.call_function(operator.getitem, (together, i)))
    tuned.graph.lint()
    tuned.recompile()
    return tuned

"""Making a student: quantizers go into a traced copy of the teacher, where the protocol wants them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dfqbench.errors import UserError
from dfqbench.network.activations import is_activation
from dfqbench.network.canonical import Layer, TransposedConv
from dfqbench.network.frozen_batch_norm import SUMS, BatchNorm
from dfqbench.network.products import LAYERS, Operand, added, is_constant, operands, take_attention_apart
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer, WeightGrid
from dfqbench.quantization.protocol import Bits, Protocol

# the output's values are all values of the input (or zero): what is on a grid stays on it
_SAME_VALUES_MODULES = (
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.ZeroPad2d,
    nn.ChannelShuffle,
    nn.PixelShuffle,
)
_SAME_VALUES = {
    F.max_pool2d, F.adaptive_max_pool2d, F.dropout, F.pad, F.channel_shuffle, F.pixel_shuffle, torch.flatten, torch.squeeze, torch.unsqueeze,
    torch.transpose, torch.permute, torch.reshape, torch.chunk, torch.split, operator.getitem,
    "flatten", "squeeze", "unsqueeze", "transpose", "permute", "reshape", "view", "chunk", "split", "contiguous",
}  # fmt: skip
_MAY_ACTIVATE = {"where", "maximum", "minimum", "max", "min", "fmax", "threshold", "clamp", "clamp_max", "clip", "gt", "ge", "lt", "le"}


def module_of(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def insert_quantizers(traced: fx.GraphModule, protocol: Protocol, bits: Bits, own: Mapping[str, int] | None = None) -> list[str]:
    """Quantizes `traced` in place; new modules are `quantizers.<name of the node they follow>`.

    own: bits of weights and activations that have others than `bits` and the protocol say, by the names that these modules get.

    Returns what keeps float weights because no quantizer is known for it (modules with weights of another kind), to be said to the user: nothing is
    left out silently. Under a protocol that folds, also batch norms without running statistics, which nothing can fold; where activation functions
    are quantized, also what may be one that is written otherwise.

    Raises UserError where there is no weight, or the protocol finds no activation, to quantize: one of the two would stay in full precision,
    whatever `bits` says.
    """
    protocol.check_bits(bits)
    if protocol.batch_norm == "folded":
        _fold_batch_norms(traced)
    if protocol.placement == "operands":
        take_attention_apart(traced)
    targets = list(dict.fromkeys(str(n.target) for n in traced.graph.nodes if isinstance(module_of(n, traced), LAYERS)))
    _check_calls(traced)
    products = {n: found for n in traced.graph.nodes if (found := operands(n, traced))}
    if not targets and not any(o.is_weight for found in products.values() for o in found):
        raise UserError(f"{traced.meta['network']}: no weight to quantize: it has no convolution, no linear layer and no product with a parameter")
    own, weight_bits = own or {}, int(bits.weights)
    widths = dict.fromkeys(targets, weight_bits)
    first, last = (targets[0], targets[-1]) if targets else ("", "")
    widths |= {first: protocol.first_bits or weight_bits} | ({last: protocol.last_bits} if protocol.last_bits else {})
    left_float = _norms_left_float(traced) if protocol.batch_norm == "folded" else []
    left_float += _may_be_activations(traced) if protocol.placement == "activations" else []

    traced.add_submodule("quantizers", nn.Module())
    at_layers = protocol.placement != "activations"
    places = _at_operands(traced, products, protocol.placement == "layer-inputs") if at_layers else _images_and_after_activations(traced)
    images = _image_nodes(traced)
    last_only = [n for n in places if at_layers and protocol.last_bits and _feeds_only(n, last, traced)]
    if not any(n not in images or (at_layers and protocol.input_bits) for n in places):
        what = (
            "it has no convolution or linear layer that reads anything but the image"
            if at_layers
            else "it has no activation function that is known (torch's modules, functions and methods, such as nn.ReLU, F.gelu or x.sigmoid())"
        )
        raise UserError(f"{traced.meta['network']}: the protocol {protocol.name!r} finds no activation to quantize: {what}")
    for node in places:
        width = protocol.input_bits if node in images else protocol.last_bits if node in last_only else bits.activations
        if width is None:  # the image stays float
            continue
        _insert_after(node, traced, ActivationQuantizer(own.get(f"quantizers.{node.name}", width), protocol))
    _grids_of_weights(traced, products, protocol, weight_bits, own)
    left_float = _layers_left_float(traced, set(targets)) + left_float
    for target in targets:
        parent, _, name = target.rpartition(".")
        pinned = (target == first and protocol.first_bits) or (target == last and protocol.last_bits)
        rules, layer = protocol.of_pinned if pinned else protocol, traced.get_submodule(target)
        setattr(traced.get_submodule(parent), name, QuantizedLayer(layer, own.get(target, widths[target]), rules))  # type: ignore[arg-type]
    for node in traced.graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in targets:
            node.target = f"{owner}.layer.{name}"
    traced.graph.lint()
    traced.recompile()
    return left_float


def _check_calls(traced: fx.GraphModule) -> None:
    """UserError that names a layer which takes more than one tensor (an octave convolution): by what it multiplies which is not known."""
    for node in traced.graph.nodes:
        layer = module_of(node, traced)
        if isinstance(layer, LAYERS) and (len(node.args) != 1 or node.kwargs):
            what = f"{node.target} ({type(layer).__name__}) is called with {len(node.args) + len(node.kwargs)} arguments"
            raise UserError(f"{traced.meta['network']}: {what}, a layer has one: make it a module of plain layers")


def _insert_after(node: fx.Node, traced: fx.GraphModule, quantizer: ActivationQuantizer) -> None:
    name = f"quantizers.{node.name}"
    traced.add_submodule(name, quantizer)
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(name, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    # marks of observation go with the value that later layers see
    new.meta = {k: node.meta[k] for k in ("shape",) if k in node.meta} | {k: node.meta.pop(k) for k in ("stage", "bn_input") if k in node.meta}


def _images_and_after_activations(traced: fx.GraphModule) -> list[fx.Node]:
    """The network's input, and every activation function's output, but not where it is the network's answer."""
    places = [n for n in traced.graph.nodes if n.op == "placeholder" or is_activation(n, traced)]
    return [n for n in places if any(u.op != "output" for u in n.users)]


def _image_nodes(traced: fx.GraphModule) -> set[fx.Node]:
    """The input, and what is computed from it (a normalisation, say) before any weights or activation function."""
    images: set[fx.Node] = set()
    for node in traced.graph.nodes:
        module = module_of(node, traced)
        weighs = module is not None and any(p.dim() > 1 for p in module.parameters())
        if node.op == "placeholder" or (images.intersection(node.all_input_nodes) and not weighs and not is_activation(node, traced)):
            images.add(node)
    return images


def _at_operands(traced: fx.GraphModule, products: dict[fx.Node, list[Operand]], of_layers: bool) -> list[fx.Node]:
    """What is multiplied, found where it was computed; `of_layers`: only by weights, and every residual sum.

    What no image has a part in (positions in attention, say) makes no residual sum. A sum that only an activation function reads is quantized behind
    that function, as fused integer kernels do.
    """
    multiplied = [found for n, found in products.items() if not of_layers or n.op == "call_module" or any(o.is_weight for o in found)]
    wanted = {_origin(operand.node, traced) for found in multiplied for operand in found if not operand.is_weight}
    for node in traced.graph.nodes if of_layers else ():
        if node.target in SUMS and len(added(node)) == 2 and not any(map(is_constant, added(node))):
            reading = readers(node)
            only = reading[0] if len(reading) == 1 else None
            wanted.add(only if only is not None and is_activation(only, traced) else node)
    return [n for n in traced.graph.nodes if n in wanted and any(u.op != "output" for u in n.users)]


def _grids_of_weights(traced: fx.GraphModule, products: dict[fx.Node, list[Operand]], protocol: Protocol, bits: int, own: Mapping[str, int]) -> None:
    """Between a product and each weight that no layer holds."""
    for node, found in products.items():
        for operand in found:
            if not operand.is_weight:
                continue
            name = f"weights.{node.name}"
            traced.add_submodule("weights", traced.weights if hasattr(traced, "weights") else nn.Module())  # type: ignore[arg-type]
            name += "" if not hasattr(traced.weights, node.name) else "_other"
            traced.add_submodule(name, WeightGrid(own.get(name, bits), protocol, operand.axis))
            with traced.graph.inserting_before(node):
                new = traced.graph.call_module(name, (operand.node,))
            new.meta = {"shape": operand.node.meta["shape"]}
            node.replace_input_with(operand.node, new)


def _origin(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    """Back through poolings and reshapes to where the values were computed."""
    if keeps_values(node, traced) and node.args and isinstance(node.args[0], fx.Node):
        origin = _origin(node.args[0], traced)
        return origin if "shape" in origin.meta else node  # a module may give several tensors: then the one that was picked
    return node


def keeps_values(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether all values of the output are values of the input, or zero: what is on a grid stays on it."""
    module = module_of(node, traced)
    return isinstance(module, _SAME_VALUES_MODULES) if module is not None else node.target in _SAME_VALUES


def _feeds_only(node: fx.Node, target: str, traced: fx.GraphModule) -> bool:
    """Whether the values of `node` enter the layer `target` and no other computation."""
    users = readers(node)
    while len(users) == 1 and keeps_values(users[0], traced):
        users = readers(users[0])
    return len(users) == 1 and users[0].target == target


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads the values of `node`; who asks only for its size (`x.view(x.size(0), -1)`) does not."""
    return [user for user in node.users if user.op == "output" or "shape" in user.meta or "several" in user.meta]


def _fold_batch_norms(traced: fx.GraphModule) -> None:
    """Folds each BN into the layer before it where nothing else reads that layer's output; other BN layers stay, in eval mode.

    The layer's node keeps beta and |gamma| (`meta["folded"]`): they say how its output is distributed.
    """
    used = [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    for node in list(traced.graph.nodes):
        norm = module_of(node, traced)
        if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) or norm.running_mean is None:
            continue
        layer_node = node.args[0]
        layer = module_of(layer_node, traced)
        if isinstance(layer, nn.Linear) and len(layer_node.meta["shape"]) != 2:  # the norm's channels are not the layer's
            continue
        if not isinstance(layer, LAYERS) or len(readers(layer_node)) > 1 or used.count(str(layer_node.target)) > 1:
            continue
        if not weighs_linearly(layer, layer_node.args[0].meta["shape"]):
            continue
        fused = fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)  # type: ignore[type-var]
        parent, _, name = str(layer_node.target).rpartition(".")
        setattr(traced.get_submodule(parent), name, fused)
        layer_node.meta.pop("bn_input", None)
        layer_node.meta |= {"folded": bn_distribution(norm), **{k: node.meta[k] for k in ("stage",) if k in node.meta}}
        node.replace_all_uses_with(layer_node)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    remaining = [n for n in traced.graph.nodes if "batch_norm" in n.meta]
    for index, node in enumerate(remaining):
        node.meta["batch_norm"] = index
        node.args[0].meta["bn_input"] = [i for i, other in enumerate(remaining) if other.args[0] is node.args[0]]


@torch.no_grad()
def weighs_linearly(layer: Layer | TransposedConv, shape: tuple[int, ...]) -> bool:
    """Whether twice the weight gives twice the output: not so in a subclass that standardises its weight, which BN cannot be folded into."""
    if type(layer) in LAYERS:  # all of them as torch has them, or as canonical.py makes them
        return True
    x = torch.arange(math.prod(shape), dtype=layer.weight.dtype, device=layer.weight.device).sin().view(shape)
    none, once, twice = (torch.func.functional_call(layer, {"weight": k * layer.weight}, (x,)) for k in (0, 1, 2))
    return torch.allclose(twice - none, 2 * (once - none), rtol=1e-3, atol=1e-5)


def bn_distribution(norm: nn.BatchNorm2d | nn.BatchNorm1d | nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean beta and variance gamma^2 of a BN layer's output, per channel, float64."""
    if norm.weight is None:
        n = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
        return torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    return norm.bias.detach().double().cpu(), norm.weight.detach().double().cpu().square()


def _norms_left_float(traced: fx.GraphModule) -> list[str]:
    """Names of batch norms that take the statistics of each batch (`track_running_stats=False`): they stay, and compute in float."""
    norms = {str(n.target): module_of(n, traced) for n in traced.graph.nodes if n.op == "call_module"}
    return [
        f"{name} ({type(m).__name__} without running statistics)" for name, m in norms.items() if isinstance(m, BatchNorm) and m.running_mean is None
    ]


def _may_be_activations(traced: fx.GraphModule) -> list[str]:
    """Operations by which people write activation functions of their own (`torch.where(x > 0, x, 0)`, `F.threshold`): their output stays float."""
    found = []
    for node in traced.graph.nodes:
        module = module_of(node, traced)
        name = type(module).__name__ if module is not None else node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if len(node.meta.get("shape", ())) > 1 and name.lower().strip("_") in _MAY_ACTIVATE and not is_activation(node, traced):
            found.append(f"{node.name} ({name}: an activation function?)")
    return found


def _reaches_grid(node: fx.Node, traced: fx.GraphModule) -> bool:
    return any(isinstance(module_of(u, traced), WeightGrid) or (is_constant(u) and _reaches_grid(u, traced)) for u in node.users)


def _layers_left_float(traced: fx.GraphModule, quantized: set[str]) -> list[str]:
    """Names of modules and parameters with weights (two or more axes) that take part without a quantizer."""

    def candidates() -> Iterator[tuple[str, nn.Module | None]]:
        for node in traced.graph.nodes:
            if node.op == "call_module" and str(node.target) not in quantized:
                module = traced.get_submodule(str(node.target))
                if any(p.dim() > 1 for p in module.parameters()):
                    yield str(node.target), module
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(traced)
                if all(user.target is getattr for user in node.users):  # its type or device is asked for
                    continue
                if isinstance(value, nn.Parameter) and value.dim() > 1 and str(node.target).endswith("weight") and not _reaches_grid(node, traced):
                    yield str(node.target), None

    return list(dict.fromkeys(f"{name} ({type(m).__name__})" if m is not None else name for name, m in candidates()))

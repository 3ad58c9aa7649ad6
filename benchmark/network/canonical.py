"""One form for whatever weighs: a traced network in which weights are the weights of layers, however its author wrote them.

Quantizers, sizes, student files and exports then know layers alone. A network that has layers already stays as it is, to the bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_CONVOLUTIONS = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_TRANSPOSED = {F.conv_transpose1d: nn.ConvTranspose1d, F.conv_transpose2d: nn.ConvTranspose2d, F.conv_transpose3d: nn.ConvTranspose3d}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_MATMULS = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class TransposedConv(nn.Module):
    """A transposed convolution whose weight has its output channels first, as all other layers' weights: (outputs, inputs / groups, *kernel)."""

    def __init__(self, layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        super().__init__()
        self.stride, self.padding, self.output_padding = layer.stride, layer.padding, layer.output_padding
        self.groups, self.dilation, self.bias = layer.groups, layer.dilation, layer.bias
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.weight = nn.Parameter(self._swapped(layer.weight.detach()).clone(), layer.weight.requires_grad)

    def _swapped(self, weight: Tensor) -> Tensor:
        """Between torch's order and this one: both ways the same."""
        in_groups = weight.view(self.groups, -1, *weight.shape[1:])
        return in_groups.transpose(1, 2).reshape(-1, in_groups.shape[1], *weight.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.weight.dim() - 3]
        others: Any = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        answer: Tensor = convolve(x, self._swapped(self.weight), self.bias, *others)  # type: ignore[operator]
        return answer

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def make_canonical(traced: fx.GraphModule) -> list[str]:
    """Rewrites in place; returns the names of the nodes that were rewritten.

    Calls of functions with a parameter become layers (`F.linear(x, w)`, `F.conv2d(x, w)`, `x @ w`, `torch.addmm(b, x, w)`); a sum over positions
    that are weighed by a parameter becomes a depthwise convolution; transposed convolutions get their output channels first.
    """
    rewritten, read = [], _read(traced)
    for node in list(traced.graph.nodes):
        if node.op == "call_module":
            _positional(node)
            module = traced.get_submodule(str(node.target))
            if type(module) in _TRANSPOSED.values() and len(node.args) == 1 and not node.kwargs:
                traced.set_submodule(str(node.target), TransposedConv(module))  # type: ignore[arg-type]
                rewritten.append(node.name)
            elif isinstance(module, TransposedConv):  # called a second time
                rewritten.append(node.name)
        elif _as_layer(node, traced):
            rewritten.append(node.name)
    if rewritten:
        _forget_unread(traced, read)
        traced.graph.lint()
        traced.recompile()
    return rewritten


def _positional(node: fx.Node) -> None:
    """`layer(input=x)` as `layer(x)`."""
    name = next((key for key in ("input", "x") if key in node.kwargs), None)
    if name and not node.args:
        node.args = (node.kwargs[name],)
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != name}


def _as_layer(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Puts a layer in the place of a function's call, if its weight is a parameter."""
    made = _layer_for(node, traced)
    if made is None:
        return False
    x, layer, then = made
    name = _free_name(traced, node.name)
    traced.add_submodule(name, layer)
    with traced.graph.inserting_before(node):
        new = traced.graph.call_module(name, (x,))
        for function, *args in then:
            new = traced.graph.call_function(function, (new, *args))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)
    return True


Made = tuple[fx.Node, nn.Module, list[tuple[Any, ...]]]  # what enters, the layer, functions behind it


def _layer_for(node: fx.Node, traced: fx.GraphModule) -> Made | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is F.linear:
        given = _bound(node, ("input", "weight", "bias"))
        return _linear(traced, given, "weight", "bias", False)
    if node.target in _CONVOLUTIONS:
        return _convolution(traced, _bound(node, _CONV_ARGUMENTS), _CONVOLUTIONS[node.target])  # type: ignore[index]
    if node.target in _TRANSPOSED:
        return _convolution(traced, _bound(node, _TRANSPOSED_ARGUMENTS), _TRANSPOSED[node.target])  # type: ignore[index]
    if node.target in _MATMULS:
        return _linear(traced, _bound(node, ("input", "other")), "other", "", True)
    if node.target in (torch.addmm, "addmm") and not {"beta", "alpha"} & {*node.kwargs}:
        return _linear(traced, _bound(node, ("bias", "input", "other")), "other", "bias", True)
    if node.target in (torch.sum, "sum"):
        return _weighted_pooling(node, traced)
    return None


def _bound(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    aliases = {"self": names[0], "mat1": "input", "mat2": "other", "mat": "other"}
    return {aliases.get(key, key): value for key, value in given.items()}


def _linear(traced: fx.GraphModule, given: dict[str, Any], weight_name: str, bias_name: str, transposed: bool) -> Made | None:
    """A linear layer, if the weight is a parameter with two axes and the bias a vector or none."""
    x, weight = given.get("input"), _parameter(given.get(weight_name), traced)
    bias = given.get(bias_name)
    fits = bias is None or ((found := _parameter(bias, traced)) is not None and found.dim() == 1)
    if not isinstance(x, fx.Node) or _parameter(x, traced) is not None or weight is None or weight.dim() != 2 or not fits:
        return None
    rows, columns = weight.shape if not transposed else (weight.shape[1], weight.shape[0])
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad) if transposed else weight
    layer.bias = _parameter(bias, traced)  # type: ignore[assignment]
    return x, layer, []


def _convolution(traced: fx.GraphModule, given: dict[str, Any], kind: Callable[..., nn.Module]) -> Made | None:
    x, weight, bias = given.pop("input", None), _parameter(given.pop("weight", None), traced), given.pop("bias", None)
    constant = not any(isinstance(part, fx.Node) for value in given.values() for part in (value if isinstance(value, tuple | list) else (value,)))
    if not isinstance(x, fx.Node) or weight is None or not constant or (bias is not None and _parameter(bias, traced) is None):
        return None
    groups, turned = given.get("groups", 1), kind in _TRANSPOSED.values()
    outputs, inputs = (weight.shape[1] * groups, weight.shape[0]) if turned else (weight.shape[0], weight.shape[1] * groups)
    layer: Any = kind(inputs, outputs, tuple(weight.shape[2:]), bias=False, device="meta", **given)
    layer.weight, layer.bias = weight, _parameter(bias, traced)
    return x, TransposedConv(layer) if turned else layer, []


def _weighted_pooling(node: fx.Node, traced: fx.GraphModule) -> Made | None:
    """`(x * w).sum((2, 3))`: a depthwise convolution with a kernel as large as the features."""
    given = _bound(node, ("input", "dim", "keepdim"))
    product, dims = given.get("input"), given.get("dim")
    if not isinstance(product, fx.Node) or product.target not in _PRODUCTS or len(product.users) != 1 or len(product.args) != 2:
        return None
    if not isinstance(dims, tuple | list) or {d % 4 for d in dims if isinstance(d, int)} != {2, 3} or {*given} - {"input", "dim", "keepdim"}:
        return None
    for x, other in (product.args, product.args[::-1]):
        weight = _parameter(other, traced)
        if weight is None or not isinstance(x, fx.Node) or _parameter(x, traced) is not None:
            continue
        if weight.dim() == 4 and weight.shape[0] == 1:
            weight = nn.Parameter(weight.detach()[0], weight.requires_grad)
        if weight.dim() != 3 or weight.shape[0] == 1 or 1 in weight.shape[1:]:
            return None
        channels = len(weight)
        layer = nn.Conv2d(channels, channels, (weight.shape[1], weight.shape[2]), groups=channels, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach().unsqueeze(1).clone(), weight.requires_grad)
        return x, layer, [] if given.get("keepdim") else [(torch.flatten, 1)]
    return None


def _parameter(value: Any, traced: fx.GraphModule) -> nn.Parameter | None:
    """The parameter that a node reads."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = operator.attrgetter(str(value.target))(traced)
    return found if isinstance(found, nn.Parameter) else None


def _free_name(traced: fx.GraphModule, name: str) -> str:
    while hasattr(traced, name):
        name = f"{name}_layer"
    return name


def _read(traced: fx.GraphModule) -> set[str]:
    """Names of the tensors that the graph reads itself."""
    return {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}


def _forget_unread(traced: fx.GraphModule, before: set[str]) -> None:
    """Removes what a layer has taken the place of: it would be counted, and trained, twice."""
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and (node.op == "get_attr" or node.target in _PRODUCTS):
            traced.graph.erase_node(node)
    for name in before - _read(traced):
        parent, _, own = name.rpartition(".")
        if not any(node.op == "call_module" and parent == node.target for node in traced.graph.nodes):  # it may be that layer's own, too
            delattr(traced.get_submodule(parent), own)

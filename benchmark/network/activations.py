"""Which modules, functions and tensor methods are activation functions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.GELU, nn.Hardswish,
    nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus,
)  # fmt: skip
_NAMES = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "celu", "celu_", "selu",
    "selu_", "silu", "mish", "gelu", "hardswish", "sigmoid", "sigmoid_", "hardsigmoid", "tanh", "tanh_", "softplus",
}  # fmt: skip
_FUNCTIONS = {getattr(place, name) for place in (F, torch) for name in _NAMES if hasattr(place, name)}
# zoos write some activation functions themselves; kept whole by their class names, where they have no parameters
_CLASS_NAMES = {"swish", "hswish", "hardswish", "hsigmoid", "hardsigmoid", "mish", "hardmish", "quickgelu", "geluact", "gelutanh", "sigmoid", "tanh"}


_CLAMP_NAMES = {"clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"}
_CLAMPS = {getattr(torch, name) for name in _CLAMP_NAMES}


def is_activation_module(module: nn.Module | None) -> bool:
    if isinstance(module, _MODULES):
        return True
    if module is None or any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return False
    return type(module).__name__.lower().replace("_", "").removesuffix("me").removesuffix("jit") in _CLASS_NAMES


def is_activation(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether this node computes an activation function. `x * sigmoid(x)` is one: then its product is, and its sigmoid is not."""
    if _is_named_activation(node, traced):
        return _gated_product(node) is None
    return any(isinstance(a, fx.Node) and _is_named_activation(a, traced) and _gated_product(a) is node for a in node.args)


def _is_named_activation(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return is_activation_module(traced.get_submodule(str(node.target)))
    if node.op == "call_function":
        return node.target in _FUNCTIONS or (node.target in _CLAMPS and _rectifies(node))
    return node.op == "call_method" and (node.target in _NAMES or (node.target in _CLAMP_NAMES and _rectifies(node)))


def _rectifies(node: fx.Node) -> bool:
    """Whether a clamp is a ReLU written otherwise: `x.clamp(min=0)`, `torch.clamp(x, 0, 6)`."""
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    return isinstance(low, int | float) and low == 0


def _gated_product(gate: fx.Node) -> fx.Node | None:
    """The product x * gate(x), where `gate` is a node that serves nothing else."""
    if len(gate.users) != 1:
        return None
    (product,) = gate.users
    operands: tuple[Any, ...] = product.args
    is_product = product.target in (operator.mul, operator.imul, torch.mul, "mul", "mul_")
    return product if is_product and gate.args[0] in operands else None

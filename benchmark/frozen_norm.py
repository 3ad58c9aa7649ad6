"""Batch norms of a frozen network: with fixed statistics and parameters, each is one multiplication and one addition per channel.

torch's own batch norm sums its output's gradient per channel on the way back, whether or not a parameter wants it, and takes a CPU twice as long.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def is_listened_to(module: nn.Module | None) -> bool:
    """Whether somebody hooked this module, and so wants it to be called as it is."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class FrozenNorm(nn.Module):
    """norm(x), or relu(norm(x)), for a norm whose parameters do not train: N x C x ... -> the same shape. Equal up to rounding, also in gradient.

    The modules themselves are called where torch's kernels are good (on a GPU), where a batch's own statistics count, and where somebody listens.
    """

    def __init__(self, norm: BatchNorm, relu: nn.ReLU | None = None):
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor) -> Tensor:
        norm, mean, variance = self.norm, self.norm.running_mean, self.norm.running_var
        as_it_is = x.device.type != "cpu" or norm.training or is_listened_to(norm) or is_listened_to(self.relu)
        if as_it_is or mean is None or variance is None or x.dtype != mean.dtype:
            result: Tensor = norm(x)
            return result if self.relu is None else self.relu(result)
        scale = torch.rsqrt(variance + norm.eps)
        scale = scale if norm.weight is None else norm.weight * scale
        shift = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
        along = [-1 if d == 1 else 1 for d in range(x.dim())]
        y = torch.addcmul(shift.view(along), x, scale.view(along))
        return y if self.relu is None else y.relu_()


def with_frozen_norms(traced: fx.GraphModule) -> fx.GraphModule:
    """Makes every batch norm, with the ReLU that alone reads it, a `FrozenNorm`: in place, in a graph that must be nobody else's."""
    for node in list(traced.graph.nodes):
        norm = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, BatchNorm):
            continue
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        relu = traced.get_submodule(str(reader.target)) if reader is not None and reader.op == "call_module" else None
        name = f"frozen_{node.name}"
        if reader is not None and type(relu) is nn.ReLU:
            traced.add_submodule(name, FrozenNorm(norm, relu))
            reader.replace_all_uses_with(node)
            traced.graph.erase_node(reader)
        else:
            traced.add_submodule(name, FrozenNorm(norm))
        node.target = name
    traced.graph.lint()
    traced.recompile()
    return traced

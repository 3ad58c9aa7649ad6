"""Batch norms of a frozen network, with the passes over the memory that go with them: the sum with a shortcut, the ReLU, the moments of what entered.

With fixed statistics and parameters a norm is one multiplication and one addition per channel. torch's own batch norm sums its output's gradient per
channel on the way back, whether or not a parameter wants it; and each further operation writes a tensor of its own, there and back.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

BatchNorm = nn.modules.batchnorm._BatchNorm
SUMS_IN_PLACE = {operator.iadd, "add_"}
SUMS = {operator.add, torch.add, "add", *SUMS_IN_PLACE}


def is_listened_to(module: nn.Module | None) -> bool:
    """Whether somebody hooked this module, and so wants it to be called as it is."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def moments_of(x: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, C each, by the kernel of a training batch norm: it reads x twice and writes nothing.

    It answers in the precision of running statistics (`about` is such), which a momentum of 0 leaves as they are; on a GPU any will do.
    """
    if x.device.type != "cpu":
        return torch.batch_norm_update_stats(x, torch.empty_like(about), torch.empty_like(about), 0.0)
    return torch.batch_norm_update_stats(x, about.clone(), torch.ones_like(about), 0.0)


def gradient_of_moments(count: int | Tensor, mean: Tensor, mean_gradient: Tensor, variance_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), C each: the moments' part of the gradient with respect to x is a x + b. count: the values of a channel."""
    slope = variance_gradient * (2.0 / count)
    return slope, mean_gradient / count - slope * mean


class _Normalised(torch.autograd.Function):
    """scale x + shift (+ shortcut), rectified if asked; and mean and biased variance of x if asked."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None, rectified: bool, about: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        along = [-1 if d == 1 else 1 for d in range(x.dim())]
        mean, variance = moments_of(x, about) if about is not None else (None, None)
        y = torch.addcmul(shift.view(along), x, scale.view(along))
        if shortcut is not None:
            y.add_(shortcut)
        if rectified:
            y.relu_()
        ctx.along, ctx.rectified, ctx.with_shortcut = along, rectified, shortcut is not None
        ctx.save_for_backward(scale, y if rectified else None, x if mean is not None else None, mean)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_y, of_mean, of_variance = gradients
        scale, y, x, mean = ctx.saved_tensors
        of_x = None
        if of_y is not None:
            if ctx.rectified:
                of_y = torch.ops.aten.threshold_backward(of_y, y, 0)
            is_own = ctx.rectified and not ctx.with_shortcut  # nobody else sees this tensor
            of_x = of_y.mul_(scale.view(ctx.along)) if is_own else of_y * scale.view(ctx.along)
        if of_mean is not None or of_variance is not None:
            zero = torch.zeros_like(mean)
            count = x.numel() // mean.numel()
            slope, constant = gradient_of_moments(count, mean, zero if of_mean is None else of_mean, zero if of_variance is None else of_variance)
            slope, constant = slope.view(ctx.along), constant.view(ctx.along)
            of_x = torch.addcmul(constant, x, slope) if of_x is None else of_x.addcmul_(x, slope).add_(constant)
        return of_x, None, None, of_y if ctx.with_shortcut else None, None, None


class FrozenNorm(nn.Module):
    """relu(norm(x) + shortcut), for a norm whose parameters do not train: N x C x ... -> the same shape. Equal up to rounding, also in gradient.

    Sum and ReLU are there if they are given. With `moments`, it answers (y, mean, variance): mean and biased variance of x, C each.

    The modules themselves are called where torch's kernels are good (on a GPU), where a batch's own statistics count, where parameters train, and
    where somebody listens; the moments are None then.
    """

    def __init__(self, norm: BatchNorm, relu: nn.ReLU | None = None, moments: bool = False):
        super().__init__()
        self.norm, self.relu, self.moments = norm, relu, moments

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
        norm, mean, variance = self.norm, self.norm.running_mean, self.norm.running_var
        as_it_is = x.device.type != "cpu" or norm.training or is_listened_to(norm) or is_listened_to(self.relu)
        as_it_is = as_it_is or (norm.weight is not None and norm.weight.requires_grad)
        if as_it_is or mean is None or variance is None or x.dtype != mean.dtype:
            y = norm(x) if shortcut is None else norm(x) + shortcut
            y = y if self.relu is None else self.relu(y)
            return (y, None, None) if self.moments else y
        scale = torch.rsqrt(variance + norm.eps)
        scale = scale if norm.weight is None else norm.weight * scale
        shift = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
        answer: tuple[Tensor, Tensor | None, Tensor | None] = _Normalised.apply(
            x, scale, shift, shortcut, self.relu is not None, mean if self.moments else None
        )
        return answer if self.moments else answer[0]


def with_frozen_norms(traced: fx.GraphModule, moments: bool = False) -> fx.GraphModule:
    """Makes every batch norm, with the sum and the ReLU that alone read it, a `FrozenNorm`: in place, in a graph that must be nobody else's.

    With `moments`, the graph's output, a tuple, gets one more part: the moments of what enters each norm, in the order of `meta["batch_norm"]`.
    """
    found: dict[int, tuple[fx.Node, fx.Node]] = {}
    for node in list(traced.graph.nodes):
        norm = module_of(node, traced)
        if not isinstance(norm, BatchNorm):
            continue
        replaced, inputs = [node], [node.args[0]]
        reader = _only_reader(node)
        if reader is not None and _adds_to(node, reader):
            inputs.append(next(a for a in reader.args if a is not node))
            replaced.append(reader)
        reader = _only_reader(replaced[-1])
        relu = module_of(reader, traced) if reader is not None else None
        if reader is not None and type(relu) is nn.ReLU:
            replaced.append(reader)
        name = f"frozen_{node.name}"
        traced.add_submodule(name, FrozenNorm(norm, relu if type(relu) is nn.ReLU else None, moments))
        with traced.graph.inserting_before(replaced[-1]):
            result = traced.graph.call_module(name, tuple(inputs))
            parts = [traced.graph.call_function(operator.getitem, (result, i)) for i in range(3)] if moments else [result]
        parts[0].meta = dict(replaced[-1].meta)
        if "batch_norm" in node.meta and moments:
            found[node.meta["batch_norm"]] = (parts[1], parts[2])
        replaced[-1].replace_all_uses_with(parts[0])
        for old in reversed(replaced):
            traced.graph.erase_node(old)
    if moments:
        output = next(n for n in traced.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], tuple(found[i] for i in sorted(found))),)
    traced.graph.lint()
    traced.recompile()
    return traced


def module_of(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    """The module that `node` calls; None where it does something else."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _adds_to(node: fx.Node, total: fx.Node) -> bool:
    """Whether `total` is `node` plus another tensor of its shape, and a tensor of its own or in `node`'s place."""
    if total.target not in SUMS or total.kwargs or len(total.args) != 2 or total.args[0] is total.args[1]:
        return False
    alike = all(isinstance(a, fx.Node) and a.meta.get("shape") == node.meta["shape"] for a in total.args)
    return alike and (total.args[0] is node or total.target not in SUMS_IN_PLACE)

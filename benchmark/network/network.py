"""A network as a torch.fx graph that can be run, and *observed*: logits, features at the end of each stage, inputs of the BN layers.

Teacher and student are both `Network`s, so a method asks both the same questions.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_structure, tree_unflatten

from dfqbench.network.frozen_batch_norm import BatchNorm, gradient_of_moments, moments_of, with_frozen_norms
from dfqbench.network.trace import trace as trace
from dfqbench.task import Task
from dfqbench.tasks.answers import native_shapes, packed, unpacked

Decode = Callable[[Any, int, int], list[dict[str, Tensor]]]
Boxes = Callable[[Any, int, int], Tensor]


@dataclass
class Observation:
    """What a network says about a batch of N images.

    logits: N x C, or what else answers of the task are (`dfqbench.tasks`). features: the output of each stage, N x C_i x H_i x W_i.
    bn_inputs: what entered each BN layer, in the order of the forward pass (empty for networks without BN, and for students whose BN is folded).
    batch_norms: those layers.
    moments: the `statistics` that came along, (None, None) where none did.
    """

    logits: Tensor
    features: list[Tensor]
    bn_inputs: list[Tensor]
    batch_norms: list[nn.BatchNorm2d]
    moments: Sequence[tuple[Tensor, Tensor] | tuple[None, None]] = ()

    def statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and biased variance over (N, H, W) of each BN layer's input: pairs of C_l, float32, differentiable."""
        known = list(self.moments) or [(None, None)] * len(self.bn_inputs)
        missing = [i for i, (mean, _) in enumerate(known) if mean is None]
        found = moments_of_all([self.bn_inputs[i] for i in missing], [self.batch_norms[i].running_mean for i in missing])  # type: ignore[misc]
        for i, pair in zip(missing, found, strict=True):
            known[i] = pair
        return known  # type: ignore[return-value]


def without_owner(traced: fx.GraphModule) -> fx.GraphModule:
    """The same module, to which its finished graph does not refer back: in a circle, weights would live until Python's collector runs."""
    traced.graph.owning_module = None
    return traced


class Network(nn.Module):
    """A traced network. Calling it gives its answer (N x C logits, or see `dfqbench.tasks`); `observe` gives an `Observation`.

    decode: of detectors, makes boxes of what the head says: (native answer, height, width) -> one dict of boxes, scores, labels per image.
    boxes: of detectors that have it, where the box of every position is before anything is chosen among them: (native answer, height, width) ->
    N x positions x 4 (left, top, right, bottom in pixels), positions as in the answer, differentiable.
    exit: of a network with early exits, whose answer it is; None: all, N x exits x C.
    """

    _other_graphs: ClassVar[tuple[str, ...]] = ("_observing_graph",)  # over the same modules; made when first needed

    def __init__(self, traced: fx.GraphModule, task: Task):
        super().__init__()
        self.traced, self.task = without_owner(traced), task
        self.decode: Decode | None = None
        self.boxes: Boxes | None = None
        self.exit: int | None = -1
        nodes = list(traced.graph.nodes)
        self.batch_norms_used = [n.target for n in sorted((n for n in nodes if "batch_norm" in n.meta), key=lambda n: n.meta["batch_norm"])]
        self.stages = sum("stage" in n.meta for n in nodes)

    @property
    def offers(self) -> dict[str, int]:
        """How many there are of what a method may need: BN layers with running statistics, stages, layers with one output per class."""
        layers = [m for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == self.task.classes]
        found = {"statistics": len(self.batch_norms_used), "features": self.stages, "classifier": len(layers)}
        return found | ({"boxes": int(self.boxes is not None)} if self.task.kind == "detect" else {})

    def forward(self, images: Tensor) -> Tensor:
        return self._said(self.traced(images))

    def _said(self, native: Any) -> Tensor:
        answer = packed(native, self.task)
        return answer if self.task.exits == 1 or self.exit is None else answer[:, self.exit]

    @contextlib.contextmanager
    def answering_at(self, exit: int | None) -> Iterator[None]:
        """Inside, it is that exit's answer (see `exit`) that the network gives, observed or not."""
        before, self.exit = self.exit, exit
        try:
            yield
        finally:
            self.exit = before

    def native(self, answer: Tensor) -> Any:
        """An answer in the form in which the network itself gives it: of a detector (class logits, boxes, ...), or one such for each level."""
        if self.task.kind != "detect":
            return answer
        own = self._native_on_meta()
        levels = unpacked(answer, native_shapes(own), self.task.classes)
        return levels[0] if all(isinstance(part, Tensor) for part in own) else levels

    def _native_on_meta(self) -> Any:
        """What the network itself gives for one image, as tensors without values."""
        output = next(n for n in self.traced.graph.nodes if n.op == "output")
        return fx.node.map_arg(output.args[0], lambda node: torch.empty(node.meta["shape"], device="meta"))

    @property
    def names(self) -> list[str]:
        """Of the tensors that the network itself gives, one after the other: `logits`; of early exits `exit_1` ... and at last `logits`; of a
        detector `class_logits`, `boxes`, and further logits `others_1` ..., for each level with its number behind where there are several."""
        native = self._native_on_meta()
        if self.task.kind != "detect":
            return [*(f"exit_{i}" for i in range(1, self.task.exits)), "logits"]
        levels = native_shapes(native)
        parts = [["class_logits", "boxes", *(f"others_{i}" for i in range(1, len(level) - 1))] for level in levels]
        return [part + (f"_{i}" if len(levels) > 1 else "") for i, level in enumerate(parts, 1) for part in level]

    def answer_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The answer that these tensors, in the order of `names`, are."""
        return self._said(tree_unflatten(list(tensors), tree_structure(self._native_on_meta())))

    def observe(self, images: Tensor) -> Observation:
        """Runs the same graph, and also hands out the inner tensors (attached to autograd like the logits)."""
        logits, features, bn_inputs, *moments = self._observing(images)
        return Observation(self._said(logits), list(features), list(bn_inputs), self.batch_norms, *moments)

    @contextlib.contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Inside, BN layers normalise by the batch's own statistics, as in training mode, but no buffer moves and dropout stays off."""
        layers = [m for m in self.modules() if isinstance(m, BatchNorm)]
        running = [(m.running_mean, m.running_var) for m in layers]
        for layer in layers:
            layer.running_mean = layer.running_var = None
        try:
            yield
        finally:
            for layer, (mean, variance) in zip(layers, running, strict=True):
                layer.running_mean, layer.running_var = mean, variance

    @property
    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """The BN layers in the order of the forward pass, one entry per call."""
        return [self.traced.get_submodule(name) for name in self.batch_norms_used]  # type: ignore[misc]

    @property
    def _observing(self) -> fx.GraphModule:
        """The same modules with more outputs; not a submodule, so that no parameter counts twice."""
        cached = self.__dict__.get("_observing_graph")
        if cached is None:
            graph = copy.deepcopy(self.traced.graph)
            output = next(n for n in graph.nodes if n.op == "output")
            features = sorted((n for n in graph.nodes if "stage" in n.meta), key=lambda n: n.meta["stage"])
            bn_inputs = sorted(((i, n) for n in graph.nodes for i in n.meta.get("bn_input", ())), key=lambda pair: pair[0])
            output.args = ((output.args[0], tuple(features), tuple(n for _, n in bn_inputs)),)
            cached = self.__dict__["_observing_graph"] = without_owner(self._prepared(fx.GraphModule(self.traced, graph), observing=True))
        return cached

    def _prepared(self, other: fx.GraphModule, observing: bool = False) -> fx.GraphModule:
        """Another graph over the same modules, as this network wants to run it; one that observes may also give `Observation.moments`."""
        return other

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's; a memory format is that of tensors with four axes, and leaves others as they are."""
        if args or kwargs.keys() != {"memory_format"}:
            return super().to(*args, **kwargs)
        self._apply(lambda tensor: tensor.to(**kwargs) if tensor.dim() == 4 else tensor)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Network:
        for name in self._other_graphs:
            self.__dict__.pop(name, None)  # it holds the buffers of before
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in self._other_graphs})
        return new


class Teacher(Network):
    """The frozen full-precision network: eval mode, no gradient for any weight."""

    _other_graphs: ClassVar[tuple[str, ...]] = (*Network._other_graphs, "_answering_graph")

    def __init__(self, network: nn.Module, task: Task):
        super().__init__(trace(network, task), task)
        self.decode = getattr(network, "decode", None)
        self.boxes = getattr(network, "boxes", None) if task.kind == "detect" else None
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        answering = self.__dict__.get("_answering_graph")
        if answering is None:
            plain = fx.GraphModule(self.traced, copy.deepcopy(self.traced.graph))
            answering = self.__dict__["_answering_graph"] = without_owner(self._prepared(plain))
        return self._said(answering(images))

    def _prepared(self, other: fx.GraphModule, observing: bool = False) -> fx.GraphModule:
        return with_frozen_norms(other, moments=observing)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher never leaves eval mode."""
        super().train(False)
        return self


class _ChannelMoments(torch.autograd.Function):
    """Mean and biased variance per channel without a copy of x, and one pass back. What comes back is made by `_MomentsOfAll`: (b, a) for a x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        if x.dtype in (about.dtype, torch.bfloat16):
            mean, variance = moments_of(x, about)
        else:
            dims = [d for d in range(x.dim()) if d != 1]
            shifted = x.to(about.dtype) - about.view(ctx.shape)
            offset = shifted.mean(dims)
            variance = (shifted * shifted).mean(dims) - offset * offset
            mean = offset + about
        ctx.save_for_backward(x)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, constant: Tensor, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        # the two terms nearly cancel where the mean is large: added in full precision, whatever x has
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # as a batch norm of mean 0 and variance 1: no float32 copy
            zeros, ones = torch.zeros_like(slope), torch.ones_like(slope)
            return torch.batch_norm(x, slope, constant, zeros, ones, False, 0.0, 0.0, False), None
        return torch.addcmul(constant.view(ctx.shape), x, slope.view(ctx.shape)).to(x.dtype), None


class _MomentsOfAll(torch.autograd.Function):
    """Passes on the moments of all layers, one behind the other; of their gradients it makes what each `_ChannelMoments` wants, at once."""

    @staticmethod
    def forward(ctx: Any, means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(means, counts)
        return means.view_as(means), variances.view_as(variances)

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, variance_gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        means, counts = ctx.saved_tensors
        slope, constant = gradient_of_moments(counts, means, mean_gradient, variance_gradient)
        return constant, slope, None


@functools.cache
def _counts(each: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of (channels, values per channel) of each layer: the values of every channel. Kept: to make it anew would be a kernel for each layer."""
    return torch.cat([torch.full((channels,), float(count), dtype=dtype, device=device) for channels, count in each])


def moments_of_all(inputs: Sequence[Tensor], about: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`channel_moments` of each, with one pass of small operations on the way back for all of them."""
    if not inputs:
        return []
    means, variances = zip(*(_ChannelMoments.apply(x, near) for x, near in zip(inputs, about, strict=True)), strict=True)
    each = tuple((len(mean), x.numel() // len(mean)) for mean, x in zip(means, inputs, strict=True))
    counts = _counts(each, means[0].dtype, means[0].device)
    joined: tuple[Tensor, Tensor] = _MomentsOfAll.apply(torch.cat(means), torch.cat(variances), counts)
    return list(zip(*(part.split([channels for channels, _ in each]) for part in joined), strict=True))


def channel_moments(x: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all axes but the second, in the precision of `about`: two tensors of C.

    `about` (C) should be near the mean (the running mean is): it only guards a one-pass variance against cancellation.
    """
    return moments_of_all([x], [about])[0]

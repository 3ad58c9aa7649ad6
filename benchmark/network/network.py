"""A network as a torch.fx graph that can be run, and *observed*: logits, features at the end of each stage, inputs of the BN layers.

Teacher and student are both `Network`s, so a method asks both the same questions.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dfqbench.errors import UserError
from dfqbench.network.activations import is_activation_module
from dfqbench.network.frozen_batch_norm import BatchNorm, gradient_of_moments, moments_of, with_frozen_norms
from dfqbench.task import Task


class _Tracer(fx.Tracer):
    """Keeps layers and activation functions whole, and remembers in which module tracing was when it failed."""

    def __init__(self) -> None:
        super().__init__()
        self.failed_in: str | None = None

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        whole = isinstance(module, (nn.Conv2d, nn.Linear, BatchNorm)) or is_activation_module(module)
        return whole or super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or f"{path} ({type(m).__name__})"
            raise


def trace(network: nn.Module, task: Task) -> fx.GraphModule:
    """A traced copy of `network` in eval mode; the network itself stays as it is.

    Every node knows its output's shape (`meta["shape"]`, batch of 1; `meta["several"]` where it gives several tensors);
    `meta["stage"]` marks the end of stage i and `meta["bn_input"]` what enters the i-th BN layer.

    Raises UserError, naming the module, where torch.fx cannot follow the network (data-dependent control flow).
    """
    network = _with_plain_batch_norms(copy.deepcopy(network)).eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(network)
    except Exception as error:
        where = f"in {tracer.failed_in}" if tracer.failed_in else "in its forward"
        raise UserError(f"{type(network).__name__} cannot be traced by torch.fx {where}: {_first_line(error)}") from error
    traced = fx.GraphModule(network, graph, type(network).__name__)
    traced.eval()
    _propagate_shapes(traced, task)
    _mark(traced)
    return traced


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _with_plain_batch_norms(network: nn.Module) -> nn.Module:
    """timm's BatchNormAct2d is a BN layer, a dropout and an activation in one module: take it apart, in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(getattr(child, "act", None), nn.Module):
                plain = nn.BatchNorm2d(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
                plain.load_state_dict({k: v for k, v in child.state_dict().items() if "." not in k}, assign=True)
                drop, act = getattr(child, "drop", None), child.act
                setattr(parent, name, nn.Sequential(plain, *(part for part in (drop, act) if isinstance(part, nn.Module))))
    return network


def _propagate_shapes(traced: fx.GraphModule, task: Task) -> None:
    weight = next(traced.parameters(), None)
    images = torch.zeros(1, *task.image_shape, device=weight.device if weight is not None else None)
    try:
        with torch.no_grad():
            ShapeProp(traced).propagate(images)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{traced._get_name()} does not run on images of shape {task.image_shape}: {_first_line(cause)}") from error
    for node in traced.graph.nodes:
        tensors = node.meta.pop("tensor_meta", None)
        shape = getattr(tensors, "shape", None)
        node.meta = {"shape": tuple(shape)} if shape is not None else {"several": True} if tensors is not None else {}
    answer = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    given = answer.meta.get("shape") if isinstance(answer, fx.Node) else None
    if given != (1, task.classes):
        said = f"an output of shape {given}" if given else "something else than one tensor"
        raise UserError(f"{traced._get_name()} answers one image with {said}: logits of shape (1, {task.classes}) are wanted")


def _mark(traced: fx.GraphModule) -> None:
    """A stage is a run of at least two layers at one spatial resolution; it ends with the last tensor of that resolution that
    everything later is computed from.

    ResNets: after the last sum's activation of each residual stage (the one-layer ImageNet stem is none); MobileNetV2: its last 1x1
    block for the last stage; VGG: the last activation before each pooling; Inception: the last concatenation.
    """
    stages: list[tuple[tuple[int, ...], int, fx.Node]] = []
    batch_norms = 0
    necks = _necks(traced)
    for node in traced.graph.nodes:
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            node.args[0].meta.setdefault("bn_input", []).append(batch_norms)
            node.meta["batch_norm"] = batch_norms
            batch_norms += 1
        shape = node.meta.get("shape", ())
        if node.op in ("placeholder", "output") or len(shape) != 4 or min(shape[2:]) < 2:
            continue
        is_layer = isinstance(module, nn.Conv2d)
        if stages and stages[-1][0] == shape[2:]:
            end = node if node in necks or stages[-1][2] not in necks else stages[-1][2]
            stages[-1] = (shape[2:], stages[-1][1] + is_layer, end)
        elif is_layer and (not stages or shape[2] < stages[-1][0][0]):
            stages.append((shape[2:], 1, node))
    for index, node in enumerate(node for _, layers, node in stages if layers >= 2):
        node.meta["stage"] = index


def _necks(traced: fx.GraphModule) -> set[fx.Node]:
    """The nodes that no path from the images to the logits goes around. (A bottleneck's first 1x1 layer, still at the resolution of
    the stage before, is gone around by the shortcut.)"""
    index = {node: i for i, node in enumerate(traced.graph.nodes)}
    necks, reached = set(), 0
    for node, i in index.items():
        if i >= reached:
            necks.add(node)
        if node.op != "get_attr" and ("shape" in node.meta or "several" in node.meta):
            reached = max([reached, *(index[user] for user in node.users)])
    return necks


@dataclass
class Observation:
    """What a network says about a batch of N images.

    logits: N x C. features: the output of each stage, N x C_i x H_i x W_i. bn_inputs: what entered each BN layer, in the order
    of the forward pass (empty for networks without BN, and for students whose BN is folded). batch_norms: those layers.
    moments: the `statistics` that came along, (None, None) where none did.
    """

    logits: Tensor
    features: list[Tensor]
    bn_inputs: list[Tensor]
    batch_norms: list[nn.BatchNorm2d]
    moments: Sequence[tuple[Tensor, Tensor] | tuple[None, None]] = ()

    def statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and biased variance over (N, H, W) of each BN layer's input: pairs of C_l, float32, differentiable."""
        known = self.moments or [(None, None)] * len(self.bn_inputs)
        layers = zip(self.bn_inputs, self.batch_norms, known, strict=True)
        return [channel_moments(x, bn.running_mean) if mean is None else (mean, variance) for x, bn, (mean, variance) in layers]  # type: ignore[arg-type,misc]


class Network(nn.Module):
    """A traced network. Calling it gives logits (N x C); `observe` gives an `Observation`."""

    _other_graphs: ClassVar[tuple[str, ...]] = ("_observing_graph",)  # over the same modules; made when first needed

    def __init__(self, traced: fx.GraphModule, task: Task):
        super().__init__()
        self.traced, self.task = traced, task
        nodes = list(traced.graph.nodes)
        self.batch_norms_used = [n.target for n in sorted((n for n in nodes if "batch_norm" in n.meta), key=lambda n: n.meta["batch_norm"])]
        self.stages = sum("stage" in n.meta for n in nodes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.traced(images)
        return logits

    def observe(self, images: Tensor) -> Observation:
        """Runs the same graph, and also hands out the inner tensors (attached to autograd like the logits)."""
        logits, features, bn_inputs, *moments = self._observing(images)
        return Observation(logits, list(features), list(bn_inputs), self.batch_norms, *moments)

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
            cached = self.__dict__["_observing_graph"] = self._prepared(fx.GraphModule(self.traced, graph), observing=True)
        return cached

    def _prepared(self, other: fx.GraphModule, observing: bool = False) -> fx.GraphModule:
        """Another graph over the same modules, as this network wants to run it; one that observes may also give `Observation.moments`."""
        return other

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
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        answering = self.__dict__.get("_answering_graph")
        if answering is None:
            plain = fx.GraphModule(self.traced, copy.deepcopy(self.traced.graph))
            answering = self.__dict__["_answering_graph"] = self._prepared(plain)
        logits: Tensor = answering(images)
        return logits

    def _prepared(self, other: fx.GraphModule, observing: bool = False) -> fx.GraphModule:
        return with_frozen_norms(other, moments=observing)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher never leaves eval mode."""
        super().train(False)
        return self


class _ChannelMoments(torch.autograd.Function):
    """Mean and biased variance per channel without a copy of x on a CPU, in one pass elsewhere, and one pass back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        if x.device.type == "cpu" and x.dtype in (about.dtype, torch.bfloat16):
            mean, variance = moments_of(x, about)
        else:
            dims = [d for d in range(x.dim()) if d != 1]
            shifted = x.to(about.dtype) - about.view(ctx.shape)
            offset = shifted.mean(dims)
            variance = (shifted * shifted).mean(dims) - offset * offset
            mean = offset + about
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, variance_gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        slope, constant = gradient_of_moments(x, mean, mean_gradient, variance_gradient)
        # the two terms nearly cancel where the mean is large: added in full precision, whatever x has
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # as a batch norm of mean 0 and variance 1: no float32 copy
            zeros, ones = torch.zeros_like(slope), torch.ones_like(slope)
            return torch.batch_norm(x, slope, constant, zeros, ones, False, 0.0, 0.0, False), None
        return torch.addcmul(constant.view(ctx.shape), x, slope.view(ctx.shape)).to(x.dtype), None


def channel_moments(x: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all axes but the second, in the precision of `about`: two tensors of C.

    `about` (C) should be near the mean (the running mean is): it only guards a one-pass variance against cancellation.
    """
    moments: tuple[Tensor, Tensor] = _ChannelMoments.apply(x, about)
    return moments

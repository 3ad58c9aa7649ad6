"""Tracing: from a module to a torch.fx graph without side effects, in which shapes, stages and batch norms are marked."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves

from dfqbench.errors import UserError
from dfqbench.network.activations import is_activation_module
from dfqbench.network.attention import make_attention_plain
from dfqbench.network.canonical import make_canonical
from dfqbench.network.concrete import ConcreteTracer, nothing_kept_whole
from dfqbench.network.frozen_batch_norm import SUMS, BatchNorm
from dfqbench.network.inplace import InPlaceProxy, watched, without_side_effects
from dfqbench.network.plain_batch_norm import make_batch_norms_plain, with_plain_batch_norms
from dfqbench.network.products import added, is_constant, operands
from dfqbench.task import Task
from dfqbench.tasks.answers import answers_of, without_auxiliary

FORM = 1  # of networks that are not made of layers alone: raised when what is quantized in them, or how, changes


class _Tracer(fx.Tracer):
    """Keeps layers and activation functions whole, and remembers in which module tracing was when it failed."""

    record_stack_traces = True  # an operation that cannot be followed is named with its line

    def __init__(self) -> None:
        super().__init__()
        self.failed_in: str | None = None

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        whole = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, BatchNorm)) or is_activation_module(module)
        return whole or super().is_leaf_module(module, qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """`self` and the images. Every other argument keeps its default, and is no input of the graph."""
        where = f"{type(self.root).__name__} cannot be traced by torch.fx: its forward takes"
        parameters = [*inspect.signature(root_fn).parameters.values()][1:]
        if not parameters:
            raise UserError(f"{where} no images")
        images, *others = parameters
        needed = [p.name for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if needed:
            raise UserError(f"{where} {' and '.join(map(repr, needed))} beside the images: give each a default")
        return root_fn, [self.root, self.create_proxy("placeholder", images.name, (), {})]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or f"{path} ({type(m).__name__})"
            raise


class _RunningTracer(ConcreteTracer, _Tracer):
    """Where shapes decide what is computed.

    follow_buffers: what is made of buffers is recorded, too: where a network expands one by the number of images.
    """

    def __init__(self, images: tuple[Tensor, Tensor], follow_buffers: bool = False):
        _Tracer.__init__(self)
        self.images, self.proxy_buffer_attributes = images, follow_buffers


def trace(network: nn.Module, task: Task) -> fx.GraphModule:
    """A traced copy of `network` in eval mode; the network itself stays as it is.

    It has no side effects (inplace.py), one input, torch's own batch norms (plain_batch_norm.py), and weights in layers (canonical.py).
    `meta["network"]` is the network's class; `meta["form"]` is 0 where nothing had to be rewritten for that, else `FORM`.
    Every node knows its output's shape (`meta["shape"]`, batch of 1; `meta["several"]` where it gives several tensors);
    `meta["stage"]` marks the end of stage i and `meta["bn_input"]` what enters the i-th BN layer.

    Raises UserError, naming the module, where torch.fx cannot follow the network (data-dependent control flow), and where the graph does not
    compute what the network does.
    """
    images = torch.randn(2, *task.image_shape, generator=torch.Generator().manual_seed(0)).to(_device(network))
    original = copy.deepcopy(network).eval()
    answer = _answer(original, images)  # of a copy of its own: a first run may leave something behind
    network = with_plain_batch_norms(copy.deepcopy(network)).eval()
    attention = make_attention_plain(network)
    graph, concrete = _graph_of(network, images, answer)
    _leave_out_auxiliary(graph)
    traced = fx.GraphModule(network, graph, type(network).__name__)
    traced.eval()
    traced.meta["network"] = type(network).__name__  # a copy of a GraphModule forgets its name
    with _running(traced, task):
        seen = watched(traced, images.clone())
    without_side_effects(traced, seen)
    for node in traced.graph.nodes:
        if hasattr(nn.Module, node.name):  # modules are named after nodes: `to` is a method of theirs
            node._rename(f"{node.name}_")
    if concrete:  # what was only asked for shapes
        traced.graph.eliminate_dead_code()
        traced.recompile()
    rewritten = make_canonical(traced)
    _propagate_shapes(traced, task)
    make_batch_norms_plain(traced)
    same = answer is None or _are_close(_answer(traced, images), answer)
    if concrete and same:
        more = torch.cat([images, images, images[:1]])
        answer = _answer(original, more)
        same = answer is None or _are_close(_answer(traced, more), answer)
    if not same:
        raise UserError(
            f"{traced._get_name()} traced by torch.fx computes something else than the network itself: its forward asks for what only holds in one "
            "of the two (the type of its input, or state that it keeps)"
        )
    _mark(traced, _heads(traced) if task.kind == "detect" else set())
    by_weights = any(operand.is_weight for node in traced.graph.nodes for operand in operands(node, traced))
    to_constants = any(node.target in SUMS and any(map(is_constant, added(node))) for node in traced.graph.nodes)
    traced.meta["form"] = FORM if concrete or attention or rewritten or by_weights or to_constants else 0
    return traced


def _graph_of(network: nn.Module, images: Tensor, answer: list[Tensor] | None) -> tuple[fx.Graph, bool]:
    """The graph, and whether the network had to run along to get it: where torch.fx fails, or comes to another `answer`.

    Raises UserError that names the module where it cannot be had.
    """
    tracer, plain, refusal = _Tracer(), None, None
    try:
        plain = tracer.trace(network)
    except UserError:
        raise
    except Exception as error:
        where = f"in {tracer.failed_in}" if tracer.failed_in else "in its forward"
        refusal = UserError(f"{type(network).__name__} cannot be traced by torch.fx {where}: {_first_line(error)}")
        refusal.__cause__ = error
    seen = plain if plain is not None and not _keeps_weights_from_view(plain, network) else None
    if seen is not None and (answer is None or _are_close(_answer(fx.GraphModule(network, seen), images), answer)):
        return seen, False
    for follow_buffers in (False, True):
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), nothing_kept_whole():
            return _RunningTracer((images, torch.cat([images, images[:1]])), follow_buffers).trace(network), True
    if plain is not None:  # what the plain tracer said is about the network, and not about its shapes
        return plain, False
    assert refusal is not None
    raise refusal from refusal.__cause__


def _keeps_weights_from_view(graph: fx.Graph, network: nn.Module) -> bool:
    """Whether a function that a zoo has torch.fx keep whole is given a weight."""
    names = {name for name, parameter in network.named_parameters(remove_duplicate=False) if parameter.dim() > 1}
    whole = [
        n
        for n in graph.nodes
        if n.op == "call_function" and (getattr(n.target, "__module__", None) or "").partition(".")[0] in ("torchvision", "timm")
    ]
    return any(given.op == "get_attr" and given.target in names for node in whole for given in node.all_input_nodes)


def _device(network: nn.Module) -> torch.device | None:
    return next((p.device for p in network.parameters()), None)


@torch.no_grad()
def _answer(network: nn.Module, images: Tensor) -> list[Tensor] | None:
    """What `network` says about a copy of `images`, with the same random numbers every time; None where it fails, or gives no tensors."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            answer = network(images.clone())
    except Exception:  # a network's forward may raise anything
        return None
    found: list[Any] = tree_leaves(without_auxiliary(answer))
    return found if found and all(isinstance(tensor, Tensor) for tensor in found) else None


def _leave_out_auxiliary(graph: fx.Graph) -> None:
    output = next(n for n in graph.nodes if n.op == "output")
    if output.args[0] is not without_auxiliary(output.args[0]):
        output.args = (without_auxiliary(output.args[0]),)
        graph.eliminate_dead_code()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _are_close(ours: list[Tensor] | None, theirs: list[Tensor]) -> bool:
    return ours is not None and len(ours) == len(theirs) and all(map(_is_close, ours, theirs))


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, on the scale of the largest finite value."""
    if a.shape != b.shape:
        return False
    largest = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * largest, equal_nan=True)


@contextlib.contextmanager
def _running(traced: fx.GraphModule, task: Task) -> Iterator[None]:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{traced._get_name()} does not run on images of shape {task.image_shape}: {_first_line(cause)}") from error


def _propagate_shapes(traced: fx.GraphModule, task: Task) -> None:
    with _running(traced, task):
        answer = ShapeProp(traced).propagate(torch.zeros(1, *task.image_shape, device=_device(traced)))
    for node in traced.graph.nodes:
        tensors = node.meta.pop("tensor_meta", None)
        shape = getattr(tensors, "shape", None)
        node.meta = {"shape": tuple(shape)} if shape is not None else {"several": True} if tensors is not None else {}
        if getattr(tensors, "dtype", None) == torch.bool:
            node.meta["boolean"] = True
    problem = answers_of(task).problem(answer, 1)
    if problem:
        raise UserError(f"{traced._get_name()} answers one image {problem}")


def _mark(traced: fx.GraphModule, heads: set[fx.Node]) -> None:
    """A stage is a run of at least two layers at one spatial resolution; it ends with the last tensor of that resolution that
    everything later is computed from.

    ResNets: after the last sum's activation of each residual stage (the one-layer ImageNet stem is none); MobileNetV2: its last 1x1
    block for the last stage; VGG: the last activation before each pooling; Inception: the last concatenation. A detector's heads, of
    which each sees one resolution, belong to no stage.
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
        if node.op in ("placeholder", "output") or len(shape) != 4 or min(shape[2:]) < 2 or node in heads:
            continue
        is_layer = isinstance(module, nn.Conv2d)
        if stages and stages[-1][0] == shape[2:]:
            end = node if node in necks or stages[-1][2] not in necks else stages[-1][2]
            stages[-1] = (shape[2:], stages[-1][1] + is_layer, end)
        elif is_layer and (not stages or shape[2] < stages[-1][0][0]):
            stages.append((shape[2:], 1, node))
    for index, node in enumerate(node for _, layers, node in stages if layers >= 2):
        node.meta["stage"] = index


def _heads(traced: fx.GraphModule) -> set[fx.Node]:
    """Of a network with several answers, the nodes that only some of them are computed from."""
    answers = next(n for n in traced.graph.nodes if n.op == "output").all_input_nodes
    reached = {node: {node} if node in answers else set() for node in traced.graph.nodes}
    for node in reversed(traced.graph.nodes):
        reached[node] = reached[node].union(*(reached[user] for user in node.users))
    return {node for node, found in reached.items() if len(found) < len(answers)}


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

"""A traced network as JSON, and back: its nodes, and what its modules are beside their tensors.

Reading executes nothing that the text says: modules are made without their constructors, and only torch's own layers and those of the zoos are
made; functions are only such that torch itself lists as operations on tensors.
"""

from __future__ import annotations

import builtins
import copy
import functools
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfqbench.network.inplace import with_item, with_view
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer, WeightGrid

PACKAGES = ("torch.nn", "timm", "torchvision", "pytorchcv", "dfqbench.network.canonical")  # whose module classes a text may name
_OPERATORS = {
    f"operator.{f.__name__}": f
    for f in (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow, operator.matmul),
        *(operator.neg, operator.pos, operator.invert, operator.getitem, operator.and_, operator.or_, operator.xor),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    )
}
_OWN: dict[str, Callable[..., Any]] = {"dfqbench.with_item": with_item, "dfqbench.with_view": with_view, "builtins.getattr": builtins.getattr}
_OF_TORCHVISION = {  # that torchvision itself keeps whole in a traced network
    *(f"torchvision.models.swin_transformer.{name}" for name in ("shifted_window_attention", "_get_relative_position_bias", "_patch_merging_pad")),
    "torchvision.ops.stochastic_depth.stochastic_depth",
}
_MAKERS = ("arange", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "linspace", "empty_like")  # tensors from numbers
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT")  # that `getattr` may ask for
_META = ("shape", "several", "stage", "bn_input", "batch_norm")
_TYPES = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}
_INTERNAL = frozenset(vars(nn.Module()))


class NotWritable(ValueError):
    """What of a network cannot be written as text, or read from it."""


def plain_graph(traced: fx.GraphModule) -> fx.Graph:
    """A copy of a student's graph without checks of shapes, in which modules of a user's own classes are taken apart into what they compute.

    Names of the taken apart's tensors are those that the modules have in `traced`. Raises NotWritable.
    """
    graph = fx.GraphModule(traced, copy.deepcopy(traced.graph)).graph
    for node in list(graph.nodes):
        if node.target is torch._assert:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        layer = module.layer if isinstance(module, QuantizedLayer) else module
        if layer is not None and not isinstance(layer, ActivationQuantizer | WeightGrid) and not _is_known(type(layer).__module__):
            _take_apart(node, graph, layer, str(node.target))
    graph.owning_module = None  # in a circle, the student's weights would live until Python's collector runs
    return graph


def _take_apart(node: fx.Node, graph: fx.Graph, layer: nn.Module, name: str) -> None:
    """Puts what `layer` computes in the place of the node that calls it."""
    kind = type(layer)
    try:
        inner = fx.Tracer().trace(layer)
    except Exception as error:
        raise NotWritable(f"the class {kind.__qualname__} of {kind.__module__} cannot be traced by torch.fx ({error})") from error
    given = [*node.args, *node.kwargs.values()]
    copies: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for old in inner.nodes:
            if old.op == "placeholder":
                copies[old] = given.pop(0) if given else old.args[0]
            elif old.op == "output":
                result = fx.map_arg(old.args[0], lambda n: copies[n])
            else:
                copies[old] = graph.node_copy(old, lambda n: copies[n])
                if old.op in ("get_attr", "call_module"):
                    copies[old].target = f"{name}.{old.target}"
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def nodes_as_text(graph: fx.Graph) -> list[dict[str, Any]]:
    """Every node in order: name, op, target, args, kwargs, and the marks of tracing. Raises NotWritable."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _name_of(node.target) if node.op == "call_function" else str(node.target),
            **{key: _written(value) for key, value in (("args", node.args), ("kwargs", dict(node.kwargs))) if value},
            **{key: _written(node.meta[key]) for key in _META if key in node.meta},
        }
        for node in graph.nodes
    ]


def graph_of(text: list[dict[str, Any]]) -> fx.Graph:
    """The graph of `nodes_as_text`. Raises NotWritable for what a text must not name, and whatever a damaged text leads to."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for given in text:
        op, target = given["op"], given["target"]
        if op == "call_method":
            _check_method(target)
        args, kwargs = _read(given.get("args", {"tuple": []}), nodes), _read(given.get("kwargs", {}), nodes)
        if target == "builtins.getattr" and (len(args) != 2 or args[1] not in _ATTRIBUTES):
            raise NotWritable(f"getattr of {args[1:]}")
        if target == "dfqbench.with_view":
            for method, given_args, _ in args[2]:
                if method not in ("__getitem__", "__getattribute__"):
                    _check_method(method)
                elif method == "__getattribute__" and given_args not in [(a,) for a in _ATTRIBUTES]:
                    raise NotWritable(f"getattr of {given_args}")
        node = graph.create_node(op, _function(target) if op == "call_function" else target, args, kwargs, given["name"])
        node.meta = {key: _read(given[key], nodes) for key in _META if key in given}
        nodes[given["name"]] = node
    graph.lint()
    return graph


def module_as_text(module: nn.Module) -> dict[str, Any]:
    """Class, plain attributes, and the same of the parts; tensors are elsewhere. Raises NotWritable."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not _is_known(kind.__module__):
        raise NotWritable(f"the class {kind.__qualname__} of {kind.__module__} is not one of {', '.join(PACKAGES)}")
    values = {key: _written(value) for key, value in vars(module).items() if key not in _INTERNAL}
    parts = {key: module_as_text(part) for key, part in module.named_children()}
    absent = [key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is None]
    return {"class": name, "values": values} | ({"parts": parts} if parts else {}) | ({"absent": absent} if absent else {})


def module_of(text: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """The module of `module_as_text`, in eval mode, with the tensors called `prefix` + name: floats as parameters, or as buffers where running."""
    place, _, name = text["class"].rpartition(".")
    found = getattr(importlib.import_module(place), name, None) if _is_known(place) else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise NotWritable(f"{text['class']} is not a layer of {', '.join(PACKAGES)}")
    module = found.__new__(found)
    nn.Module.__init__(module)
    module.__dict__.update({key: _read(value, {}) for key, value in text["values"].items()})
    for key in text.get("absent", ()):
        module.register_parameter(key, None)
    for key, part in text.get("parts", {}).items():
        module.add_module(key, module_of(part, tensors, f"{prefix}{key}."))
    for key, tensor in tensors_under(tensors, prefix):
        if "." not in key:
            attach(module, key, tensor)
    if isinstance(module, nn.modules.batchnorm._NormBase) and "num_batches_tracked" not in module._buffers:
        module.register_buffer("num_batches_tracked", torch.tensor(0) if module.track_running_stats else None)
    return module.eval()


def tensors_under(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name without the prefix, tensor)."""
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))


def attach(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Statistics and whole numbers are buffers; everything else is a parameter, as an optimizer or a fine-tuning script expects."""
    module._parameters.pop(name, None)
    if name.startswith(("running_", "num_")) or not tensor.is_floating_point():
        module.register_buffer(name, tensor)
    else:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _is_known(place: str) -> bool:
    return any(place == package or place.startswith(f"{package}.") for package in PACKAGES)


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Every function that a text may name, by its name in public: `torch.cat`, `torch.nn.functional.pad`, `operator.add`."""
    known: dict[str, Callable[..., Any]] = {}
    listed = torch.overrides.get_overridable_functions()
    for place, prefix in ((torch, "torch"), (torch.nn.functional, "torch.nn.functional"), (torch.functional, "torch")):
        for function in listed.get(place, ()):
            name = getattr(function, "__name__", "")
            if getattr(place, name, None) is function:
                known[f"{prefix}.{name}"] = function
                in_place = getattr(place, f"{name}_", None)  # torch does not list these
                known |= {f"{prefix}.{name}_": in_place} if callable(in_place) else {}
    return known | {f"torch.{name}": getattr(torch, name) for name in _MAKERS} | _OPERATORS | _OWN


def _check_method(name: str) -> None:
    if name.startswith("_") or not callable(getattr(Tensor, name, None)):
        raise NotWritable(f"tensors have no method {name!r}")


def _name_of(function: Any) -> str:
    name = next((name for name, known in _functions().items() if known is function), None)
    own = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', function)}"
    if name is None and own not in _OF_TORCHVISION:
        raise NotWritable(f"the function {own} is none of torch's")
    return name or own


def _function(name: str) -> Callable[..., Any]:
    if name in _OF_TORCHVISION:
        place, _, own = name.rpartition(".")
        function: Callable[..., Any] = getattr(importlib.import_module(place), own)
        return function
    if name not in _functions():
        raise NotWritable(f"the function {name!r} is none of torch's")
    return _functions()[name]


def _written(value: Any) -> Any:
    """JSON for an argument or an attribute; what JSON does not have is a mapping with one key that says what it is."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else {"float": str(value)}
    if isinstance(value, list):
        return [_written(v) for v in value]
    if isinstance(value, tuple):  # torch.Size too
        return {"tuple": [_written(v) for v in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _written(v) for key, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_written(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # a file has no device; what is asked for goes where the network is
    if type(value) in _TYPES:
        return {_TYPES[type(value)]: str(value).removeprefix("torch.")}
    raise NotWritable(f"a value of the type {type(value).__name__}")


def _read(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    if not value:
        return {}
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(_read(v, nodes) for v in inner)
    if kind == "dict":
        return {key: _read(v, nodes) for key, v in inner.items()}
    if kind == "slice":
        return slice(*(_read(v, nodes) for v in inner))
    if kind in _TYPES.values():
        found = getattr(torch, inner)
        if type(found) not in _TYPES:
            raise NotWritable(f"{inner!r} is no {kind}")
        return found
    plain: dict[str, Callable[[Any], Any]] = {"node": lambda v: nodes[v], "float": float, "ellipsis": lambda v: Ellipsis, "device": torch.device}
    return plain[kind](inner)

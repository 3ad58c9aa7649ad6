"""A network as an ONNX file: the torch.export program, operator by operator, with integer weights and quantize-dequantize pairs (QDQ).

Opset 21 has 4-bit types; a file with 2-bit weights is of opset 25. Neither is the newest, which runtimes lag behind.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dfqbench.export.onnx_graph import IMAGES, Dims, Graph, Value
from dfqbench.export.onnx_ops import OPERATORS
from dfqbench.export.torch_program import description, program
from dfqbench.files import write_atomically
from dfqbench.network import Network
from dfqbench.quantization.student import Student

SESSION_OPTIONS = "session_options"  # key of the metadata


def export_onnx(network: Network, path: Path, about: dict[str, str] | None = None, quantized: bool = True) -> None:
    """Writes an ONNX file: images (batch x C x H x W, normalised) -> logits (batch x classes); without `quantized`, and a teacher, as floats.

    What else networks answer they answer in their own form, under the names of `Network.names`.

    Its metadata says what it is and what images it wants; `about` adds to it. Raises UserError, before anything is written, where the network has
    an operator that is not known here.
    """
    graph = Graph()
    outputs = dict(zip(network.names, _translate(program(network, quantized), graph), strict=True))
    found = {**description(network), **(about or {})}
    if quantized and isinstance(network, Student):
        found[SESSION_OPTIONS] = json.dumps(session_options(network))
    model = graph.model(outputs, network.task.image_shape, found)
    write_atomically(path, model.SerializeToString())


def session_options(student: Student) -> dict[str, str]:
    """What onnxruntime has to be told, as entries of a session's configuration, so that it computes what the file says.

    - 8-bit weights with 8-bit activations go through 16-bit sums on x86 CPUs without VNNI, and saturate: `session.x64quantprecision` (on one with
      VNNI it is not needed, and costs time).
    - Below 8 bits nothing is gained by fusing, and kernels are taken that have no 2-bit type: `session.disable_quant_qdq`.
    - Weights alone (no quantized input) of 4 bits or 2 go through a kernel that rounds activations: `session.qdq_matmulnbits_accuracy_level`.
    """
    narrow = any(layer.bits < 8 for layer in student.layers.values())
    other = "session.disable_quant_qdq" if narrow else "session.x64quantprecision"
    return {other: "1", "session.qdq_matmulnbits_accuracy_level": "1"}


def _translate(source: ExportedProgram, graph: Graph) -> list[Value]:
    """Fills `graph`, and gives its outputs."""
    env: dict[fx.Node, Any] = {}
    constants = {**source.state_dict, **source.constants}
    inputs = {spec.arg.name: spec for spec in source.graph_signature.input_specs}  # type: ignore[union-attr]

    def given(argument: Any) -> Any:
        return fx.node.map_arg(argument, env.__getitem__)

    for node in source.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            is_image = spec.kind is InputKind.USER_INPUT
            env[node] = Value(IMAGES, _dims(node.meta["val"])) if is_image else constants[str(spec.target)].detach()
            graph.parameters[id(env[node])] = str(spec.target).replace(".layer.", ".")
        elif node.op == "output":
            return list(given(node.args[0]))
        elif node.op == "call_function":
            env[node] = _call(node, given(node.args), given(node.kwargs), graph)
            if str(node.target).split(".")[1:2] and str(node.target).split(".")[1].endswith("_"):  # in place: the argument is now the result
                env[node.args[0]] = env[node]
    raise AssertionError("a program has an output")


def _call(node: fx.Node, args: Any, kwargs: Any, graph: Graph) -> Any:
    found, name = node.meta.get("val"), str(node.target)
    if node.target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(found, Tensor | list | tuple):  # a size, or arithmetic on sizes: shapes are known anyway
        return found
    flat = _flat([args, kwargs])
    if "quantized_decomposed" not in name and not any(isinstance(a, Value | torch.SymInt) for a in flat):
        return node.target(*args, **kwargs)  # type: ignore[operator]
    graph.node, graph.target = _place(node), name.removesuffix(".default")
    shapes = [_dims(part) for part in ([found] if isinstance(found, Tensor) else found)]
    graph.dims = shapes[0] if isinstance(found, Tensor) else shapes
    short = name.split(".")[1] if "." in name else name
    function = OPERATORS.get(short if short in OPERATORS else short.removesuffix("_"))
    if function is None:
        raise graph.unknown()
    try:
        made = function(graph, *args, **kwargs)
    except TypeError as error:  # an argument that the function does not take
        raise graph.unknown(str(error).partition(") ")[2] or str(error)) from None
    if isinstance(found, Tensor):
        return Value(made, graph.one())
    return tuple(Value(part, dims) for part, dims in zip(made, shapes, strict=True))


def _place(node: fx.Node) -> str:
    """Where in the network a node is: its module's name, or its own."""
    modules = [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values() if path]
    return str(modules[-1]).removesuffix(".layer") if modules else node.name


def _flat(argument: Any) -> list[Any]:
    """All that is in an argument; a Value is one thing."""
    if isinstance(argument, dict):
        argument = list(argument.values())
    if isinstance(argument, list | tuple) and not isinstance(argument, Value):
        return [part for a in argument for part in _flat(a)]
    return [argument]


def _dims(tensor: Tensor) -> Dims:
    return tuple(None if isinstance(size, torch.SymInt) else int(size) for size in tensor.shape)

"""An ONNX graph while it is being written: nodes, initialisers, and what is known of each value's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dfqbench.errors import UserError

BATCH = "batch"
IMAGES = "images"
Operator = Callable[..., Any]
Dims = tuple[int | None, ...]  # None: as many as there are images
# the types that QuantizeLinear and DequantizeLinear know, by the levels that they hold; two bits from opset 25 on, the others from 21
TYPES = {(0, 3): "uint2", (-2, 1): "int2", (0, 15): "uint4", (-8, 7): "int4", (0, 255): "uint8", (-128, 127): "int8", (-(2**15), 2**15 - 1): "int16"}


class Value(NamedTuple):
    """A tensor of the graph."""

    name: str
    dims: Dims


class Graph:
    """`op` adds a node; what it is given may be values, torch tensors (which become initialisers), numbers, or None for an input left out."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: dict[str, onnx.TensorProto] = {}
        self.node = ""  # of the program: what is being translated
        self.dims: Dims | list[Dims] = ()  # of its output, or outputs
        self.target: Any = None  # what it calls
        self.opset = 21
        self.parameters: dict[int, str] = {}  # names of tensors, by id
        self._constants: dict[bytes, str] = {}
        self._used: set[str] = {IMAGES}

    def op(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """The output's name; a tuple of names where there are several."""
        names = [self.name_of(i) for i in inputs]
        while names and not names[-1]:
            names.pop()
        made = [self._unique(f"{self.node}/{kind}" if outputs == 1 else f"{self.node}/{kind}_{i}") for i in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(kind, names, made, name=made[0], **given))
        return made[0] if outputs == 1 else tuple(made)

    def name_of(self, given: Any) -> str:
        if isinstance(given, Value):
            return given.name
        if given is None or isinstance(given, str):
            return given or ""
        if isinstance(given, Tensor):
            return self.constant(given.detach().numpy(), self.parameters.get(id(given), "constant"))
        return self.constant(given if isinstance(given, np.ndarray) else np.array(given, np.float32))

    def constant(self, array: npt.NDArray[Any], name: str = "constant") -> str:
        """An initialiser; equal ones are written once."""
        key = repr((array.dtype, array.shape)).encode() + array.tobytes()
        if key not in self._constants:
            self._constants[key] = self.own(array, name)
        return self._constants[key]

    def own(self, array: npt.NDArray[Any], name: str) -> str:
        """An initialiser of its own."""
        unique = self._unique(name)
        array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes an axis where there is none
        self.initialisers[unique] = numpy_helper.from_array(array, unique)
        return unique

    def weight(self, levels: Tensor, scale: Any, zero: Any, lowest: int, highest: int) -> list[str]:
        """Levels, scale and zero point as initialisers; levels of the narrowest type that holds lowest..highest, four bits and two are packed.

        No two weights share any of them: onnxruntime, where it changes them, calls the new ones after the old.
        """
        limits, kind = next(item for item in TYPES.items() if item[0][0] <= lowest and highest <= item[0][1])
        if limits[1] - limits[0] == 3:
            self.opset = 25
        name, dtype = f"{self.node}.weight", numpy_type(kind)
        whole = [np.asarray(v).astype(np.int32).astype(dtype) for v in (levels, zero)]
        return [self.own(whole[0], name), self.own(np.asarray(scale, np.float32), f"{name}_scale"), self.own(whole[1], f"{name}_zero_point")]

    def shape(self, dims: Sequence[int | None]) -> str:
        """A shape as a tensor, where the number of images counts."""
        if None not in dims:
            return self.constant(np.array(dims, np.int64))
        images = self.op("Shape", IMAGES, start=0, end=1)
        parts = [images if d is None else self.constant(np.array([d], np.int64)) for d in dims]
        return str(self.op("Concat", *parts, axis=0))

    def reshape(self, x: Any, dims: Dims | None = None) -> str:
        """To the shape of the current node's output, if no other is given."""
        dims = self.one() if dims is None else dims
        if dims.count(None) > 1:
            raise self.unknown("a shape in which the number of images appears twice")
        return str(self.op("Reshape", x, np.array([-1 if d is None else d for d in dims], np.int64)))

    def one(self) -> Dims:
        """The shape of the current node's single output."""
        assert isinstance(self.dims, tuple)
        return self.dims

    def unknown(self, what: str = "") -> UserError:
        return UserError(f"export to ONNX: no translation is known for {self.target}{f' with {what}' if what else ''} (at {self.node})")

    def _unique(self, name: str) -> str:
        unique, number = name, 1
        while unique in self._used:
            number += 1
            unique = f"{name}_{number}"
        self._used.add(unique)
        return unique

    def model(self, outputs: dict[str, Value], image_shape: tuple[int, int, int], about: dict[str, str]) -> onnx.ModelProto:
        """The finished model, checked. outputs: by their names."""
        self.nodes += [helper.make_node("Identity", [value.name], [name], name=name) for name, value in outputs.items()]
        shapes = {IMAGES: image_shape, **{name: value.dims[1:] for name, value in outputs.items()}}
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (BATCH, *shape)) for name, shape in shapes.items()]
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for name, tensor in self.initialisers.items() if name in used]
        graph = helper.make_graph(self.nodes, "network", ends[:1], ends[1:], kept)
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]), producer_name="dfqbench")
        helper.set_model_props(model, about)
        onnx.checker.check_model(model, full_check=True)
        return model


def numpy_type(kind: str) -> Any:
    """The numpy type of that name; ml_dtypes, which onnx brings, has those below 8 bits."""
    import ml_dtypes

    return getattr(ml_dtypes, kind) if kind.endswith(("2", "4")) else np.dtype(kind).type


def integers(*values: int) -> Any:
    return np.array(values, np.int64)


def rank(x: Any) -> int:
    return x.dim() if isinstance(x, Tensor) else len(x.dims)


def size(x: Any) -> tuple[int | None, ...]:
    return tuple(x.shape) if isinstance(x, Tensor) else x.dims


def listed(value: Any, axes: int = 2) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values

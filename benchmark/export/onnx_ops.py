"""How each operator of a torch.export program is written in ONNX: a small function per operator, by its name in ATen (without a trailing `_`).

A function gets the graph and the operator's own arguments; tensors are `Value`s, or torch tensors where they are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from dfqbench.export.onnx_graph import Graph, Operator, integers, rank, size
from dfqbench.export.onnx_layers import (
    adaptive,
    addmm,
    attention,
    avg_pool2d,
    batch_norm,
    convolution,
    dequantize_per_channel,
    dequantize_per_tensor,
    group_norm,
    layer_norm,
    linear,
    max_pool2d,
    quantize_per_tensor,
    reduced,
    transposed,
)


def plain(kind: str, **attributes: Any) -> Operator:
    """An operator of one tensor; what else torch passes does not change its value."""
    return lambda g, x, *_, **__: g.op(kind, x, **attributes)


def binary(kind: str) -> Operator:
    def two(g: Graph, a: Any, b: Any, *, alpha: float = 1, rounding_mode: str | None = None) -> str:
        if rounding_mode is not None:
            raise g.unknown(f"rounding_mode={rounding_mode!r}")
        return str(g.op(kind, a, b if alpha == 1 else g.op("Mul", b, float(alpha))))

    return two


def same(g: Graph, x: Any, *_: Any, **__: Any) -> Any:
    return g.name_of(x)


def shaped(g: Graph, x: Any, *_: Any, **__: Any) -> str:
    """View, flatten, squeeze and their like: the shape is known from the program."""
    return g.reshape(x)


# --- activation functions ---------------------------------------------------------------------------------------------


def clamp(g: Graph, x: Any, min: float | None = None, max: float | None = None) -> Any:
    return g.op("Clip", x, None if min is None else float(min), None if max is None else float(max))


def elu(g: Graph, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    if scale != 1 or input_scale != 1:
        raise g.unknown("a scale")
    return g.op("Elu", x, alpha=float(alpha))


def softplus(g: Graph, x: Any, beta: float = 1, threshold: float = 20) -> Any:  # above the threshold both are x, in float32
    return g.op("Softplus", x) if beta == 1 else g.op("Div", g.op("Softplus", g.op("Mul", x, float(beta))), float(beta))


def prelu(g: Graph, x: Any, weight: Any) -> Any:
    return g.op("PRelu", x, weight.reshape(-1, *[1] * (rank(x) - 2)) if isinstance(weight, Tensor) else weight)


def softmax(kind: str) -> Operator:
    return lambda g, x, dim, dtype=None: g.op(kind, x, axis=dim)


# --- moving values about ----------------------------------------------------------------------------------------------


def cat(g: Graph, parts: Sequence[Any], dim: int = 0) -> Any:
    return g.op("Concat", *parts, axis=dim)


def stack(g: Graph, parts: Sequence[Any], dim: int = 0) -> Any:
    return g.op("Concat", *(g.op("Unsqueeze", p, integers(dim)) for p in parts), axis=dim)


def split(axis: int) -> Operator:
    """Chunk and split: how long the parts are is known from the program. `axis`: where among the arguments the dimension is."""

    def parts(g: Graph, x: Any, *given: Any, dim: int | None = None) -> Any:
        assert isinstance(g.dims, list)
        dim = dim if dim is not None else given[axis] if len(given) > axis else 0
        lengths = [d[dim] for d in g.dims]
        if None in lengths:
            raise g.unknown("parts of the batch")
        made = g.op("Split", x, integers(*(int(n or 0) for n in lengths)), axis=dim, outputs=len(lengths))
        return (made,) if isinstance(made, str) else made

    return parts


def unbind(g: Graph, x: Any, dim: int = 0) -> Any:
    return tuple(select(g, x, dim, index) for index in range(len(g.dims)))


def select(g: Graph, x: Any, dim: int, index: int) -> Any:
    return g.op("Gather", x, g.constant(np.array(index, np.int64)), axis=dim)


def looked_up(g: Graph, x: Any, places: Sequence[Any]) -> Any:
    if rank(x) != 1 or len(places) != 1:
        raise g.unknown("an index into more than one axis")
    return g.op("Gather", x, g.op("Cast", places[0], to=TensorProto.INT64), axis=0)


def sliced(g: Graph, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if size(x)[dim] is None:
        if start or step != 1 or (isinstance(end, int) and end < 2**31):
            raise g.unknown("some images of the batch")
        return g.name_of(x)
    return g.op("Slice", x, integers(start or 0), integers(2**62 if end is None else end), integers(dim), integers(step))


def permute(g: Graph, x: Any, order: Sequence[int]) -> Any:
    return g.op("Transpose", x, perm=[d % rank(x) for d in order])


def transpose(g: Graph, x: Any, a: int = 0, b: int = 1) -> Any:
    order = list(range(rank(x)))
    order[a], order[b] = order[b], order[a]
    return g.op("Transpose", x, perm=order)


def expand(g: Graph, x: Any, *_: Any, **__: Any) -> Any:
    return g.op("Expand", x, g.shape(g.one()))


def pad(g: Graph, x: Any, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """torch counts from the last axis on, a pair for each; a negative width cuts."""
    starts, ends = [0] * rank(x), [0] * rank(x)
    for place in range(len(widths) // 2):
        starts[-1 - place], ends[-1 - place] = widths[2 * place], widths[2 * place + 1]
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return g.op("Pad", x, integers(*starts, *ends), float(value or 0) if mode == "constant" else None, mode=modes[mode])


def channel_shuffle(g: Graph, x: Any, groups: int) -> Any:
    images, channels, *places = size(x)
    apart = g.reshape(x, (images, groups, int(channels or 0) // groups, *places))
    return g.reshape(g.op("Transpose", apart, perm=[0, 2, 1, *range(3, 3 + len(places))]))


def pixel_shuffle(g: Graph, x: Any, factor: int) -> Any:
    return g.op("DepthToSpace", x, blocksize=factor, mode="CRD")


def resize(mode: str, coordinates: str, **attributes: Any) -> Operator:
    def enlarge(g: Graph, x: Any, wanted: Any, *rest: Any, **named: Any) -> Any:
        corners = mode != "nearest" and bool(rest[0] if rest else named.get("align_corners"))
        how = "align_corners" if corners else coordinates
        return g.op("Resize", x, None, None, g.shape(g.one()), mode=mode, coordinate_transformation_mode=how, **attributes)

    return enlarge


IDENTITIES = ("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach", "alias", "to", "lift_fresh_copy", "_to_copy")
SHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")
PLAIN = ("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "reciprocal", "neg", "abs", "erf", "floor", "ceil", "round", "sign", "selu", "mish")
OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(IDENTITIES, same),
    **dict.fromkeys(SHAPES, shaped),
    **{name: plain(name.capitalize()) for name in PLAIN},
    "hardswish": plain("HardSwish"),
    "hardsigmoid": plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "relu6": lambda g, x: clamp(g, x, 0, 6),
    "hardtanh": lambda g, x, low=-1, high=1: clamp(g, x, low, high),
    "leaky_relu": lambda g, x, slope=0.01: g.op("LeakyRelu", x, alpha=float(slope)),
    "celu": lambda g, x, alpha=1: g.op("Celu", x, alpha=float(alpha)),
    "gelu": lambda g, x, approximate="none": g.op("Gelu", x, approximate=approximate),
    "silu": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
    "rsqrt": lambda g, x: g.op("Reciprocal", g.op("Sqrt", x)),
    "square": lambda g, x: g.op("Mul", x, x),
    "rsub": lambda g, x, y, alpha=1: binary("Sub")(g, y, x, alpha=alpha),
    "clamp": clamp,
    "clamp_min": lambda g, x, low: clamp(g, x, low),
    "clamp_max": lambda g, x, high: clamp(g, x, None, high),
    "elu": elu,
    "softplus": softplus,
    "prelu": prelu,
    "softmax": softmax("Softmax"),
    "log_softmax": softmax("LogSoftmax"),
    **{name: binary(name.capitalize()) for name in ("add", "sub", "mul", "div", "pow")},
    "maximum": binary("Max"),
    "minimum": binary("Min"),
    **dict.fromkeys(("matmul", "bmm"), binary("MatMul")),
    "addmm": addmm,
    "linear": linear,
    **{f"conv{axes}d": convolution(axes) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": transposed(axes) for axes in (1, 2, 3)},
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "scaled_dot_product_attention": attention,
    "max_pool2d": max_pool2d,
    "avg_pool2d": avg_pool2d,
    "adaptive_avg_pool2d": adaptive("AveragePool", "GlobalAveragePool"),
    "adaptive_max_pool2d": lambda g, x, wanted: (adaptive("MaxPool", "GlobalMaxPool")(g, x, wanted), ""),  # torch gives indices, too
    "mean": reduced("ReduceMean"),
    "sum": reduced("ReduceSum"),
    "amax": reduced("ReduceMax"),
    "amin": reduced("ReduceMin"),
    "cat": cat,
    "stack": stack,
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), split(1)),
    "unbind": unbind,
    "select": select,
    "index": looked_up,
    "slice": sliced,
    "permute": permute,
    **dict.fromkeys(("transpose", "t", "swapaxes"), transpose),
    **dict.fromkeys(("expand", "expand_as"), expand),
    "pad": pad,
    "constant_pad_nd": lambda g, x, widths, value=0: pad(g, x, widths, "constant", value),
    "channel_shuffle": channel_shuffle,
    "pixel_shuffle": pixel_shuffle,
    "upsample_nearest2d": resize("nearest", "asymmetric", nearest_mode="floor"),
    "upsample_bilinear2d": resize("linear", "half_pixel"),
    "upsample_bicubic2d": resize("cubic", "half_pixel", cubic_coeff_a=-0.75),
    "quantize_per_tensor": quantize_per_tensor,
    "dequantize_per_tensor": dequantize_per_tensor,
    "dequantize_per_channel": dequantize_per_channel,
}  # fmt: skip

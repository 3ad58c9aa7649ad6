"""How each operator of a torch.export program is written in ONNX: a small function per operator, by its name in ATen (without a trailing `_`).

A function gets the graph and the operator's own arguments; tensors are `Value`s, or torch tensors where they are constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dfqbench.export.onnx_graph import TYPES, Graph, Value, numpy_type

Operator = Callable[..., Any]


def integers(*values: int) -> Any:
    return np.array(values, np.int64)


def rank(x: Any) -> int:
    return x.dim() if isinstance(x, Tensor) else len(x.dims)


def size(x: Any) -> tuple[int | None, ...]:
    return tuple(x.shape) if isinstance(x, Tensor) else x.dims


def listed(value: Any, axes: int = 2) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


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


# --- layers -----------------------------------------------------------------------------------------------------------


def convolution(axes: int) -> Operator:
    def convolve(g: Graph, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
        dilation, window = listed(dilation, axes), [int(k or 0) for k in size(weight)[2:]]
        if padding == "same":  # torch puts the odd one at the end
            total = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
            pads = [t // 2 for t in total] + [t - t // 2 for t in total]
        else:
            pads = [0] * 2 * axes if padding == "valid" else listed(padding, axes) * 2
        return g.op("Conv", x, weight, bias, kernel_shape=window, strides=listed(stride, axes), pads=pads, dilations=dilation, group=groups)

    return convolve


def transposed(axes: int) -> Operator:
    def convolve(
        g: Graph,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        strides, extra, dilations = (listed(v, axes) for v in (stride, output_padding, dilation))
        pads = listed(padding, axes) * 2
        return g.op("ConvTranspose", x, weight, bias, strides=strides, pads=pads, output_padding=extra, dilations=dilations, group=groups)

    return convolve


def linear(g: Graph, x: Any, weight: Any, bias: Any = None) -> Any:
    if rank(x) == 2:
        return g.op("Gemm", x, weight, bias, transB=1)
    product = g.op("MatMul", x, g.op("Transpose", weight, perm=[1, 0]))
    return product if bias is None else g.op("Add", product, bias)


def addmm(g: Graph, bias: Any, a: Any, b: Any) -> Any:
    return g.op("Gemm", a, b, bias)


def batch_norm(
    g: Graph, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool = False, momentum: float = 0, eps: float = 1e-5, *_: Any
) -> Any:
    if training or mean is None:
        axes = integers(*(d for d in range(rank(x)) if d != 1))
        return normalised(g, x, axes, eps, weight, bias)
    ones = mean.new_ones(mean.shape)
    return g.op("BatchNormalization", x, ones if weight is None else weight, ones * 0 if bias is None else bias, mean, variance, epsilon=eps)


def normalised(g: Graph, x: Any, axes: Any, eps: float, weight: Any = None, bias: Any = None) -> Any:
    """(x - mean) / sqrt(variance + eps) of the tensor's own statistics over `axes`; weight and bias are of its second axis."""
    centred = g.op("Sub", x, g.op("ReduceMean", x, axes))
    variance = g.op("ReduceMean", g.op("Mul", centred, centred), axes)
    result = g.op("Div", centred, g.op("Sqrt", g.op("Add", variance, float(eps))))
    along = (-1, *[1] * (rank(x) - 2))
    result = result if weight is None else g.op("Mul", result, weight.reshape(along))
    return result if bias is None else g.op("Add", result, bias.reshape(along))


def layer_norm(g: Graph, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    scale = np.ones(tuple(shape), np.float32) if weight is None else weight
    return g.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=eps)


def group_norm(g: Graph, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    dims = size(x)
    apart = Value(g.reshape(x, (dims[0], groups, math.prod(int(d or 0) for d in dims[1:]) // groups)), (dims[0], groups, None))
    result = g.reshape(normalised(g, apart, integers(2), eps))
    along = (-1, *[1] * (rank(x) - 2))
    result = result if weight is None else g.op("Mul", result, weight.reshape(along))
    return result if bias is None else g.op("Add", result, bias.reshape(along))


def attention(
    g: Graph, q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0, is_causal: bool = False, *, scale: float | None = None, **_: Any
) -> Any:
    if mask is not None or is_causal:
        raise g.unknown("a mask")
    axes = list(range(rank(k)))
    turned = g.op("Transpose", k, perm=[*axes[:-2], axes[-1], axes[-2]])
    scores = g.op("Mul", g.op("MatMul", q, turned), scale or 1 / math.sqrt(size(q)[-1] or 1))
    return g.op("MatMul", g.op("Softmax", scores, axis=-1), v)


# --- pooling ----------------------------------------------------------------------------------------------------------


def max_pool2d(g: Graph, x: Any, window: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Any:
    strides = listed(stride) if stride not in ((), [], None) else listed(window)
    pads, dilations = listed(padding) * 2, listed(dilation)
    return g.op("MaxPool", x, kernel_shape=listed(window), strides=strides, pads=pads, dilations=dilations, ceil_mode=int(ceil_mode))


def avg_pool2d(
    g: Graph, x: Any, window: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, padded: bool = True, divisor: int | None = None
) -> Any:
    if divisor is not None:
        raise g.unknown("divisor_override")
    strides = listed(stride) if stride not in ((), [], None) else listed(window)
    return g.op(
        "AveragePool",
        x,
        kernel_shape=listed(window),
        strides=strides,
        pads=listed(padding) * 2,
        ceil_mode=int(ceil_mode),
        count_include_pad=int(padded),
    )


def adaptive(kind: str, whole: str) -> Operator:
    """Adaptive pooling to 1 x 1, or to a size that divides the input's."""

    def pool(g: Graph, x: Any, wanted: Any) -> Any:
        before, after = size(x)[-2:], [b if w is None else w for b, w in zip(size(x)[-2:], listed(wanted), strict=True)]
        if after == [1, 1]:
            return g.op(whole, x)
        if any(not b or not a or b % a for b, a in zip(before, after, strict=True)):
            raise g.unknown(f"{tuple(before)} pixels to {tuple(after)}: one must divide the other")
        window = [int(b or 0) // int(a or 1) for b, a in zip(before, after, strict=True)]
        return g.op(kind, x, kernel_shape=window, strides=window)

    return pool


def reduced(kind: str) -> Operator:
    def reduce(g: Graph, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        axes = None if dim is None or dim == [] else integers(*listed(dim, 1))
        return g.op(kind, x, axes, keepdims=int(keepdim))

    return reduce


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


# --- quantization -----------------------------------------------------------------------------------------------------


def quantize_per_tensor(g: Graph, x: Any, scale: float, zero: int, lowest: int, highest: int, dtype: Any) -> Any:
    """QuantizeLinear saturates at its type's limits: where the grid ends before them, a Clip goes in front, whose ends are the grid's."""
    limits, kind = grid_type(lowest, highest)
    if (lowest, highest) != limits:
        x = g.op("Clip", x, np.float32((lowest - zero) * np.float32(scale)), np.float32((highest - zero) * np.float32(scale)))
    return g.op("QuantizeLinear", x, np.array(scale, np.float32), np.array(zero).astype(numpy_type(kind)))


def dequantize_per_tensor(g: Graph, x: Any, scale: float, zero: int, lowest: int, highest: int, dtype: Any, **_: Any) -> Any:
    if isinstance(x, Tensor):
        return g.op("DequantizeLinear", *g.weight(x, scale, zero, lowest, highest))
    kind = numpy_type(grid_type(lowest, highest)[1])
    return g.op("DequantizeLinear", x, np.array(scale, np.float32), np.array(zero).astype(kind))


def dequantize_per_channel(g: Graph, x: Tensor, scale: Tensor, zero: Tensor, axis: int, lowest: int, highest: int, dtype: Any, **_: Any) -> Any:
    return g.op("DequantizeLinear", *g.weight(x, scale, zero, lowest, highest), axis=axis)


def grid_type(lowest: int, highest: int) -> tuple[tuple[int, int], str]:
    """The type for an activation's levels, of 8 bits or 16: its limits and its name.

    None has fewer, which would save no work anyway: onnxruntime 1.32 loads neither a Clip (a ReLU6, say) in front of 4 bits, nor 2 bits
    at both ends of a layer.
    """
    wide = [(limits, kind) for limits, kind in TYPES.items() if limits[0] <= lowest and highest <= limits[1] and kind[-1] not in "24"]
    return wide[0]


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

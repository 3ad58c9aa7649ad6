"""Layers, poolings and quantizers in ONNX: what onnx_ops.py needs more than a line for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dfqbench.export.onnx_graph import TYPES, Graph, Operator, Value, integers, listed, numpy_type, rank, size


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

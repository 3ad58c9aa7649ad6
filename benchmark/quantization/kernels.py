"""How values are brought onto a grid: by torch's operations, and on a GPU in one pass, by a kernel of our own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_operations = torch.library.Library("dfqbench", "DEF")
_operations.define("on_grid(Tensor x, Tensor scale, Tensor? zero_point, int lowest, int highest) -> Tensor")


def along(axis: int | None, values: Tensor, x: Tensor) -> Tensor:
    """`values` (one per channel) shaped to broadcast along `axis` of x."""
    return values if axis is None else values.view([-1 if d == axis else 1 for d in range(x.dim())])


def scaled(x: Tensor, scale: Tensor, channel_axis: int | None) -> Tensor:
    """x / scale as a new tensor: float64 where x is, else float32."""
    factor = along(channel_axis, 1.0 / scale, x)
    return x * factor if x.dtype in (torch.float32, torch.float64) else x.float().mul_(factor)


def elementwise(x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int, channel_axis: int | None = None) -> Tensor:
    """The formula in six passes, four where the zero point is 0 (None), as behind a ReLU; in x's dtype, rounded in no less than float32.

    On a CPU this is six times faster than torch's fake-quantize kernel, which is not vectorised there.
    """
    step, level = along(channel_axis, scale, x), scaled(x, scale, channel_axis)
    if zero_point is None:
        return level.round_().clamp_(lowest, highest).mul_(step).to(x.dtype)
    zero = along(channel_axis, zero_point, x)
    return level.add_(zero).round_().clamp_(lowest, highest).sub_(zero).mul_(step).to(x.dtype)


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int) -> Tensor:
    """`elementwise` with one grid for all values, as an operation of torch: on a GPU one kernel, where Triton is there and its bits are the same."""
    result: Tensor = torch.ops.dfqbench.on_grid(x, scale, zero_point, lowest, highest)
    return result


def _on_a_gpu(x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int) -> Tensor:
    with torch.cuda.device(x.device):
        return _kernel_of(x.device)(x, scale, zero_point, lowest, highest)


@functools.cache
def _kernel_of(device: torch.device) -> Callable[..., Tensor]:
    """The kernel, where it runs on this GPU and gives what torch's operations give, to the bit; these otherwise. Waits for the device, once."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first tensor that is quantized on this GPU is one of a captured step")
    try:
        from dfqbench.quantization.triton_kernel import on_grid as kernel

        why = difference(kernel, device)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if why:
        warnings.warn(f"quantizing in several passes, which is slower: the kernel in one pass does not do on {device} ({why})", stacklevel=2)
        return elementwise
    return kernel


def difference(
    kernel: Callable[..., Tensor], device: torch.device, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
) -> str:
    """Where a kernel in `elementwise`'s place gives other bits; empty where it does not."""
    values = torch.cat([torch.linspace(-3, 3, 3001), torch.tensor([0.25, 0.75, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])]).to(device)
    for dtype in dtypes:
        for step, zero, highest in ((0.5, 3.0, 15), (0.25, None, 7), (0.0371, 100.0, 255), (0.0371, -1e6, 255), (1e-3, None, 3)):
            scale, zero_point = torch.tensor(step, device=device), None if zero is None else torch.tensor(zero, device=device)
            x = values.to(dtype)
            theirs, ours = (f(x, scale, zero_point, 0, highest) for f in (elementwise, kernel))
            if not torch.equal(theirs.nan_to_num(nan=7e3), ours.nan_to_num(nan=7e3)):
                return f"other bits in {str(dtype).removeprefix('torch.')}, at a step of {step}"
    return ""


_operations.impl("on_grid", elementwise, "CPU")
_operations.impl("on_grid", _on_a_gpu, "CUDA")

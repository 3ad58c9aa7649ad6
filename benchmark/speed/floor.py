"""What a device can do at best: its arithmetic and its bandwidth, and what a step needs of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

from dfqbench.engine.device import products_in

MATRIX = (256, 2048)  # sides of the matrices whose product the device's rate is measured with; the large one where that takes no ENOUGH
LAYER = (64, 128, 32)  # images, channels and pixels of a side of the convolution that it is measured with, too
ENOUGH = 2.0  # seconds for what is measured once; a CPU without bf16 takes minutes for what another does in a blink
COPIED = 64 * 2**20  # floats copied to measure its bandwidth


class Bytes(TorchDispatchMode):
    """Counts what convolutions and matrix products must at least read and write."""

    NAMES = ("convolution", "addmm", "mm", "bmm", "scaled_dot_product")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(name in function.name() for name in self.NAMES):
            given = [v for v in args if isinstance(v, Tensor)]
            made = [v for v in (result if isinstance(result, tuple | list) else [result]) if isinstance(v, Tensor)]
            self.total += sum(v.numel() * v.element_size() for v in given + made)
        return result


@dataclass(frozen=True)
class Device:
    """Measured: floating-point operations per second, and bytes per second of a large copy (read and written)."""

    flops: dict[str, float]
    bandwidth: float

    def floor(self, flops: float, moved: float, precision: str) -> float:
        """Seconds below which no step with this arithmetic and these bytes can stay."""
        return max(flops / self.flops[precision], moved / self.bandwidth)


def measured_device(device: torch.device, precisions: Collection[str]) -> Device:
    """A few seconds. The arithmetic is that of a large matrix product or of a 3x3 convolution, whichever is faster: on a CPU they are
    different libraries' work, and one of these may not be at home there.
    """
    rates = {}
    images, channels, side = LAYER
    dtypes = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
    for precision in precisions:
        dtype = dtypes[precision]
        x = torch.randn(images, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        with products_in(precision):
            product = _product(MATRIX[0], dtype, device)
            if 2 * MATRIX[1] ** 3 / product < ENOUGH:
                product = _product(MATRIX[1], dtype, device)
            layer = 2 * 9 * channels**2 * images * side**2 / _best(lambda x=x, w=weight: conv2d(x, w, padding=1), device)  # type: ignore[misc]
        rates[precision] = max(product, layer)
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    return Device(rates, 2 * 4 * COPIED / _best(lambda: target.copy_(source), device))


def _product(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def _best(call: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    first = timed(call, device)  # not counted, but where it took too long for others
    return min(timed(call, device) for _ in range(times)) if first < ENOUGH else first


def timed(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

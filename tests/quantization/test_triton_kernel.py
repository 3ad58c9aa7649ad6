"""Fake quantization in one pass: the operation, and the kernel for a GPU, run by Triton's interpreter.

That says nothing of a GPU's compiler, nor of speed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_cuda import PretendedCuda
from torch import Tensor

from dfqbench.quantization import kernels
from dfqbench.quantization.fake_quantize import fake_quantize, rectify_and_quantize
from dfqbench.quantization.kernels import difference, elementwise, on_grid

CPU = torch.device("cpu")
INTERPRETED = """
import torch
from dfqbench.quantization.kernels import difference, elementwise
from dfqbench.quantization.triton_kernel import BLOCK, on_grid
cpu = torch.device("cpu")
assert difference(on_grid, cpu, (torch.float32, torch.float16)) == "", difference(on_grid, cpu, (torch.float32, torch.float16))
# the interpreter cuts a bfloat16 off where a GPU rounds it: on a grid of powers of two there is nothing to round
half, zero = torch.tensor(0.125), torch.tensor(3.0)
random = torch.Generator().manual_seed(0)
whole = torch.randn(3, 5, BLOCK // 8, 9, generator=random).bfloat16()
for x in (whole, whole.to(memory_format=torch.channels_last), whole[:, ::2], whole.mT, whole[0, 0, 0, 0], whole[:0], whole.expand(3, 5, -1, -1)):
    for zero_point in (zero, None):
        ours, theirs = on_grid(x, half, zero_point, 0, 15), elementwise(x, half, zero_point, 0, 15)
        assert torch.equal(ours, theirs)
        assert (ours.shape, ours.dtype) == (x.shape, x.dtype)
assert on_grid(whole.to(memory_format=torch.channels_last), half, zero, 0, 15).is_contiguous(memory_format=torch.channels_last)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this build of torch came without Triton")
def test_the_kernel_gives_what_torchs_operations_give() -> None:
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible here")
def test_a_real_gpu_uses_the_kernel() -> None:
    from dfqbench.quantization.triton_kernel import on_grid as kernel

    assert kernels._kernel_of(torch.device("cuda:0")) is kernel


def test_the_operation_is_the_formula_on_a_cpu() -> None:
    assert difference(on_grid, CPU) == ""


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda x, s, z, low, high: elementwise(x, s, z, low, high - 1), "other bits in float32, at a step of 0.5"),
        (lambda x, s, z, low, high: elementwise(x.nan_to_num(), s, z, low, high), "other bits in float32"),
        (lambda x, s, z, low, high: elementwise(x + 1e-6, s, z, low, high), "other bits in float32"),
        (lambda x, s, z, low, high: elementwise(x, s, z, low, high) if x.dtype == torch.float32 else x, "other bits in bfloat16"),
    ],
)
def test_a_kernel_that_gives_other_bits_is_found(broken: Callable[..., Tensor], told: str) -> None:
    assert told in difference(broken, CPU)


@pytest.mark.parametrize("fault", ["other bits", "none"])
def test_where_the_kernel_does_not_do_the_formula_is_taken_and_it_is_said(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    written: Any = SimpleNamespace(on_grid=lambda x, *grid: x) if fault == "other bits" else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "dfqbench.quantization.triton_kernel", written)
    kernels._kernel_of.cache_clear()
    with pytest.warns(UserWarning, match="in several passes") as said:
        assert kernels._kernel_of(CPU) is elementwise
    assert ("other bits in float32" if fault == "other bits" else "ImportError") in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels._kernel_of(CPU) is elementwise, "once"
    kernels._kernel_of.cache_clear()


def test_a_kernel_that_does_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    written = SimpleNamespace(on_grid=lambda *given: elementwise(*given))
    monkeypatch.setitem(sys.modules, "dfqbench.quantization.triton_kernel", written)
    kernels._kernel_of.cache_clear()
    assert kernels._kernel_of(CPU) is written.on_grid
    kernels._kernel_of.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_one_kernel(dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero = torch.tensor(0.2), torch.tensor(5.0)
    expected = fake_quantize(values, scale, zero, 4), rectify_and_quantize(values, scale, 4)
    with PretendedCuda() as gpu:
        x, s, z = (t.to("cuda") for t in (values, scale, zero))
        gpu.kernels.clear()
        found = fake_quantize(x, s, z, 4), rectify_and_quantize(x, s, 4)
        assert dict(gpu.kernels) == {"on_grid": 2}
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))

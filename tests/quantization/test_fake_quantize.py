"""The fake quantizer, against integers worked out by hand and against the formula of spec section 1.5 in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dfqbench.quantization.fake_quantize import fake_quantize, grid, levels
from dfqbench.quantization.kernels import elementwise


def quantized(x: list[float] | Tensor, low: float, high: float, bits: int, symmetric: bool = False, **how: bool) -> Tensor:
    x = torch.as_tensor(x, dtype=torch.float32) if isinstance(x, list) else x
    scale, zero_point = grid(torch.tensor(low), torch.tensor(high), bits, symmetric)
    return fake_quantize(x, scale, zero_point, bits, symmetric=symmetric, **how)


def spec_1_5(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The authors' formula with its signed levels, float64; also how far each value is from a tie, in steps."""
    s = (2**bits - 1) / np.maximum(high - low, 1e-8)
    zero = np.round(s * low) + 2 ** (bits - 1)
    q = np.clip(np.round(s * x - zero), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    fraction = (s * x - zero) % 1
    return (q + zero) / s, np.abs(fraction - 0.5)


@pytest.mark.parametrize(
    ("bits", "low", "high", "x", "expected"),
    [
        (2, 0.0, 3.0, [-1.0, 0.4, 0.6, 1.7, 9.0], [0, 0, 1, 2, 3]),
        (3, -3.0, 4.0, [-9.0, -2.6, -0.4, 3.6, 9.0], [-3, -3, 0, 4, 4]),
        (4, -5.0, 10.0, [-5.2, -4.6, 0.3, 9.6, 11.0], [-5, -5, 0, 10, 10]),
        (8, -128.0, 127.0, [-200.0, -127.6, 0.2, 126.7, 500.0], [-128, -128, 0, 127, 127]),
        (2, 10.0, 16.0, [9.0, 10.9, 11.1, 13.2, 20.0], [10, 10, 12, 14, 16]),  # all positive: step 2, no level at zero
        (2, -16.0, -10.0, [-20.0, -13.2, -11.1, -10.9, 0.0], [-16, -14, -12, -10, -10]),  # all negative
        (4, 100.0, 115.0, [0.0, 100.4, 107.6, 130.0], [100, 100, 108, 115]),
    ],
)
def test_asymmetric_values_land_on_hand_worked_levels(bits: int, low: float, high: float, x: list[float], expected: list[float]) -> None:
    assert quantized(x, low, high, bits).tolist() == expected


@pytest.mark.parametrize(
    ("bits", "low", "high", "x", "expected"),
    [
        (2, -1.0, 0.5, [-9.0, -0.6, 0.4, 0.6, 9.0], [-1, -1, 0, 1, 1]),
        (3, -2.0, 3.0, [-9.0, -2.6, 0.4, 1.6, 9.0], [-3, -3, 0, 2, 3]),
        (4, -14.0, 3.0, [-20.0, -12.9, 0.9, 1.1, 20.0], [-14, -12, 0, 2, 14]),
        (8, 100.0, 127.0, [-128.0, -1.2, 126.6], [-127, -1, 127]),
    ],
)
def test_symmetric_values_land_on_hand_worked_levels(bits: int, low: float, high: float, x: list[float], expected: list[float]) -> None:
    assert quantized(x, low, high, bits, symmetric=True).tolist() == expected


def test_ties_go_to_the_even_level() -> None:
    assert quantized([0.5, 1.5, 2.5, 3.5], 0.0, 15.0, 4).tolist() == [0, 2, 2, 4]
    # levels are counted from the lowest (-3 is level 0), as in the lineage's code: x = -2.5 is level 0.5 and goes to level 0
    assert quantized([-2.5, -1.5, 0.5], -3.0, 12.0, 4).tolist() == [-3, -1, 1]


def test_each_channel_has_its_own_grid() -> None:
    x = torch.tensor([[0.0, 1.4, 3.0], [10.0, 13.2, 16.0], [-16.0, -10.9, -10.0], [-1.0, 0.9, 2.0]])
    scale, zero_point = grid(x.amin(1), x.amax(1), 2)
    assert scale.tolist() == [1, 2, 2, 1]
    assert zero_point.tolist() == [0, -5, 8, 1]
    expected = [[0, 1, 3], [10, 14, 16], [-16, -10, -10], [-1, 1, 2]]
    assert fake_quantize(x, scale, zero_point, 2, channel_axis=0).tolist() == expected
    assert fake_quantize(x.t(), scale, zero_point, 2, channel_axis=1).t().tolist() == expected


def test_a_range_is_widened_to_zero_only_where_asked() -> None:
    low, high = torch.tensor([2.0, -3.0]), torch.tensor([3.0, -2.0])
    scale, zero_point = grid(low, high, 2, zero_in_range=True)
    assert scale.tolist() == [1, 1]
    assert zero_point.tolist() == [0, 3]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 512.0])
def test_a_constant_tensor_stays_what_it_is(bits: int, symmetric: bool, value: float) -> None:
    x = torch.full((7,), value)
    result = quantized(x, value, value, bits, symmetric)
    torch.testing.assert_close(result, x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_agrees_with_the_authors_formula_in_float64(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(40, 500, generator=generator) * torch.rand(40, 1, generator=generator) + torch.linspace(-3, 3, 40)[:, None]
    low, high = x.amin(1) * 0.9, x.amax(1) * 1.1  # some of both ends are clipped
    scale, zero_point = grid(low, high, bits)
    result = fake_quantize(x, scale, zero_point, bits, channel_axis=0).double().numpy()
    expected, tie_distance = spec_1_5(x.double().numpy(), low.double().numpy()[:, None], high.double().numpy()[:, None], bits)
    # zero points are rounded too: leave out the channels where that is a near tie
    s_low = ((2**bits - 1) / (high - low).double() * low.double()).numpy()
    sure = (tie_distance > 1e-3) & (np.abs(s_low % 1 - 0.5) > 1e-3)[:, None]
    assert sure.mean() > 0.9
    np.testing.assert_allclose(result[sure], expected[sure], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 2.1), (3.0, 5.0), (-5.0, -3.0), (1.0, 1.0)])
def test_torchs_kernel_for_channels_computes_the_same(bits: int, low: float, high: float) -> None:
    x = torch.empty(4, 8, 6, 6).uniform_(low - 0.5, high + 0.5, generator=torch.Generator().manual_seed(1))
    scale, zero_point = (t.repeat(8) for t in grid(torch.tensor(low), torch.tensor(high), bits))
    away = ((x.double() / scale[0].double()) % 1 - 0.5).abs() > max(1e-3, abs(float(zero_point[0])) * 2e-6)
    ours = elementwise(x, scale, zero_point, *levels(bits), 1)
    kernel = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, *levels(bits))
    assert kernel.shape == x.shape
    torch.testing.assert_close(ours[away], kernel[away], rtol=3e-7, atol=1e-9)
    assert float(((ours - kernel).abs() / scale.max()).max()) < 1.1 or low == high


def test_identity_gradient_passes_everywhere() -> None:
    x = torch.tensor([-9.0, -0.1, 1.2, 2.9, 9.0], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (quantized(x, 0.0, 3.0, 2) * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == weight.tolist()


def test_clipped_gradient_is_zero_exactly_where_a_value_was_clipped() -> None:
    """The grid reaches half a step beyond its outer levels."""
    x = torch.tensor([-9.0, -0.6, -0.4, 0.0, 1.2, 3.0, 3.4, 3.6, 9.0], requires_grad=True)
    quantized(x, 0.0, 3.0, 2, clipped_gradient=True).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_bfloat16_is_rounded_in_float32_and_returned_as_bfloat16() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    result = quantized(x, -3.0, 3.0, 8)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, quantized(x.detach().float(), -3.0, 3.0, 8).bfloat16())
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("channel_axis", [None, 1])
def test_channels_last_stays_channels_last(clipped: bool, channel_axis: int | None) -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    scale, zero_point = (torch.tensor(0.1), torch.tensor(7.0)) if channel_axis is None else (torch.full((3,), 0.1), torch.full((3,), 7.0))
    result = fake_quantize(x, scale, zero_point, 4, channel_axis=channel_axis, clipped_gradient=clipped)
    assert result.is_contiguous(memory_format=torch.channels_last)

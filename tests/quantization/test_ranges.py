"""Range estimators against closed forms, NumPy and a brute force of their own."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from dfqbench.quantization import ranges
from dfqbench.quantization.layers import ActivationQuantizer
from dfqbench.quantization.protocol import Protocol, RangeEstimatorName
from dfqbench.quantization.ranges import RangeEstimator

KINDS = get_args(RangeEstimatorName)


def batches(count: int, size: int = 4000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) * (1 + i % 3) for i in range(count)]


@pytest.mark.parametrize("kind", ["ema", "minmax", "percentile"])
@pytest.mark.parametrize("count", [1, 2, 20, 200])
def test_a_constant_range_is_right_from_the_first_batch(kind: RangeEstimatorName, count: int) -> None:
    estimator, batch = RangeEstimator(kind, 4), torch.linspace(-1, 3, 5).repeat(4000)
    for _ in range(count):
        estimator(batch)
    assert float(estimator.low) == pytest.approx(-1, rel=1e-5)
    assert float(estimator.high) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_ema_is_the_normalised_exponentially_weighted_mean(count: int) -> None:
    estimator, given = RangeEstimator("ema", 4), batches(count)
    for batch in given:
        estimator(batch)
    weights = 0.9 ** np.arange(count)[::-1]
    for estimate, extremes in ((estimator.low, [b.min() for b in given]), (estimator.high, [b.max() for b in given])):
        assert float(estimate) == pytest.approx(np.average(np.array(extremes, dtype=np.float64), weights=weights), rel=1e-5)


def test_minmax_keeps_the_extremes_of_all_batches() -> None:
    estimator = RangeEstimator("minmax", 4)
    for low, high in ((2.0, 3.0), (4.0, 5.0), (3.0, 3.5)):  # never starts from zero
        estimator(torch.linspace(low, high, 9))
    assert (float(estimator.low), float(estimator.high)) == (2.0, 5.0)


def test_percentile_agrees_with_numpy() -> None:
    estimator, batch = RangeEstimator("percentile", 4), batches(1, 50_000)[0]
    estimator(batch)
    expected = np.percentile(batch.double().numpy(), [0.01, 99.99])
    np.testing.assert_allclose([float(estimator.low), float(estimator.high)], expected, rtol=1e-4)


def grid_error(x: np.ndarray, low: float, high: float, bits: int) -> float:
    step = (high - low) / (2**bits - 1)
    first = np.round(low / step)
    return float(np.mean((np.clip(np.round(x / step), first, first + 2**bits - 1) * step - x) ** 2))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("relu", [False, True])
def test_mse_clips_heavy_tails_as_well_as_a_brute_force_does(bits: int, relu: bool) -> None:
    x = np.random.default_rng(5).laplace(size=20_000).astype(np.float32)
    x = np.maximum(x, 0) if relu else x
    estimator = RangeEstimator("mse", bits)
    estimator(torch.from_numpy(x))
    x64, low, high = x.astype(np.float64), float(x.min()), float(x.max())
    found = grid_error(x64, float(estimator.low), float(estimator.high), bits)
    best = min(grid_error(x64, low * share, high * share, bits) for share in np.linspace(0.02, 1, 333))
    assert found < 0.7 * grid_error(x64, low, high, bits)
    assert found <= 1.03 * best


@pytest.mark.parametrize("shape", [(4, 8, 32, 32), (3, 7, 28, 28)])
def test_a_thinned_sample_visits_every_row_and_column(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "LARGEST_SAMPLE", 512)
    flat = torch.arange(int(np.prod(shape))).view(shape)
    taken = torch.zeros(flat.numel(), dtype=torch.bool)
    taken[ranges._thinned(flat)] = True
    assert taken.sum() <= 512
    for axis in range(4):
        others = tuple(a for a in range(4) if a != axis)
        assert taken.view(shape).sum(others).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_estimator_goes_on_exactly(kind: RangeEstimatorName) -> None:
    one, other = RangeEstimator(kind, 4), RangeEstimator(kind, 4)
    first, second = batches(6, 500)[:3], batches(6, 500)[3:]
    for batch in first:
        one(batch)
    assert set(one.state_dict()) == {"low", "high", "average", "batches"}
    other.load_state_dict(one.state_dict())
    for batch in second:
        one(batch)
        other(batch)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_ranges_do_not_move_unless_tracking() -> None:
    quantizer = ActivationQuantizer(4, Protocol())
    quantizer.tracking = True
    quantizer(torch.linspace(0, 15, 16))
    quantizer.tracking = False
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    assert float(quantizer(torch.tensor([99.0]))) == pytest.approx(15)
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


def test_a_range_that_was_set_counts_as_one_batch() -> None:
    quantizer = ActivationQuantizer(4, Protocol())
    assert not quantizer.has_range
    quantizer.set_range(-2.0, 4.0)
    assert quantizer.has_range
    assert float(quantizer.scale) == pytest.approx(6 / 15)
    quantizer.tracking = True
    quantizer(torch.tensor([-2.0, 14.0]))
    assert float(quantizer.range.low) == pytest.approx(-2, rel=1e-5)
    assert float(quantizer.range.high) == pytest.approx((0.9 * 4 + 14) / 1.9, rel=1e-5)

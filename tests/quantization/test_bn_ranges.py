"""Ranges from BN parameters alone, on networks small enough to work out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, Protocol, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task

LINEAGE, HARDWARE = PROTOCOLS["lineage"], PROTOCOLS["hardware"]
SUMS_ONLY = find_protocol({"base": "hardware", "batch_norm": "fixed"})


class Net(nn.Module):
    """Two BN layers, `body` combines their outputs a and b (with the module `more`, where given), a linear layer answers."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], channels: int = 2, more: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
        self.body, self.more, self.fc = body, more, nn.Linear(channels, 10)
        with torch.no_grad():
            self.bn1.bias.copy_(torch.tensor([1.0, -2.0]))
            self.bn1.weight.copy_(torch.tensor([0.5, -3.0]))  # gamma may be negative
            self.bn2.bias.copy_(torch.tensor([3.0, 0.0]))
            self.bn2.weight.copy_(torch.tensor([1.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.bn1(self.conv1(x)), self.bn2(self.conv2(x))
        combined = self.body(a, b) if self.more is None else self.more(self.body(a, b))
        return self.fc(combined.mean((2, 3)))  # type: ignore[no-any-return]


def net_with(function: Callable[[Tensor], Tensor]) -> Net:
    """`function` of the first BN layer's output."""
    return Net(lambda a, _: a, more=function) if isinstance(function, nn.Module) else Net(lambda a, _: function(a))


def ranges_of(network: nn.Module, n: float, protocol: Protocol = LINEAGE) -> list[tuple[float, float]]:
    student = Student(Teacher(network, Task(10, 3, 4, (0.5,) * 3, (0.25, 0.5, 0.5))), protocol, Bits(4, 4))
    student.set_ranges_from_bn(n)
    student.check_ranges()
    return [(float(q.range.low), float(q.range.high)) for q in student.quantizers.values()]


@pytest.mark.parametrize("relu", [nn.ReLU(), F.relu, lambda x: x.relu(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("n", [1.0, 3.0])
def test_behind_a_relu_the_range_reaches_beta_plus_n_gamma(relu: Callable[[Tensor], Tensor], n: float) -> None:
    [(low, high)] = ranges_of(net_with(relu), n)
    assert low == 0
    assert high == pytest.approx(max(1 + n * 0.5, -2 + n * 3))


def test_a_relu_far_above_zero_has_a_range_without_zero() -> None:
    network = Net(lambda a, _: F.relu(a))
    network.bn1.bias.data = torch.tensor([10.0, 20.0])
    assert ranges_of(network, 2) == [(9.0, 26.0)]


@pytest.mark.parametrize("protocol", [SUMS_ONLY, HARDWARE])
def test_means_and_variances_of_a_sum_add(protocol: Protocol) -> None:
    """Channel 0: 1 + 3 with 0.25 + 1; channel 1: -2 + 0 with 9 + 16. Folding BN loses nothing of it."""
    (image_low, image_high), (low, high), _ = ranges_of(Net(lambda a, b: a + b), 2, protocol)
    assert (image_low, image_high) == (-2.0, 2.0)  # the widest channel of a normalised image
    assert low == pytest.approx(-2 - 2 * 5)
    assert high == pytest.approx(max(4 + 2 * 1.25**0.5, -2 + 2 * 5))


def test_folding_gives_the_same_ranges_as_not_folding() -> None:
    body = Net(lambda a, b: F.silu(a + b) * 0.5)
    folded, not_folded = ranges_of(body, 3, HARDWARE), ranges_of(body, 3, SUMS_ONLY)
    assert len(folded) == len(not_folded) > 2
    for one, other in zip(folded, not_folded, strict=True):
        assert one == pytest.approx(other)


def test_without_batch_norm_the_tensor_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    with pytest.raises(UserError, match="no batch norm says how '_1' is distributed"):
        ranges_of(network, 3)


def test_behind_a_prelu_each_channel_has_its_own_slope() -> None:
    prelu = nn.PReLU(2)
    prelu.weight.data = torch.tensor([0.5, 0.1])
    [(low, high)] = ranges_of(net_with(prelu), 3)
    assert low == pytest.approx(min(0.5 * (1 - 1.5), 0.1 * (-2 - 9)))
    assert high == pytest.approx(7)


@pytest.mark.parametrize("silu", [nn.SiLU(), F.silu, lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * x, lambda x: x.mul_(x.sigmoid())])
def test_behind_silu_the_low_end_is_its_minimum(silu: Callable[[Tensor], Tensor]) -> None:
    [(low, high)] = ranges_of(net_with(silu), 3)
    assert low == pytest.approx(-0.27846, abs=1e-3)
    assert high == pytest.approx(7 / (1 + torch.exp(torch.tensor(-7.0)).item()))


def test_channels_padded_with_zeros_are_zero() -> None:
    """The parameterless shortcut of CIFAR ResNets: of four channels the outer two are those of b alone."""
    network = Net(lambda a, b: F.pad(a[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) + torch.cat([b, b], 1)[:, :, ::2, ::2], channels=4)
    _, (low, high), _ = ranges_of(network, 1, SUMS_ONLY)
    # channels: b0 = 3 +- 1; a0 + b1 = 1 +- sqrt(16.25); a1 + b0 = 1 +- sqrt(10); b1 = 0 +- 4
    assert low == pytest.approx(-4)
    assert high == pytest.approx(1 + 16.25**0.5)


def test_concatenated_channels_keep_their_own_moments() -> None:
    network = Net(lambda a, b: F.relu(torch.cat([a, b], dim=1)), channels=4)
    assert ranges_of(network, 1)[0] == pytest.approx((0, 4))
    assert ranges_of(network, 3)[0] == pytest.approx((0, 12))


@pytest.mark.parametrize(
    "apart",
    [lambda x: torch.chunk(x, 2, 1), lambda x: x.split(1, dim=1), lambda x: torch.split(x, [1, 1], 1), lambda x: x.chunk(2, dim=-3)],
)
def test_parts_of_the_channels_keep_their_own_moments(apart: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    [(low, high), (other_low, other_high)] = ranges_of(Net(lambda a, _: torch.cat([F.relu(apart(a)[1]), F.relu(apart(a)[0])], 1)), 1.0)
    assert (low, other_low) == (0, pytest.approx(0.5))
    assert (high, other_high) == (pytest.approx(1.0), pytest.approx(1.5))


@pytest.mark.parametrize(
    "same", [lambda x: F.interpolate(x, scale_factor=2), lambda x: x.amax((2, 3), keepdim=True), lambda x: stochastic_depth(x, 0.5, "row", False)]
)
def test_what_keeps_the_channels_keeps_their_moments(same: Callable[[Tensor], Tensor]) -> None:
    assert ranges_of(net_with(lambda x: F.relu(same(x))), 1.0) == ranges_of(net_with(F.relu), 1.0)


def test_a_mean_over_the_channels_is_not_mistaken_for_channels() -> None:
    network = Net(lambda a, _: F.relu(a.mean(1, keepdim=True).expand(-1, 2, -1, -1)))
    with pytest.raises(UserError, match="'relu'"):
        ranges_of(network, 3)


def test_a_scaled_sum_is_not_taken_for_a_plain_one() -> None:
    with pytest.raises(UserError, match="'relu'"):
        ranges_of(Net(lambda a, b: F.relu(torch.add(a, b, alpha=2))), 3)


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.conv(F.relu(x)) + 0.5 * x)


def test_propagated_moments_agree_with_a_simulation() -> None:
    """BN outputs drawn as Gaussians go through ReLU, a grouped layer without BN behind it, a scaled sum of what is independent."""
    torch.manual_seed(0)
    mixes, n = Mixes(), 4.0
    network = Net(lambda a, b: torch.cat([a, b], 1), channels=4, more=mixes)
    mean, std = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([0.5, 3.0, 1.0, 4.0])
    draws = [mean + std * torch.randn(400_000, 4) for _ in range(2)]  # the model takes the two terms of a sum for independent
    with torch.no_grad():
        entering = mixes.conv(draws[0].relu()[:, :, None, None]).flatten(1) + 0.5 * draws[1]
    reach = entering.mean(0) + n * entering.std(0)
    (relu_low, relu_high), (low, high) = ranges_of(network, n)
    assert (relu_low, relu_high) == (0, 16)
    assert low == pytest.approx(-0.375, abs=1e-2)  # hardswish's minimum, inside the reach
    assert high == pytest.approx(float(reach.max()), rel=1e-2)

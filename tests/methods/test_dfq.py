"""DFQ: the float network computes what it did, ranges are equal afterwards, and corrected biases have no mean error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.engine.evaluate import state_hash
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, Protocol, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.testing import StopAfter, Trial, small_task
from dfqbench_methods.dfq import DFQ, absorb, equalise

RULES = [find_protocol({"base": base, "weight_granularity": g, "last_bits": None}) for base in PROTOCOLS for g in ("per-channel", "per-tensor")]
Function = Callable[[Tensor], Tensor]


class Chain(nn.Module):
    """Stem, depthwise, grouped, a residual branch, pooling, linear; channels of very different size, one dead, one with negative gamma.

    function: between the layers of pairs; other: elsewhere.
    """

    def __init__(self, function: Function, other: Function, padding: int):
        super().__init__()
        self.function, self.other = function, other
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm1 = nn.Conv2d(8, 8, 3, groups=8, padding=padding, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 12, 3, groups=2, padding=padding), nn.BatchNorm2d(12)
        self.inner, self.norm3 = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6)
        self.outer, self.norm4 = nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12)
        self.last, self.norm5 = nn.Conv2d(12, 16, 3, padding=padding), nn.BatchNorm2d(16)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)
        with torch.no_grad():
            for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.weight.uniform_(0.3, 1.5)
                norm.weight[1] = -0.7
                norm.bias.normal_(0.5, 0.5)
                norm.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                norm.running_var.uniform_(0.2, 2)  # type: ignore[union-attr]
            self.depthwise.weight.mul_(10 ** torch.linspace(-2, 2, 8).view(-1, 1, 1, 1))
            self.stem.weight[2] = 0

    def forward(self, x: Tensor) -> Tensor:
        f = self.function
        x = f(self.norm1(self.depthwise(f(self.norm0(self.stem(x))))))
        x = F.max_pool2d(self.other(self.norm2(self.grouped(x))), 2)
        x = self.other(x + self.norm4(self.outer(f(self.norm3(self.inner(x))))))
        x = f(self.norm5(self.last(x)))
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]


PAIRS = [("stem", "depthwise"), ("depthwise", "grouped"), ("inner", "outer"), ("last", "fc")]


def seeded(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().eval()


def chain(function: Function = F.relu, other: Function | None = None, padding: int = 1) -> Chain:
    return seeded(lambda: Chain(function, other or function, padding))  # type: ignore[no-any-return]


def student_of(network: nn.Module, protocol: Protocol, bits: int = 4) -> Student:
    return Student(Teacher(network, small_task(size=16)), protocol, Bits(bits, 8))


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def spans(layer: nn.Module, axis: int, protocol: Protocol) -> Tensor:
    """The range of what weighs out of (0) or into (1) each channel; a layer in groups reads its inputs in blocks."""
    weight, groups = layer.get_parameter("weight").detach(), getattr(layer, "groups", 1)
    rows, width = weight.shape[0] // groups, weight.shape[1]
    blocks = weight.unbind() if axis == 0 else [weight[c // width * rows :][:rows, c % width] for c in range(width * groups)]
    return torch.stack([2 * w.abs().max() if protocol.weight_symmetric else w.max() - w.min() for w in blocks])


def assert_computes(student: Student, wanted: nn.Module) -> None:
    """Without quantization, to 1e-5 of the largest logit, called and observed."""
    with torch.no_grad(), student.full_precision():
        answer = wanted(IMAGES)
        for found in (student(IMAGES), student.observe(IMAGES).logits):
            torch.testing.assert_close(found, answer, rtol=0, atol=1e-5 * float(answer.abs().max()))


@pytest.mark.parametrize("protocol", RULES, ids=lambda p: p.name)
@pytest.mark.parametrize("function", [F.relu, nn.LeakyReLU(0.1), nn.PReLU(), nn.ReLU(inplace=True)], ids=["relu", "leaky", "prelu", "module"])
def test_the_float_network_is_the_same_after_equalising(function: Function, protocol: Protocol) -> None:
    network = chain(function)
    student = student_of(network, protocol)
    names = {layer: name for name, layer in student.layers.items()}
    assert [(names[p.first], names[p.second]) for p in student.pairs()] == PAIRS
    before = {name: layer.layer.weight.detach().clone() for name, layer in student.layers.items()}
    equalise(student)
    assert_computes(student, network)
    moved = {name for name, layer in student.layers.items() if not torch.equal(layer.layer.weight, before[name])}
    assert moved == {name for pair in PAIRS for name in pair}
    for pair in student.pairs():
        one, other = spans(pair.first.layer, 0, protocol), spans(pair.second.layer, 1, protocol)
        alive = (one > 1e-6 * one.max()) & (other > 1e-6 * other.max())
        torch.testing.assert_close(one[alive], other[alive], rtol=0.01, atol=0)


@pytest.mark.parametrize("protocol", RULES, ids=lambda p: p.name)
@pytest.mark.parametrize("relu6", [F.relu6, nn.Hardtanh(0, 6)], ids=["relu6", "hardtanh"])
def test_between_pairs_a_relu6_is_left_alone_or_becomes_a_relu(relu6: Function, protocol: Protocol) -> None:
    network, unbounded = chain(relu6), chain(F.relu, relu6)
    for each in (network, unbounded):
        each.norm5.bias.data[3] = 7.0
    assert (network(IMAGES) - unbounded(IMAGES)).abs().max() > 0.1
    kept, raised = student_of(network, protocol), student_of(network, protocol)
    before = state_hash(kept)
    equalise(kept, raise_ceilings=False)
    absorb(kept)
    assert state_hash(kept) == before
    assert_computes(kept, network)
    equalise(raised)
    assert_computes(raised, unbounded)
    assert len(raised.pairs()) == len(PAIRS)
    for pair in raised.pairs():
        mean, deviation = pair.distribution  # type: ignore[misc]
        assert (mean + 20 * deviation).max() <= 6 * (1 + 1e-5)


class Passes(nn.Module):
    """relu(norm(x)) far above zero, then a second layer: what is absorbed is passed by the ReLU for every image."""

    def __init__(self, relu: Function):
        super().__init__()
        self.relu, self.conv, self.norm, self.second = relu, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 10, 3, groups=2)
        with torch.no_grad():
            self.conv.weight.mul_(0.1)
            self.norm.bias.copy_(torch.tensor([5.0, 4.0, 3.0, -1.0]))
            self.norm.weight.copy_(torch.tensor([0.5, -0.5, 0.9, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.norm(self.conv(x)))).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("protocol", RULES[::2], ids=lambda p: p.name)
def test_absorbing_lowers_what_a_relu_passes_and_nothing_else(protocol: Protocol) -> None:
    network = seeded(lambda: Passes(F.relu))
    student = student_of(network, protocol)
    absorb(student)
    assert_computes(student, network)
    ((mean, deviation),) = [p.distribution for p in student.pairs()]  # type: ignore[misc]
    torch.testing.assert_close(mean, torch.tensor([1.5, 1.5, 2.7, -1.0], dtype=torch.float64))
    torch.testing.assert_close(deviation, torch.tensor([0.5, 0.5, 0.9, 0.5], dtype=torch.float64))
    silent = student_of(seeded(lambda: Passes(nn.LeakyReLU(0.1))), protocol)
    before = state_hash(silent)
    absorb(silent)
    assert state_hash(silent) == before, "only a ReLU passes what is above zero and stops the rest"


def test_nothing_is_a_pair_across_a_gate_a_second_reader_or_a_shared_layer() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shared, self.c = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4, 4))
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.a(x))
            x = self.shared(self.shared(self.b(x)).relu()).sigmoid() * x
            y = self.c(x).relu()
            return self.fc(torch.cat([y, y + 1], 1).mean((2, 3)))  # type: ignore[no-any-return]

    assert student_of(seeded(Others), PROTOCOLS["lineage"]).pairs() == []


@pytest.mark.parametrize("protocol", RULES, ids=lambda p: p.name)
def test_corrected_biases_leave_no_mean_error_where_batch_norm_tells_the_truth(protocol: Protocol) -> None:
    """Independent Gaussian inputs of the second layer, whose mean behind the ReLU the integrals know; measured on 40,000 positions."""
    network = seeded(lambda: Passes(F.relu))
    network.norm.weight.data = torch.tensor([0.5, -2.0, 3.0, 1.5])
    student = student_of(network, protocol, bits=2)
    assert student.correct_biases() == ["conv"]
    (pair,) = student.pairs()
    mean, deviation = pair.distribution  # type: ignore[misc]
    noise = torch.randn(1, 4, 200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (mean[:, None, None] + deviation[:, None, None] * noise).relu()
    with torch.no_grad():
        error = (pair.second(x.float()) - network.second(x.float())).mean((0, 2, 3))
        uncorrected = error - (pair.second.layer.bias - network.second.bias)  # type: ignore[operator]
    assert uncorrected.abs().max() > 0.05
    assert error.abs().max() < 0.1 * uncorrected.abs().max()


def test_padded_zeros_count_in_a_correction() -> None:
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 10, 3, padding=1), *ends))
    network[1].weight.data.fill_(1e-6)
    network[1].bias.data.copy_(torch.tensor([1.0, 2.0, 0.5, 3.0]))
    student = student_of(network, PROTOCOLS["lineage"], bits=3)
    before = (student.layers["3"].quantized_weight() - network[3].weight).abs().max()  # type: ignore[union-attr,operator]
    student.correct_biases()
    student.set_ranges_from_bn(3.0)
    assert before > 0.01
    x = torch.tensor([1.0, 2.0, 0.5, 3.0]).view(1, 4, 1, 1).expand(1, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student.layers["3"](x).mean((2, 3)), network[3](x).mean((2, 3)), rtol=0, atol=1e-5)


def test_with_everything_off_it_is_round_to_the_bit_and_each_setting_matters() -> None:
    off = {"equalise": False, "absorb": False, "correct": False}
    teacher = Teacher(chain(), small_task(size=16))
    teacher.traced.get_submodule("norm0").bias.data[0] = 6.0  # type: ignore[union-attr,operator]

    def finished(settings: dict[str, bool]) -> str:
        student = Student(teacher, PROTOCOLS["lineage"], Bits(4, 4))
        DFQ(teacher, DFQ.Config(**settings), seed=0).finish(student)
        return state_hash(student)

    rounded = Student(teacher, PROTOCOLS["lineage"], Bits(4, 4))
    rounded.set_ranges_from_bn(3.0)
    assert finished(off) == state_hash(rounded)
    assert len({finished(s) for s in ({}, off, *({**off, name: True} for name in off))}) == 5


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_student_that_was_equalised_is_evaluated_like_any_other(protocol: str) -> None:
    lockstep = Trial(find_method("dfq")).start(bits=("w4a4", "w2a2"), protocol=protocol)
    lockstep.run(StopAfter())
    assert all(t.evaluation is not None and t.failed is None for t in lockstep.trainees)

"""SQuant: its flips beside a loop over kernels and channels, what holds of them, and that the student computes with the levels that it chose."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfqbench.engine.evaluate import state_hash
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, Protocol, find_protocol
from dfqbench.quantization.layers import QuantizedLayer
from dfqbench.quantization.student import Student
from dfqbench.testing import Trial, small_task, small_teacher
from dfqbench_methods.squant import SQuant, flips, round_cancelling

GRIDS = {
    f"{base}, {granularity}": find_protocol({"base": base, "weight_granularity": granularity})
    for base, granularity in product(PROTOCOLS, ("per-channel", "per-tensor"))
}


def by_hand(error: np.ndarray, kernel: bool, channel: bool) -> np.ndarray:
    """The specification's two stages, one kernel and one weight after the other."""
    error, moved = error.copy(), np.zeros_like(error)

    def flip(where: tuple[int, ...], up: bool) -> None:
        step = 1 if up else -1
        error[where] += step
        moved[where] += step

    for o in range(error.shape[0]):
        offered = [(i, k, bool(error[o, i, k] < 0)) for i in range(error.shape[1]) for k in range(error.shape[2])]  # input, position, up
        if kernel and error.shape[2] > 1:
            offered = []
            for i in range(error.shape[1]):
                total = error[o, i].sum()
                count, up = int(np.round(abs(total))), total < 0
                able = sorted((k for k in range(error.shape[2]) if error[o, i, k] * total > 0), key=lambda k: -abs(error[o, i, k]))
                for k in able[:count]:
                    flip((o, i, k), up)
                if count >= abs(total):
                    offered += [(i, k, not up) for k in able[count - 1 : count]]
                else:
                    offered += [(i, k, up) for k in able[count : count + 1]]
        if channel:
            total = error[o].sum()
            able = sorted((c for c in offered if c[2] == (total < 0)), key=lambda c: -abs(error[o, c[0], c[1]]))
            for i, k, up in able[: int(np.round(abs(total)))]:
                flip((o, i, k), up)
    return moved


@pytest.mark.parametrize(("kernel", "channel"), [*product((True, False), repeat=2)])
@pytest.mark.parametrize("shape", [(5, 7, 9), (4, 3, 25), (6, 11, 1), (4, 1, 9)])
def test_flips_are_those_of_the_specification(shape: tuple[int, int, int], kernel: bool, channel: bool) -> None:
    for seed in range(5):
        error = np.random.default_rng(seed).uniform(-0.5, 0.5, shape)
        found = flips(torch.tensor(error), torch.ones(shape, dtype=torch.bool), kernel, channel)
        np.testing.assert_array_equal(found.numpy(), by_hand(error, kernel, channel))


def test_no_kernel_and_no_channel_keeps_an_error_of_more_than_half_a_step_and_every_weight_goes_to_a_neighbour() -> None:
    error = torch.rand(20, 30, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    free = torch.ones_like(error, dtype=torch.bool)
    assert error.sum((1, 2)).abs().max() > 2
    kernels, both = error + flips(error, free, channel=False), error + flips(error, free)
    assert kernels.sum(2).abs().max() <= 0.5
    assert both.sum((1, 2)).abs().max() <= 0.5
    assert kernels.sum((1, 2)).abs().max() > 0.5
    assert both.sum(2).abs().max() <= 1  # the one that a kernel offers costs it less than a step
    assert kernels.abs().max() < 1
    assert both.abs().max() < 1


def test_what_must_not_move_does_not() -> None:
    random = torch.Generator().manual_seed(0)
    error = torch.rand(20, 30, 9, dtype=torch.float64, generator=random) - 0.5
    free = torch.rand(error.shape, generator=random) < 0.8
    moved = flips(error, free)
    assert not moved[~free].any()
    assert moved[free].any()
    assert (error + moved).sum((1, 2)).abs().max() <= 0.5
    assert not flips(torch.zeros(2, 3, 9, dtype=torch.float64), torch.ones(2, 3, 9, dtype=torch.bool)).any()


class Layers(nn.Module):
    """A convolution of each kind; one channel all positive, one constant, one dead, one far from zero and narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.norm1 = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 16, 3, groups=2), nn.BatchNorm2d(16)
        self.point, self.norm3, self.fc = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Linear(16, 10)
        with torch.no_grad():
            for layer in (self.conv, self.depthwise, self.grouped, self.point):
                layer.weight[0].abs_()
                layer.weight[1] = 0.3
                layer.weight[2] = 0
                layer.weight[3] = layer.weight[3] * 1e-7 + 0.3

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in ((self.conv, self.norm), (self.depthwise, self.norm1), (self.grouped, self.norm2), (self.point, self.norm3)):
            x = norm(layer(x)).relu()
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def student_of(protocol: Protocol, bits: int) -> Student:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Student(Teacher(Layers(), small_task(size=8)), protocol, Bits(bits, 4))


@pytest.mark.parametrize("protocol", [*GRIDS.values()], ids=list(GRIDS))
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_student_computes_with_the_levels_that_were_chosen(protocol: Protocol, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, chosen = student_of(protocol, bits), []
    before = {name: layer.codes() for name, layer in student.layers.items()}
    write = QuantizedLayer.set_levels
    monkeypatch.setattr(QuantizedLayer, "set_levels", lambda layer, levels: (chosen.append(levels), write(layer, levels)))
    SQuant(small_teacher(small_task()), SQuant.Config(), seed=0).finish(student)
    flipped = 0
    for (name, layer), levels in zip(student.layers.items(), chosen, strict=True):
        old, new = before[name], layer.codes()
        assert torch.equal(new.levels, levels)
        assert torch.equal(new.scale, old.scale), "the grid stays"
        assert torch.equal(new.zero_point, old.zero_point)
        assert torch.equal(layer.quantized_weight(), old._replace(levels=levels).weight())
        assert (new.levels - old.levels).abs().max() <= 1
        assert new.levels.min() >= old.lowest
        assert new.levels.max() <= old.highest
        flipped += int((new.levels != old.levels).sum())
    assert flipped > 20


@pytest.mark.parametrize("protocol", [*GRIDS.values()], ids=list(GRIDS))
def test_errors_cancel_in_every_kernel_and_every_channel_of_a_student(protocol: Protocol) -> None:
    """A kernel may keep more than half a step only where it holds an entry that spans the grid and so must stay."""
    for kernels_only in (True, False):
        student = Student(small_teacher(small_task()), protocol, Bits(3, 4))
        before = {name: (layer.codes(), layer.layer.weight.detach().double(), layer.spans_grid()) for name, layer in student.layers.items()}
        SQuant(small_teacher(small_task()), SQuant.Config(channel=not kernels_only), seed=0).finish(student)
        for name, layer in student.layers.items():
            codes, weight, spans = before[name]
            scale, zero_point = (v.double().view([-1, *[1] * (weight.dim() - 1)]) for v in (codes.scale, codes.zero_point))
            error = (layer.codes().levels - (weight / scale + zero_point)).view(*weight.shape[:2], -1)
            if not kernels_only:
                assert error.sum((1, 2)).abs().max() <= 0.5 + 1e-5
            elif error.shape[2] > 1:
                held = spans.view_as(error).any(2)
                assert error.sum(2)[~held].abs().max() <= 0.5 + 1e-5
                assert (error.sum(2)[held].abs() <= 0.5 + 1e-5).double().mean() > 0.8


def test_without_both_stages_it_is_round_to_the_bit() -> None:
    ends = [
        Trial(find_method(name), settings).end().trainees[0].student
        for name, settings in (("squant", {"kernel": False, "channel": False}), ("round", {}))
    ]
    assert state_hash(ends[0]) == state_hash(ends[1])
    assert state_hash(Trial(find_method("squant")).end().trainees[0].student) != state_hash(ends[1])


def test_levels_that_the_grid_cannot_have_are_refused_and_change_nothing() -> None:
    layer = student_of(GRIDS["lineage, per-channel"], 4).layers["conv"]
    before, levels = layer.layer.weight.detach().clone(), layer.codes().levels
    spanning = levels + layer.spans_grid() * (levels == 0)
    for wrong in (spanning, torch.full_like(levels, 16.0), levels + 0.5):
        with pytest.raises(ValueError, match="cannot be had"):
            layer.set_levels(wrong)
        assert torch.equal(layer.layer.weight, before)
    layer.set_levels(levels)
    assert torch.equal(layer.layer.weight, before), "what rounds to its level stays as it is"


def test_a_level_that_begins_half_a_step_beyond_the_grids_end_cannot_be_had() -> None:
    """Half a step below level 7 is the largest weight itself, and rounds to even: 6."""
    low, high, close = -0.11747197806835175, 0.11747197061777115, 0.11412843316793442
    student = Student(small_teacher(small_task(size=16)), PROTOCOLS["lineage"], Bits(3, 8))
    layer = student.layers["conv1"]
    with torch.no_grad():
        layer.layer.weight[0] = close
        layer.layer.weight[0, 0, 0, 0], layer.layer.weight[0, 0, 0, 1] = low, high
    levels = layer.codes().levels
    assert levels[0].unique().tolist() == [0.0, 6.0]
    assert not layer.can_have(levels + 1)[0].any()
    assert layer.can_have(levels - 1)[0].sum() == levels[0].numel() - 2, "all but those that the grid is found from"
    with pytest.raises(ValueError, match="cannot be had"):
        layer.set_levels(levels.index_fill(0, torch.tensor([0]), 7.0))
    round_cancelling(student)

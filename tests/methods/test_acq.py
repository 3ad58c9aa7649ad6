"""ACQ: attention by hand, pairs and conditions, and that its four components off leave GDFQ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dfqbench.engine.evaluate import Evaluation, state_hash
from dfqbench.engine.lockstep import Lockstep
from dfqbench.errors import UserErrors
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Bundle, Cell
from dfqbench.sweep.load import load_sweep
from dfqbench.teachers import load
from dfqbench.teachers.cifar import CifarResNet
from dfqbench.testing import StopAfter, small_task
from dfqbench_methods.acq import ACQ
from dfqbench_methods.parts.attention import (
    attention_center,
    attention_distance,
    attention_map,
    cell_loss,
    cell_mass,
    class_activation_map,
    classifier_weight,
    correlation,
    has_class_activation_maps,
    spread_within,
)
from dfqbench_methods.parts.generators import relative_coordinates
from dfqbench_methods.parts.losses import divergence_loss
from dfqbench_methods.parts.pictures import CAPTION, GAP, HEAT, MARGIN, SIDE, attention_sheet, heat

SweepFile = Callable[..., Path]
SHORT = {"warmup_epochs": 1, "calibration_epochs": 1}


def lockstep_of(sweep_file: SweepFile, method: dict[str, Any], **changes: Any) -> Lockstep:
    loaded = load_sweep(sweep_file(methods=[method], bits=["w4a4"], **changes), cache_folder())
    cell: Cell = loaded.cells[0]
    teacher = Teacher(load(loaded.teachers[cell.teacher]), cell.teacher.task)
    return Lockstep(Bundle((cell,)), teacher, torch.device("cpu"), lambda s: Evaluation(np.array([True]), 0.0, None, 0.0))


def test_attention_is_the_channel_mean_of_squares() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -4.0]]]])
    assert attention_map(features).tolist() == [[[5.0, 10.0]]]


@pytest.mark.parametrize(("row", "column", "expected"), [(0, 0, (0.125, 0.125)), (0, 3, (0.875, 0.125)), (2, 1, (0.375, 0.625))])
def test_a_single_hot_pixel_is_the_centre(row: int, column: int, expected: tuple[float, float]) -> None:
    features = torch.full((1, 2, 4, 4), 0.1)
    features[0, :, row, column] = 1.0
    assert attention_center(features)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_centre_is_the_sharpened_centre_of_mass() -> None:
    """Two pixels, attention 1 and 1/2 above the minimum: masses 1 and 1/4 at sharpness 2."""
    features = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    features[0, 0, 0, 0], features[0, 0, 0, 2] = 1.0, 0.5**0.5
    assert attention_center(features)[0, 0].item() == pytest.approx((0.125 + 0.625 / 4) / 1.25)
    assert attention_center(features, sharpness=1.0)[0, 0].item() == pytest.approx((0.125 + 0.625 / 2) / 1.5)


def test_a_flat_map_has_a_finite_centre_and_gradient() -> None:
    features = torch.ones(2, 3, 4, 4, requires_grad=True)
    center = attention_center(features)
    assert torch.isfinite(center).all()
    center.sum().backward()
    assert torch.isfinite(features.grad).all()  # type: ignore[arg-type]


def test_the_centre_follows_its_gradient() -> None:
    torch.manual_seed(0)
    features = torch.rand(1, 2, 6, 6, requires_grad=True)
    wanted = torch.tensor([[0.7, 0.3]])
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (attention_center(features) - wanted).square().sum().backward()
        optimizer.step()
    assert torch.allclose(attention_center(features), wanted, atol=0.02)


def test_class_activation_maps_add_up_to_the_logits_and_are_those_of_the_asked_class() -> None:
    torch.manual_seed(0)
    teacher = Teacher(CifarResNet(1), small_task(size=16))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([3, 0, 9, 3])
    answer, weight = teacher.observe(images), classifier_weight(teacher)
    maps = class_activation_map(answer.features[-1], weight, labels)
    expected = np.einsum("nkij,nk->nij", answer.features[-1].detach().double().numpy(), weight[labels].double().numpy())
    assert maps.detach().numpy() == pytest.approx(expected, abs=1e-4)
    bias = teacher.traced.get_submodule("linear").bias
    assert torch.allclose(maps.mean((1, 2)) + bias[labels], answer.logits.gather(1, labels[:, None])[:, 0], atol=1e-4)
    assert has_class_activation_maps(teacher, images[:2])


def test_a_network_with_more_behind_its_last_stage_has_no_class_activation_maps() -> None:
    class Deeper(CifarResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
            return self.linear(torch.tanh(self.pool(x).flatten(1)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    assert not has_class_activation_maps(Teacher(Deeper(1), small_task(size=16)), torch.randn(2, 3, 16, 16))


def test_cells_share_a_mass_out_by_area_and_lose_nothing() -> None:
    mass = torch.zeros(1, 3, 3, dtype=torch.float64)
    mass[0, 0, 0], mass[0, 1, 2] = 0.6, 0.4
    assert cell_mass(mass, 2)[0].tolist() == [pytest.approx([0.6, 0.2]), pytest.approx([0.0, 0.2])], "the middle row is half above and half below"
    uneven = torch.rand(2, 7, 5, dtype=torch.float64)
    assert cell_mass(uneven, 3).sum((1, 2)).tolist() == pytest.approx(uneven.sum((1, 2)).tolist())
    points = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    assert cell_loss(mass, points, 2).item() == pytest.approx(-np.log(0.2)), "x to the right, y above"


def test_spread_is_within_classes_and_correlation_over_both_coordinates() -> None:
    centers = torch.tensor([[0.0, 0.0], [0.2, 0.0], [0.9, 0.9], [0.9, 0.5]])
    assert spread_within(centers, torch.tensor([7, 7, 2, 2]), 10).item() == pytest.approx(((0.01 + 0.01 + 0.04 + 0.04) / 4) ** 0.5)
    assert correlation(centers, 2 * centers + 1).item() == pytest.approx(1.0)
    assert correlation(centers, -centers).item() == pytest.approx(-1.0)
    assert correlation(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])).item() == pytest.approx(0.0)


def test_attention_distance_is_zero_for_scaled_features_and_two_for_disjoint_ones() -> None:
    one, other = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    one[0, 0, 0, 0] = other[0, 0, 1, 1] = 1.0
    assert attention_distance([one], [3 * one]).item() == pytest.approx(0.0, abs=1e-6)
    assert attention_distance([one], [other]).item() == pytest.approx(2.0)
    assert attention_distance([one, one], [other, one]).item() == pytest.approx(1.0)


def test_relative_coordinates_are_zero_at_the_centre() -> None:
    maps = relative_coordinates(torch.tensor([[0.625, 0.125]]), 4)
    assert maps.shape == (1, 2, 4, 4)
    assert maps[0, 0, 3].tolist() == [-0.5, -0.25, 0.0, 0.25]
    assert maps[0, 1, :, 2].tolist() == [0.0, 0.25, 0.5, 0.75]


def test_the_divergence_loss_is_the_formula_averaged_over_the_batch() -> None:
    random = np.random.default_rng(0)
    p, q = random.normal(size=(5, 7)), random.normal(size=(5, 7))
    soft = [np.exp(z / 4) / np.exp(z / 4).sum(1, keepdims=True) for z in (p, q)]
    expected = 16 * (soft[0] * np.log(soft[0] / soft[1])).sum() / 5
    assert divergence_loss(torch.tensor(q), torch.tensor(p), 4.0).item() == pytest.approx(expected)


def test_batch_statistics_are_those_of_train_mode_and_no_buffer_moves(sweep_file: SweepFile) -> None:
    teacher = lockstep_of(sweep_file, {"gdfq": SHORT}).teacher
    before, images = state_hash(teacher), torch.randn(8, 3, 16, 16)
    usual = teacher(images)
    with teacher.batch_statistics():
        seen = teacher.observe(images)
    plain = teacher.traced.get_submodule("bn0")(seen.bn_inputs[0])
    expected = F.batch_norm(seen.bn_inputs[0], None, None, plain.new_ones(8), plain.new_zeros(8), training=True)
    bn = teacher.batch_norms[0]
    after = torch.relu(expected * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1))
    stem = teacher.traced.get_submodule("conv1")(after)
    assert torch.allclose(stem, seen.bn_inputs[1], atol=1e-4)
    assert not torch.allclose(usual, seen.logits, atol=1e-2)
    assert state_hash(teacher) == before
    assert torch.equal(teacher(images), usual)


@pytest.mark.parametrize("conditioning", ["embedding", "batch-norm"])
def test_with_its_four_components_off_it_is_gdfq_to_the_bit(sweep_file: SweepFile, conditioning: str) -> None:
    off = {"condition": False, "matching_weight": 0.0, "adversarial_weight": 0.0, "consistency_weight": 0.0}
    ends = []
    for method in ({"gdfq": SHORT | {"conditioning": conditioning}}, {"acq": SHORT | off | {"conditioning": conditioning}}):
        lockstep = lockstep_of(sweep_file, method)
        lockstep.run(StopAfter())
        ends.append((state_hash(lockstep.trainees[0].student), state_hash(lockstep.method.generator)))  # type: ignore[attr-defined]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("part", ["condition", "matching_weight", "adversarial_weight", "consistency_weight"])
def test_every_component_changes_the_images(sweep_file: SweepFile, part: str) -> None:
    off = {"condition": part == "matching_weight", "matching_weight": 0.0, "adversarial_weight": 0.0, "consistency_weight": 0.0}
    hashes = []
    for value in (off, off | {part: True if part == "condition" else 1.0}):
        lockstep = lockstep_of(sweep_file, {"acq": SHORT | value})
        lockstep.run(StopAfter())
        hashes.append(state_hash(lockstep.trainees[0].student))
    assert hashes[0] != hashes[1]


def test_pairs_share_label_and_condition_but_not_noise(sweep_file: SweepFile) -> None:
    method = lockstep_of(sweep_file, {"acq": SHORT}).method
    labels, centers = method.draw_conditions()  # type: ignore[attr-defined]
    assert labels.shape == (8,)
    assert torch.equal(labels[:4], labels[4:])
    assert torch.equal(centers[:4], centers[4:])
    assert centers.min() >= 0.3
    assert centers.max() <= 0.7
    images = method.synthesize().images
    assert not torch.allclose(images[:4], images[4:], atol=1e-3)


@pytest.mark.slow
def test_matching_makes_the_attention_follow_the_condition(sweep_file: SweepFile) -> None:
    budget = {"epochs": 4, "iterations": 40, "batch_size": 32}
    settings = {"matching_weight": 100.0, "adversarial_weight": 0.0, "consistency_weight": 0.0}
    lockstep = lockstep_of(sweep_file, {"acq": SHORT | settings}, budget=budget)
    lockstep.run(StopAfter())
    history = lockstep.trainees[0].history
    assert history[-1]["center_error"] < history[0]["center_error"] / 2
    assert history[-1]["center_correlation"] > 0.9
    assert history[-1]["center_error"] < history[0]["center_error"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"center_loss": "cell"}, {"attention": "class", "center_loss": "cell", "cells": 3}], ids=["energy", "class"])
def test_the_evidence_for_a_class_and_cells_follow_the_condition_too(sweep_file: SweepFile, settings: dict[str, Any]) -> None:
    budget = {"epochs": 3, "iterations": 20, "batch_size": 24}
    settings = settings | {"matching_weight": 3.0, "adversarial_weight": 0.0, "consistency_weight": 0.0}
    lockstep = lockstep_of(sweep_file, {"acq": SHORT | settings}, budget=budget)
    lockstep.run(StopAfter())
    history = lockstep.trainees[0].history
    assert history[-1]["center_error"] < history[0]["center_error"]
    assert history[-1]["center_correlation"] > max(0.5, history[0]["center_correlation"])


def test_conditions_lie_in_the_middle_of_cells(sweep_file: SweepFile) -> None:
    method = lockstep_of(sweep_file, {"acq": SHORT | {"center_loss": "cell", "cells": 4}}).method
    _, centers = method.draw_conditions()  # type: ignore[attr-defined]
    assert set(centers.flatten().tolist()) <= {0.125, 0.375, 0.625, 0.875}


def test_settings_that_came_later_leave_cells_what_they_were() -> None:
    assert not {"attention", "center_loss", "cells"} & ACQ.Config().model_dump(mode="json").keys()


def test_the_teacher_gets_no_gradient_and_keeps_its_buffers(sweep_file: SweepFile) -> None:
    lockstep = lockstep_of(sweep_file, {"acq": SHORT})
    before = state_hash(lockstep.teacher)
    lockstep.run(StopAfter())
    assert state_hash(lockstep.teacher) == before
    assert all(p.grad is None for p in lockstep.teacher.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"condition": False}, "matching needs the condition"), ({"batch_size": 7}, "batch_size must be even")],
)
def test_components_that_do_not_fit_are_told(sweep_file: SweepFile, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserErrors, match=said):
        load_sweep(sweep_file(methods=[{"acq": settings}]), cache_folder())


def test_both_student_settings_train(sweep_file: SweepFile) -> None:
    ends = set()
    for loss in ("ce+kl", "kl"):
        lockstep = lockstep_of(sweep_file, {"acq": SHORT | {"student_loss": loss}})
        lockstep.run(StopAfter())
        ends.add(state_hash(lockstep.trainees[0].student))
    assert len(ends) == 2
    assert find_method("acq").info.fidelity == "abstract"


def test_the_attention_sheet_shows_pairs_with_both_modes(sweep_file: SweepFile) -> None:
    """Ten columns under a caption, a row for the image and one for each mode, all within [0, 1]; marks are where they should be."""
    lockstep = lockstep_of(sweep_file, {"acq": SHORT}, budget={"epochs": 2, "iterations": 2, "batch_size": 12})
    with torch.no_grad():
        sheet = lockstep.method.pictures()["attention"]
    assert sheet.shape[0] == 3
    assert sheet.shape[2] == MARGIN + 10 * (SIDE + GAP) + GAP
    assert 0 <= sheet.min() < sheet.max() <= 1


def test_marks_lie_where_they_are_said_to() -> None:
    black, middle = torch.zeros(1, 1, 4, 4), torch.tensor([[0.5, 0.25]])
    sheet = attention_sheet(black, {}, {"here": middle}, ["one"])
    tile = sheet[:, CAPTION : CAPTION + SIDE, MARGIN : MARGIN + SIDE]
    white = (tile == 1).all(0).nonzero().float().mean(0)
    assert white.tolist() == pytest.approx([0.25 * SIDE, 0.5 * SIDE], abs=1)


def test_heat_is_dark_at_the_lowest_and_bright_at_the_highest() -> None:
    colours = heat(torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert torch.equal(colours[0, :, 0, 0], HEAT[0])
    assert torch.equal(colours[0, :, 0, 1], HEAT[2])
    assert torch.equal(colours[0, :, 0, 2], HEAT[-1])

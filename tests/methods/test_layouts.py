"""Layouts: what is asked of a segmentation network's images, and how it goes into generators and losses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dfqbench.task import Task
from dfqbench.tasks.answers import answers_of
from dfqbench_methods.parts.generators import LabelledGenerator
from dfqbench_methods.parts.layouts import at_size, label_accuracy, label_loss, voronoi
from dfqbench_methods.parts.losses import distillation_loss
from dfqbench_methods.parts.pixels import drawn_jitter
from dfqbench_methods.parts.relations import pooled

TASK = Task(8, 3, 16, (0.5,) * 3, (0.25,) * 3, kind="segment", width=24)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_layout_has_two_to_six_regions_of_different_classes_and_all_classes_alike() -> None:
    layouts = voronoi(400, TASK, stream())
    assert tuple(layouts.shape) == (400, 16, 24)
    regions = torch.tensor([len(layout.unique()) for layout in layouts])
    assert set(regions.tolist()) <= {1, 2, 3, 4, 5, 6}  # a region between others may be smaller than a pixel
    assert {2, 3, 4, 5, 6} <= set(regions.tolist())
    assert float((regions == 1).float().mean()) < 0.02
    shares = torch.bincount(layouts.flatten(), minlength=8) / layouts.numel()
    assert torch.allclose(shares, torch.full((8,), 1 / 8), atol=0.05)
    assert torch.equal(voronoi(400, TASK, stream()), layouts)
    assert not torch.equal(voronoi(400, TASK, stream(1)), layouts)


def test_a_region_is_what_is_nearest_to_its_point() -> None:
    """Cells are convex: in a row, a class that is left does not come back."""
    for row in voronoi(50, TASK, stream()).flatten(0, 1).tolist():
        changes = [a for a, b in itertools.pairwise(row) if a != b] + [row[-1]]
        assert len(changes) == len(set(changes))


def test_with_two_classes_both_are_there() -> None:
    two = Task(2, 3, 16, (0.5,) * 3, (0.25,) * 3, kind="segment")
    assert {len(layout.unique()) for layout in voronoi(20, two, stream())} <= {1, 2}
    assert float(voronoi(200, two, stream()).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_labels_of_pixels_by_hand() -> None:
    answers, answer = answers_of(TASK), torch.randn(2, 8, 4, 6, generator=stream())
    layout = voronoi(2, TASK, stream())
    small = at_size(layout, answer)
    assert torch.equal(small, layout[:, 2::4, 2::4])  # of four pixels that of the middle
    expected, right = 0.0, 0
    for n in range(2):
        for y in range(4):
            for x in range(6):
                expected -= float(answer[n, :, y, x].log_softmax(0)[small[n, y, x]]) / 48
                right += int(answer[n, :, y, x].argmax() == small[n, y, x])
    assert float(label_loss(answers, answer, layout)) == pytest.approx(expected, rel=1e-5)
    assert float(label_accuracy(answer, layout)) == pytest.approx(right / 48)
    ours, theirs = (answers.rows(a) for a in (answer, answer.flip(0)))
    p, q = ((a / 3).softmax(1) for a in (theirs, ours))
    expected += 9 * float((p * (p / q).log()).mean())
    assert float(distillation_loss(ours, small.flatten(), theirs, 3.0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("conditioning", ["embedding", "batch-norm"])
def test_an_image_changes_where_its_layout_does(conditioning: str) -> None:
    torch.manual_seed(0)
    generator = LabelledGenerator(TASK, 10, conditioning).eval()
    for table in (m for m in generator.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(table.weight)
    noise, layout = torch.randn(1, 10, generator=stream()), torch.zeros(1, 16, 24, dtype=torch.long)
    other = layout.clone()
    other[:, :, 16:] = 5
    with torch.no_grad():
        change: Tensor = (generator(noise, layout) - generator(noise, other)).abs().amax((0, 1, 2))
    assert float(change[20:].min()) > 1e-4
    assert float(change[:8].max()) < 1e-6
    generator.train()
    images = generator(torch.randn(4, 10, generator=stream()), voronoi(4, TASK, stream()))
    assert tuple(images.shape) == (4, 3, 16, 24)
    images.square().mean().backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_a_layout_goes_the_way_of_its_image() -> None:
    images = torch.randn(2, 3, 8, 12, generator=stream())
    random = stream()
    for _ in range(6):
        moved = drawn_jitter(3, random)
        assert torch.equal(moved(images)[:, 0], moved(images[:, 0]))


def test_large_features_are_averaged_and_small_ones_stay() -> None:
    features = torch.randn(2, 4, 6, 9, generator=stream())
    assert pooled(features, 9) is features
    small = pooled(features, 4)
    assert tuple(small.shape) == (2, 4, 3, 3)
    assert torch.allclose(small[0, 1, 2, 1], features[0, 1, 4:6, 3:6].mean())
    assert tuple(pooled(features, 5).shape) == (2, 4, 3, 5)
    assert torch.allclose(pooled(features, 5)[0, 0, 0, 4], features[0, 0, 0:2, 8:].mean())  # the last window may be smaller

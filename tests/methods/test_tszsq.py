"""TSZSQ: sampled boxes, the positions that answer for them, what they cost, how they are corrected, and the two stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou

from dfqbench.errors import UserError
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.task import Task
from dfqbench.tasks.answers import answers_of
from dfqbench.teachers.scenes import DetectionNet
from dfqbench.testing import Trial, small_task, small_teacher
from dfqbench.testing.networks import SmallDetector
from dfqbench_methods.parts.boxes import POSITIONS, assigned, detection_loss, draw_boxes, overlaps, relabelled

TASK = Task(3, 3, 40, (0.5,) * 3, (0.25,) * 3, kind="detect", width=60)
BACKGROUND = Task(3, 3, 40, (0.5,) * 3, (0.25,) * 3, kind="detect", width=60, scores="softmax")


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_boxes(*shape: int) -> Tensor:
    start = torch.rand(*shape, 2, generator=stream(1)) * 30
    return torch.cat([start, start + 5 + 20 * torch.rand(*shape, 2, generator=stream(2))], -1)


def wanting(*rows: tuple[float, ...]) -> Tensor:
    """One image with these boxes (left, top, right, bottom, class)."""
    wanted = torch.zeros(1, 4, 6)
    for i, row in enumerate(rows):
        wanted[0, i] = torch.tensor([*row, 1.0])
    return wanted


def test_drawn_boxes_lie_inside_and_are_of_every_size_and_class() -> None:
    wanted = draw_boxes(2000, 4, TASK, stream())
    assert wanted[:, 0, 5].min() == 1
    assert wanted[:, 1:].abs().max() == 0
    left, top, right, bottom, kind = wanted[:, 0, :5].unbind(1)
    assert min(float(left.min()), float(top.min())) >= 0
    assert float(right.max()) <= 60
    assert float(bottom.max()) <= 40
    for side, length in ((right - left, 60), (bottom - top, 40)):
        assert float(side.min()) == pytest.approx(0.2 * length, abs=0.1)
        assert float(side.max()) == pytest.approx(0.8 * length, abs=0.1)
        assert float(side.mean()) == pytest.approx(0.5 * length, rel=0.03)
    assert torch.bincount(kind.long(), minlength=3).min() > 500
    assert set(draw_boxes(200, 1, BACKGROUND, stream())[:, 0, 4].tolist()) == {1.0, 2.0}, "class 0 is the background"


def test_overlaps_are_torchvisions() -> None:
    a, b = some_boxes(2, 5), some_boxes(2, 7).flip(0)
    for n in range(2):
        assert torch.allclose(overlaps(a, b)[n], box_iou(a[n], b[n]), atol=1e-6)


def test_a_box_is_answered_for_by_the_positions_that_overlap_it_most() -> None:
    boxes, wanted = some_boxes(1, 50), wanting((2, 2, 20, 20, 1), (12, 12, 50, 35, 2))
    overlap, answering = box_iou(wanted[0, :2, :4], boxes[0]), assigned(boxes, wanted)[0]
    best = [set(row.argsort(descending=True)[:POSITIONS].tolist()) for row in overlap]
    for position in range(50):
        asked = [i for i in range(2) if position in best[i] and overlap[i, position] > 0]
        expected = max(asked, key=lambda i: float(overlap[i, position])) if asked else -1
        assert int(answering[position]) == expected
    assert set(answering.tolist()) == {-1, 0, 1}
    assert assigned(boxes + 1000, wanted).max() == -1


@pytest.mark.parametrize("task", [TASK, BACKGROUND], ids=lambda task: task.scores)
def test_the_detection_loss_by_hand(task: Task) -> None:
    answer, boxes = torch.randn(1, 6, 7, generator=stream()), some_boxes(1, 6)
    wanted, answering = wanting((2, 2, 20, 20, 1), (12, 12, 50, 35, 2)), torch.tensor([[-1, 0, 1, -1, 1, -1]])
    classes, missed = 0.0, 0.0
    for position, which in enumerate(answering[0].tolist()):
        logits = answer[0, position, :3]
        kind = int(wanted[0, which, 4]) if which >= 0 else None
        if task.scores == "softmax":
            right = [float(logits.softmax(0)[kind or 0])]
        else:
            right = [float(p) if kind == i else 1 - float(p) for i, p in enumerate(logits.sigmoid())]
        classes -= sum((1 - p) ** 2 * float(torch.tensor(p).log()) for p in right) / 3
        if which >= 0:
            missed += (1 - float(generalized_box_iou(boxes[0, position : position + 1], wanted[0, which : which + 1, :4]))) / 3
    of_classes, of_boxes = detection_loss(answers_of(task), answer, boxes, wanted, answering)
    assert float(of_classes) == pytest.approx(classes, rel=1e-4)
    assert float(of_boxes) == pytest.approx(missed, rel=1e-4)


def seen(*rows: tuple[float, ...]) -> list[dict[str, Tensor]]:
    """What a detector finds in one image: left, top, right, bottom, class, score."""
    table = torch.tensor(rows).view(-1, 6)
    return [{"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}]


def boxes_in(wanted: Tensor) -> list[list[float]]:
    return [[round(v) for v in row[:5]] for row in wanted[0].tolist() if row[5]]


def test_boxes_are_corrected_by_what_the_detector_sees() -> None:
    there = wanting((0, 0, 20, 20, 0), (30, 10, 50, 30, 1))
    found = seen((1, 1, 20, 20, 2, 0.9), (40, 0, 59, 12, 2, 0.6), (0, 30, 9, 39, 0, 0.1), (50, 35, 53, 38, 0, 0.9), (0, 0, 60, 39, 0, 0.9))
    # the second is not seen any more; of the others one is there already, one is doubtful, one too small, one too large
    assert boxes_in(relabelled(found, there, TASK)) == [[0, 0, 20, 20, 0], [40, 0, 59, 12, 2]]
    shifted = boxes_in(relabelled(found, there, BACKGROUND))
    assert shifted == [[0, 0, 20, 20, 0], [40, 0, 59, 12, 3]], "labels do not count the background, places among logits do"
    assert boxes_in(relabelled(seen(), there, TASK)) == [[0, 0, 20, 20, 0]], "one box always stays"
    many = seen(*((10.0 * i, 0.0, 10.0 * i + 9, 39.0, 0.0, 0.9) for i in range(6)))
    assert len(boxes_in(relabelled(many, wanting((0, 0, 1, 1, 0)), TASK))) == 4, "no more than there is room for"


def method(settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    lockstep = Trial(find_method("tszsq"), settings, "detect").start()
    return lockstep.method


def test_images_come_to_show_what_they_were_asked_for() -> None:
    making = {"synthesis_iterations": 200, "relabel_from": 200, "images": 4, "bn_weight": 0.0, "first_bn_weight": 0.0, "erased": 0.0}
    tszsq = method(making)
    images = tszsq.phases()[0]
    tszsq.before_step(images)
    wanted = tszsq.wanted.clone()

    def loss() -> float:
        with torch.no_grad():
            answer = tszsq.teacher(tszsq.normalised())
            return float(tszsq.detection_loss(answer, answer, wanted))

    before, pixels = loss(), tszsq.pixels.detach().clone()
    tszsq.optimise()
    for _ in range(199):
        tszsq.before_step(images)
        tszsq.optimise()
    assert loss() < 0.85 * before  # of a network that never learned to see anything
    assert not torch.equal(tszsq.pixels, pixels)
    assert float(tszsq.pixels.detach().amin()) >= 0
    assert float(tszsq.pixels.detach().amax()) <= 1
    assert tuple(tszsq.stored.labels.shape) == (4, 32, 6)
    assert torch.allclose(tszsq.task.denormalised(tszsq.stored.images), tszsq.pixels.detach(), atol=1e-6)


def test_parts_are_erased_in_the_share_of_images_that_is_asked_for() -> None:
    tszsq, images = method({"erased": 0.5}), torch.ones(400, 3, 16, 24)
    gone = (tszsq.with_erased_parts(images) == 0).float().mean((1, 2, 3))
    assert float((gone > 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert float(gone.max()) <= 0.26
    assert torch.equal(method({"erased": 0.0}).with_erased_parts(images), images)


def test_the_flat_divergence_is_one_distribution_for_each_scale_and_image() -> None:
    tszsq = method({})
    ours, theirs = (10 * torch.randn(3, 8 * 12 + 4 * 6, 9, generator=stream(seed)) for seed in (0, 1))
    fine, expected = 8 * 12, 0.0
    for part in (slice(0, fine), slice(fine, None)):
        for n in range(3):
            p, q = ((a[n, part].flatten() / 4).softmax(0) for a in (theirs, ours))
            expected += float((p * (p / q).log()).sum()) / 3
    assert float(tszsq.divergence(ours, theirs)) == pytest.approx(expected, rel=1e-4)
    by_choice = method({"divergence": "choices"})
    assert torch.equal(by_choice.divergence(ours, theirs), answers_of(tszsq.task).divergence(ours, theirs, 4.0))


@pytest.mark.parametrize("network", [SmallDetector, DetectionNet])
def test_what_a_network_decodes_is_among_its_boxes(network: Any) -> None:
    torch.manual_seed(0)
    task = small_task(classes=5, size=32, kind="detect", width=48)
    teacher = Teacher(network(task) if network is SmallDetector else network(5, 3), task)
    assert teacher.boxes is not None
    assert teacher.decode is not None
    answer = 3 * torch.randn(teacher(torch.zeros(1, 3, 32, 48)).shape, generator=stream())
    native = teacher.native(answer)
    boxes, (found,) = teacher.boxes(native, 32, 48)[0], teacher.decode(native, 32, 48)
    assert len(boxes) == answer.shape[1]
    probable = answers_of(task).probabilities(answer)[0]  # type: ignore[attr-defined]
    assert len(found["boxes"]) > 10
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        (position,) = (probable[:, label] - score).abs().argsort()[:1]
        assert torch.allclose(clip_boxes_to_image(boxes[position], (32, 48)), clip_boxes_to_image(box, (32, 48)), atol=1e-4)


def test_a_detector_that_does_not_say_where_all_its_boxes_are_is_refused() -> None:
    class Silent(SmallDetector):
        boxes = None  # type: ignore[assignment]

    task = small_task(classes=5, size=16, kind="detect", width=24)
    teacher = Teacher(Silent(task), task)
    assert teacher.offers["boxes"] == 0
    assert small_teacher(task).offers["boxes"] == 1
    with pytest.raises(UserError, match="`decode` and `boxes`"):
        Trial(find_method("tszsq"), kind="detect").start(teacher=teacher)

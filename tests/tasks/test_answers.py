"""Answers of classifiers, segmentation networks and detectors: packed into one tensor, compared, taken apart again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.tasks.answers import answers_of, native_shapes, packed, unpacked

GREY: dict[str, Any] = {"channels": 3, "size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "width": 24}
SEGMENT, DETECT = Task(classes=5, kind="segment", **GREY), Task(classes=3, kind="detect", **GREY)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.up, self.last, self.extra = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size, x = x.shape[-2:], F.relu(self.norm(self.stem(x)))
        y = F.relu(self.up(F.relu(self.deep(x))))
        return {"out": F.interpolate(self.last(y), size=size, mode="bilinear"), "aux": self.extra(x)}


class Detector(nn.Module):
    def __init__(self, anchors: int = 2):
        super().__init__()
        self.stem, self.norm, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1)
        self.heads = nn.ModuleList(nn.ModuleList([nn.Conv2d(8, anchors * 3, 1), nn.Conv2d(8, anchors * 4, 1)]) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        fine = F.relu(self.norm(self.stem(x)))
        coarse = F.relu(self.down(fine))
        return [(self.heads[i][0](f), self.heads[i][1](f)) for i, f in enumerate((fine, coarse))]


def test_classifiers_have_the_task_they_had() -> None:
    task = Task(10, 3, 32, (0.5,) * 3, (0.25,) * 3)
    assert set(task.as_dict()) == {"classes", "channels", "size", "mean", "std", "crop_ratio", "interpolation"}
    assert SEGMENT.as_dict() | {"kind": "segment", "width": 24} == SEGMENT.as_dict()


def test_a_segmentation_network_loses_its_auxiliary_head_and_all_else_is_quantized() -> None:
    teacher = Teacher(Segmenter(), SEGMENT)
    images = drawn(2, 3, 16, 24)
    assert torch.equal(teacher(images), teacher.observe(images).logits)
    assert tuple(teacher(images).shape) == (2, 5, 16, 24)
    assert "extra" not in {str(n.target) for n in teacher.traced.graph.nodes}
    student = Student(teacher, PROTOCOLS["full"], Bits(8, 8))
    assert set(student.layers) == {"stem", "deep", "up", "last"}
    assert student.left_float == []


def test_detectors_answer_with_one_tensor_and_get_their_own_form_back() -> None:
    network = Detector()
    network.decode = lambda answer, height, width: []  # type: ignore[assignment]
    teacher = Teacher(network, DETECT)
    images = drawn(2, 3, 16, 24)
    answer = teacher(images)
    assert tuple(answer.shape) == (2, 2 * (8 * 12 + 4 * 6), 3 + 4)
    for ours, theirs in zip(teacher.native(answer), network.eval()(images), strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    first = network(images)[0][0]  # the second anchor of the third position of the second row
    assert torch.allclose(answer[0, 2 * (12 + 2) + 1, :3], first[0, 3:, 1, 2], atol=1e-6)
    assert teacher.decode is network.decode
    assert [tuple(f.shape[1:]) for f in teacher.observe(images).features] == []  # one layer per resolution, and heads are no stage


def test_lists_of_positions_are_packed_as_they_are() -> None:
    classes, boxes, centre = drawn(2, 30, 3), drawn(2, 30, 4), drawn(2, 30, 1)
    answer = packed((classes, boxes, centre), DETECT)
    assert torch.equal(answer, torch.cat([classes, boxes, centre], 2))
    [level] = unpacked(answer, native_shapes((classes, boxes, centre)), 3)
    assert all(map(torch.equal, level, (classes, boxes, centre)))


@pytest.mark.parametrize(
    ("network", "task", "said"),
    [
        (nn.Conv2d(3, 4, 3), SEGMENT, "with (1, 4, 14, 22), not with (1, 5, height, width) logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(1152, 5)), SEGMENT, "with (1, 5), not with (1, 5, height, width) logits"),
        (nn.Conv2d(3, 4, 3), DETECT, "with (1, 4, 14, 22), not with one (class logits, boxes) for each level of its head"),
        (Segmenter(), DETECT, "not with one (class logits, boxes) for each level of its head"),
    ],
)
def test_other_answers_are_refused(network: nn.Module, task: Task, said: str) -> None:
    with pytest.raises(UserError, match="answers one image") as error:
        Teacher(network, task)
    assert said in str(error.value)


def test_a_softmax_head_has_nothing_beside_classes_and_boxes() -> None:
    task = Task(classes=3, kind="detect", scores="softmax", **GREY)
    assert "further logits" in answers_of(task).problem((drawn(2, 30, 3), drawn(2, 30, 4), drawn(2, 30, 1)), 2)
    assert "boxes" in answers_of(task).problem((drawn(2, 30, 3), drawn(2, 30, 5)), 2)
    assert "for 2 images" in answers_of(task).problem((drawn(2, 30, 3), drawn(2, 30, 4)), 1)


def shapes_of(task: Task) -> tuple[int, ...]:
    return {"classify": (2, 5), "segment": (2, 5, 4, 6), "detect": (2, 30, 3 + 4 + 1)}[task.kind]


@pytest.mark.parametrize("task", [Task(5, 3, 16, (0.5,) * 3, (0.25,) * 3), SEGMENT, DETECT], ids=lambda task: task.kind)
def test_a_network_agrees_with_itself_and_less_with_others(task: Task) -> None:
    ours, answers = 4 * drawn(*shapes_of(task)), answers_of(task)
    others = -ours
    assert torch.equal(answers.agreement(ours, ours), torch.ones(2))
    assert float(answers.divergence(ours, ours, 4.0).abs()) < 1e-5
    assert float(answers.divergence(others, ours)) > 0.1
    assert float(answers.agreement(others, ours).mean()) < 1
    assert torch.allclose(answers.divergence_per_image(others, ours).mean(), answers.divergence(others, ours))
    assert float(answers.distance(others, ours)) == pytest.approx(float((others - ours).abs().mean()))


def test_divergence_of_pixels_by_hand() -> None:
    ours, theirs = drawn(2, 5, 2, 3), drawn(2, 5, 2, 3).flip(0)
    total = 0.0
    for image in range(2):
        for y in range(2):
            for x in range(3):
                p, q = (t[image, :, y, x].div(2.0).softmax(0) for t in (theirs, ours))
                total += float((p * (p / q).log()).sum())
    assert float(answers_of(SEGMENT).divergence(ours, theirs, 2.0)) == pytest.approx(4 * total / 12, rel=1e-5)


def test_divergence_of_boxes_by_hand() -> None:
    ours, theirs, total = drawn(2, 6, 7), drawn(2, 6, 7).flip(0), 0.0
    for image in range(2):
        p, q = (t[image, :, :3].sigmoid() for t in (theirs, ours))
        choices = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
        seen = p.amax(1)
        off = F.smooth_l1_loss(ours[image, :, 3:], theirs[image, :, 3:], reduction="none").sum(1)
        total += float((choices + seen * off).sum() / max(float(seen.sum()), 1.0))
    assert float(answers_of(DETECT).divergence(ours, theirs)) == pytest.approx(total / 2, rel=1e-4)

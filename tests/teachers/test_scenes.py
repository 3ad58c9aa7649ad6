"""The small networks for dense tasks: what they answer, how boxes are made of it, and that they learn from scenes of digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dfqbench.data.digit_scenes import scenes
from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.run.pretrain import pretrain
from dfqbench.run.pretrain_scenes import targets_of
from dfqbench.teachers import describe, load, parse_teacher
from dfqbench.teachers.build import build
from dfqbench.teachers.scenes import STRIDES, DetectionNet, SegmentationNet, boxes_of
from dfqbench.teachers.zoo import scenes_task


def test_the_zoo_has_them_untrained() -> None:
    for name, cls, shape in (("segment", SegmentationNet, (2, 11, 64, 64)), ("detect", DetectionNet, (2, 8 * 8 + 4 * 4, 14))):
        spec = parse_teacher({"model": f"scenes:{name}", "weights": "untrained"})
        built = build(spec)
        assert built.task.kind == name
        assert isinstance(built.network, cls)
        assert Teacher(built.network, built.task)(torch.zeros(2, 1, 64, 64)).shape == shape


def test_weights_say_channels_and_classes(tmp_path: Path) -> None:
    for name, cls in (("segment", SegmentationNet), ("detect", DetectionNet)):
        torch.save(cls(classes=3, in_channels=3).state_dict(), tmp_path / "w.pt")
        task = describe(parse_teacher({"model": f"scenes:{name}", "weights": str(tmp_path / "w.pt")})).task
        assert (task.classes, task.channels) == (3, 3)


def test_boxes_of_the_targets_are_found_again() -> None:
    """Of box numbers that say exactly what training asks for, decoding makes the annotated boxes."""
    drawn, task = scenes("test"), scenes_task("detect", 10, 1)
    for boxes, labels in zip(drawn.boxes[:20], drawn.labels[:20], strict=True):
        classes, wanted = targets_of(boxes, labels, task)
        start, levels = 0, []
        for stride in STRIDES:
            side = 64 // stride
            own, box = classes[start : start + side**2], wanted[start : start + side**2]
            middle = boxes_of(torch.zeros(1, 4, side, side), stride)[0]
            centre = (middle[:, :2] + middle[:, 2:]) / 2
            size = (box[:, 2:] - box[:, :2]).clamp(min=1e-3)
            numbers = torch.cat([((box[:, :2] + box[:, 2:]) / 2 - centre) / stride, (size / stride).log()], 1)
            logits = torch.full((side**2, 10), -9.0)
            logits[own >= 0, own[own >= 0]] = 5.0
            levels.append((logits.T.reshape(1, 10, side, side), numbers.T.reshape(1, 4, side, side)))
            start += side**2
        (found,) = DetectionNet.decode(levels, 64, 64)
        assert sorted(found["labels"].tolist()) == sorted(labels.tolist())
        for box, label in zip(boxes, labels, strict=True):
            same = found["boxes"][found["labels"] == int(label)]
            assert (same - torch.from_numpy(box)).abs().amax(1).min() < 1e-4


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on digit-scenes-detect scenes:detect is trained"):
        pretrain("cifar:resnet20", "digit-scenes-detect", tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="only cifar: networks can be trained on digits"):
        pretrain("scenes:detect", "digits", tmp_path / "w.safetensors")


@pytest.mark.slow
def test_a_segmentation_network_learns(tmp_path: Path) -> None:
    trained = pretrain(None, "digit-scenes-segment", tmp_path / "s.safetensors", epochs=2, progress=lambda line: None)
    network, drawn = load(parse_teacher({"model": "scenes:segment", "weights": str(trained.path)})), scenes("test")
    task = scenes_task("segment", 11, 1)
    images = (torch.from_numpy(drawn.images[:100, None]) / 255 - task.mean[0]) / task.std[0]
    with torch.no_grad():
        said = network(images).argmax(1).numpy()
    ink = drawn.masks[:100] > 0
    assert np.mean((said > 0)[ink]) > 0.5  # finds the strokes; an untrained network or one that says background everywhere does not
    assert np.mean((said > 0)[~ink]) < 0.05

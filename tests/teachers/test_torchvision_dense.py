"""torchvision's networks for pixels and boxes: traced and quantized as a whole, and boxes decoded as torchvision's own models do, without weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection

from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.quantization import Bits, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.quantization.work import share_of, work_of
from dfqbench.task import Task
from dfqbench.teachers import parse_teacher
from dfqbench.teachers.build import build
from dfqbench.teachers.spec import Built, zoo_kind
from dfqbench.teachers.torchvision_dense import BackboneAndHead, _is_official
from dfqbench.teachers.zoo import zoo_names

DETECTORS = {"retinanet_resnet50_fpn": (128, 160), "fcos_resnet50_fpn": (128, 160), "ssdlite320_mobilenet_v3_large": (320, 320)}


def untrained(name: str, **settings: Any) -> Built:
    return build(parse_teacher({"model": f"torchvision:{name}", "weights": "untrained", **settings}))


def test_the_zoo_lists_them_with_their_kind() -> None:
    names = zoo_names("torchvision")
    kinds = {name: zoo_kind(f"torchvision:{name}") for name in names}
    assert {name for name, kind in kinds.items() if kind == "segment"} == {
        *("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet101", "deeplabv3_resnet50", "fcn_resnet101", "fcn_resnet50", "lraspp_mobilenet_v3_large")
    }
    assert {name for name, kind in kinds.items() if kind == "detect"} == {*DETECTORS, "retinanet_resnet50_fpn_v2", "ssd300_vgg16"}
    assert kinds["resnet18"] == "classify"


def test_two_stage_detectors_are_refused() -> None:
    for name in ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"):
        with pytest.raises(UserError, match="take a one-stage detector"):
            untrained(name)


@pytest.mark.slow
@pytest.mark.thorough("lraspp", "ssdlite", "fcos")
@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", *DETECTORS])
def test_they_are_quantized_as_a_whole_and_rounded_by_their_batch_norms(name: str) -> None:
    built = untrained(name, size=list(DETECTORS.get(name, (96, 128))))
    images = torch.randn(2, *built.task.image_shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)  # within the range of pixels
    for module in built.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        built.network.train()(images)  # so that batch norms say what is true of these images
    teacher = Teacher(built.network.eval(), built.task)
    student = Student(teacher, find_protocol("full"), Bits(8, 8))
    assert share_of(work_of(student)) == (1.0, 1.0)
    assert student.left_float == []
    student.set_ranges_from_bn(6.0)
    student.check_ranges()
    with torch.no_grad():
        answer = teacher(images)
        assert float(student.clipped_shares(images)[1].max()) < 0.1
        with student.full_precision():
            assert (student(images) - answer).norm() < 1e-3 * answer.norm()
    if built.task.kind == "segment":
        assert answer.shape == (2, 21, 96, 128)


@pytest.mark.slow
@pytest.mark.thorough("ssdlite", "retinanet")
@pytest.mark.parametrize("name", [*DETECTORS, "ssd300_vgg16"])
def test_boxes_are_those_of_the_whole_model(name: str) -> None:
    height, width = DETECTORS.get(name, (300, 300))
    torch.manual_seed(0)
    whole = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5).eval()
    for parameter in whole.head.parameters():
        if parameter.dim() == 1:  # else no score is above any threshold
            nn.init.normal_(parameter, std=0.5)
    if whole.transform.fixed_size is None:
        whole.transform.min_size, whole.transform.max_size = (height,), width
    images = torch.rand(2, 3, height, width)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (whole.transform.image_mean, whole.transform.image_std))
    scores = "softmax" if name.startswith("ssd") else "sigmoid"
    task = Task(5, 3, height, tuple(whole.transform.image_mean), tuple(whole.transform.image_std), kind="detect", width=width, scores=scores)  # type: ignore[arg-type]
    with torch.no_grad():
        theirs = whole(list(images))
        teacher = Teacher(BackboneAndHead(whole), task)
        assert teacher.decode is not None
        ours = teacher.decode(teacher.native(teacher((images - mean) / std)), height, width)
    for our, their in zip(ours, theirs, strict=True):
        assert len(our["boxes"]) == len(their["boxes"]) > 5
        assert torch.allclose(our["scores"], their["scores"], atol=1e-4)
        assert torch.equal(our["labels"] + (1 if scores == "softmax" else 0), their["labels"])
        assert torch.allclose(our["boxes"], their["boxes"], atol=1e-2)


@pytest.mark.slow
def test_frozen_norms_of_a_weights_file_are_observed_and_keep_their_eps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).eval()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    file = tmp_path / "w.pth"
    torch.save({key: value for key, value in whole.state_dict().items() if not key.endswith("num_batches_tracked")}, file)
    spec = parse_teacher({"model": "torchvision:retinanet_resnet50_fpn", "weights": str(file), "classes": 5, "size": 64})
    built = build(spec)
    assert {type(m).__name__ for m in built.network.backbone.modules() if "BatchNorm" in type(m).__name__} == {"FrozenBatchNorm2d"}
    teacher, images = Teacher(built.network, built.task), torch.randn(1, 3, 64, 64)
    assert teacher.offers["statistics"] == 53
    with torch.no_grad():
        assert torch.allclose(teacher(images), Teacher(BackboneAndHead(whole), built.task)(images), atol=1e-4)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert _is_official(spec, f"https://somewhere/retinanet-{sha256[:8]}.pth")
    assert not _is_official(spec, "https://somewhere/retinanet-00000000.pth")

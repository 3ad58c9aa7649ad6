"""torchvision's segmentation networks and one-stage detectors: built, given their weights, and what they expect of an image.

Of a detector the network is backbone and head alone; anchors, decoding and non-maximum suppression stay outside it, in float, as `decode`. They and
the thresholds are torchvision's own code.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.task import Scores, Task, size_of_images
from dfqbench.teachers.spec import Built, TeacherSpec, zoo_kind
from dfqbench.teachers.weights import fit, weights_of

LANDSCAPE = (800, 1088)  # pixels of images whose shorter side is 800, as RetinaNet and FCOS were trained: 640 x 480 fits, sides are multiples of 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dense_names(models: Any) -> list[str]:
    """Segmentation networks and one-stage detectors."""
    detectors = [name for name in models.list_models(module=models.detection) if zoo_kind(f"torchvision:{name}") == "detect"]
    return [*models.list_models(module=models.segmentation), *detectors]


def segmentation(models: Any, name: str, spec: TeacherSpec) -> Built:
    """N x 3 x H x W -> N x classes x H x W logits. Weights are COCO_WITH_VOC_LABELS_V1, 21 classes; the auxiliary head, for training, is left out."""
    known = [entry for entry in models.get_model_weights(name) if entry.name == "COCO_WITH_VOC_LABELS_V1"]
    state = weights_of(spec, lambda: known[0].get_state_dict(progress=False, check_hash=True, weights_only=True))
    classes = spec.classes or 21
    aux = {} if name.startswith("lraspp") else {"aux_loss": any(key.startswith("aux_classifier.") for key in state)}
    network = models.get_model(name, weights=None, weights_backbone=None, num_classes=classes, **aux)
    fit(network, state, spec)
    network.aux_classifier = None
    return Built(network, Task(classes, 3, 520, IMAGENET_MEAN, IMAGENET_STD, kind="segment"))


def detector(models: Any, name: str, spec: TeacherSpec) -> Built:
    """Weights are COCO_V1: 91 classes, of which the first is the background (softmax: SSD) or unused (sigmoid: RetinaNet, FCOS)."""
    known = [entry for entry in models.get_model_weights(name) if entry.name == "COCO_V1"]
    if not known and spec.weights is None:
        raise UserError(f"{spec.model}: torchvision has no COCO_V1 weights for it; give `weights: FILE`")
    state = weights_of(spec, lambda: known[0].get_state_dict(progress=False, check_hash=True, weights_only=True))
    classes = spec.classes or 91
    whole = models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if state and not any(key.startswith("backbone.") and key.endswith("num_batches_tracked") for key in state):
        _freeze_norms(whole.backbone, eps=0.0 if known and name == "retinanet_resnet50_fpn" and _is_official(spec, known[0].url) else 1e-5)
    fit(whole, state, spec)
    scores: Scores = "softmax" if name.startswith("ssd") else "sigmoid"
    width, height = whole.transform.fixed_size or LANDSCAPE[::-1]
    mean, std = tuple(whole.transform.image_mean), tuple(whole.transform.image_std)
    task = Task(classes, 3, mean=mean, std=std, kind="detect", scores=scores, **size_of_images(height, width))  # type: ignore[arg-type]
    return Built(BackboneAndHead(whole), task)


class BackboneAndHead(nn.Module):
    """N x 3 x H x W normalised images -> (N x M x classes logits, N x M x 4 box numbers[, N x M x 1 centerness logits]), M positions and anchors."""

    def __init__(self, whole: Any):
        super().__init__()
        self.backbone, self.head = whole.backbone, whole.head
        self.decode = Decoder(whole)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        said: dict[str, Tensor] = self.head([features] if isinstance(features, Tensor) else list(features.values()))
        return tuple(said[key] for key in ("cls_logits", "bbox_regression", "bbox_ctrness") if key in said)


class Decoder:
    """What a torchvision detector makes of its head's answer: boxes (K x 4 pixels), scores and labels, best first, for each image.

    Labels count the classes; under "softmax" without the background, which is none.
    """

    def __init__(self, whole: Any):
        self.rest, self.backbone = copy.copy(whole), copy.deepcopy(whole.backbone).to("meta").eval()  # no weights here
        self.rest._modules = {name: part for name, part in whole._modules.items() if name not in ("backbone", "head")}
        self.by_level = type(whole).__name__ != "SSD"  # SSD's postprocessing takes all levels together
        self.sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}  # of the backbone's maps, by the image's, found when needed
        self.first = 0 if self.by_level else 1

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        if (height, width) not in self.sizes:
            maps = self.backbone(torch.empty(1, 3, height, width, device="meta"))
            maps = [maps] if isinstance(maps, Tensor) else maps.values()
            self.sizes[height, width] = [(one.shape[2], one.shape[3]) for one in maps]
        return self.sizes[height, width]

    @torch.no_grad()
    def __call__(self, answer: tuple[Tensor, ...], height: int, width: int) -> list[dict[str, Tensor]]:
        from torchvision.models.detection.image_list import ImageList

        said = {key: part.float() for key, part in zip(("cls_logits", "bbox_regression", "bbox_ctrness"), answer, strict=False)}
        count, sizes = len(answer[0]), self._sizes(height, width)
        features = [answer[0].new_empty(1, 1, *size, dtype=torch.float32) for size in sizes]
        images = ImageList(answer[0].new_empty(1, 1, height, width), [(height, width)] * count)
        anchors = self.rest.anchor_generator(images, features)
        head: Mapping[str, Any] = said
        if self.by_level:
            positions = [h * w for h, w in sizes]
            per_level = [n * (said["cls_logits"].shape[1] // sum(positions)) for n in positions]
            head = OrderedDict((key, list(part.split(per_level, 1))) for key, part in said.items())
            anchors = [list(one.split(per_level)) for one in anchors]
        found: list[dict[str, Tensor]] = self.rest.postprocess_detections(head, anchors, images.image_sizes)
        return [{**one, "labels": one["labels"] - self.first} for one in found]


def _freeze_norms(backbone: nn.Module, eps: float) -> None:
    """Puts torchvision's frozen batch norms in the place of the backbone's own, as its builders do when they load weights."""
    from torchvision.ops import FrozenBatchNorm2d

    for parent in list(backbone.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, FrozenBatchNorm2d(child.num_features, eps))


def _is_official(spec: TeacherSpec, url: str) -> bool:
    """Whether the weights are those of `url`, which ends with the beginning of their sha256: torchvision gives their norms an eps of 0."""
    if spec.weights_file is None:
        return True
    with spec.weights_file.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(url.rpartition("-")[2].removesuffix(".pth"))

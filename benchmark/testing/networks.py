"""Small networks for the conformance checks, one for each kind of task: two residual stages with BN and ReLU, and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.task import Kind, Task

STRIDES = (2, 4)  # of the detector's levels
SCORE, OVERLAP = 0.05, 0.6


class SmallNetwork(nn.Module):
    """A classifier for any task."""

    def __init__(self, task: Task):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(task.channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.pool, self.head = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(16, task.classes)

    def maps(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        x = self.relu(self.norm1(self.conv1(x)) + x)
        x = self.relu(self.norm2(self.down(x)))
        x = self.relu(self.norm3(self.conv3(x)) + x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.maps(x)).flatten(1))
        return logits


class SmallSegmenter(SmallNetwork):
    """A class for each pixel, at the size of the image."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.head = nn.Conv2d(16, task.classes, 1)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.maps(x)), size=x.shape[2:], mode="bilinear", align_corners=False)


class SmallDetector(SmallNetwork):
    """Per level (class logits, logarithms of the distances to the four sides, in strides), without anchors."""

    def __init__(self, task: Task):
        super().__init__(task)
        del self.head
        self.coarse, self.norm4 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.classify = nn.ModuleList(nn.Conv2d(16, task.classes, 1) for _ in STRIDES)
        self.locate = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in STRIDES)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:  # type: ignore[override]
        fine = self.maps(x)
        levels = [fine, self.relu(self.norm4(self.coarse(fine)))]
        return [(classify(f), locate(f)) for classify, locate, f in zip(self.classify, self.locate, levels, strict=True)]

    @staticmethod
    def boxes(maps: list[tuple[Tensor, Tensor]], height: int, width: int) -> Tensor:
        """N x positions x 4 (left, top, right, bottom in pixels)."""
        found = []
        for (_, distances), stride in zip(maps, STRIDES, strict=True):
            ticks = [(torch.arange(side, device=distances.device) + 0.5) * stride for side in distances.shape[2:]]
            y, x = torch.meshgrid(*ticks, indexing="ij")
            left, top, right, bottom = (distances.float().clamp(-4, 4).exp() * stride).unbind(1)
            found.append(torch.stack([x - left, y - top, x + right, y + bottom], 3).flatten(1, 2))
        return torch.cat(found, 1)

    @staticmethod
    def decode(maps: list[tuple[Tensor, Tensor]], height: int, width: int) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image, best first."""
        from torchvision.ops import nms  # brings half of torch along, seconds of every start

        scores = torch.cat([logits.flatten(2).transpose(1, 2) for logits, _ in maps], 1).float().sigmoid()
        found = []
        for boxes, score in zip(SmallDetector.boxes(maps, height, width), scores, strict=True):
            position, label = (score > SCORE).nonzero(as_tuple=True)
            apart = boxes[position] + 1e4 * label[:, None]  # boxes of different classes do not compete
            kept = nms(apart, score[position, label], OVERLAP)
            found.append({"boxes": boxes[position][kept], "scores": score[position, label][kept], "labels": label[kept]})
        return found


NETWORKS: dict[Kind, type[SmallNetwork]] = {"classify": SmallNetwork, "segment": SmallSegmenter, "detect": SmallDetector}

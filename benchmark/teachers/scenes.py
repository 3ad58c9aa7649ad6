"""Small networks for dense tasks, trained from nothing in about a minute: a U-Net and an anchor-free detector, for grey images of 64 x 64 pixels.

U-Net: Ronneberger et al. (arXiv:1505.04597), with BN, and bilinear resizing on the way up. Detector: one box per position
of two levels and no anchors (as in FCOS, Tian et al., arXiv:1904.01355), scores that are trained to be the box's IoU (Li et al., arXiv:2006.04388).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (24, 32, 48, 64)  # of the U-Net, in channels at strides 2, 4, 8, 16
STRIDES = (8, 16)  # of the detector's levels


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _class_logits(inputs: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, classes, 1)
    nn.init.constant_(layer.bias, -3.0)  # type: ignore[arg-type]  # nearly all positions are background
    return layer


class SegmentationNet(nn.Module):
    """N x in_channels x H x W normalised images -> N x classes x H x W logits; H and W are multiples of 16.

    It works at half the size and below; its logits are resized.
    """

    def __init__(self, classes: int = 11, in_channels: int = 1):
        super().__init__()
        self.classes = classes
        self.stem = conv_bn_relu(in_channels, WIDTHS[0], stride=2)
        pairs = list(pairwise(WIDTHS))
        self.down = nn.ModuleList(nn.Sequential(conv_bn_relu(a, b, stride=2), conv_bn_relu(b, b)) for a, b in pairs)
        self.up = nn.ModuleList(conv_bn_relu(a + b, a) for a, b in reversed(pairs))
        self.classify = nn.Conv2d(WIDTHS[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.stem(x)]
        for down in self.down:
            sizes.append(down(sizes[-1]))
        x = sizes.pop()
        for up in self.up:
            x = up(torch.cat([doubled(x), sizes.pop()], 1))
        return doubled(self.classify(x))


class DetectionNet(nn.Module):
    """N x in_channels x H x W normalised images -> for each stride of STRIDES (N x classes x h x w logits, N x 4 x h x w box numbers).

    Box numbers: from the position's centre to the box's, right and down, and the logarithms of its width and height, all in strides. H and W are
    multiples of 16.
    """

    def __init__(self, classes: int = 10, in_channels: int = 1):
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(conv_bn_relu(in_channels, 16, stride=2), conv_bn_relu(16, 32, stride=2), conv_bn_relu(32, 32))
        self.fine = nn.Sequential(conv_bn_relu(32, 64, stride=2), conv_bn_relu(64, 64))
        self.coarse = nn.Sequential(conv_bn_relu(64, 96, stride=2), conv_bn_relu(96, 96))
        self.top, self.lateral = conv_bn_relu(96, 64), conv_bn_relu(64, 64)
        self.classify = nn.ModuleList(nn.Sequential(conv_bn_relu(64, 64), _class_logits(64, classes)) for _ in STRIDES)
        self.locate = nn.ModuleList(nn.Sequential(conv_bn_relu(64, 32), nn.Conv2d(32, 4, 1)) for _ in STRIDES)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        fine = self.fine(self.stem(x))
        top = self.top(self.coarse(fine))
        levels = self.lateral(fine) + F.interpolate(top, scale_factor=2, mode="nearest"), top
        return tuple((classify(x), locate(x)) for x, classify, locate in zip(levels, self.classify, self.locate, strict=True))

    @staticmethod
    def boxes(levels: Sequence[tuple[Tensor, Tensor]], height: int, width: int) -> Tensor:
        """Where the box of every position is: N x positions x 4 pixels, level by level, row by row."""
        return torch.cat([boxes_of(numbers.float(), stride) for (_, numbers), stride in zip(levels, STRIDES, strict=True)], 1)

    @staticmethod
    def decode(levels: Sequence[tuple[Tensor, Tensor]], height: int, width: int) -> list[dict[str, Tensor]]:
        """What `forward` gave for images of height x width -> for each image boxes (K x 4 pixels), scores and labels, best first, K <= 100."""
        from torchvision.ops import batched_nms, clip_boxes_to_image

        boxes = DetectionNet.boxes(levels, height, width)
        scores = torch.cat([logits.float().flatten(2).transpose(1, 2) for logits, _ in levels], 1).sigmoid()
        found = []
        for box, score in zip(clip_boxes_to_image(boxes, (height, width)), scores, strict=True):
            position, label = (score > 0.05).nonzero(as_tuple=True)
            best = batched_nms(box[position], score[position, label], label, 0.5)[:100]
            found.append({"boxes": box[position[best]], "scores": score[position, label][best], "labels": label[best]})
        return found


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def centres(height: int, width: int, stride: int, device: torch.device | None = None) -> Tensor:
    """(height * width) x 2: x and y of the positions' centres in pixels, row by row."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return (torch.stack([x, y], -1).view(-1, 2) + 0.5) * stride


def boxes_of(numbers: Tensor, stride: int) -> Tensor:
    """N x 4 x h x w box numbers of a level -> N x (h * w) x 4 boxes in pixels."""
    middle = centres(numbers.shape[2], numbers.shape[3], stride, numbers.device)
    offset, size = numbers.flatten(2).transpose(1, 2).split(2, 2)
    middle, half = middle + offset * stride, size.clamp(-5, 5).exp() * stride / 2
    return torch.cat([middle - half, middle + half], 2)


CLASSES = {"segment": 11, "detect": 10}  # of scenes of digits: with and without a background
ENDS = ({"stem.0.weight", "stem.0.0.weight"}, {"classify.weight", "classify.0.1.weight"})  # weights that say input channels and classes
NETWORKS: dict[str, type[SegmentationNet] | type[DetectionNet]] = {"segment": SegmentationNet, "detect": DetectionNet}

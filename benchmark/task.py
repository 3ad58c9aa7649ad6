"""What is known about a teacher's job without any data: what it answers, classes, image shape, normalisation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["classify", "segment", "detect"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Scores = Literal["sigmoid", "softmax"]
SCORES: tuple[Scores, ...] = get_args(Scores)


@dataclass(frozen=True)
class Task:
    """The description that a method is handed instead of data.

    `mean` and `std` (one value per channel, of images scaled to [0, 1]) say what a *normalised image* is: the domain in which
    the teacher works and in which every synthetic image lives. `crop_ratio` and `interpolation` say how a real image is
    brought to `size`: the shorter side is resized to `size / crop_ratio`, then the centre is cropped; at crop_ratio 1 an
    image that already has the size stays as it is.

    kind: one class per image, one per pixel, or boxes with a class each; rooms that compare answers ask `dfqbench.tasks`. `size` is the height,
    and the width too unless `width` says otherwise; images of the two dense kinds are resized to fit into it, their aspect kept (`data`).
    scores: how a detector's class scores are made of its logits; under "softmax" the first class is the background. exits: of a classifier, how
    many times it answers on its way (early exits), the last time at its end.
    """

    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"
    kind: Kind = "classify"
    width: int | None = None
    scores: Scores = "sigmoid"
    exits: int = 1

    @property
    def labels(self) -> int:
        """Classes that an image, a pixel or a box can have: all but a background that only a detector's scores know."""
        return self.classes - (self.kind == "detect" and self.scores == "softmax")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return (self.channels, self.size, self.width or self.size)

    def pixel_range(self) -> list[tuple[float, float]]:
        """The (lowest, highest) value that a pixel can have after normalisation, per channel."""
        return [((0.0 - m) / s, (1.0 - m) / s) for m, s in zip(self.mean, self.std, strict=True)]

    def denormalised(self, images: Tensor) -> Tensor:
        """Normalised images (N x C x H x W) as pixels in [0, 1], float32; what lies outside is clipped."""
        mean, std = (images.new_tensor(v).float().view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images.float() * std + mean).clamp(0, 1)

    def as_dict(self) -> dict[str, object]:
        """For records and identities; a setting that came later is left out where it is the usual one."""
        values = vars(self)  # asdict copies deeply: slow, a sweep asks for every cell
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in _LATER or v != _LATER[k]}


_LATER = {field.name: field.default for field in fields(Task) if field.name in ("kind", "width", "scores", "exits")}


def size_of_images(height: int, width: int) -> dict[str, int | None]:
    """The two settings of a Task that say so."""
    return {"size": height, "width": None if width == height else width}

"""What is known about a teacher's job without any data: classes, image shape, normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """The description that a method is handed instead of data.

    `mean` and `std` (one value per channel, of images scaled to [0, 1]) say what a *normalised image* is: the domain in which
    the teacher works and in which every synthetic image lives. `crop_ratio` and `interpolation` say how a real image is
    brought to `size`: the shorter side is resized to `size / crop_ratio`, then the centre is cropped; at crop_ratio 1 an
    image that already has the size stays as it is.
    """

    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return (self.channels, self.size, self.size)

    def pixel_range(self) -> list[tuple[float, float]]:
        """The (lowest, highest) value that a pixel can have after normalisation, per channel."""
        return [((0.0 - m) / s, (1.0 - m) / s) for m, s in zip(self.mean, self.std, strict=True)]

    def denormalised(self, images: Tensor) -> Tensor:
        """Normalised images (N x C x H x W) as pixels in [0, 1], float32; what lies outside is clipped."""
        mean, std = (images.new_tensor(v).float().view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images.float() * std + mean).clamp(0, 1)

    def as_dict(self) -> dict[str, object]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}  # asdict copies deeply: slow, a sweep asks for every cell

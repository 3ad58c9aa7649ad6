"""A picture of synthetic images: a grid with the label of each."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dfqbench.method.contract import Batch
from dfqbench.task import Task

COLUMNS = 8
SMALLEST_SIDE = 64  # smaller images are enlarged, pixel by pixel, so that they can be looked at
CAPTION = 14
GAP = 4


def sample_grid(images: Tensor, labels: Tensor | None, task: Task) -> bytes:
    """PNG of normalised images (N x C x H x W), eight a row, sorted by label, each under its class index.

    Normalisation is undone with the task's mean and std; what then lies outside of [0, 1] is clipped.
    """
    order = np.argsort(labels.numpy(), kind="stable") if labels is not None else np.arange(len(images))
    pixels = (task.denormalised(images).numpy() * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    side = pixels.shape[1] * max(1, -(-SMALLEST_SIDE // pixels.shape[1]))
    caption = CAPTION if labels is not None else 0
    rows = -(-len(pixels) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + GAP) + GAP, rows * (side + caption + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for place, index in enumerate(order):
        x = GAP + place % COLUMNS * (side + GAP)
        y = GAP + place // COLUMNS * (side + caption + GAP)
        if labels is not None:
            pen.text((x + side / 2, y + caption / 2), f"class {int(labels[index])}", fill="black", font=font, anchor="mm")
        picture = Image.fromarray(pixels[index].squeeze())
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (x, y + caption))
    return _encoded(sheet)


def png(picture: Tensor) -> bytes:
    """PNG of a picture (3 x H x W in [0, 1]; what lies outside is clipped)."""
    if picture.ndim != 3 or len(picture) != 3:
        raise ValueError(f"a picture is 3 x H x W, this one has the shape {tuple(picture.shape)}")
    return _encoded(Image.fromarray((picture.float().clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)))


def _encoded(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def sample_images(batch: Batch, count: int) -> tuple[Tensor, Tensor | None]:
    """The first images of a batch with their labels, on the CPU; labels of pixels or boxes are no caption."""
    labels = batch.labels[:count].cpu() if batch.labels is not None and batch.labels.dim() == 1 else None
    return batch.images[:count].float().cpu(), labels

"""Pictures of where a network looks."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

SIDE = 96  # pixels of one tile
GAP, MARGIN, CAPTION = 4, 96, 30
HEAT = torch.tensor([[0.0, 0.0, 0.1], [0.35, 0.05, 0.43], [0.74, 0.21, 0.33], [0.97, 0.55, 0.04], [0.99, 0.95, 0.55]])  # dark to bright


def heat(maps: Tensor) -> Tensor:
    """Maps (N x H x W) -> colours (N x 3 x H x W) in [0, 1]; each map is stretched from its lowest to its highest value."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    place = (maps - low) / (high - low).clamp_min(1e-12) * (len(HEAT) - 1)
    below = place.floor().clamp(0, len(HEAT) - 2)
    share = (place - below)[..., None]
    colours = HEAT.to(maps.device)
    mixed = colours[below.long()] * (1 - share) + colours[below.long() + 1] * share
    return mixed.permute(0, 3, 1, 2)


def attention_sheet(pixels: Tensor, rows: dict[str, Tensor], marks: dict[str, Tensor], captions: list[str]) -> Tensor:
    """One column for each image: the image itself, then its attention maps, one row each, with points marked (3 x H x W in [0, 1]).

    pixels: N x C x S x S in [0, 1]. rows: title -> maps (N x h x w). marks: title -> points (N x 2: x, y, in units of the image's side); the first
    is drawn as a cross, the second as a ring. captions: N texts.
    """
    tiles = {"image": pixels.expand(-1, 3, -1, -1), **{title: heat(maps.float()) for title, maps in rows.items()}}
    width = MARGIN + len(pixels) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, CAPTION + len(tiles) * (SIDE + GAP) + CAPTION), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, (title, images) in enumerate(tiles.items()):
        top = CAPTION + row * (SIDE + GAP)
        pen.multiline_text((MARGIN - 8, top + SIDE / 2), title, fill="black", font=font, anchor="rm", align="right")
        large = F.interpolate(images.float().cpu(), (SIDE, SIDE), mode="nearest")
        for column, image in enumerate(large):
            left = MARGIN + column * (SIDE + GAP)
            tile = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
            sheet.paste(tile, (left, top))
            if row == 0:
                pen.text((left + SIDE / 2, CAPTION / 2), captions[column], fill="black", font=font, anchor="mm")
            for draw, points in zip((_cross, _ring), marks.values(), strict=False):
                x, y = points[column].float().tolist()
                draw(pen, left + x * SIDE, top + y * SIDE)
    x, y = MARGIN, CAPTION + len(tiles) * (SIDE + GAP) + CAPTION / 2 - GAP
    for draw, title in zip((_cross, _ring), marks, strict=False):
        draw(pen, x + 8, y)
        pen.text((x + 22, y), title, fill="black", font=font, anchor="lm")
        x += 40 + pen.textlength(title, font=font)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1) / 255


def _cross(pen: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for colour, thickness in (("black", 5), ("white", 2)):
        pen.line((x - 6, y, x + 6, y), fill=colour, width=thickness)
        pen.line((x, y - 6, x, y + 6), fill=colour, width=thickness)


def _ring(pen: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for colour, radius, thickness in (("black", 8, 4), ("#40e0ff", 7, 2)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=thickness)

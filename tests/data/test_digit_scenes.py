"""Scenes of digits: always the same, writers apart, and masks, boxes and labels that tell of the same digits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from dfqbench.data import digit_scenes
from dfqbench.data.digit_scenes import SIDE, scenes
from dfqbench.errors import UserError


def test_masks_boxes_and_labels_tell_of_the_same_digits() -> None:
    drawn = scenes("test")
    assert drawn.images.shape == drawn.masks.shape == (300, SIDE, SIDE)
    for mask, boxes, labels in zip(drawn.masks, drawn.boxes, drawn.labels, strict=True):
        assert set(np.unique(mask)) - {0} <= {1 + digit for digit in labels}
        outside = np.ones_like(mask, bool)
        for (left, top, right, bottom), digit in zip(boxes.astype(int), labels, strict=True):
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            assert (mask[top:bottom, left:right] == 1 + digit).any()
            outside[top:bottom, left:right] = False
        assert not mask[outside].any()
    assert set(np.concatenate(drawn.labels)) == set(range(10))


def test_they_are_the_same_on_every_machine() -> None:
    drawn = scenes("test")
    parts = [drawn.images, drawn.masks, *drawn.boxes, *drawn.labels]
    assert (
        hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() == "4a3c6411e06bf9935177369d1e11fad30a3259e8427341d40594b23e8767fdda"
    )


def test_test_scenes_show_no_training_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    draw = digit_scenes._scene
    monkeypatch.setattr(digit_scenes, "_scene", lambda pixels, labels, stream: (seen.append(len(pixels)), draw(pixels, labels, stream))[1])
    scenes.__wrapped__("test")
    assert set(seen) == {599}


def test_another_split_is_refused() -> None:
    with pytest.raises(UserError, match="no split 'val'"):
        scenes("val")

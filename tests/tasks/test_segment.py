"""mIoU and pixel accuracy: by hand, against scikit-learn, and what is void."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from dfqbench.tasks.segment import intersections_over_unions, mean_iou, pixel_accuracy, pixel_counts


def test_by_hand() -> None:
    labels = np.array([[0, 0, 1], [1, 2, 255]])
    said = np.array([[0, 1, 1], [1, 0, 2]])
    counts = pixel_counts(said, labels, 4)
    assert counts.tolist() == [[1, 2, 2], [2, 2, 3], [0, 1, 0], [0, 0, 0]]
    assert intersections_over_unions(counts)[:3] == pytest.approx([100 / 3, 200 / 3, 0])
    assert float(mean_iou(counts[None])) == pytest.approx(100 / 3)  # the fourth class is nowhere, and no part of the mean
    assert pixel_accuracy(counts[None]) == pytest.approx(60)


@pytest.mark.parametrize("seed", range(3))
def test_as_one_confusion_matrix_over_all_images_says(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels, said = draw.integers(0, 8, (6, 9, 7)), draw.integers(-1, 6, (6, 9, 7))  # 6 and 7 are void, -1 is nothing
    counts = np.stack([pixel_counts(*pair, classes=6) for pair in zip(said, labels, strict=True)])
    scored = labels < 6
    matrix = confusion_matrix(labels[scored], said[scored], labels=[-1, *range(6)])[1:]
    right, rows, columns = np.diag(matrix[:, 1:]), matrix.sum(1), matrix[:, 1:].sum(0)
    assert float(mean_iou(counts)) == pytest.approx(100 * np.mean(right / (rows + columns - right)), abs=1e-9)
    assert pixel_accuracy(counts) == pytest.approx(100 * right.sum() / scored.sum(), abs=1e-9)


def test_of_several_sets_at_once() -> None:
    draw = np.random.default_rng(0)
    counts = np.stack([pixel_counts(draw.integers(0, 3, 20), draw.integers(0, 3, 20), 3) for _ in range(8)])
    both = mean_iou(np.stack([counts[:4], counts[4:]]))
    assert both == pytest.approx([float(mean_iou(counts[:4])), float(mean_iou(counts[4:]))])


def test_nothing_to_score() -> None:
    counts = pixel_counts(np.zeros((2, 2), int), np.full((2, 2), 255), 3)
    assert np.isnan(mean_iou(counts[None]))
    assert np.isnan(pixel_accuracy(counts[None]))

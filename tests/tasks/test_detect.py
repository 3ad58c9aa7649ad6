"""Average precision: by hand, against pycocotools' own sums, over resampled images, and with what is ignored."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dfqbench.tasks.detect import Boxes, Detections, average_precision, average_precisions, matches_of

SIDE = 100


def annotated(*entries: tuple[list[float], int], ignored: tuple[int, ...] = ()) -> Boxes:
    boxes = np.array([box for box, _ in entries], float).reshape(-1, 4)
    return Boxes(boxes, np.array([label for _, label in entries], int), np.isin(np.arange(len(entries)), ignored), SIDE, SIDE)


def found(*entries: tuple[list[float], float, int]) -> Detections:
    boxes = np.array([box for box, _, _ in entries], float).reshape(-1, 4)
    return Detections(boxes, np.array([s for _, s, _ in entries], float), np.array([label for _, _, label in entries], int))


A, B, FAR = [10.0, 10.0, 30.0, 30.0], [50.0, 50.0, 90.0, 90.0], [70.0, 5.0, 95.0, 20.0]


def test_all_found_and_nothing_else() -> None:
    matches = matches_of([found((A, 0.9, 0), (B, 0.8, 1))], [annotated((A, 0), (B, 1))], 2)
    assert average_precision(matches) == {"ap": 100.0, "ap50": 100.0, "ap75": 100.0}


def test_a_false_one_before_the_right_one_halves_precision() -> None:
    matches = matches_of([found((FAR, 0.9, 0), (A, 0.8, 0))], [annotated((A, 0))], 1)
    assert average_precision(matches)["ap50"] == pytest.approx(50)


def test_one_of_two_found() -> None:
    """Precision 1 up to recall 0.5: 51 of 101 recalls."""
    matches = matches_of([found((A, 0.9, 0))], [annotated((A, 0), (B, 0))], 1)
    assert average_precision(matches)["ap"] == pytest.approx(100 * 51 / 101)


def test_an_overlap_of_two_thirds_counts_up_to_065() -> None:
    shifted = [14.0, 10.0, 34.0, 30.0]  # 16 x 20 of 24 x 20: 2/3
    matches = matches_of([found((shifted, 0.9, 0))], [annotated((A, 0))], 1)
    assert average_precisions(matches)[0].tolist() == [100.0] * 4 + [0.0] * 6


def test_what_is_ignored_neither_counts_nor_spoils() -> None:
    truth = annotated((A, 0), (B, 0), ignored=(1,))
    inside = [55.0, 55.0, 70.0, 70.0]  # of a crowd: all of the detection lies in it
    with_crowd = matches_of([found((inside, 0.9, 0), (A, 0.8, 0))], [truth], 1)
    assert average_precision(with_crowd)["ap"] == pytest.approx(100)
    assert with_crowd.boxes.tolist() == [[1]]


@pytest.mark.parametrize("box", [[np.nan] * 4, [0.0, 0.0, np.nan, np.nan], [10.0, 10.0, 30.0, np.inf]])
def test_what_is_not_finite_finds_nothing(box: list[float]) -> None:
    truth = [annotated((A, 0))]
    assert average_precision(matches_of([found((box, 0.9, 0))], truth, 1))["ap50"] == 0.0
    assert average_precision(matches_of([found((A, np.nan, 0))], truth, 1))["ap50"] == 0.0
    assert average_precision(matches_of([found((box, 0.9, 0), (A, 0.8, 0))], truth, 1))["ap50"] == 100.0


def test_images_without_boxes_and_without_detections() -> None:
    empty, nothing = annotated(), found()
    assert np.isnan(average_precision(matches_of([nothing], [empty], 2))["ap"])
    missed = matches_of([nothing, nothing], [empty, annotated((A, 1))], 2)
    assert average_precision(missed)["ap"] == 0.0
    assert np.isnan(average_precisions(missed)[0, 0])  # of the class without boxes
    false = matches_of([found((A, 0.9, 0)), found((A, 0.8, 0))], [empty, annotated((A, 0))], 1)
    assert average_precision(false)["ap50"] == pytest.approx(50)


def a_set(seed: int, images: int = 12, classes: int = 3) -> tuple[list[Detections], list[Boxes]]:
    draw = np.random.default_rng(seed)
    said, truth = [], []
    for _ in range(images):
        count = int(draw.integers(0, 6))
        corner, size = draw.uniform(0, 60, (count, 2)), draw.uniform(10, 40, (count, 2))
        boxes, labels = np.concatenate([corner, corner + size], 1), draw.integers(0, classes, count)
        truth.append(Boxes(boxes, labels, draw.random(count) < 0.2, SIDE, SIDE))
        near = boxes + draw.normal(0, 4, boxes.shape)
        others = draw.uniform(0, 50, (3, 4)) + np.array([0, 0, 20, 20])
        scores = np.round(draw.random(count + 3), 1)  # with ties
        said.append(Detections(np.concatenate([near, others]), scores, np.concatenate([labels, draw.integers(0, classes, 3)])))
    return said, truth


def by_pycocotools(said: list[Detections], truth: list[Boxes], classes: int = 3) -> tuple[float, float, float]:
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for i, (detections, boxes) in enumerate(zip(said, truth, strict=True)):
        for (x1, y1, x2, y2), label, crowd in zip(boxes.boxes.tolist(), boxes.labels.tolist(), boxes.ignored.tolist(), strict=True):
            box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            annotations.append(entry)
        for (x1, y1, x2, y2), score, label in zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True):
            results.append({"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images, categories = [{"id": i} for i in range(len(truth))], [{"id": c} for c in range(classes)]
        coco.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return tuple(100 * float(value) for value in evaluation.stats[:3])  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(4))
def test_as_pycocotools_sums_it_up(seed: int) -> None:
    said, truth = a_set(seed)
    ours = average_precision(matches_of(said, truth, 3))
    assert tuple(ours.values()) == pytest.approx(by_pycocotools(said, truth), abs=1e-6)
    assert 0 < ours["ap"] < ours["ap50"]


def test_a_set_with_images_twice_is_the_set_with_them_twice() -> None:
    said, truth = a_set(7)
    times = np.array([0, 2, 1, 3] * 3)
    chosen = np.repeat(np.arange(12), times)
    whole = average_precision(matches_of(said, truth, 3), times)
    written_out = average_precision(matches_of([said[i] for i in chosen], [truth[i] for i in chosen], 3))
    assert whole["ap"] == pytest.approx(written_out["ap"], abs=1.5)  # among equal scores of different images the order is free
    different = [Detections(d.boxes, d.scores + 1e-4 * np.arange(len(d.scores)) + 1e-6 * i, d.labels) for i, d in enumerate(said)]
    whole = average_precision(matches_of(different, truth, 3), times)
    written_out = average_precision(matches_of([different[i] for i in chosen], [truth[i] for i in chosen], 3))
    assert whole == pytest.approx(written_out, abs=1e-6)

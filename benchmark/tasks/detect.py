"""COCO's average precision, from matches per image that can be put together again for any choice of images. No torch here.

Which detection finds which box is pycocotools' answer; what is made of it (precision at 101 recalls, ten overlaps, mean over classes) is computed
here, so that a bootstrap over images need not match again. Boxes of all areas, at most 100 detections per image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections per image


@dataclass(frozen=True)
class Boxes:
    """What is annotated on an image of height x width pixels. boxes: K x 4 (x1, y1, x2, y2) in pixels; labels: K class indices; ignored: K, crowds
    and what is too hard, which neither count when they are missed nor spoil what finds them."""

    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    ignored: npt.NDArray[np.bool_]
    height: int
    width: int


@dataclass(frozen=True)
class Detections:
    """boxes: K x 4 (x1, y1, x2, y2) in pixels of the image; scores: K; labels: K class indices."""

    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """Of a whole set: D detections (of which image, of which class, with which score; D x 10 whether each finds a box at each overlap, and whether it
    is ignored there) and images x classes annotated boxes that are not ignored."""

    image: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    score: npt.NDArray[np.float32]
    found: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    boxes: npt.NDArray[np.int32]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """For a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def ranked(self) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], list[npt.NDArray[np.intp]]]]:
        """By class, detections from the best score down: image of each, 10 x D whether it counts (1 x D where all do), and
        at each overlap the places of those that find a box and count."""
        made = []
        for c in range(self.boxes.shape[1]):
            chosen = np.flatnonzero(self.label == c)
            chosen = chosen[np.argsort(-self.score[chosen], kind="stable")]
            counts = np.ascontiguousarray(~self.ignored[chosen].T)
            finds = [np.flatnonzero(row) for row in self.found[chosen].T & counts]
            made.append((self.image[chosen], counts[:1] if counts.all() else counts, finds))
        return made


def matches_of(detections: Sequence[Detections], annotated: Sequence[Boxes], classes: int) -> Matches:
    """As COCO's evaluation matches them, class by class: best score first, each to the free box that it overlaps most.

    A detection with a number that is not finite is none: pycocotools would take it to find whatever box it is compared with.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box: npt.NDArray[np.float64]) -> list[float]:
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    truth, said, number = [], [], 0
    for i, (image, found) in enumerate(zip(annotated, detections, strict=True)):
        for box, label, ignored in zip(image.boxes, image.labels, image.ignored, strict=True):
            number += 1
            x, y, w, h = xywh(box)
            truth.append({"id": number, "image_id": i, "category_id": int(label), "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(ignored)})
        finite = np.isfinite(found.boxes).all(1) & np.isfinite(found.scores)
        for box, score, label in zip(found.boxes[finite], found.scores[finite], found.labels[finite], strict=True):
            said.append({"image_id": i, "category_id": int(label), "bbox": xywh(box), "score": float(score)})
    kept: dict[str, list[npt.NDArray[Any]]] = {field.name: [] for field in fields(Matches)}
    boxes = np.zeros((len(annotated), classes), np.int32)
    for i, image in enumerate(annotated):
        np.add.at(boxes[i], image.labels[~image.ignored], 1)
    if said:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
            coco = COCO()
            coco.dataset = {
                "info": {},
                "images": [{"id": i} for i in range(len(annotated))],
                "annotations": truth,
                "categories": [{"id": c} for c in range(classes)],
            }
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(said), "bbox")
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.params.maxDets = [MOST]
            evaluation.evaluate()
        for one in evaluation.evalImgs:
            if one is None:
                continue
            count = len(one["dtScores"])
            kept["image"].append(np.full(count, one["image_id"], np.int32))
            kept["label"].append(np.full(count, one["category_id"], np.int32))
            kept["score"].append(np.asarray(one["dtScores"], np.float32))
            kept["found"].append(np.asarray(one["dtMatches"] > 0).T)
            kept["ignored"].append(np.asarray(one["dtIgnore"], bool).T)
    empty = {"image": np.int32, "label": np.int32, "score": np.float32, "found": bool, "ignored": bool}
    parts = {
        name: np.concatenate(kept[name]) if kept[name] else np.zeros((0, len(OVERLAPS)) if kind is bool else 0, kind) for name, kind in empty.items()
    }
    return Matches(**parts, boxes=boxes)


def average_precisions(matches: Matches, times: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
    """classes x 10 overlaps, in percent; NaN for a class of which no box is annotated. times: how often each image is in the set (a bootstrap); None:
    once."""
    images, classes = matches.boxes.shape
    times = np.ones(images, np.int64) if times is None else times
    wanted = (matches.boxes * times[:, None]).sum(0)
    found = np.full((classes, len(OVERLAPS)), np.nan)
    for c in np.flatnonzero(wanted):
        image, counts, finds = matches.ranked[c]
        often = times[image]
        seen = np.cumsum(often * counts, 1, dtype=np.float64)
        for t, at in enumerate(finds):  # precision is highest where a box is found, and only there recall grows
            right = np.cumsum(often[at], dtype=np.float64)
            precision = right / np.maximum(seen[min(t, len(seen) - 1)][at], np.spacing(1))
            precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
            found[c, t] = 100 * precision[np.searchsorted(right / wanted[c], RECALLS, side="left")].mean()
    return found


def average_precision(matches: Matches, times: npt.NDArray[np.int64] | None = None) -> dict[str, float]:
    """`ap` (mean over overlaps 0.50 to 0.95), `ap50`, `ap75`: mean over the classes that have boxes, in percent; NaN where nothing is annotated."""
    found = average_precisions(matches, times)
    found = found[np.isfinite(found[:, 0])]
    if not len(found):
        return dict.fromkeys(("ap", "ap50", "ap75"), float("nan"))
    return {"ap": float(found.mean()), "ap50": float(found[:, 0].mean()), "ap75": float(found[:, 5].mean())}

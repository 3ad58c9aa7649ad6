"""Mean intersection over union, from counts per image and class that add up. No torch here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]  # ... x classes x 3: pixels that are right, labelled, predicted


def pixel_counts(predicted: npt.NDArray[np.integer], labels: npt.NDArray[np.integer], classes: int) -> Counts:
    """classes x 3 of one image (H x W each). Pixels whose label is no class (below 0, `classes` or above) are void: they count nowhere.

    A prediction that is no class is wrong, and counts among no class's predicted pixels.
    """
    scored = (labels >= 0) & (labels < classes)
    predicted, labels = predicted[scored], labels[scored]
    right = labels[predicted == labels]
    known = predicted[(predicted >= 0) & (predicted < classes)]
    return np.stack([np.bincount(each.astype(np.int64), minlength=classes) for each in (right, labels, known)], 1)


def intersections_over_unions(counts: Counts) -> npt.NDArray[np.float64]:
    """Per class (last axis), in percent, of counts that are summed over images; NaN for a class that is neither labelled nor predicted."""
    right, labelled, predicted = (counts[..., i].astype(np.float64) for i in range(3))
    union = labelled + predicted - right
    return 100 * np.divide(right, union, out=np.full_like(right, np.nan), where=union > 0)


def mean_iou(counts: Counts) -> npt.NDArray[np.float64]:
    """... x images x classes x 3 -> mIoU in percent over all images: the mean over classes that are labelled or predicted anywhere; NaN without any.

    One confusion matrix over the whole set, as in PASCAL VOC and Cityscapes; not the mean over images.
    """
    found = intersections_over_unions(counts.sum(-3))
    there = np.isfinite(found)
    number = there.sum(-1)
    total = np.where(there, found, 0.0).sum(-1)
    means: npt.NDArray[np.float64] = np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0)
    return means


def pixel_accuracy(counts: Counts) -> float:
    """Percent of the scored pixels that are right; NaN without any."""
    right, labelled, _ = counts.reshape(-1, counts.shape[-2], 3).sum((0, 1))
    return 100 * float(right) / float(labelled) if labelled else float("nan")

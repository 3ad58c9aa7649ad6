"""Whether a teacher seems to have learned its classes in another order than the evaluation set has them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np

from dfqbench.data import EvaluationSet, Images


def doubt_about_classes(found: EvaluationSet, images: Images, top1: float, measure: Callable[[Images], float]) -> str | None:
    """What to say where a set's class folders have two orders and the teacher is near chance under the one that was taken; else None.

    top1: the teacher's, in percent. measure: its top-1 on other labels, asked for only then. Near chance is what a teacher of the other order
    reaches at best: the classes that have the same place in both, and one more.
    """
    taken, other = found.class_names, found.other_order
    if other is None:
        return None
    same = sum(a == b for a, b in zip(taken, other, strict=True))
    if top1 > 100 * (same + 1) / len(taken):
        return None
    place = {name: i for i, name in enumerate(other)}
    relabelled = copy.copy(images)
    relabelled.labels = np.array([place[name] for name in taken], np.int64)[images.labels]
    there, first = measure(relabelled), next(i for i, name in enumerate(other) if name != taken[i])
    said = f"top-1 {top1:.2f} % on {found.name} is near chance, with class {taken[first]} before class {other[first]}"
    if there <= top1:
        return f"{said}; the other way round it is {there:.2f} %"
    return f"{said}; the other way round it is {there:.2f} %: rename the class folders so that they sort as the teacher was trained"

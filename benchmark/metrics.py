"""How well a network does, by the kind of its task: what results call it and what people do. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A percentage. key: in result.json and history.csv; name: for people; beside: further percentages of an evaluation, by key with their names."""

    key: str
    name: str
    beside: Mapping[str, str] = field(default_factory=dict)


METRICS = {
    metric.key: metric
    for metric in (
        Metric("top1", "top-1", {"top5": "top-5"}),
        Metric("agreement", "agreement"),
        Metric("miou", "mIoU", {"pixel_accuracy": "pixel accuracy"}),
        Metric("ap", "AP", {"ap50": "AP50", "ap75": "AP75"}),
    )
}

DENSE = frozenset(("miou", "ap"))  # of which no image is right or wrong


def metric_of(result: Mapping[str, Any]) -> Metric:
    """Of a result.json, a teacher's record or a row of either; results say it unless they are of a classifier with an evaluation set."""
    return METRICS[result.get("metric", "top1")]

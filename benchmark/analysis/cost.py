"""What cells cost: seconds by one clock, a figure for each place where they ran; those of two places are never averaged. No torch here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# GPU: time of the device's own events. CPU: processor time, all threads of the process. wall: on a CPU, grows with whatever else the machine does
SECONDS: dict[str, str] = {"GPU": "GPU-seconds", "CPU": "CPU-seconds", "wall": "wall seconds", "": "seconds"}


@dataclass(frozen=True)
class Cost:
    """Mean seconds of a cell, common work of its bundle counted whole.

    low, high: the least and the greatest mean of one place (host, device, threads); NaN where the cells have no clock in common (clock is "").
    chosen: whether somebody chose a width for each layer before, whose seconds are not counted here.
    """

    clock: str
    low: float
    high: float
    chosen: bool = False

    def __str__(self) -> str:
        """`352`, or `290-410` where cells ran in several places; `-` where there is no figure."""
        return (f"{rounded(self.low)}-{rounded(self.high)}" if self.several else rounded(self.low)) if self.clock else "-"

    @property
    def several(self) -> bool:
        """Whether it is printed as a range."""
        return bool(self.clock) and rounded(self.low) != rounded(self.high)


def rounded(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def clock_of(results: list[dict[str, Any]]) -> str:
    """By which seconds of these results can be told together."""
    on_gpu = {result["provenance"].get("device") == "cuda" for result in results}
    if len(on_gpu) != 1:
        return ""
    if True in on_gpu:
        return "GPU"
    return "CPU" if all(processor_seconds(result) is not None for result in results) else "wall"


def cost_of(results: list[dict[str, Any]], clock: str | None = None) -> Cost:
    """clock: another than `clock_of` finds, as `wall` for results that could be told in CPU-seconds."""
    clock, places = clock_of(results) if clock is None else clock, defaultdict(list)
    for result in results:
        places[place_of(result)].append(seconds_of(result, clock))
    means = [float(np.mean(seconds)) for seconds in places.values()] if clock else [math.nan]
    return Cost(clock, min(means), max(means), any("allocation" in result for result in results))


def seconds_of(result: dict[str, Any], clock: str) -> float:
    """A cell's own seconds and those that its bundle shares."""
    own = processor_seconds(result) if clock == "CPU" else None
    return float(result["seconds"]["own"] + result["seconds"]["shared"]) if own is None else own


def processor_seconds(result: dict[str, Any]) -> float | None:
    """None where they were not measured, as by earlier versions."""
    try:
        seconds = float(result["cpu_seconds"]["own"] + result["cpu_seconds"]["shared"])
    except (KeyError, TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) else None


def place_of(result: dict[str, Any]) -> tuple[Any, ...]:
    """Where seconds mean the same: host, device and, on a CPU, threads."""
    on = result["provenance"]
    return on.get("host"), on["device_name"], None if on.get("device") == "cuda" else on.get("threads")


def in_column(costs: Sequence[Cost]) -> tuple[str, list[str]]:
    """A table's heading, like `CPU-s/cell`, and what stands below it; where rows have several clocks each names its own."""
    clocks = {cost.clock for cost in costs if cost.clock}
    unit = SECONDS[next(iter(clocks)) if len(clocks) == 1 else ""].replace("seconds", "s")
    return f"{unit}/cell", [f"{cost} {cost.clock if len(clocks) > 1 else ''}".rstrip() for cost in costs]


def in_words(costs: Sequence[Cost], devices: Sequence[str]) -> list[str]:
    """A table's notes on such a column. costs: of rows with finished cells."""
    clocks = [clock for clock in SECONDS if clock and any(cost.clock == clock for cost in costs)]
    notes = [f"{' or '.join(SECONDS[clock] for clock in clocks)} per cell, images included, on {', '.join(devices)}"] * bool(clocks)
    if "wall" in clocks:
        notes[0] += "; wall seconds grow with whatever else the machine did"
    if clocks and any(cost.chosen for cost in costs):
        notes.append("seconds do not count the choice of a width for each layer: it is made once, and cells share it")
    if any(cost.several for cost in costs):
        notes.append("seconds a-b: means of several hosts or devices lie between these; they are not averaged")
    if any(not cost.clock for cost in costs):
        notes.append("- seconds: the row's cells ran on GPUs and on CPUs")
    return notes

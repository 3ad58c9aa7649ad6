"""Ticks of logarithmic axes as plain numbers: the exponents of matplotlib's own are too small to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

ROUND = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
SIZES = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from which value on, in which unit


def set_ticks(axis: Any, low: float, high: float, most: int) -> None:
    """Of a matplotlib axis with these limits: the most, up to `most`, that are round."""
    values = ticks(low, high, most)
    axis.set_ticks(values, [plain(value) for value in values])
    axis.set_ticks([], minor=True)


def ticks(low: float, high: float, most: int) -> Sequence[float]:
    """0 < low < high. Evenly spaced ones where a short axis has no two round numbers."""
    from matplotlib.ticker import MaxNLocator

    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    choices = [[n * 10.0**p for p in powers for n in numbers if low <= n * 10.0**p <= high] for numbers in ROUND]
    found = next((its for its in choices if len(its) <= most), choices[-1][:: -(-len(choices[-1]) // most) or 1])
    return found if len(found) > 1 else [float(v) for v in MaxNLocator(most - 1).tick_values(low, high) if low <= v <= high]


def plain(value: float) -> str:
    """`0.01`, `500`, `20k`, `3M`."""
    for least, unit, letter in SIZES:
        if value >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:.12f}".rstrip("0").rstrip(".") if value < 1e-3 else f"{value:g}"

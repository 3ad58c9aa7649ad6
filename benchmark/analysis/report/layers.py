"""What allocators chose, layer by layer: a bar for each width. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dfqbench.analysis.tables.without_data import nats

ACTIVATIONS = "quantizers."  # their names begin so; those of weights are their layers'


@dataclass(frozen=True)
class Bars:
    """what: weights or activations. average: of their budget. bars: (bits, what is said of the layer)."""

    what: str
    average: float
    bars: list[tuple[int, str]]


@dataclass(frozen=True)
class Chosen:
    """One allocation."""

    words: str
    parts: list[Bars]


def chosen(results: Iterable[dict[str, Any]]) -> list[Chosen]:
    """What was chosen for these cells: each choice once, by teacher, protocol, bits and allocator."""
    found: dict[tuple[str, ...], Chosen] = {}
    for result in results:
        made, cell = result.get("allocation"), result["cell"]
        if made:
            place = (cell["teacher"]["label"], cell["protocol"], cell["bits"], cell["allocation"]["text"])
            found.setdefault((*place, str(made["bits"])), Chosen(f"{', '.join(place)}: {_costs(made)}", _parts(made)))
    return [found[key] for key in sorted(found)]


def _costs(made: dict[str, Any]) -> str:
    ours, equal = nats(made["cost"]), nats(made["uniform_cost"])
    said = f"{made['average_weight_bits']:.2f} bits per weight, KL to the teacher {ours} nats (equal widths: {equal})"
    if "unseen_cost" not in made:
        return said
    return f"{said}; on images that did not choose {nats(made['unseen_cost'])} ({nats(made['unseen_uniform_cost'])})"


def _parts(made: dict[str, Any]) -> list[Bars]:
    parts = []
    for what, of in (("weights", "weights"), ("activations", "values of an image")):
        its = {name: bits for name, bits in made["bits"].items() if name.startswith(ACTIVATIONS) == (what == "activations")}
        if its:
            entries = {name: made["entries"][name] for name in its}
            average = sum(bits * entries[name] for name, bits in its.items()) / sum(entries.values())
            bars = [(bits, f"{name.removeprefix(ACTIVATIONS)}: {bits} bits, {entries[name]:,} {of}") for name, bits in its.items()]
            parts.append(Bars(what, average, bars))
    return parts

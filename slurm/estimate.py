"""How long bundles will take, by what finished cells of the same method and teacher took on the same kind of device. No torch here."""

from __future__ import annotations

from typing import Any

from benchmark.cell import Bundle, Cell

Key = tuple[str, str, str]


class Speeds:
    """Figures from a store's results."""

    def __init__(self, results: list[dict[str, Any]], device: str):
        """device: cpu or cuda; `auto` counts as cuda."""
        self.device = "cpu" if device == "cpu" else "cuda"
        self._known: dict[Key, list[tuple[float, float, float]]] = {}
        for result in results:
            if result["provenance"]["device"] != self.device:
                continue
            cell, seconds = result["cell"], result["seconds"]
            key = (cell["method"], cell["identity"]["teacher"]["weights"], cell["precision"])
            work = _work(cell["identity"]["config"])
            self._known.setdefault(key, []).append((work, float(seconds["own"]), float(seconds["shared"])))

    def seconds(self, bundle: Bundle) -> float | None:
        """None where no figure is known."""
        known = self._known.get(_key(bundle.cells[0]))
        if not known:
            return None
        work = _work(bundle.cells[0].config)
        costs = [(shared + own * len(bundle.cells)) * work / measured for measured, own, shared in known]
        return sum(costs) / len(costs)


def _key(cell: Cell) -> Key:
    return cell.method, cell.teacher.weights_sha256, cell.precision


def _work(config: dict[str, Any]) -> float:
    """Images that a run of these settings goes through; 1 for methods without such settings, which then always take the same time."""
    work = 1.0
    for setting in ("epochs", "iterations", "batch_size"):
        work *= float(config.get(setting) or 1)
    return work


def hours(bundles: list[Bundle], speeds: Speeds, side_by_side: int) -> str:
    """`about 12.5 GPU-hours`, and for how many bundles no figure is known."""
    seconds = [speeds.seconds(bundle) for bundle in bundles]
    known = [s for s in seconds if s is not None]
    unit = "GPU-hours" if speeds.device == "cuda" else "job-hours on CPUs"
    if not known:
        return f"{unit}: no figure is known (nothing of these methods and teachers has finished on {speeds.device} in this store)"
    total = sum(known) / 3600 / side_by_side
    missing = len(seconds) - len(known)
    rest = f"; no figure is known for {missing} of {len(seconds)} bundles" if missing else ""
    return f"about {total:.2g} {unit} by finished cells of this store{rest}"

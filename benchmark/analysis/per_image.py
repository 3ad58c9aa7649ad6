"""Which test images every cell got right, held ready for comparisons: one bootstrap per evaluation set. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfqbench.analysis.records import Counts, Reading, score_of
from dfqbench.analysis.seeds import Basis
from dfqbench.analysis.stats import Bootstrap, Column, DenseBootstrap, Estimate, McNemar, mcnemar
from dfqbench.metrics import DENSE, metric_of


class PerImage:
    """Comparisons by cell id. A cell without readable per-image results takes part in none; `missing` names them."""

    def __init__(self, reading: Reading):
        groups: dict[tuple[str, int], list[tuple[str, Any]]] = {}
        self.missing: list[str] = []
        self._metrics: dict[tuple[str, int], str] = {}
        for result in reading.results:
            metric = metric_of(result).key
            found = reading.counts(result) if metric in DENSE else reading.correct(result)
            if found is None:
                file = reading.store.folder(result["id"]) / ("per_image.npz" if metric in DENSE else "correct.npy")
                self.missing.append(f"{file}: missing, or not this result's: the cell is in no comparison")
            else:
                groups.setdefault(_set_of(result), []).append((result["id"], found))
                self._metrics[_set_of(result)] = metric
        self._seedless = {r["id"] for r in reading.results if not r["last_epoch"]}  # no epoch, so nothing was made or trained: nothing was drawn
        self._place: dict[str, tuple[tuple[str, int], int]] = {}
        self._rows: dict[tuple[str, ...], tuple[Column, int]] = {}
        self._packed: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._counts: dict[tuple[str, int], list[Counts]] = {}
        self._bootstraps: dict[tuple[str, int], Bootstrap] = {}
        for key, group in groups.items():
            if self._metrics[key] in DENSE:
                self._counts[key] = [counts for _, counts in group]
            else:
                self._packed[key] = np.stack([packed for _, packed in group])
            self._place.update({cell_id: (key, i) for i, (cell_id, _) in enumerate(group)})

    def column(self, rows: Sequence[list[str]]) -> list[tuple[Estimate, Basis] | None]:
        """Means of a column's rows, cells sorted by seed; None where one has no per-image results. What seeds scatter is learned from all of them.

        ValueError for rows of several evaluation sets.
        """
        known = [ids for ids in rows if all(cell_id in self._place for cell_id in ids)]
        if not known:
            return [None] * len(rows)
        key = self._set([cell_id for ids in known for cell_id in ids])
        places = [[self._place[cell_id][1] for cell_id in ids] for ids in known]
        column = Column(self._bootstrap(key), places, [self._seedless >= set(ids) for ids in known])
        self._rows |= {tuple(ids): (column, row) for row, ids in enumerate(known)}
        found = {tuple(ids): (column.mean(row), column.seeds.bases[row]) for row, ids in enumerate(known)}
        return [found.get(tuple(ids)) for ids in rows]

    def against_best(self, rows: Sequence[list[str]]) -> list[tuple[Estimate | None, bool]]:
        """Of rows of one column, best first: the difference to the best (None for itself), p after Holm's correction, and whether it is as good."""
        column, places = self._rows[tuple(rows[0])][0], [self._rows[tuple(ids)][1] for ids in rows]
        differences, good = column.against_best(places)
        return [(differences.get(place), place in good) for place in places]

    def difference(self, ours: list[str], theirs: list[str]) -> Estimate:
        """Mean of `ours` minus mean of `theirs`, rows of one column (KeyError, ValueError)."""
        (column, row), (other, base) = self._rows[tuple(ours)], self._rows[tuple(theirs)]
        if column is not other:
            raise ValueError("rows of different columns cannot be compared image by image")
        return column.difference(row, base)

    def mcnemar(self, first: str, second: str) -> McNemar | None:
        """None where no image is right or wrong (mIoU, AP)."""
        key, (a, b) = self._set([first, second]), (self._place[first][1], self._place[second][1])
        return None if key in self._counts else mcnemar(self._packed[key][a], self._packed[key][b])

    def _set(self, ids: Sequence[str]) -> tuple[str, int]:
        keys = {self._place[cell_id][0] for cell_id in ids}
        if len(keys) > 1:
            raise ValueError("cells of different evaluation sets cannot be compared image by image")
        return keys.pop()

    def _bootstrap(self, key: tuple[str, int]) -> Bootstrap:
        if key in self._counts and key not in self._bootstraps:
            counts = self._counts[key]
            self._bootstraps[key] = DenseBootstrap(lambda cell, times: score_of(counts[cell], times), len(counts), key[1])
        if key not in self._bootstraps:
            self._bootstraps[key] = Bootstrap(self._packed[key], key[1])
        return self._bootstraps[key]


def _set_of(result: dict[str, Any]) -> tuple[str, int]:
    return result["cell"]["identity"]["evaluation"], result["images"]

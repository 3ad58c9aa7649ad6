"""Which test images every cell got right, held ready for comparisons: one bootstrap per evaluation set. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfqbench.analysis.records import Reading
from dfqbench.analysis.stats import Bootstrap, Estimate, McNemar, mcnemar


class PerImage:
    """Comparisons by cell id. A cell without readable per-image results takes part in none; `missing` names them."""

    def __init__(self, reading: Reading):
        groups: dict[tuple[str, int], list[tuple[str, NDArray[np.uint8]]]] = {}
        self.missing: list[str] = []
        for result in reading.results:
            packed = reading.correct(result)
            if packed is None:
                self.missing.append(
                    f"{reading.store.folder(result['id']) / 'correct.npy'}: missing, or not this result's: the cell is in no comparison"
                )
            else:
                groups.setdefault(_set_of(result), []).append((result["id"], packed))
        self._place: dict[str, tuple[tuple[str, int], int]] = {}
        self._packed: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._bootstraps: dict[tuple[str, int], Bootstrap] = {}
        for key, group in groups.items():
            self._packed[key] = np.stack([packed for _, packed in group])
            self._place.update({cell_id: (key, i) for i, (cell_id, _) in enumerate(group)})

    def mean(self, ids: list[str]) -> Estimate | None:
        """Over cells of one row, sorted by seed; None where one of them has no per-image results."""
        if any(cell_id not in self._place for cell_id in ids):
            return None
        return self._bootstrap(ids[0]).mean([self._place[cell_id][1] for cell_id in ids])

    def difference(self, ours: list[str], theirs: list[str]) -> Estimate:
        """Mean of `ours` minus mean of `theirs`; all must have per-image results on one evaluation set (KeyError, ValueError)."""
        if len({self._place[cell_id][0] for cell_id in (*ours, *theirs)}) > 1:
            raise ValueError("cells of different evaluation sets cannot be compared image by image")
        return self._bootstrap(ours[0]).difference([self._place[i][1] for i in ours], [self._place[i][1] for i in theirs])

    def mcnemar(self, first: str, second: str) -> McNemar:
        (key, a), (other, b) = self._place[first], self._place[second]
        if key != other:
            raise ValueError("cells of different evaluation sets cannot be compared image by image")
        return mcnemar(self._packed[key][a], self._packed[key][b])

    def _bootstrap(self, cell_id: str) -> Bootstrap:
        key = self._place[cell_id][0]
        if key not in self._bootstraps:
            self._bootstraps[key] = Bootstrap(self._packed[key], key[1])
        return self._bootstraps[key]


def _set_of(result: dict[str, Any]) -> tuple[str, int]:
    return result["cell"]["identity"]["evaluation"], result["images"]

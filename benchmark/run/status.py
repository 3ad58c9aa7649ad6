"""In which state every cell of a sweep is, read from the store alone."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dfqbench.store import Store
from dfqbench.sweep.cell import Bundle, Cell, bundles, coordinates_of


class Status(enum.Enum):
    DONE = "done"
    STALE = "stale"
    FAILED = "failed"
    RUNNING = "running"
    MISSING = "missing"


@dataclass(frozen=True)
class State:
    """A cell's status, and why: what differs, what failed, who runs it."""

    status: Status
    why: str = ""


def statuses(cells: Iterable[Cell], store: Store, finished: list[dict[str, Any]] | None = None) -> dict[str, State]:
    """By cell id. A cell that is not done is *stale* where the store holds the same experiment with other settings or versions.

    finished: the store's results, where they have been read already.
    """
    cells = list(cells)
    finished = store.results()[0] if finished is None else finished
    by_coordinates: dict[str, list[dict[str, Any]]] = {}
    for result in finished:
        by_coordinates.setdefault(coordinates_of(result["cell"]), []).append(result["cell"])
    done = {result["id"] for result in finished}
    checkpointed = {cell.id for bundle in bundles(c for c in cells if c.id not in done) for cell in _checkpointed(bundle, store)}
    begun = set(store.ids())  # a cell without a folder has neither a holder nor a failure: two files fewer to look for
    return {cell.id: _state(cell, store, done, cell.id in begun, by_coordinates.get(cell.coordinates, []), cell.id in checkpointed) for cell in cells}


def _checkpointed(bundle: Bundle, store: Store) -> tuple[Cell, ...]:
    return bundle.cells if (store.bundle_folder(bundle.id) / "checkpoint.pt").is_file() else ()


def _state(cell: Cell, store: Store, done: set[str], begun: bool, same_place: list[dict[str, Any]], checkpointed: bool) -> State:
    if cell.id in done:
        return State(Status.DONE)
    holder = store.lease(cell.id).holder() if begun else None
    if holder is not None:
        return State(Status.RUNNING, f"process {holder['pid']} on {holder['host']}")
    if begun:
        store.result(cell.id)  # one that may not be read raises: it is not missing
    failure = store.failure(cell.id) if begun else None
    if failure is not None:
        return State(Status.FAILED, f"{failure['kind']}: {(failure['message'].splitlines() or [''])[0]}")
    going_on = "goes on from its checkpoint" if checkpointed else ""
    if same_place:
        return State(Status.STALE, "; ".join(filter(None, [f"finished with {differences(same_place[-1]['identity'], cell.identity())}", going_on])))
    return State(Status.MISSING, going_on)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """`config.epochs 20, now 400`: every leaf in which two identities differ."""
    said = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            said.append(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            said.append(f"{prefix}{key} {a}, now {b}")
    return ", ".join(filter(None, said))

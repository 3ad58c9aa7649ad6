"""Bundles -> jobs: short ones are chained in one process, several processes share a job, jobs are split into arrays. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dfqbench.sweep.cell import Bundle
from dfqbench_slurm.profile import Profile
from dfqbench_slurm.submission import Task

UNTRAINED = 16  # bundles of methods that train nothing (seconds each) that are chained where no speed was measured; chosen here


def pack(bundles: list[Bundle], profile: Profile, seconds: Callable[[Bundle], float | None]) -> list[Task]:
    """Jobs in the order of their bundles. `seconds` says how long a bundle takes, None where nothing like it was measured."""
    lanes: list[list[Bundle]] = []
    left = 0.0  # minutes that the open lane still has room for
    for bundle in bundles:
        cost = _minutes(bundle, profile, seconds(bundle))
        if not lanes or cost > left or (profile.chain is not None and len(lanes[-1]) >= profile.chain):
            lanes.append([])
            left = float("inf") if profile.chain is not None else float(profile.chain_minutes)
        lanes[-1].append(bundle)
        left -= cost
    ids = [[[cell.id for cell in bundle.cells] for bundle in lane] for lane in lanes]
    return [ids[i : i + profile.lanes] for i in range(0, len(ids), profile.lanes)]


def _minutes(bundle: Bundle, profile: Profile, seconds: float | None) -> float:
    if seconds is not None:
        return seconds / 60
    trains = bool(bundle.cells[0].config.get("epochs"))
    return float(profile.chain_minutes) if trains else profile.chain_minutes / UNTRAINED


@dataclass(frozen=True)
class Split:
    """A job array: tasks from `first`, `parallel` of them at once, after the array of that index (None: at once)."""

    first: int
    count: int
    parallel: int
    after: int | None


def split(tasks: int, limit: int, parallel: int) -> list[Split]:
    """As few arrays of about equal size as the cluster's limit allows, which together never run more than `parallel` tasks at once.

    Arrays know nothing of each other, so each gets its share of `parallel`; where there are more arrays than that, they queue up behind one another.
    """
    arrays = -(-tasks // limit)
    chains = min(arrays, parallel)
    found, first = [], 0
    for i in range(arrays):
        count = tasks // arrays + (i < tasks % arrays)
        share = parallel // chains + (i % chains < parallel % chains)
        found.append(Split(first, count, share, i - chains if i >= chains else None))
        first += count
    return found

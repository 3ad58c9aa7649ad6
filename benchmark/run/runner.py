"""Runs what a sweep still lacks: claims its cells and hands them, bundle by bundle, to a worker."""

from __future__ import annotations

from dfqbench.engine.device import keep_freed_memory, use_device
from dfqbench.errors import UserError
from dfqbench.files import write_json
from dfqbench.run.options import Options, StopFlag, Summary
from dfqbench.run.progress import Progress
from dfqbench.run.status import Status, statuses
from dfqbench.run.worker import Worker
from dfqbench.store import Store
from dfqbench.sweep.cell import Bundle, Cell, bundles
from dfqbench.sweep.load import LoadedSweep
from dfqbench.sweep.schema import tracking_of
from dfqbench.tracking.process import observer


def run_sweep(loaded: LoadedSweep, store: Store, options: Options, progress: Progress, stop: StopFlag) -> Summary:
    """Runs every cell of the sweep that is not done, and notes which cells it spans."""
    note_sweep(loaded, store)
    return run_cells(loaded, loaded.cells, store, options, progress, stop)


def note_sweep(loaded: LoadedSweep, store: Store) -> None:
    """Which cells a config stands for, so that `table` and `status` need not work it out again."""
    cells = {cell.id: str(cell) for cell in loaded.cells}
    named = [cell for cell in loaded.cells if (cell.name or cell.group) and cell.label not in loaded.sweep.labels]  # those may change later
    names = {cell.id: {"name": cell.name, "group": cell.group} for cell in named}
    write_json(
        store.root / "sweeps" / f"{loaded.sweep.name}.json", {"config": loaded.text_sha256, "cells": list(cells), "labels": cells, "names": names}
    )


def run_cells(loaded: LoadedSweep, cells: list[Cell], store: Store, options: Options, progress: Progress, stop: StopFlag) -> Summary:
    """Runs those of a sweep's cells that are not done. One that fails is recorded and does not keep the others from running."""
    device = use_device(options.device)
    if options.graphs and device.type != "cuda":
        raise UserError(f"--graphs: CUDA graphs need a GPU, and the device is {device}")
    if options.streams and device.type != "cuda":
        raise UserError(f"--streams: several students at once need a GPU, and the device is {device}")
    if device.type != "cuda" and any(cell.precision == "tf32" for cell in cells):
        raise UserError(f"precision: tf32: only a GPU has it, and the device is {device}")
    keep_freed_memory()
    states = statuses(cells, store)
    skipped = {Status.DONE, Status.RUNNING} | (set() if options.retry_failed else {Status.FAILED})
    todo = bundles(cell for cell in cells if states[cell.id].status not in skipped)
    store.check_cells(cell.id for bundle in todo for cell in bundle.cells)
    failures = [states[cell.id].why for cell in cells if states[cell.id].status is Status.FAILED and Status.FAILED in skipped]
    summary = Summary(left=sum(states[cell.id].status is Status.RUNNING for cell in cells), failed_earlier=len(failures))
    watching = observer(store.root, loaded.sweep.name, tracking_of(loaded.sweep, options.wandb))
    worker = Worker(loaded, store, device, options, progress, stop, watching)
    progress.start(todo, sum(state.status is Status.DONE for state in states.values()), summary.left, failures)
    for number, bundle in enumerate(todo):
        if stop.signal is not None:
            summary.interrupted = True
            summary.left += sum(len(b.cells) for b in todo[number:])
            break
        if options.stop_at_failure and summary.failed:
            summary.left += sum(len(b.cells) for b in todo[number:])
            break
        with store.leases([cell.id for cell in bundle.cells]) as held:
            mine = tuple(cell for cell in bundle.cells if cell.id in held and store.result(cell.id) is None)
            summary.left += sum(cell.id not in held for cell in bundle.cells)
            if mine:
                worker.run(Bundle(mine), summary)
    progress.stop()
    watching.close(progress.say, hurry=summary.interrupted)
    return summary

"""The commands `dfqbench submit`, `status` and `cancel`: what they print, and how they exit."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from dfqbench.errors import UserError, counted
from dfqbench.store import Store
from dfqbench.sweep.config_file import find_config, noted_cells, sweep_name

if TYPE_CHECKING:
    from dfqbench_slurm.launcher import Plan
    from dfqbench_slurm.profile import Profile

WATCH_EVERY_S = 5.0


def submit(config: str, profile_name: str, results: Path, *, local: bool, dry_run: bool, retry_failed: bool, plugins: list[str]) -> None:
    from dfqbench_slurm.profile import find_profile

    if local and dry_run:
        raise UserError("--local runs the jobs, --dry-run does not: take one of them")
    name, profile = find_profile(profile_name)
    path = find_config(config)
    Store(results)
    from dfqbench_slurm import launcher

    if not (local or dry_run):
        launcher.check_slurm()
    from dfqbench.run.runner import note_sweep
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.load import load_sweep
    from dfqbench_slurm.cluster import NoAnswer, array_limit, queue

    loaded = load_sweep(path, cache_folder(), plugins)
    if "%" in str(results.absolute()):
        raise UserError(f"results folder {results.absolute()}: Slurm does not take a path with % in it")
    if local or dry_run:
        try:
            jobs, limit = queue(), array_limit()
        except NoAnswer:
            jobs, limit = {}, 1001
        store = Store(results, writable=not dry_run)
        plan, text = launcher.make_plan(loaded, plugins, store, name, profile, jobs, limit, retry_failed)
        refused = None
    else:
        store = Store(results, writable=True)
        plan, refused = launcher.submit(loaded, plugins, store, name, profile, retry_failed, _say)
    if not dry_run:
        note_sweep(loaded, store)
    where = "" if str(results) == "results" else f" --results {results}"
    for reason, cells in plan.skipped.items():
        _say(f"{cells} of {len(loaded.cells)} cells: {reason}")
    if plan.waiting:
        _say(f"{plan.waiting} cells wait for a later submit: the profile's max_queued is {profile.max_queued}")
    if not plan.submission.tasks:
        _say("nothing to submit")
        return
    if dry_run:
        for script in launcher.scripts(plan, profile):
            print(script)
        for line in plan.unread:
            print(f"skipped: {line}", file=sys.stderr)
        for line in plan.hours_of_each:
            _say(line)
        _say(f"{_plan_in_words(plan)}; nothing is submitted")
        _say(plan.hours)
        return
    if local:
        _run_here(plan, text, profile, config, where)
        return
    for array in plan.submission.arrays:
        tasks = f", tasks 0-{array.count - 1}" if array.count > 1 else ""
        _say(f"job {array.job} ({array.name}){tasks}")
    _say(_plan_in_words(plan))
    _say(plan.hours)
    _say(f"logs: {plan.submission.folder / 'jobs'}")
    _say(f"how it goes: dfqbench status {config}{where}")
    if refused is not None:
        raise refused


def _plan_in_words(plan: Plan) -> str:
    tasks = plan.submission.tasks
    processes = sum(len(task) for task in tasks)
    at_once = min(sum(part.parallel for part in plan.splits), len(tasks))
    arrays = f" in {len(plan.splits)} arrays" if len(plan.splits) > 1 else ""
    packed = ", ".join([counted(plan.cells, "cell"), counted(processes, "process"), counted(len(tasks), "job") + arrays])
    return packed + (f", {at_once} at once" if len(tasks) > 1 else "")


def _run_here(plan: Plan, text: str, profile: Profile, config: str, where: str) -> None:
    from dfqbench_slurm.launcher import run_here

    said, crew = run_here(plan, text, profile, _say)
    _say(said)
    if crew.told_to_stop is not None:
        _say("stopped; the state is saved, the same command goes on from there")
        raise typer.Exit(130 if crew.told_to_stop == 2 else 143)
    for line in crew.trouble:
        _say(line)
    _say(f"table: dfqbench table {config}{where}")
    if crew.trouble:
        raise typer.Exit(1)


def status(config: str, results: Path, *, watch: bool, plugins: list[str]) -> None:
    from dfqbench_slurm.overview import look

    store = Store(results)
    cells = noted_cells(config, results)
    if cells is None:
        from dfqbench.store.cache import cache_folder
        from dfqbench.sweep.load import load_sweep

        cells = {cell.id: str(cell) for cell in load_sweep(find_config(config), cache_folder(), plugins).cells}
    console = Console()
    if watch and console.is_terminal:
        from rich.live import Live

        with Live(look(cells, store), console=console, auto_refresh=False, vertical_overflow="crop", screen=True) as live:
            while not (seen := look(cells, store)).settled:
                live.update(seen, refresh=True)
                time.sleep(WATCH_EVERY_S)
    elif watch:
        last = ""
        while not (seen := look(cells, store)).settled:
            if seen.counts() != last:
                _say(last := seen.counts())
            time.sleep(WATCH_EVERY_S)
    seen = look(cells, store)
    console.print(seen.table(seen.lines), soft_wrap=False)
    for note in seen.notes:
        print(note, file=sys.stderr)
    _say(seen.counts())


def cancel(config: str, results: Path) -> None:
    from dfqbench_slurm.launcher import cancel as cancel_jobs

    name = sweep_name(find_config(config))
    ended = cancel_jobs(Store(results), name)
    _say(f"{counted(ended, 'job')} of {name} told to save and end" if ended else f"no job of {name} is in the queue")


def _say(line: str) -> None:
    Console().print(Text(line), soft_wrap=True)

"""What the commands that read a store have in common: their options, and the cells that they read, named as tables name them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, one_of
from dfqbench.errors import UserError

if TYPE_CHECKING:
    from dfqbench.analysis.records import Reading
    from dfqbench.analysis.tables.blocks import Rule
    from dfqbench.store import Store

OnlyConfig = Annotated[str | None, typer.Argument(help="Only this sweep's cells; default: all of the store.")]
Rows = Annotated[
    list[str] | None,
    typer.Option("--rows", help="Only rows whose label or method fits: a glob, or /a regular expression/; may be given again."),
]
NamesFrom = Annotated[
    Path | None,
    typer.Option("--names-from", readable=False, help="A CSV file with row (a cell's id or a row's name), label, group: what rows are called."),
]
Group = Annotated[str | None, typer.Option("--group", help="Only methods of this group, as the config names it.")]
RuleOption = Annotated[str, typer.Option("--rule", help="last, or best-on-test (chosen on the test labels).")]
NAMED = 5  # missing or failed cells that are named; the rest is counted


def rule_of(given: str) -> Rule:
    """The rule of `--rule`; UserError where there is no such rule."""
    one_of("--rule", given, ("last", "best-on-test"))
    return given  # type: ignore[return-value]


def read_cells(config: str | None, results: Path, plugins: list[str] | None, diverged_will_do: bool = False) -> Reading:
    """The finished cells of a store or of one sweep. Says on standard error what is damaged, failed or missing.

    Raises UserError where nothing is finished; with `diverged_will_do`, only where nothing has diverged either.
    """
    from dfqbench.analysis.records import read_store
    from dfqbench.store import Store

    store = Store(results)
    wanted = cells_of(config, store, plugins) if config else None
    reading = read_store(store, set(wanted) if wanted is not None else None)
    called = {line: f" ({wanted[cell_id]})" for cell_id, line in reading.unreadable.items() if wanted and wanted[cell_id]}
    for line in reading.skipped:
        print(f"skipped: {line}{called.get(line, '')}", file=sys.stderr)
    if reading.skipped:
        print(f"{len(reading.skipped)} skipped, nothing was changed", file=sys.stderr)
    again = f"dfqbench run {config}" + ("" if results == DEFAULT_RESULTS else f" --results {results}")
    again += "".join(f" --plugin {plugin}" for plugin in plugins or ())
    if wanted is not None:
        there = {result["id"] for result in reading.finished} | reading.unreadable.keys()
        failed = {failure["id"]: f"{failure['kind']}: {(str(failure['message']).splitlines() or [''])[0]}" for failure in reading.failures}
        _say_not_done(
            [name for cell_id, name in wanted.items() if cell_id not in there | failed.keys()], wanted, "are not done", f"{again} runs them"
        )
        retried = f"{again} --retry-failed tries them again"
        _say_not_done([f"{wanted[cell_id]}: {why}" for cell_id, why in failed.items()], wanted, "failed", retried)
        if failed.keys() == wanted.keys():
            again += " --retry-failed"
    if not reading.finished and not (diverged_will_do and reading.diverged):
        if config is None and not store.root.is_dir():
            raise UserError(f"results folder {store.root}: there is no such folder")
        what = "nothing that can be read" if reading.unreadable else "nothing"
        raise UserError(f"{what} is finished in {store.root / 'runs'}" + (f" of {config}: {again}" if config else ""))
    return reading


def _say_not_done(names: list[str], wanted: dict[str, str], what: str, advice: str) -> None:
    if names:
        named = "".join(f"\n  {name}" for name in names[:NAMED]) + (f"\n  and {len(names) - NAMED} more" if len(names) > NAMED else "")
        print(f"{len(names)} of {len(wanted)} cells {what}, {advice}:{named}", file=sys.stderr)


def named(reading: Reading, config: str | None, plugins: list[str] | None, group: str | None = None, names_from: Path | None = None) -> Reading:
    """With the labels of the config as it is now; without a config, with those that cells had when they ran. What `names_from` says counts first;
    without it and without a config, the store's own names.csv."""
    from dfqbench.analysis.names import FILE, name_rows, read_names, unknown_in
    from dfqbench.sweep.config_file import labels_of

    path = names_from or (None if config else reading.store.root / FILE)
    over = read_names(path) if path and (names_from or path.is_file()) else {}
    names = names_of(config, reading.store, plugins) if config else None
    found = name_rows(reading, names, [labels_of(config) if config else {}, over], group)
    if unknown := unknown_in(over, reading):
        print(f"{path}: {unknown}", file=sys.stderr)
    return found


def names_of(config: str, store: Store, plugins: list[str] | None) -> dict[str, dict[str, str]]:
    """`name` and `group` by cell id as the config gives them: noted by its last run, or worked out anew."""
    from dfqbench.sweep.config_file import find_config, noted_names

    noted = noted_names(config, store.root)
    if noted is not None:
        return noted
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.load import load_sweep

    return {cell.id: {"name": cell.name, "group": cell.group} for cell in load_sweep(find_config(config), cache_folder(), plugins).cells}


def cells_of(config: str, store: Store, plugins: list[str] | None) -> dict[str, str]:
    """The ids of a sweep's cells with their names: as its last run noted them, or, if the config has changed since, worked out anew (needs torch)."""
    from dfqbench.sweep.config_file import find_config, noted_cells

    noted = noted_cells(config, store.root)
    if noted is not None:
        return noted
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.load import load_sweep

    return {cell.id: str(cell) for cell in load_sweep(find_config(config), cache_folder(), plugins).cells}

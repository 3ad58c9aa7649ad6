"""Options and checks that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfqbench.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from dfqbench.store import Store
    from dfqbench.sweep.load import LoadedSweep

Config = Annotated[str, typer.Argument(help="A sweep: a YAML file, or the name of a shipped one (quickstart, cifar10, ...).")]
Results = Annotated[Path, typer.Option("--results", envvar="DFQBENCH_RESULTS", readable=False, help="The results folder.")]
DEFAULT_RESULTS = Path("results")
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="A Python file that registers methods, allocators or sets; may be given again.")]


def one_of(option: str, given: str, known: Iterable[str]) -> None:
    names = list(known)
    if given not in names:
        raise UserError(f"{option} {given!r}: {', '.join(names[:-1])} or {names[-1]}")


def run_plugins(files: list[str] | None) -> None:
    """Runs those of `--plugin`."""
    for file in files or []:
        from dfqbench.method.registry import load_plugin

        load_plugin(file)


def tell_broken(plugins: dict[str, str]) -> None:
    """Says which plug-ins are broken, and why."""
    for plugin, why in plugins.items():
        print(f"broken plug-in {plugin}: {why}", file=sys.stderr)


def print_with_summaries(heading: tuple[str, ...], rows: dict[tuple[str, ...], str]) -> None:
    """A table with a line of text below each row."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    widths, console = [max(map(len, column)) for column in zip(heading, *rows, strict=True)], Console()
    for row in (heading, *rows):
        line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), style="bold" if row is heading else None, highlight=False, markup=False, soft_wrap=True)
        if row is not heading:
            console.print(Padding(Text(rows[row], style="dim"), (0, 0, 0, 2)))


def console_of(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def load(config: str, results: Path, plugins: list[str] | None, writable: bool = False) -> tuple[Store, LoadedSweep]:
    from dfqbench.store import Store
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.config_file import find_config
    from dfqbench.sweep.load import load_sweep

    path = find_config(config)
    store = Store(results)
    loaded = load_sweep(path, cache_folder(), plugins)
    return Store(results, writable=True) if writable else store, loaded

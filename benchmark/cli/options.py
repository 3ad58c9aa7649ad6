"""Options and checks that several commands share."""

from __future__ import annotations

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
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="A Python file that registers more methods; may be given again.")]


def one_of(option: str, given: str, known: Iterable[str]) -> None:
    names = list(known)
    if given not in names:
        raise UserError(f"{option} {given!r}: {', '.join(names[:-1])} or {names[-1]}")


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

"""dfqbench models, sets, allocators and protocols: what an experiment can be made of, beside methods."""

from __future__ import annotations

import csv
import sys
from typing import Annotated

import typer

from dfqbench.cli.options import Plugins, one_of, print_with_summaries, run_plugins, tell_broken
from dfqbench.errors import UserError, nearest
from dfqbench.task import KINDS


def sets(pattern: Annotated[str, typer.Argument(help="A wildcard, like 'cifar*'.")] = "*", plugin: Plugins = None) -> None:
    """List the evaluation sets: built in, of installed packages, and of plug-in files."""
    from rich.console import Console
    from rich.table import Table

    from dfqbench.data import list_sets
    from dfqbench.method import plugins

    run_plugins(plugin)
    found = list_sets(pattern)
    tell_broken(plugins.broken)
    if not found:
        raise UserError(f"no evaluation set matches {pattern!r}: {nearest(pattern, [name for name, _, _ in list_sets()])}")
    shown = Table(box=None, pad_edge=False)
    for heading in ("set", "from", ""):
        shown.add_column(heading, no_wrap=bool(heading))
    for row in found:
        shown.add_row(*row)
    Console().print(shown)


def allocators(plugin: Plugins = None) -> None:
    """List who can choose a bit width for each layer: built in, of installed packages, and of plug-in files."""
    from dfqbench.method import plugins
    from dfqbench.method.allocator import list_allocators

    run_plugins(plugin)
    found = list_allocators()
    tell_broken(plugins.broken)
    rows: dict[tuple[str, ...], str] = {}
    for each in found:
        info, tasks = each.info, " ".join(kind for kind in KINDS if kind in each.tasks)
        rows[info.name, info.paper, info.fidelity, tasks, "too" if each.of_activations else "no", str(info.source)] = info.summary
    print_with_summaries(("allocator", "paper", "follows", "tasks", "activations", "from"), rows)


def protocols(
    given: Annotated[list[str] | None, typer.Argument(help="Names and YAML files; default: the built-in ones.")] = None,
) -> None:
    """Show protocols side by side, a line per rule: the built-in ones, or those that are named (a file is checked by that)."""
    from rich.console import Console
    from rich.table import Table

    from dfqbench.quantization import PROTOCOLS, Protocol, find_protocol

    chosen = [find_protocol(name) for name in given] if given else list(PROTOCOLS.values())
    shown = Table(box=None, pad_edge=False)
    shown.add_column("rule", no_wrap=True)
    for protocol in chosen:
        shown.add_column(protocol.name, overflow="fold")
    shown.add_column("meaning")
    for rule, field in Protocol.model_fields.items():
        if rule == "name":
            continue
        values = [getattr(protocol, rule) for protocol in chosen]
        shown.add_row(rule, *("null" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in values), field.description or "")
    Console().print(shown)


def models(
    patterns: Annotated[list[str] | None, typer.Argument(metavar="PATTERN...", help="Wildcards, like 'pytorchcv:resnet*_cifar10'.")] = None,
    check: Annotated[str | None, typer.Option(metavar="PROTOCOL", help="Quantize each, untrained, and say how much of its work it is.")] = None,
    output: Annotated[str, typer.Option("--format", help="Of --check: text, markdown or csv.")] = "text",
) -> None:
    """List the networks that can be teachers; `my_nets.py:*` and `my_package.nets:*` list a file's and a module's factories.

    With --check each is built with random weights, traced and quantized: what goes through, and which share of its multiplications has quantized
    weights and quantized activations. A large network takes a minute.
    """
    from dfqbench.store.cache import cache_folder
    from dfqbench.teachers import list_models
    from dfqbench.teachers.spec import zoo_kind

    found: list[str] = []
    for pattern in patterns or ["*"]:
        matching = list_models(pattern, cache_folder())
        if not matching:
            raise UserError(f"no network matches {pattern!r}: {nearest(pattern, list_models(cache=cache_folder()))}")
        found += [name for name in matching if name not in found]
    if check is None:
        print("\n".join(name if zoo_kind(name) == "classify" else f"{name}  ({zoo_kind(name)})" for name in found))
        return
    one_of("--format", output, ("text", "markdown", "csv"))
    from dfqbench.quantization import find_protocol
    from dfqbench.sweep.students import HEADINGS, checked

    protocol, rows = find_protocol(check), []
    separator = {"text": "  ", "markdown": " | ", "csv": ","}[output]
    if output != "text":
        print(separator.join(HEADINGS) if output == "csv" else f"| {separator.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for name in found:
        rows.append(checked(name, protocol))
        row = rows[-1].words()
        if output == "csv":
            csv.writer(sys.stdout, lineterminator="\n").writerow(row)
        else:
            print(f"{name}: {rows[-1]}" if output == "text" else f"| {separator.join(row)} |", flush=True)
    whole = sum(row.is_whole for row in rows)
    print(f"{whole} of {len(rows)} wholly quantized under {protocol.name}", file=sys.stderr)

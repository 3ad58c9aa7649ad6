"""dfqbench methods: list, show, new, check."""

from __future__ import annotations

import fnmatch
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfqbench.cli.options import Plugins, print_with_summaries, run_plugins, tell_broken
from dfqbench.errors import UserError, nearest

if TYPE_CHECKING:
    from dfqbench.method.catalogue import Catalogue
    from dfqbench.method.info import MethodInfo
    from dfqbench.method.settings import MethodConfig

app = typer.Typer(help="List the methods; show one with its settings; write a new one; check one.", invoke_without_command=True)


@app.callback()
def methods(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_methods("*", None)


@app.command("list")
def list_methods(pattern: Annotated[str, typer.Argument(help="A wildcard, like 'z*'.")] = "*", plugin: Plugins = None) -> None:
    """List methods: paper, what the implementation follows, tasks, what it needs, whether bit widths share synthesis, where it comes from."""
    entries = _catalogue(plugin).entries
    found = [entry.info for name, entry in entries.items() if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"no method matches {pattern!r}: {nearest(pattern, entries)}")
    heading = ("method", "paper", "follows", "tasks", "needs", "lockstep", "from")
    print_with_summaries(heading, {_row(info): info.summary for info in found})


def _row(info: MethodInfo) -> tuple[str, ...]:
    needs = ", ".join("BN" if need == "statistics" else need for need in info.needs)
    return info.name, info.paper, info.fidelity, " ".join(info.tasks), needs or "logits only", "yes" if info.shares_synthesis else "no", info.origin


@app.command("show")
def show_method(name: str, plugin: Plugins = None) -> None:
    """Show one method: what it is, where it comes from, and every setting with default, unit, meaning and source."""
    from rich.console import Console
    from rich.table import Table

    from dfqbench.method.catalogue import Entry
    from dfqbench.method.info import FIDELITY, NEEDS
    from dfqbench.method.registry import find_method

    known = _catalogue(plugin)
    entry = None if name in known.clashes else known.entries.get(name)
    if entry is None:  # says what is wrong, or finds what this process has registered since it was remembered
        entry = Entry.of(find_method(name))
    info, console = entry.info, Console()
    source = info.source
    lines = [
        f"{info.name}: {info.summary}",
        f"paper      {info.paper}",
        f"follows    {FIDELITY[info.fidelity]}",
        f"from       {info.origin}, {source.file}, sha256 {source.sha256[:12]}",
        f"tasks      {', '.join(info.tasks)}",
        *(f"needs      {NEEDS[need]}" for need in info.needs),
        f"lockstep   {'yes: one stream of images serves all bit widths' if info.shares_synthesis else 'no: the images depend on the student'}",
    ]
    if entry.rules:
        lines.append(f"own rules  {', '.join(entry.rules)}")
    for check, reason in entry.expected_failures.items():
        lines.append(f"fails      {check}: {reason}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not entry.settings:
        console.print("no settings")
        return
    console.print()
    shown = Table(box=None, pad_edge=False)
    for heading in ("setting", "default", "unit", "meaning", "source"):
        shown.add_column(heading, no_wrap=heading == "setting", overflow="fold")
    for setting in entry.settings:
        shown.add_row(setting.name, setting.default, setting.unit, setting.meaning, setting.source)
    console.print(shown)
    for preset, values in entry.presets.items():
        console.print(f"preset {preset}: {values}", highlight=False)
    for host, values in entry.hosted.items():
        console.print(f"host {host}: {values}", highlight=False)


@app.command("new")
def new_method(
    name: Annotated[str, typer.Argument(help="What it is to be called: lower case, words with hyphens.")],
    package: Annotated[bool, typer.Option("--package", help="An installable package instead of one file.")] = False,
    allocator: Annotated[bool, typer.Option("--allocator", help="Not a method, but an allocator of bit widths per layer.")] = False,
) -> None:
    """Write a working method, or allocator, into this folder: a file and a sweep over it, or a package with a test."""
    from dfqbench.method.scaffold import ALLOCATOR, METHOD, write_file, write_package

    written, then = (write_package if package else write_file)(name, ALLOCATOR if allocator else METHOD)
    print("\n".join(["wrote", *(f"  {path}" for path in written), "then", *(f"  {command}" for command in then)]))


@app.command("check")
def check_method(
    name: str,
    plugin: Plugins = None,
    given: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting to check it with; can be repeated.")] = None,
    allocator: Annotated[bool, typer.Option("--allocator", help="NAME is an allocator's.")] = False,
) -> None:
    """Run the conformance checks on a method or allocator, on a small random network: what held, what failed, how to mend it."""
    from dfqbench.method.allocator import find_allocator
    from dfqbench.method.registry import broken, find_method

    run_plugins(plugin)
    try:
        checked: Any = find_allocator(name) if allocator else find_method(name)
    finally:
        tell_broken(broken)
    settings = dict(_setting(pair, checked.Config) for pair in given or [])
    from dfqbench.testing import allocator_outcomes, outcomes

    print(f"{checked.info.name} ({checked.info.source})")
    started, counts = time.perf_counter(), dict.fromkeys(("held", "expected", "failed", "outdated"), 0)
    for outcome in (allocator_outcomes if allocator else outcomes)(checked, settings):
        counts[outcome.verdict] += 1
        print(f"  {'FAILED' if not outcome.good else outcome.verdict:<9} {outcome.check}: {outcome.meaning}")
        if outcome.verdict == "outdated":
            print("            what  it is declared in expected_failures, but it holds\n            mend  Take it out of expected_failures.")
        elif outcome.failure is not None:
            print(f"            what  {_indented(outcome.failure)}")
            print(
                f"            why   {outcome.excuse}" if outcome.excuse else f"            mend  {outcome.mend[:1].upper()}{outcome.mend[1:]}",
                flush=True,
            )
        sys.stdout.flush()
    failed = counts["failed"] + counts["outdated"]
    parts = [f"{counts['held']} held", f"{counts['expected']} failed as declared" if counts["expected"] else "", f"{failed} failed" if failed else ""]
    print(f"{sum(counts.values())} checks: {', '.join(filter(None, parts))} ({time.perf_counter() - started:.0f} s)")
    if failed:
        raise typer.Exit(1)


def _setting(pair: str, config: type[MethodConfig]) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or name not in config.model_fields:
        raise UserError(f"--set {pair}: NAME=VALUE is expected: {nearest(name, config.model_fields)}")
    return name, value


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n                  ")


def _catalogue(plugins: list[str] | None) -> Catalogue:
    """Every method. Plug-in files are run, so that nothing is taken from memory with them."""
    from dfqbench.method.catalogue import catalogue
    from dfqbench.store.cache import cache_folder

    run_plugins(plugins)
    found = catalogue(None if plugins else cache_folder())
    tell_broken(found.broken)
    return found

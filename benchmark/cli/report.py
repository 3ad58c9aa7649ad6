"""The command `report`: a store, or one sweep of it, as HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Plugins, Results
from dfqbench.cli.reading import Group, NamesFrom, OnlyConfig, Rows, RuleOption, named, read_cells, rule_of
from dfqbench.errors import UserError


def report(
    config: OnlyConfig = None,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[Path | None, typer.Option(readable=False, help="The HTML file to write; default: report.html in the results folder.")] = None,
    site: Annotated[
        Path | None, typer.Option(readable=False, metavar="DIR", help="Write a static site into this folder: an index and a page per block.")
    ] = None,
    rule: RuleOption = "last",
    rows: Rows = None,
    sort: Annotated[str, typer.Option(help="A bit width, or method, steps, seconds, size, ...; default: the narrowest width.")] = "",
    names_from: NamesFrom = None,
    group: Group = None,
    plugin: Plugins = None,
) -> None:
    """Write one HTML file with tables, plots, synthetic images and everything about every cell; it needs no network."""
    from dfqbench.analysis.tables.choice import Choice

    checked, choice = rule_of(rule), Choice(tuple(rows or ()), sort=sort)
    if site and out:
        raise UserError("--out is one file, --site a folder of files: give one of them")
    target = site or out or results / "report.html"
    if target.is_dir() and not site:
        raise UserError(f"--out {target}: a folder; name a file, like {target / 'report.html'}")
    reading = choice.of(named(read_cells(config, results, plugin, diverged_will_do=True), config, plugin, group, names_from))
    from dfqbench.analysis.report import INDEX, default_title, write_report, write_site

    title = default_title(reading.store) if config is None else f"dfqbench: {Path(config).stem}"
    try:
        if site:
            write_site(reading, site, title, checked, sort)
        else:
            write_report(reading, target, title, checked, sort)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from None
    print(target / INDEX if site else target)

"""The command `report`: a store, or one sweep of it, as HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Plugins, Results
from dfqbench.cli.results import OnlyConfig, RuleOption, named, read_cells, rule_of
from dfqbench.errors import UserError


def report(
    config: OnlyConfig = None,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[Path | None, typer.Option(readable=False, help="The HTML file to write; default: report.html in the results folder.")] = None,
    rule: RuleOption = "last",
    plugin: Plugins = None,
) -> None:
    """Write one HTML file with tables, plots, synthetic images and everything about every cell; it needs no network."""
    checked = rule_of(rule)
    target = out or results / "report.html"
    if target.is_dir():
        raise UserError(f"--out {target}: a folder; name a file, like {target / 'report.html'}")
    reading = named(read_cells(config, results, plugin, diverged_will_do=True), config, plugin)
    from dfqbench.analysis.report import default_title, write_report

    try:
        write_report(reading, target, default_title(reading.store) if config is None else f"dfqbench: {Path(config).stem}", checked)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from None
    print(target)

"""The commands that read a store: table, compare, plot; merge, which brings stores together; wandb sync.

None of them needs torch, unless a sweep has changed since it ran and has to be loaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Plugins, Results, one_of
from dfqbench.cli.reading import Group, NamesFrom, OnlyConfig, Rows, RuleOption, named, read_cells, rule_of
from dfqbench.errors import UserError, counted, nearest

if TYPE_CHECKING:
    from dfqbench.analysis.tables.blocks import Block
    from dfqbench.analysis.tables.printed import Table

Columns = Annotated[
    str,
    typer.Option(
        help="Only these, in this order, commas between: bit widths, follows, steps, seeds, seconds; beside each accuracy drop, published, "
        "size (MB), compression, weight-bits, bops. With + before each: the usual columns and these."
    ),
]
TABLE_FORMATS = ("text", "markdown", "latex", "html", "csv", "csv-means")


def table(
    config: OnlyConfig = None,
    results: Results = DEFAULT_RESULTS,
    rule: RuleOption = "last",
    output: Annotated[
        str, typer.Option("--format", help="text, markdown, latex, html; csv: a line per cell; csv-means: a line per row and width.")
    ] = "text",
    layout: Annotated[
        str,
        typer.Option(
            help="blocks: a table per teacher and evaluation set; wide: one table of methods by networks and bit widths; "
            "factorial: sources of images by trainings of the student."
        ),
    ] = "blocks",
    rows: Rows = None,
    columns: Columns = "",
    sort: Annotated[str, typer.Option(help="A bit width, or method, steps, seconds, size, ...; default: the narrowest width.")] = "",
    best_first: Annotated[bool, typer.Option("--best-first/--worst-first", help="Rows that lack a column or diverged are last either way.")] = True,
    names_from: NamesFrom = None,
    bib: Annotated[Path | None, typer.Option(readable=False, help="With --format latex: write the BibTeX of the table's methods here.")] = None,
    group: Group = None,
    plugin: Plugins = None,
) -> None:
    """Print the table of finished cells."""
    from dfqbench.analysis.tables.choice import Choice
    from dfqbench.analysis.tables.choice import Columns as Shown

    checked, choice = rule_of(rule), Choice(tuple(rows or ()), Shown.of(columns), sort, best_first)
    one_of("--format", output, TABLE_FORMATS)
    one_of("--layout", layout, ("blocks", "wide", "factorial"))
    if layout != "blocks" and output.startswith("csv"):
        raise UserError(f"--layout {layout}: --format {output} has a line for every cell or mean, whatever the layout")
    if bib and output != "latex":
        raise UserError(f"--bib {bib}: only --format latex cites")
    reading = read_cells(config, results, plugin, diverged_will_do=True)
    reading = choice.of(named(reading, config, plugin, group, names_from))
    if output == "csv":
        from dfqbench.analysis.frames import frame_of

        frame_of([reading]).to_csv(sys.stdout, index=False)
        return
    from dfqbench.analysis.ledger import load_ledger
    from dfqbench.analysis.per_image import PerImage
    from dfqbench.analysis.tables.blocks import blocks
    from dfqbench.analysis.tables.means import means_frame, ranking
    from dfqbench.analysis.tables.printed import arranged
    from dfqbench.analysis.tables.wide import side_by_side
    from dfqbench.analysis.tables.without_data import agreements

    found = blocks([*reading.results, *reading.unfinished], checked, ledger=load_ledger(), per_image=PerImage(reading))
    found, without_data = [arranged(block, choice) for block in found], agreements(reading, choice)
    if output == "csv-means":
        means_frame(found, without_data).to_csv(sys.stdout, index=False)
        return
    if layout == "factorial":
        tables, ranks = _factorial(found), []
    else:
        tables, ranks = [*(side_by_side(found) if layout == "wide" else found), *without_data], ranking(found)
    tables = [arranged(table, choice) for table in tables]
    if output == "text":
        from rich.console import Console

        from dfqbench.analysis.tables.terminal import print_tables

        print_tables(tables, ranks, Console())
    else:
        from dfqbench.analysis.tables.formats import html, markdown
        from dfqbench.analysis.tables.latex import latex

        formats = {"markdown": markdown, "latex": latex, "html": html}
        print(formats[output](tables, ranks), end="")
    if bib:
        _write_bibliography(bib, {record["cell"]["method"] for record in (*reading.results, *reading.unfinished)})


def _factorial(found: list[Block]) -> list[Table]:
    from dfqbench.analysis.tables.factorial import factorials, written

    tables = factorials(found)
    if not tables:
        raise UserError("--layout factorial: no cell trains a student on a host's images, as method qat does: {qat: {host: gdfq, student: kl}}")
    return [written(table) for table in tables]


def _write_bibliography(path: Path, methods: set[str]) -> None:
    from dfqbench.analysis.tables.papers import bibliography
    from dfqbench.files import write_atomically

    entries, lacking = bibliography(methods)
    try:
        write_atomically(path, entries)
    except OSError as error:
        raise UserError(f"--bib {path}: {error.strerror}") from None
    if lacking:
        print(f"{path}: no entry for {', '.join(lacking)}, which is cited nowhere", file=sys.stderr)


def plot(
    config: OnlyConfig = None,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[Path | None, typer.Option(readable=False, help="Folder to write to; default: figures in the results folder.")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only this kind; may be given again. accuracy, widths, published, cost, size, curves, losses, drop, ablation, factorial."),
    ] = None,
    output: Annotated[list[str] | None, typer.Option("--format", help="png, pdf or svg; may be given again. Default: all three.")] = None,
    width: Annotated[str, typer.Option(help="How wide figures are printed: page (7 in) or column (3.3 in).")] = "page",
    rule: RuleOption = "last",
    rows: Rows = None,
    sort: Annotated[str, typer.Option(help="Which rows come first, as in table.")] = "",
    group: Group = None,
    names_from: NamesFrom = None,
    plugin: Plugins = None,
) -> None:
    """Draw the plots of finished cells."""
    from dfqbench.analysis.plots.drawn import NothingToDraw
    from dfqbench.analysis.plots.kinds import KINDS
    from dfqbench.analysis.plots.style import FORMATS, WIDTHS
    from dfqbench.analysis.tables.choice import Choice

    checked, choice = rule_of(rule), Choice(tuple(rows or ()), sort=sort)
    one_of("--width", width, WIDTHS)
    for name in kind or []:
        if name not in KINDS:
            raise UserError(f"--kind {name!r}: {nearest(name, KINDS)}")
    for name in output or []:
        one_of("--format", name, FORMATS)
    reading = choice.of(named(read_cells(config, results, plugin), config, plugin, group, names_from))
    if reading.without_data:
        why = (
            f"{counted(len(reading.without_data), 'cell')} without data: there is no accuracy, `dfqbench table` shows the agreement with the teacher"
        )
        if not reading.results:
            raise UserError(f"nothing to draw of {why}")
        print(f"not drawn: {why}", file=sys.stderr)
    from dfqbench.analysis.plots.figures import drawn_kinds, prepare
    from dfqbench.files import write_atomically

    folder = out or results / "figures"
    for name, found in drawn_kinds(prepare(reading, checked, width, choice), kind or KINDS, output or FORMATS):
        if isinstance(found, NothingToDraw):
            if kind:
                raise UserError(f"{name}: {found}")
            print(f"not drawn: {name}: {found}", file=sys.stderr)
            continue
        try:
            for file, content in found:
                write_atomically(folder / file, content)
                print(folder / file)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}") from None


def compare(
    first: Annotated[str, typer.Argument(metavar="CELL_OR_FILE", help="A finished cell's id, or as many of its first letters as no other has.")],
    second: Annotated[str, typer.Argument(metavar="CELL_OR_FILE", help="Another one, on the same evaluation set; or a student's file.")],
    results: Results = DEFAULT_RESULTS,
    on: Annotated[str | None, typer.Option("--on", help="For files: the evaluation set to measure them on, as in a config.")] = None,
    decode: Annotated[str | None, typer.Option(help="For files of detectors: the function that makes boxes, FILE.py:NAME.")] = None,
) -> None:
    """Compare two finished cells image by image: difference with interval, McNemar's exact test, and what else they differ in."""
    from dfqbench.analysis.compare import compare as compared
    from dfqbench.analysis.compare import in_words
    from dfqbench.store import Store

    files = [given for given in (first, second) if Path(given).is_file()]
    if files and on is None:
        raise UserError(f"{files[0]} is a file: say with --on which evaluation set to measure it on")
    measured = {}
    if on is not None:
        from dfqbench.run.evaluation import measure

        for given in files:
            found = measure(given, on, results, decode=decode)
            measured[given] = found.result, found.per_image
    for line in in_words(compared(Store(results), first, second, measured)):
        print(line)


def merge(
    others: Annotated[list[Path], typer.Argument(metavar="OTHER_RESULTS...", readable=False, help="Results folders of others.")],
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Copy the cells of other results folders into this one; nothing is overwritten, conflicts are reported."""
    from dfqbench.analysis import merge as merging

    done = merging.merge(others, results)
    for line in done.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    for line in done.conflicts:
        print(f"conflict: {line}", file=sys.stderr)
    print(f"{done} ({results})")
    if done.conflicts:
        raise typer.Exit(1)


wandb_app = typer.Typer(help="Weights & Biases.", no_args_is_help=True)


@wandb_app.callback()
def _wandb() -> None:
    """Weights & Biases."""


@wandb_app.command("sync")
def wandb_sync(
    config: OnlyConfig = None,
    results: Results = DEFAULT_RESULTS,
    project: Annotated[str, typer.Option(help="The W&B project.")] = "dfqbench",
    entity: Annotated[str | None, typer.Option(help="A W&B user or team; default: the one that is logged in.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Write offline folders into wandb/ of the results folder, for `wandb sync`.")] = False,
    students: Annotated[bool, typer.Option("--students", help="Also the cells' quantized networks, as artifacts of type model.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also those that were pushed before.")] = False,
    plugin: Plugins = None,
) -> None:
    """Push finished cells to Weights & Biases, also those that ran without it; each once."""
    from pydantic import ValidationError

    from dfqbench.store.environment import WANDB, forget
    from dfqbench.sweep.schema import Tracking
    from dfqbench.tracking.runs import sync
    from dfqbench.tracking.students import Students

    try:
        where = Tracking(wandb="offline" if offline else "online", project=project, entity=entity)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]} {first['input']!r}: letters, digits, '.', '_' and '-' only") from None
    reading = read_cells(config, results, plugin)
    forget(WANDB)
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise UserError("W&B is not installed: pip install wandb") from None
    if not offline and not wandb.login(prompt=False):
        raise UserError("W&B: not logged in: `wandb login`, or set WANDB_API_KEY; without an account: --offline")
    networks = Students() if students else None
    try:
        pushed, there = sync(reading.store, reading.finished, where, again, print, networks)
    except (wandb.Error, OSError, TimeoutError) as error:
        raise UserError(f"W&B: {(str(error).splitlines() or [type(error).__name__])[0]}; the same command goes on with what is missing") from None
    place = f"{results / 'wandb'}: upload them with `wandb sync {results / 'wandb'}/offline-run-*`" if offline else f"project {project}"
    for line in networks.skipped if networks else ():
        print(f"skipped: {line}", file=sys.stderr)
    print(f"{pushed} pushed" + (f", {there} already there" if there else "") + (f"; {networks}" if networks else "") + f" ({place})")

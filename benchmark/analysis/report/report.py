"""The report: one HTML file that holds everything about a store and opens from disk without a network. No torch here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dfqbench.analysis.plots.drawn import Drawn
from dfqbench.analysis.plots.figures import prepare
from dfqbench.analysis.records import DIVERGED, Reading, said_of
from dfqbench.analysis.report import pictures
from dfqbench.analysis.report.assets import PAGE, Assets, Inside
from dfqbench.analysis.report.comparisons import HEADS, bold_means, comparisons
from dfqbench.analysis.report.data import Data
from dfqbench.analysis.report.keytable import arrange, key_tables
from dfqbench.analysis.report.layers import chosen
from dfqbench.analysis.tables import formats
from dfqbench.analysis.tables.blocks import Rule
from dfqbench.analysis.tables.means import ranking
from dfqbench.analysis.tables.without_data import agreements
from dfqbench.errors import counted
from dfqbench.quantization.protocol_words import in_words
from dfqbench.store import Store

NOT_SHOWN = " (not in the tables: a newer try counts, or its cell.json cannot be read)"
BREAKS = re.compile(r"([_=(,])(?=[^\s&])")
CODE = re.compile(r"`([^`]+)`")
OPEN = 4  # blocks that are unfolded; of more, each is opened by its title


def write_report(reading: Reading, out: Path, title: str, rule: Rule = "last", sort: str = "") -> None:
    """sort: as in Choice. Raises OSError where the file cannot be written; then the old one, if any, stays."""
    from dfqbench.files import write_atomically

    write_atomically(out, page(reading, title, rule, root_from(out.parent, reading.store), sort))


def root_from(folder: Path, store: Store) -> str | None:
    """The results folder as seen from one of its folders; None from elsewhere: a page must not say where things lie on this machine."""
    here, root = folder.resolve(), store.root.resolve()
    return Path(os.path.relpath(root, here)).as_posix() if here.is_relative_to(root) else None


def page(reading: Reading, title: str, rule: Rule = "last", root: str | None = None, sort: str = "") -> str:
    """The whole file; the same store gives the same text. root: the results folder as seen from the file, whose cells it then links to."""
    return view(arrange(prepare(reading, rule), sort), title, Inside(), root)


def view(drawn: Drawn, title: str, assets: Assets, root: str | None = None, index: str = "") -> str:
    """A page about these blocks, and what their reading has without data. index: the address of the page that it belongs to."""
    reading, data = drawn.reading, Data(drawn, assets, root)
    without_data = agreements(reading)
    return render(
        "page.html",
        assets,
        title=title,
        index=index,
        summary=summary_of(drawn),
        bold_means=bold_means(drawn),
        tables=list(zip(key_tables(drawn), pictures.of_blocks(drawn, assets), strict=True)),
        opened=len(drawn.blocks) <= OPEN,
        ranks=ranking(drawn.blocks) if drawn.blocks else [],
        without_data=Markup(formats.html(without_data, page=False)) if without_data else "",
        comparisons=list(comparisons(drawn)),
        comparison_heads=HEADS,
        layers=chosen(reading.finished),
        plots=pictures.of_all(drawn, assets) if drawn.blocks else [],
        data=data,
        protocols=_protocols(reading),
        failures=_failures(reading),
        skipped=skipped_of(reading),
    )


def render(template: str, assets: Assets, **parts: Any) -> str:
    """A page from page/: everything is escaped there but style, script and data."""
    found = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    inside = {"style": "style.css", "script": "page.js"}
    texts = {name: Markup("" if file in assets.addresses else (PAGE / file).read_text(encoding="utf-8")) for name, file in inside.items()}
    found.filters |= {"breakable": _breakable, "coded": _coded}
    return found.get_template(template).render(parts, addresses=assets.addresses, inside=texts, counted=counted)


def _breakable(name: str) -> Markup:
    """Escaped, with places where a narrow column may break it: between settings rather than inside words."""
    return Markup(BREAKS.sub(r"\1<wbr>", str(escape(name))))


def skipped_of(reading: Reading) -> list[str]:
    """Files that could not be read, by their place in the results folder."""
    return [line.replace(f"{reading.store.root}/", "") for line in reading.skipped]


def _coded(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    return Markup(CODE.sub(r"<code>\1</code>", str(escape(text))))


def summary_of(drawn: Drawn) -> str:
    """How many cells there are, of what, and what became of the others."""
    reading = drawn.reading
    methods = {r["cell"]["method"] for r in reading.finished}
    teachers = {r["cell"]["teacher"]["weights_sha256"] for r in reading.finished}
    said = [f"{counted(len(reading.finished), 'finished cell')}: {counted(len(methods), 'method')}, {counted(len(teachers), 'teacher')}"]
    if drawn.blocks or not reading.without_data:
        chosen = "the last epoch" if drawn.rule == "last" else "the best epoch on the test set, which is a choice made with test labels"
        said[0] += f", {counted(len(drawn.blocks), 'block')} of what can be compared. Reported is {chosen}"
    said[0] += "."
    if reading.without_data:
        said.append(f"{counted(len(reading.without_data), 'cell')} without data: no accuracy is known, only agreement with the teacher.")
    diverged = sum(failure["kind"] == DIVERGED for failure in reading.failures)
    for number, what in ((diverged, "diverged"), (len(reading.failures) - diverged, "failed")):
        said += [f"{counted(number, 'cell')} {what}."] * bool(number)
    if reading.skipped:
        said.append(
            f"{counted(len(reading.skipped), 'file')} could not be read and {'is' if len(reading.skipped) == 1 else 'are'} listed at the end."
        )
    uncompared = sum(len(entry.ids) for b in drawn.blocks for row in b.rows for entry in row.entries.values() if entry.estimate is None)
    if uncompared and drawn.rule == "last":
        said.append(f"{counted(uncompared, 'cell')} without per-image results of all seeds: in no comparison.")
    return " ".join(said)


def _protocols(reading: Reading) -> list[tuple[str, str, str]]:
    """(name, methods, rules in words): each set of rules once, with what a method changed for itself as a set of its own."""
    seen: dict[str, tuple[str, dict[str, Any], set[str]]] = {}
    for result in reading.finished:
        rules = result["cell"]["identity"]["protocol"]
        key = json.dumps([result["cell"]["protocol"], rules], sort_keys=True)
        seen.setdefault(key, (result["cell"]["protocol"], rules, set()))[2].add(result["cell"]["method"])
    return [(name, ", ".join(sorted(methods)), in_words(rules)) for name, rules, methods in (seen[key] for key in sorted(seen))]


def _failures(reading: Reading) -> list[tuple[str, str, str, str]]:
    """(name, cell, what is said of it, traceback)."""
    shown = {cell["id"] for cell in (*reading.unfinished, *reading.unfinished_without_data)}
    found = []
    for failure in reading.failures:
        cell = failure["cell"]
        name = f"{cell.get('label', '?')} {cell.get('teacher', {}).get('label', '')} {cell.get('bits', '')} seed {cell.get('seed', '?')}"
        said = said_of(failure) + NOT_SHOWN * (failure["id"] not in shown)
        found.append((name, failure["id"], said, str(failure["traceback"]) or "no traceback"))
    return found


def default_title(store: Store) -> str:
    return f"dfqbench: {store.root.resolve().name}"

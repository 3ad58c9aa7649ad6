"""The report: one HTML file that holds everything about a store and opens from disk without a network. No torch here."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.figures import drawn_kinds, prepare
from dfqbench.analysis.plots.kinds import KINDS
from dfqbench.analysis.records import DIVERGED, Reading, said_of
from dfqbench.analysis.report.data import Data
from dfqbench.analysis.tables import formats
from dfqbench.analysis.tables.blocks import Block, Rule
from dfqbench.analysis.tables.printed import ranking
from dfqbench.analysis.tables.without_data import agreements
from dfqbench.errors import counted
from dfqbench.quantization.protocol_words import in_words
from dfqbench.store import Store

PAGE = Path(__file__).parent / "page"
NOT_SHOWN = " (not in the tables: a newer try counts, or its cell.json cannot be read)"


def write_report(reading: Reading, out: Path, title: str, rule: Rule = "last") -> None:
    """Raises OSError where the file cannot be written; then the old one, if any, stays."""
    from dfqbench.files import write_atomically

    write_atomically(out, page(reading, title, rule))


def page(reading: Reading, title: str, rule: Rule = "last") -> str:
    """The whole file; the same store gives the same text."""
    drawn = prepare(reading, rule)
    data = Data(reading, drawn)
    parts = {
        "title": html.escape(title),
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "script": (PAGE / "page.js").read_text(encoding="utf-8"),
        "summary": _summary(reading, drawn, rule),
        "tables": formats.html(drawn.blocks, ranking(drawn.blocks), page=False) if drawn.blocks else "<p>No cell has an accuracy.</p>",
        "without_data": _without_data(reading),
        "link": '<a href="#without-data">Without data</a>' * bool(reading.without_data or reading.unfinished_without_data),
        "comparisons": "\n".join(_comparisons(drawn)) or "<p>No two rows of a column have per-image results under this rule.</p>",
        "plots": "\n".join(_plots(drawn)) if drawn.blocks else "<p>No cell has an accuracy to draw.</p>",
        "images": data.gallery(),
        "protocols": _protocols(reading),
        "failures": _failures(reading),
        "data": data.json(),
    }
    text = (PAGE / "page.html").read_text(encoding="utf-8")
    pieces = text.split("{{")
    return pieces[0] + "".join(parts[piece.split("}}", 1)[0]] + piece.split("}}", 1)[1] for piece in pieces[1:])


def _without_data(reading: Reading) -> str:
    """A section of its own, where there are such cells."""
    found = agreements(reading)
    if not found:
        return ""
    return f'<section id="without-data"><h2>Without data</h2>\n{formats.html(found, page=False)}</section>'


def _summary(reading: Reading, drawn: Drawn, rule: Rule) -> str:
    methods = {r["cell"]["method"] for r in reading.finished}
    teachers = {r["cell"]["teacher"]["weights_sha256"] for r in reading.finished}
    said = [f"{len(reading.finished)} finished cells: {counted(len(methods), 'method')}, {counted(len(teachers), 'teacher')}"]
    if drawn.blocks or not reading.without_data:
        chosen = "the last epoch" if rule == "last" else "the best epoch on the test set, which is a choice made with test labels"
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
    if drawn.per_image.missing:
        said.append(f"{counted(len(drawn.per_image.missing), 'cell')} without per-image results: in no comparison.")
    return html.escape(" ".join(said))


def _comparisons(drawn: Drawn) -> Iterator[str]:
    """Each row against the best of its column."""
    if any(e.against_best for b in drawn.blocks for row in b.rows for e in row.entries.values()):
        yield (
            "<p>Each row against the best of its column: difference with its 95 % interval (paired over test images, with the variance between "
            "seeds), p after Holm's correction within the column; and for the lowest common seed McNemar's exact test, with the images that only "
            "the one and only the other got right.</p>"
            "<p>Bold is the best row of a column, and each next one down to the first that can be told from it: p below 5 %, or three spreads "
            "below it where seeds are too few for a test. The variance between seeds is estimated over all rows of the column (empirical Bayes), "
            "so that two seeds are enough; a row that scatters far more than the others keeps its own. With 95 % confidence the truly best row is "
            "among the bold ones; not every row that equals it need be.</p>"
        )
    for block in drawn.blocks:
        parts = [part for width in block.widths if (part := _against_best(drawn, block, width))]
        if parts:
            yield f"<details><summary>{html.escape(block.title)}</summary>{''.join(parts)}</details>"


def _against_best(drawn: Drawn, block: Block, width: str) -> str:
    there = sorted(((row, entry) for row in block.rows if (entry := row.complete(width))), key=lambda pair: -pair[1].mean)
    if len(there) < 2 or not any(entry.against_best for _, entry in there):
        return ""
    best = there[0][0].label
    lines = []
    for row, entry in there:
        against = entry.against_best
        if against is None:
            continue
        test = drawn.per_image.mcnemar(*entry.pair) if entry.pair else None
        cells = [
            f"{against.value:+.2f}",
            f"{against.low:+.2f} to {against.high:+.2f}",
            f"{against.p:.2g}",
            f"{test.p:.2g}" if test else "-",
            f"{test.only_first} / {test.only_second}" if test else "-",
        ]
        lines.append(_line(row.label, cells))
    lines += [_line(row.label, [str(row.lost[width]), *"----"]) for row in block.rows if width in row.lost]
    heads = "".join(
        f'<th scope="col" class="number">{name}</th>' for name in ("difference", "95 % interval", "p (Holm)", "p (McNemar)", "only it / only best")
    )
    return (
        f'<h3>{width.upper()}, best: {html.escape(best)}</h3><div class="scroll"><table class="sortable">'
        f'<thead><tr><th scope="col">method</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(label: str, cells: list[str]) -> str:
    return f"<tr><td>{html.escape(label)}</td>" + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>"


def _plots(drawn: Drawn) -> Iterator[str]:
    for kind, pages in drawn_kinds(drawn, KINDS, ["svg"]):
        caption = KINDS[kind][0]
        if isinstance(pages, NothingToDraw):
            yield f"<p><b>{html.escape(caption[0].upper() + caption[1:])}</b>: {html.escape(str(pages))}.</p>"
            continue
        for number, (_, content) in enumerate(pages, 1):
            words = caption[0].upper() + caption[1:] + (f" ({number} of {len(pages)})" if len(pages) > 1 else "")
            address = "data:image/svg+xml;base64," + base64.b64encode(content).decode()
            yield f'<figure><figcaption>{html.escape(words)}</figcaption><img alt="{html.escape(words)}" src="{address}"></figure>'


def _protocols(reading: Reading) -> str:
    """Each set of rules once, with what a method changed for itself as a set of its own."""
    seen: dict[str, tuple[str, dict[str, Any], set[str]]] = {}
    for result in reading.finished:
        rules = result["cell"]["identity"]["protocol"]
        key = json.dumps([result["cell"]["protocol"], rules], sort_keys=True)
        seen.setdefault(key, (result["cell"]["protocol"], rules, set()))[2].add(result["cell"]["method"])
    return "\n".join(
        f"<h3>{html.escape(name)} <small>({html.escape(', '.join(sorted(methods)))})</small></h3><p>{html.escape(in_words(rules))}</p>"
        for name, rules, methods in (seen[key] for key in sorted(seen))
    )


def _failures(reading: Reading) -> str:
    parts = []
    shown = {cell["id"] for cell in (*reading.unfinished, *reading.unfinished_without_data)}
    for failure in reading.failures:
        cell = failure["cell"]
        name = f"{cell.get('label', '?')} {cell.get('teacher', {}).get('label', '')} {cell.get('bits', '')} seed {cell.get('seed', '?')}"
        said = said_of(failure) + NOT_SHOWN * (failure["id"] not in shown)
        parts.append(
            f"<details><summary><b>{html.escape(name)}</b> (cell {html.escape(failure['id'])}) {html.escape(said)}</summary>"
            f"<pre>{html.escape(str(failure['traceback']) or 'no traceback')}</pre></details>"
        )
    skipped = [line.replace(f"{reading.store.root}/", "") for line in reading.skipped]
    if skipped:
        parts.append("<p>Not read, and left as they are:</p><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in skipped) + "</ul>")
    return "\n".join(parts) or "<p>No cell diverged or failed, and every file could be read.</p>"


def default_title(store: Store) -> str:
    return f"dfqbench: {store.root.resolve().name}"

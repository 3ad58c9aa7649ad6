"""Tables as text for people and for papers: terminal, markdown, LaTeX, HTML, CSV. No torch here."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from benchmark.tables import Block, Entry, Ranking, Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text as Rich

LEFT = ("method", "follows")
NARROWEST = 16


@dataclass(frozen=True)
class Text:
    """One printed entry of a table."""

    text: str
    bold: bool = False


def grid(block: Block) -> tuple[list[str], list[list[Text]]]:
    """Column headings and rows, as every format prints them."""
    columns: list[tuple[str, Callable[[Row], Text]]] = [
        ("method", lambda row: Text(row.label + row.mark)),
        ("follows", lambda row: Text(row.fidelity)),
        ("steps x batch", lambda row: Text(row.budget)),
        ("seeds", lambda row: Text(row.seeds)),
    ]
    for width in block.widths:
        columns += [
            (width, partial(_of_entry, width, lambda e: Text(str(e), e.best))),
            ("drop", partial(_of_entry, width, lambda e: Text(f"{e.drop:.2f}".replace("-0.00", "0.00")))),
        ]
        if any(width in row.entries and row.entries[width].published for row in block.rows):
            columns.append(("published", partial(_of_entry, width, lambda e: Text(claim_of(e)))))
    columns.append(
        (f"{block.time}/cell".replace("seconds", "s"), lambda row: Text(f"{row.seconds:.0f}" if row.seconds >= 10 else f"{row.seconds:.2g}"))
    )
    return [head for head, _ in columns], [[text_of(row) for _, text_of in columns] for row in block.rows]


def _of_entry(width: str, text_of: Callable[[Entry], Text], row: Row) -> Text:
    return text_of(row.entries[width]) if width in row.entries else Text("-")


def claim_of(entry: Entry) -> str:
    """`90.11-90.25 (-3.2 se)`: what is published, and how far the measured mean is from it in its own standard errors."""
    if entry.published is None:
        return "-"
    distance = entry.published.distance(entry.mean)
    return f"{entry.published} ({distance / entry.error:+.1f} se)" if entry.error > 0 else f"{entry.published} ({distance:+.2f})"


def ranking_lines(ranking: Ranking) -> list[str]:
    """What the average ranks say, in words."""
    ranks = ", ".join(f"{label} {average:.2f}" for label, average in zip(ranking.labels, ranking.average, strict=True))
    lines = [f"average rank over {ranking.columns} columns (1 is best): {ranks}"]
    told = f"ranks further apart than {ranking.critical_difference:.2f} differ (Nemenyi, 5 %)"
    lines.append(told if len(ranking.labels) < 3 else f"{told}; Friedman's p that all are equal: {ranking.p:.2g}")
    if ranking.left_out:
        lines.append(f"not ranked, as they are not in every column: {', '.join(ranking.left_out)}")
    return lines


def print_blocks(found: list[Block], ranking: Ranking | None, console: Console) -> None:
    """In a narrow terminal long settings wrap and columns are left out, by name; a number is never cut. A file's lines are as long as need be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Rich

    for block in found:
        heads, rows, left_out = _fitting(*grid(block), console.width if console.is_terminal else None)
        place = console if console.is_terminal else Console(file=console.file, width=_width(heads, rows))
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in heads:
            shown.add_column(head, justify="left" if head in LEFT else "right", no_wrap=head != "method", overflow="fold")
        for row in rows:
            shown.add_row(*(_in_terminal(cell, console.is_terminal) for cell in row))
        console.print()
        console.print(Rich(block.title, style="bold"), soft_wrap=True)
        place.print(shown)
        notes = [f"left out, this terminal is narrow: {', '.join(left_out)}"] if left_out else []
        for note in notes + block.notes:
            console.print(Rich(f"  {note}", style="dim"), soft_wrap=True)
    if ranking:
        console.print()
        for line in ranking_lines(ranking):
            console.print(Rich(line), soft_wrap=True)


def _fitting(heads: list[str], rows: list[list[Text]], width: int | None) -> tuple[list[str], list[list[Text]], list[str]]:
    """Without the least important columns until the rest fits, the method's name folded to no less than NARROWEST."""
    left_out: list[str] = []
    for name in ("follows", "drop", "steps x batch", "seeds", "published"):
        fold = max(max(len(row[0].text) for row in rows) - NARROWEST, 0)
        if width is None or _width(heads, rows) - fold <= width:
            break
        keep = [i for i, head in enumerate(heads) if head != name]
        left_out += [name] * (len(keep) < len(heads))
        heads, rows = [heads[i] for i in keep], [[row[i] for i in keep] for row in rows]
    return heads, rows, left_out


def _width(heads: list[str], rows: list[list[Text]]) -> int:
    """Characters of a line; bold takes four more where it is written with stars."""
    columns = zip(heads, *rows, strict=True)
    return sum(max(len(head), *(len(cell.text) + 4 * cell.bold for cell in cells)) + 2 for head, *cells in columns)


def _in_terminal(cell: Text, is_terminal: bool) -> Rich:
    from rich.text import Text as Rich

    if not cell.bold:
        return Rich(cell.text)
    return Rich(cell.text, style="bold") if is_terminal else Rich(f"**{cell.text}**")


def markdown(found: list[Block], ranking: Ranking | None = None) -> str:
    """GitHub tables, each under its title, notes below."""
    parts = []
    for block in found:
        heads, rows = grid(block)
        head = "| " + " | ".join(heads) + " |\n|" + "|".join("---" if c in LEFT else "---:" for c in heads) + "|"
        body = "\n".join("| " + " | ".join(_in_markdown(cell) for cell in row) + " |" for row in rows)
        parts.append(f"**{block.title}**\n\n{head}\n{body}\n\n" + "\n".join(f"- {_escaped(note)}" for note in block.notes))
    if ranking:
        parts.append("\n".join(f"- {_escaped(line)}" for line in ranking_lines(ranking)))
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def _in_markdown(cell: Text) -> str:
    return f"**{_escaped(cell.text)}**" if cell.bold else _escaped(cell.text)


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$"}


def latex(found: list[Block], ranking: Ranking | None = None) -> str:
    """One booktabs table per block; needs \\usepackage{booktabs}."""
    parts = ["% needs \\usepackage{booktabs}; notes are part of the captions"]
    for block in found:
        heads, rows = grid(block)
        lines = [" & ".join(rf"\textbf{{{_tex(cell.text)}}}" if cell.bold else _tex(cell.text) for cell in row) + r" \\" for row in rows]
        parts += [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{_tex(block.title)}. {_tex('. '.join(_sentence(note) for note in block.notes))}.}}",
            rf"\begin{{tabular}}{{{''.join('l' if head in LEFT else 'r' for head in heads)}}}",
            r"\toprule",
            " & ".join(_tex(head) for head in heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    if ranking:
        parts += [_tex(". ".join(_sentence(line) for line in ranking_lines(ranking))) + ".", ""]
    return "\n".join(parts)


def _sentence(note: str) -> str:
    return note[:1].upper() + note[1:]


def _tex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def html_tables(found: list[Block], ranking: Ranking | None = None) -> str:
    """<section> elements with a table each; classes, no styles. The report page styles them; `--format html` adds a style of its own."""
    parts = []
    for block in found:
        heads, rows = grid(block)
        head = "".join(f'<th scope="col"{_side(name)}>{html.escape(name)}</th>' for name in heads)
        body = "\n".join("<tr>" + "".join(_in_html(cell, name) for cell, name in zip(row, heads, strict=True)) + "</tr>" for row in rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in block.notes)
        parts.append(
            f'<section class="block"><h3>{html.escape(block.title)}</h3>\n<div class="scroll"><table class="sortable">\n'
            f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n<ul class="notes">{notes}</ul></section>'
        )
    if ranking:
        parts.append('<ul class="notes">' + "".join(f"<li>{html.escape(line)}</li>" for line in ranking_lines(ranking)) + "</ul>")
    return "\n".join(parts) + "\n"


def _side(head: str) -> str:
    return "" if head in LEFT else ' class="number"'


def _in_html(cell: Text, head: str) -> str:
    text = html.escape(cell.text)
    return f"<td{_side(head)}>{f'<strong>{text}</strong>' if cell.bold else text}</td>"


def html_page(found: list[Block], ranking: Ranking | None = None) -> str:
    """A page of its own with nothing but the tables."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:80rem}table{border-collapse:collapse}"
        "th,td{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd}.number{text-align:right}.notes{color:#555}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>dfqbench tables</title><style>{style}</style></head><body>\n'
        f"{html_tables(found, ranking)}</body></html>\n"
    )


def means_frame(found: list[Block]) -> pd.DataFrame:
    """One line per row and bit width, with everything that is known about it."""
    lines = []
    for block in found:
        for row in block.rows:
            for width, entry in row.entries.items():
                against, claim = entry.against_best, entry.published
                lines.append(
                    {
                        "teacher": block.teacher,
                        "evaluation": block.evaluation,
                        "protocol": block.protocol,
                        "precision": block.precision,
                        "method": row.label + row.mark,
                        "follows": row.fidelity,
                        "steps": row.steps,
                        "batch": row.batch,
                        "bits": width,
                        "n": entry.n,
                        "seeds": " ".join(map(str, entry.seeds)),
                        "top1": round(entry.mean, 4),
                        "sd": None if entry.sd is None else round(entry.sd, 4),
                        "low": round(entry.estimate.low, 4) if entry.estimate else None,
                        "high": round(entry.estimate.high, 4) if entry.estimate else None,
                        "drop": round(entry.drop, 4),
                        "best": entry.best,
                        "below_best": round(-against.difference.value, 4) if against else None,
                        "p_holm": float(f"{against.difference.p:.3g}") if against else None,
                        "published": str(claim) if claim else None,
                        "from_published_in_se": round(claim.distance(entry.mean) / entry.error, 2) if claim and entry.error else None,
                        "seconds_per_cell": round(row.seconds, 3),
                        "seconds_of": block.time,
                    }
                )
    return pd.DataFrame(lines)

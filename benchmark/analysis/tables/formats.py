"""Tables as text for people and for papers: markdown, LaTeX, HTML, CSV; the terminal is table_terminal.py's. No torch here."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence

import pandas as pd

from dfqbench.analysis.tables.blocks import Block, Ranking
from dfqbench.analysis.tables.sheets import LEFT, Line, Sheet, Text, grouped_by_width, in_pieces, sheet, widths_of
from dfqbench.analysis.tables.wide import WideTable

Tables = Sequence[Block | WideTable]
TEXT = 85  # characters of LaTeX's small size across a page of an article
PAPER = 150  # of its scriptsize across both columns of a paper; both chosen here
NAME = 24  # of them for a row's name, which wraps


def ranking_lines(ranking: Ranking) -> list[str]:
    """What the average ranks say, in words."""
    ranks = ", ".join(f"{label} {average:.2f}" for label, average in zip(ranking.labels, ranking.average, strict=True))
    lines = [f"average rank over {ranking.columns} columns (1 is best): {ranks}"]
    told = f"ranks further apart than {ranking.critical_difference:.2f} differ (Nemenyi, 5 %)"
    lines.append(told if len(ranking.labels) < 3 else f"{told}; Friedman's p that all are equal: {ranking.p:.2g}")
    if ranking.left_out:
        lines.append(f"not ranked, as they are not in every column: {', '.join(ranking.left_out)}")
    return lines


def markdown(found: Tables, ranking: Ranking | None = None) -> str:
    """GitHub tables, each under its title, notes below. There are no groups of columns in markdown: every heading says its own."""
    parts = []
    for table in map(sheet, found):
        head = "| " + " | ".join(_markdown_heads(table)) + " |\n|" + "|".join("---" if c in LEFT else "---:" for c in table.heads) + "|"
        body = "\n".join("| " + " | ".join(_in_markdown(cell) for cell in line.cells) + " |" for line in table.lines)
        parts.append(f"**{table.title}**\n\n{head}\n{body}\n\n" + "\n".join(f"- {_escaped(note)}" for note in table.notes))
    if ranking:
        parts.append("\n".join(f"- {_escaped(line)}" for line in ranking_lines(ranking)))
    return "\n\n".join(parts) + "\n"


def _markdown_heads(table: Sheet) -> list[str]:
    headings = [f"{_escaped(heading)}<br>" for heading, count in table.groups for _ in range(count)]
    return [above + head for above, head in zip([""] * table.first + headings, table.heads, strict=True)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def _in_markdown(cell: Text) -> str:
    return f"**{_escaped(cell.text)}**" if cell.bold else _escaped(cell.text)


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$"}


def latex(found: Tables, ranking: Ranking | None = None) -> str:
    """One booktabs table per block or per blocks side by side; needs \\usepackage{booktabs}. What is too wide for a page is set small, in pieces."""
    parts = ["% needs \\usepackage{booktabs}; notes are part of the captions"]
    for table in map(sheet, found):
        name, *others = (width + 2 for width in widths_of(table))
        tight = bool(table.groups) or name + sum(others) > TEXT
        floating = "table*" if tight else "table"
        pieces = in_pieces(grouped_by_width(table), PAPER, [min(name, NAME + 2), *others]) if tight else [table]
        parts += [
            rf"\begin{{{floating}}}",
            r"\centering\scriptsize\setlength{\tabcolsep}{3pt}" if tight else r"\centering\small",
            rf"\caption{{{_tex(table.title)}. {_tex('. '.join(_sentence(note) for note in table.notes))}.}}",
            "\n\n\\medskip\n".join(_tabular(piece, tight) for piece in pieces),
            rf"\end{{{floating}}}",
            "",
        ]
    if ranking:
        parts += [_tex(". ".join(_sentence(line) for line in ranking_lines(ranking))) + ".", ""]
    return "\n".join(parts)


def _tabular(table: Sheet, tight: bool) -> str:
    columns = "".join("l" if head in LEFT else "r" for head in table.heads)
    columns = r"p{12em}" + columns[1:] if tight else columns
    grouped, column = [], table.first + 1
    if any(heading for heading, _ in table.groups):
        rules = []
        for _, count in table.groups:
            rules.append(rf"\cmidrule(lr){{{column}-{column + count - 1}}}")
            column += count
        above = [""] * table.first + [rf"\multicolumn{{{count}}}{{c}}{{{_wrapped(heading, count)}}}" for heading, count in table.groups]
        grouped = [" & ".join(above) + r" \\", " ".join(rules)]
    lines = [_tex_line(line, tight) for line in table.lines]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *grouped,
            " & ".join(_tex(head) for head in table.heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _wrapped(heading: str, count: int) -> str:
    """Over one or two columns a heading takes several lines: it must not widen them."""
    if count > 2:
        return _tex(heading)
    return r"\shortstack{" + r" \\ ".join(_tex(line) for line in textwrap.wrap(heading, 18 * count)) + "}"


def _tex_line(line: Line, wraps: bool) -> str:
    """What is said under a line is indented; a name that wraps is not stretched."""
    cells = [rf"\textbf{{{_tex(cell.text)}}}" if cell.bold else _tex(cell.text) for cell in line.cells]
    if line.under:
        cells[0] = rf"\quad {cells[0]}"
    elif wraps:
        cells[0] = rf"\raggedright {cells[0]}"
    return " & ".join(cells) + r" \\"


def _sentence(note: str) -> str:
    return note[:1].upper() + note[1:]


def _tex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def html_tables(found: Tables, ranking: Ranking | None = None) -> str:
    """<section> elements with a table each; classes, no styles. The report page styles them; `--format html` adds a style of its own.

    Blocks side by side have lines that belong to the one above: such a table cannot be sorted.
    """
    parts = []
    for table in map(sheet, found):
        body = "\n".join(
            f"<tr{_under(line)}>" + "".join(_in_html(cell, name) for cell, name in zip(line.cells, table.heads, strict=True)) + "</tr>"
            for line in table.lines
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
        kind = "grouped" if table.groups else "sortable"
        parts.append(
            f'<section class="block"><h3>{html.escape(table.title)}</h3>\n<div class="scroll"><table class="{kind}">\n'
            f'<thead>{_html_heads(table)}</thead>\n<tbody>\n{body}\n</tbody></table></div>\n<ul class="notes">{notes}</ul></section>'
        )
    if ranking:
        parts.append('<ul class="notes">' + "".join(f"<li>{html.escape(line)}</li>" for line in ranking_lines(ranking)) + "</ul>")
    return "\n".join(parts) + "\n"


def _html_heads(table: Sheet) -> str:
    heads = [f'<th scope="col"{_side(name)}>{html.escape(name)}</th>' for name in table.heads]
    if not table.groups:
        return f"<tr>{''.join(heads)}</tr>"
    first = [head.replace("<th ", '<th rowspan="2" ') for head in heads[: table.first]]
    groups = [f'<th scope="colgroup" colspan="{count}" class="group">{html.escape(heading)}</th>' for heading, count in table.groups]
    return f"<tr>{''.join(first + groups)}</tr>\n<tr>{''.join(heads[table.first :])}</tr>"


def _under(line: Line) -> str:
    return ' class="under"' if line.under else ""


def _side(head: str) -> str:
    return "" if head in LEFT else ' class="number"'


def _in_html(cell: Text, head: str) -> str:
    text = html.escape(cell.text)
    return f"<td{_side(head)}>{f'<strong>{text}</strong>' if cell.bold else text}</td>"


def html_page(found: Tables, ranking: Ranking | None = None) -> str:
    """A page of its own with nothing but the tables."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:80rem}table{border-collapse:collapse}"
        "th,td{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd}.number{text-align:right}.notes{color:#555}"
    )
    if any(isinstance(table, WideTable) for table in found):
        style += (
            ".group{text-align:center}.grouped td{border-bottom:0;border-top:1px solid #ddd}.grouped .under td{border:0;color:#555;font-size:85%}"
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

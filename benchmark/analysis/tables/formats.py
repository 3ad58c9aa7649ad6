"""Tables as text for people and for papers: pandas writes markdown and LaTeX, Jinja2 HTML (tables.html). No torch here."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Template

from dfqbench.analysis.tables.printed import LEFT, Tables, groups_of, in_pieces, names_of, notes_of, texts_of, widths_of
from dfqbench.analysis.tables.wide import WideTable

TEXT = 85  # characters of LaTeX's small size across a page of an article
PAPER = 136  # of its scriptsize across both columns of a paper; both chosen here
NAME = 26  # of them for a row's name, which wraps
MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "|*_"})
LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"±": r"$\pm$", "†": r"$\dagger$", "<": "$<$", ">": "$>$"}
LATEX_LETTERS = str.maketrans(LATEX | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})


def _escaped(texts: pd.DataFrame, bold: pd.DataFrame, letters: dict[int, str], before: str, after: str) -> pd.DataFrame:
    """`letters`: what some are written as; `before` and `after`: what goes around a bold text."""
    escaped = texts.map(lambda text: text.translate(letters))
    return escaped.mask(bold, before + escaped + after)


def markdown(found: Tables, ranks: Sequence[str] = ()) -> str:
    """GitHub tables, each under its title, notes below. There are no groups of columns in markdown: every heading says its own."""
    parts = []
    for table in found:
        texts = _escaped(*texts_of(table), MARKDOWN, "**", "**")
        above = {i: f"{heading}<br>".translate(MARKDOWN) for heading, places in groups_of(texts) if heading for i in places}
        heads = [above.get(i, "") + name for i, name in enumerate(names_of(texts))]
        sides = ["left" if name in LEFT else "right" for name in names_of(texts)]
        written = texts.to_markdown(index=False, headers=heads, colalign=sides, disable_numparse=True)
        parts += [f"**{table.title}**", written, "- " + "\n- ".join(notes_of(table)).translate(MARKDOWN)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in ranks).translate(MARKDOWN)]).strip() + "\n"


def latex(found: Tables, ranks: Sequence[str] = ()) -> str:
    """One booktabs table per block or per blocks side by side; needs \\usepackage{booktabs}. What is too wide for a page is set small, in pieces."""
    parts = ["% needs \\usepackage{booktabs}; notes are part of the captions; in a paper of two columns a table is a table*"]
    for table in found:
        texts, bold = texts_of(table)
        widths, escaped = widths_of(texts), _escaped(texts, bold, LATEX_LETTERS, r"\textbf{", "}")
        small = isinstance(table, WideTable) or sum(widths) > TEXT
        if small:  # names wrap, unstretched; what is said under a line is indented
            widths[0] = min(widths[0], NAME)
            escaped.iloc[:, 0] = [r"\raggedright " if says == "accuracy" else r"\quad " for _, says in texts.index] + escaped.iloc[:, 0]
        floating = "table*" if small else "table"
        tabulars = [_tabular(escaped.iloc[:, piece], "p{12em}" if small else "l") for piece in in_pieces(texts, widths, PAPER if small else TEXT)]
        parts += [rf"\begin{{{floating}}}", r"\centering\scriptsize\setlength{\tabcolsep}{3pt}" if small else r"\centering\small"]
        parts += [rf"\caption{{{table.title.translate(LATEX_LETTERS)}. {_sentences(notes_of(table))}}}"]
        parts += ["\n\\medskip\n".join(tabulars) + rf"\end{{{floating}}}" + "\n"]
    return "\n".join([*parts, _sentences(ranks)]).strip() + "\n"


def _tabular(texts: pd.DataFrame, first: str) -> str:
    """first: the first column's format. A heading takes several lines, as it must not widen its columns."""
    columns, groups = first + "".join("l" if name in LEFT else "r" for name in names_of(texts)[1:]), groups_of(texts)
    headed, headings = [(heading, places) for heading, places in groups if heading], dict[str, str]()
    if not headed:
        return str(texts.droplevel(0, axis=1).style.hide().to_latex(column_format=columns, hrules=True))
    for heading, places in headed:
        lines = r" \\ ".join(line.translate(LATEX_LETTERS) for line in textwrap.wrap(heading, 18 * len(places)))
        span = r"\multicolumn{1}{c}" if len(places) == 1 else ""  # pandas does it for two and more
        headings[heading] = rf"{span}{{\shortstack{{{lines}}}}}"
    style = texts.style.hide().format_index(lambda head: headings.get(str(head), ""), axis="columns", level=0)
    rules = " ".join(rf"\cmidrule(lr){{{places[0] + 1}-{places[-1] + 1}}}" for _, places in headed)
    written = style.to_latex(column_format=columns, hrules=True, multicol_align="c")
    return written.replace("\\\\\n", f"\\\\\n{rules}\n", 1)


def _sentences(notes: Sequence[str]) -> str:
    return " ".join(f"{note[:1].upper()}{note[1:]}.".translate(LATEX_LETTERS) for note in notes)


def html(found: Tables, ranks: Sequence[str] = (), page: bool = True) -> str:
    """A page of its own with nothing but the tables; else only <section> elements with a table each, whose classes the report page styles."""
    template = Template((Path(__file__).parent / "tables.html").read_text(encoding="utf-8"), autoescape=True)
    shown = [(table.title, *texts_of(table), notes_of(table)) for table in found]
    return str(template.render(tables=shown, ranks=ranks, left=LEFT, page=page, groups_of=groups_of, zip=zip)).strip() + "\n"

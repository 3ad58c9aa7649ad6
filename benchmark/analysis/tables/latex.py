"""Tables as a paper has them: booktabs, a short caption, notes below (threeparttable), methods cited; pdfLaTeX sets them. No torch here."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from dfqbench.analysis.tables.blocks import Block
from dfqbench.analysis.tables.choice import WIDTH
from dfqbench.analysis.tables.papers import papers
from dfqbench.analysis.tables.printed import (
    LEFT,
    WARNED,
    Table,
    Tables,
    entries_of,
    groups_of,
    in_pieces,
    lead_of,
    names_of,
    notes_of,
    texts_of,
    widths_of,
)  # fmt: skip
from dfqbench.analysis.tables.wide import WideTable
from dfqbench.metrics import METRICS

TEXT = 85  # characters of LaTeX's small size across a page of an article
PAPER = 136  # of its scriptsize across both columns of a paper; both chosen here
NAME = 26  # of them for a row's name, which wraps
PACKAGES = r"\usepackage{booktabs,threeparttable}"
HEAD = f"% needs {PACKAGES}; `dfqbench table --bib FILE` writes what is cited; in a paper of two columns a table is a table*"
ASCII = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}",
    "[": "{[}", "]": "{]}", '"': "''", "`": r"\textasciigrave{}",
}  # fmt: skip
OTHERS = {
    "±": r"$\pm$", "†": r"$\dagger$", "×": r"$\times$", "÷": r"$\div$", "·": r"$\cdot$", "−": "$-$", "µ": r"$\mu$", "≤": r"$\leq$", "≥": r"$\geq$",
    "≈": r"$\approx$", "→": r"$\rightarrow$", "∞": r"$\infty$", "–": "--", "—": "---", "’": "'", "‘": "`", "“": "``", "”": "''", "…": r"\dots{}",
    "°": r"\textdegree{}", "\u00a0": "~", "²": "$^2$", "³": "$^3$", "ς": r"$\varsigma$", "ο": "o",
}  # fmt: skip
PLAIN = re.compile(r"(\d+)(\.\d+)?( \$\\pm\$ \d+)?(\.\d+)?")  # an accuracy that is nothing but numbers
SECOND = "underlined: the best of the others"
DIGITS = "accuracies have the decimals of their standard error's first digit, or of its second where the first is 1, at most two"


def escaped(text: object) -> str:
    """As LaTeX has to read it. A letter that pdfLaTeX's usual fonts lack is named by its code."""
    return "".join(ASCII.get(letter, letter) if letter.isascii() else OTHERS.get(letter) or _foreign(letter) for letter in str(text))


def _foreign(letter: str) -> str:
    name = unicodedata.name(letter, "").split()
    if name[:1] == ["GREEK"] and "WITH" not in name and name[-2:-1] == ["LETTER"]:
        greek = name[-1].replace("LAMDA", "LAMBDA").lower()
        capital = "CAPITAL" in name
        only_greek = greek in ("gamma", "delta", "theta", "lambda", "xi", "pi", "sigma", "upsilon", "phi", "psi", "omega")
        return f"$\\{greek.capitalize() if capital else greek}$" if not capital or only_greek else greek[0].upper()
    return letter if 0xC0 <= ord(letter) <= 0x17F else rf"\texttt{{U+{ord(letter):04X}}}"


def latex(found: Tables, ranks: Sequence[str] = ()) -> str:
    """One table per block or per blocks side by side. What is too wide for a page is set small, in pieces."""
    labels = [_label(table) for table in found]
    numbered = [label + f"-{labels[:i].count(label) + 1}" * (Counter(labels)[label] > 1) for i, label in enumerate(labels)]
    parts = [HEAD, *(_table(table, label) for table, label in zip(found, numbered, strict=True))]
    return "\n".join([*parts, _sentences(ranks)]).strip() + "\n"


def _table(table: Table, label: str) -> str:
    texts, bold = texts_of(table, significant=True)
    written, widths = _written(table, texts, bold), widths_of(texts)
    small = isinstance(table, WideTable) or sum(widths) > TEXT
    if small:  # names wrap, unstretched; what is said under a line is indented
        widths[0] = min(widths[0], NAME)
        written.iloc[:, 0] = [r"\raggedright " if says == "accuracy" else r"\quad " for _, says in texts.index] + written.iloc[:, 0]
    heads = _heads(texts, table.metric.name if isinstance(table, Block) else METRICS["top1"].name)
    written.columns = pd.MultiIndex.from_tuples(heads)
    pieces = [_tabular(written.iloc[:, piece], "p{12em}" if small else "l") for piece in in_pieces(texts, widths, PAPER if small else TEXT)]
    notes = "\n".join(rf"\item[] {_sentences([note])}" for note in _notes(table, bold))
    floating = "table*" if small else "table"
    lines = [rf"\begin{{{floating}}}", r"\centering\scriptsize\setlength{\tabcolsep}{3pt}" if small else r"\centering\small"]
    lines += [rf"\caption{{{escaped(_caption(table))}}}", rf"\label{{{label}}}\smallskip"]
    lines += [piece + "\\medskip\n" for piece in pieces[:-1]]
    lines += [r"\begin{threeparttable}", pieces[-1] + r"\begin{tablenotes}[para,flushleft]\footnotesize", notes, r"\end{tablenotes}"]
    return "\n".join([*lines, r"\end{threeparttable}", rf"\end{{{floating}}}"]) + "\n"


def _caption(table: Table) -> str:
    if isinstance(table, Block):
        known = table.teacher_top1 == table.teacher_top1
        full = f" ({table.teacher_top1:.2f} % in full precision)" if known else ""
        apart = table.title.partition(" [")  # what tells it from another table of the same title
        score = "Top-1 accuracy" if table.metric.key == "top1" else table.metric.name
        return f"{score} (%) of {table.teacher}{full} on {table.evaluation}, protocol {table.protocol}, {table.precision}{apart[1]}{apart[2]}."
    return f"{table.title}."


def _label(table: Table) -> str:
    what = f"{table.evaluation} {table.teacher} {table.protocol} {table.precision}" if isinstance(table, Block) else table.title
    return "tab:" + "-".join(re.findall(r"[a-z0-9]+", what.lower()))[:60]


def _notes(table: Table, bold: pd.DataFrame) -> list[str]:
    notes = notes_of(table)
    if isinstance(table, Block | WideTable):
        place = next((i for i, note in enumerate(notes) if note.startswith("bold:")), len(notes) - 1)
        second = any(entry.second for row in table.rows for entry in row.entries.values())
        notes[place + 1 : place + 1] = [SECOND] * bool(second and bold.any(axis=None)) + [DIGITS]
    return notes


def _written(table: Table, texts: pd.DataFrame, bold: pd.DataFrame) -> pd.DataFrame:
    """Escaped, with numbers aligned below each other, the best bold, the next underlined, and what is cited."""
    written = texts.map(escaped).replace({"-": "--"}).replace(r"^(\d+) x (\d+)$", r"\1 $\\times$ \2", regex=True)
    if not isinstance(table, Block | WideTable):
        return written
    entries = entries_of(table).reindex(index=texts.index, columns=texts.columns)
    for column in entries.columns[entries.notna().any()]:
        marks = written[column].str.endswith(WARNED).map({True: r"\rlap{\,!}", False: ""})  # in no number's way
        written[column] = _aligned(written[column].str.removesuffix(WARNED), marks)
    second = entries.map(lambda entry: bool(entry is not None and entry == entry and entry.second))
    written = written.mask(bold, r"\textbf{" + written + "}").mask(second, r"\underline{" + written + "}")
    cited = _cited(table)
    names = [
        escaped(row.label) + (rf"~\cite{{{cited[i]}}}" if i in cited else "") + (rf"\textsuperscript{{{escaped(row.mark)}}}" if row.mark else "")
        for i, row in enumerate(table.rows)
    ]
    written.iloc[:, 0] = [names[row] if says == "accuracy" else text for (row, says), text in zip(texts.index, written.iloc[:, 0], strict=True)]
    return written


def _cited(table: Block | WideTable) -> dict[int, str]:
    """Cite keys by the number of the row: a method's is beside its row without changed settings, or else beside its first."""
    found: dict[str, int] = {}
    for i, row in enumerate(table.rows):
        if row.method in papers() and (row.method not in found or (not row.changed and table.rows[found[row.method]].changed)):
            found[row.method] = i
    return {i: papers()[method][0] for method, i in found.items()}


def _aligned(column: pd.Series[str], marks: pd.Series[str]) -> pd.Series[str]:
    """With room where a number has fewer decimals than others of its column or no standard deviation: points stand below points. marks: what
    stands right behind each number."""
    parts = [match.groups(default="") if (match := PLAIN.fullmatch(text)) else None for text in column]
    longest = [max((part[i] for part in parts if part), key=len, default="") for i in range(4)]

    def padded(text: str, part: tuple[str, ...] | None, mark: str) -> str:
        if part is None:
            return text + mark
        whole, decimals, deviation, more = part
        rest, tail = longest[1][len(decimals) :], longest[3][len(more) :]
        if not deviation:
            return whole + decimals + mark + _phantom(rest) + _phantom(longest[2] + longest[3])
        return whole + decimals + _phantom(rest) + deviation + more + mark + _phantom(tail)

    return pd.Series([padded(*each) for each in zip(column, parts, marks, strict=True)], column.index)


def _phantom(text: str) -> str:
    return rf"\phantom{{{text}}}" if text else ""


def _heads(texts: pd.DataFrame, score: str) -> list[tuple[str, str]]:
    """W4/A4 for w4a4; over the columns of a width where it has several."""
    names, lead = names_of(texts), lead_of(texts)
    several = Counter(texts.columns.get_level_values(0))
    heads = []
    for place, (group, name) in enumerate(zip(texts.columns.get_level_values(0), names, strict=True)):
        width = _width(str(name)) if place >= lead else name
        heads.append((_width(str(group)), score if group == name and several[group] > 1 else width))
    return heads


def _width(name: str) -> str:
    return name.upper().replace("A", "/A") if WIDTH.fullmatch(name) else name


def _tabular(texts: pd.DataFrame, first: str) -> str:
    """first: the first column's format. A heading takes several lines, as it must not widen its columns."""
    columns, groups = first + "".join("l" if name in LEFT else "r" for name in names_of(texts)[1:]), groups_of(texts)
    headed, headings = [(heading, places) for heading, places in groups if heading], dict[str, str]()
    if not headed:
        style = texts.droplevel(0, axis=1).style.hide().format_index(escaped, axis="columns")
        return str(style.to_latex(column_format=columns, hrules=True))
    for heading, places in headed:
        lines = r" \\ ".join(map(escaped, textwrap.wrap(heading, 18 * len(places))))
        span = r"\multicolumn{1}{c}" if len(places) == 1 else ""  # pandas does it for two and more
        headings[heading] = rf"{span}{{\shortstack{{{lines}}}}}"
    style = texts.style.hide().format_index(lambda head: headings.get(str(head), ""), axis="columns", level=0)
    style = style.format_index(escaped, axis="columns", level=1)
    rules = " ".join(rf"\cmidrule(lr){{{places[0] + 1}-{places[-1] + 1}}}" for _, places in headed)
    written = style.to_latex(column_format=columns, hrules=True, multicol_align="c")
    return written.replace("\\\\\n", f"\\\\\n{rules}\n", 1)


def _sentences(notes: Sequence[str]) -> str:
    """With widths as in headings, quotes as TeX has them, and what stands between backticks in typewriter letters."""
    said = [escaped(WIDTH.sub(lambda width: _width(width[0]), f"{note[:1].upper()}{note[1:]}.")) for note in notes]
    quoted = [re.sub(r"(?<!\w)'([^']*)'(?!\w)", r"`\1'", text) for text in said]
    return " ".join(re.sub(r"\\textasciigrave\{\}(.*?)\\textasciigrave\{\}", r"\\texttt{\1}", text) for text in quoted)

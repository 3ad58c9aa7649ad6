"""Blocks side by side: what becomes one row, what stays apart, and that every format shows every number under its network."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic_store import make_store
from test_blocks import RULES, result
from test_ledger import papers_cell

from dfqbench.analysis.ledger import load_ledger
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.records import read_store
from dfqbench.analysis.tables.blocks import Block, blocks
from dfqbench.analysis.tables.formats import html, markdown
from dfqbench.analysis.tables.latex import latex
from dfqbench.analysis.tables.printed import groups_of, in_pieces, names_of, notes_of, texts_of, widths_of
from dfqbench.analysis.tables.terminal import print_tables
from dfqbench.analysis.tables.wide import WideTable, side_by_side

Run = Callable[..., tuple[int, str, str]]
OTHER = {"cell__teacher": {"label": "resnet50", "model": "timm:resnet50", "weights_sha256": "cd"}, "teacher": {"top1": 80.0}}


def joined(*results: dict[str, Any]) -> WideTable:
    (table,) = side_by_side(blocks(list(results)))
    assert isinstance(table, WideTable)
    return table


def cells(table: WideTable, label: str) -> list[str]:
    """The printed accuracies of a row."""
    return next(line[2:] for line in lines(table) if line[0] == label)


def lines(table: WideTable) -> list[list[str]]:
    """What is printed, line by line."""
    return [list(line) for line in texts_of(table)[0].to_numpy()]


def test_a_row_is_a_method_wherever_it_was_measured_and_gaps_are_shown() -> None:
    table = joined(result(), result(seed=1, top1=52.0), result(top1=60.0, **OTHER), result("round", top1=40.0, **OTHER), result(bits="w3a3"))
    assert [block.heading for block in table.blocks] == ["resnet20, 90.00 %, on digits (10000 images)", "resnet50, 80.00 %, on digits (10000 images)"]
    assert [width for _, width in table.columns] == ["w4a4", "w3a3", "w4a4"]
    assert cells(table, "gdfq") == ["51.00 ± 1.41 (2)", "50.00 (1)", "60.00 (1)"]
    assert cells(table, "round") == ["-", "-", "40.00 (1)"]
    assert [row.label for row in table.rows] == ["round", "gdfq"], "worst first, by the columns they are in"
    assert [says for _, says in texts_of(table)[0].index] == ["accuracy", "drop"] * 2
    drops = [line for line in lines(table) if line[0] == "drop"]
    assert drops == [["drop", "", "-", "-", "40.00"], ["drop", "", "39.00", "40.00", "20.00"]]


def test_other_budgets_and_other_settings_are_other_rows() -> None:
    changed = {"cell__label": "gdfq(x=1)", "cell__changed": {"x": 1}}
    table = joined(result(), result(steps=200, **OTHER), result(**OTHER, **changed))
    assert sorted((row.label, row.budget, sorted(i for i, _ in row.entries)) for row in table.rows) == [
        ("gdfq 100x64", "100 x 64", [0]), ("gdfq 200x64", "200 x 64", [1]), ("gdfq(x=1)", "100 x 64", [1]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"cell__protocol": "hardware"}, {"cell__precision": "bf16"}, {"cell__identity__protocol": {**RULES, "first_bits": 8}}]
)
def test_other_protocols_and_precisions_are_tables_of_their_own(change: dict[str, Any]) -> None:
    found = side_by_side(blocks([result(), result(**OTHER), result(**change), result(**{**OTHER, **change})]))
    assert [len(table.blocks) for table in found if isinstance(table, WideTable)] == [2, 2]
    assert found[0].title != found[1].title


def test_a_block_without_a_neighbour_stays_as_it_is() -> None:
    found = blocks([result(), result(cell__precision="bf16")])
    assert side_by_side(found) == found


def test_a_row_that_differs_where_its_name_does_not_show_it_is_marked_and_explained() -> None:
    other = {"batch_size": 64, "student_lr": 1.0}
    table = joined(result(), result(**OTHER, cell__identity__config=other), result("round"), result("round", **OTHER))
    assert {row.label + row.mark for row in table.rows} == {"gdfq†", "round"}
    assert "† gdfq (100 x 64) is not the same everywhere, it differs in student_lr" in notes_of(table)


def test_where_one_network_has_both_settings_each_is_a_row_everywhere() -> None:
    other = {"batch_size": 64, "student_lr": 1.0}
    table = joined(result(), result(top1=10.0, cell__identity__config=other), result(top1=70.0, **OTHER))
    assert cells(table, "gdfq [1]") == ["10.00 (1)", "-"]
    assert cells(table, "gdfq [2]") == ["50.00 (1)", "70.00 (1)"]
    assert not any("†" in note for note in notes_of(table))


def test_rules_that_a_method_declares_are_marked_over_all_networks() -> None:
    own = {"cell__identity__protocol": {"ranges": "mse", "batch_norm": "fixed"}}
    table = joined(result(), result("gznq", **own), result("gznq", **{**OTHER, **own}), result(seed=1, **OTHER))
    assert {row.label + row.mark for row in table.rows} == {"gdfq", "gznq*"}
    assert "* the method's own rules: ranges mse (protocol: ema)" in notes_of(table)


def test_what_is_published_has_a_line_where_there_is_something(tmp_path: Path) -> None:
    claimed = papers_cell(tmp_path)
    other = result(cell__identity__protocol=claimed["cell"]["identity"]["protocol"], cell__label="plain")
    (table,) = side_by_side(blocks([claimed, other], ledger=load_ledger()))
    assert isinstance(table, WideTable)
    ((_, _, *claims),) = (line for line in lines(table) if line[0] == "published")
    assert sorted(text.split(" ")[0] for text in claims) == ["-", "90.11-90.25"]
    assert any(note.startswith("published: ") for note in notes_of(table))


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Block]:
    reading = read_store(make_store(tmp_path_factory.mktemp("store") / "r", 600, 300))
    return blocks(reading.results, ledger=load_ledger(), per_image=PerImage(reading))


@pytest.fixture(scope="module")
def table(found: list[Block]) -> WideTable:
    (wide,) = side_by_side(found)
    assert isinstance(wide, WideTable)
    return wide


def accuracies(table: WideTable) -> list[str]:
    return [f"{entry} ({len(entry.ids)})" for row in table.rows for column in table.columns if (entry := row.entries.get(column))]


def test_bold_is_what_is_bold_in_each_network_alone(found: list[Block], table: WideTable) -> None:
    texts, is_bold = texts_of(table)
    assert is_bold.shape == texts.shape
    for place, (i, width) in enumerate(table.columns, 2):
        bold = set(texts[is_bold.iloc[:, place]].iloc[:, 0])
        assert bold == {row.label for row in found[i].rows if width in row.entries and row.entries[width].best}
        assert bold


@pytest.mark.parametrize("room", [10, 40, 75, 100, 1000])
def test_pieces_hold_every_column_once_in_order_and_fit(table: WideTable, room: int) -> None:
    texts, _ = texts_of(table)
    widths = widths_of(texts)
    pieces = in_pieces(texts, widths, room)
    assert [place for piece in pieces for place in piece[2:]] == [*range(2, len(widths))]
    for piece in pieces:
        assert piece[:2] == [0, 1]
        headings = [heading for heading, places in groups_of(texts.iloc[:, piece])[2:] for _ in places]
        expected = [table.columns[place - 2] for place in piece[2:]]
        assert list(zip(headings, names_of(texts.iloc[:, piece])[2:], strict=True)) == [(table.blocks[i].heading, width) for i, width in expected]
        assert len(piece) == 3 or sum(widths[place] for place in piece) <= room
    assert (len(pieces) == 1) == (room == 1000)


@pytest.mark.parametrize("width", [40, 60, 100, 160, 1000])
def test_a_terminal_of_any_width_shows_every_number_whole(table: WideTable, width: int) -> None:
    out = io.StringIO()
    print_tables([table], [], Console(file=out, width=width, force_terminal=True, color_system=None))
    shown = out.getvalue().splitlines()
    printed = [line for line in shown if re.search(r"\(\d\)|^  drop", line)]
    assert max(map(len, printed)) <= width
    found = [text for line in printed for text in re.findall(r"\d+\.\d\d ± \d+\.\d\d \(\d\)", line)]
    assert sorted(found) == sorted(accuracies(table))
    assert sum(len(re.findall(r"\d\.\d\d(?!\d)", line)) for line in printed if line.startswith("  drop")) == len(accuracies(table))
    rules = [line for line in shown if "─" in line]
    assert (len(rules) == 1) == (width == 1000)


def test_a_file_is_as_wide_as_need_be_and_has_stars(table: WideTable) -> None:
    out = io.StringIO()
    print_tables([table], [], Console(file=out, width=80))
    text = out.getvalue()
    assert text.count("─ ") == len(table.blocks) - 1
    assert f"**{next(a for a in accuracies(table) if f'**{a}**' in text)}**" in text
    heading = next(line for line in text.splitlines() if line.startswith("method"))
    assert heading.split()[4:] == [width for _, width in table.columns]


def test_latex_has_a_rule_under_every_group_and_every_row_every_column(table: WideTable) -> None:
    text = latex([table])
    tabulars = re.findall(r"\\begin\{tabular\}\{p\{12em\}(r+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert sum(len(columns) - 1 for columns, _ in tabulars) == len(table.columns)
    for columns, body in tabulars:
        heads = [line for line in body.split("\n") if r"\multicolumn" in line]
        spans = [int(n) for line in heads for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
        rules = [(int(a), int(b)) for a, b in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", body)]
        assert sum(spans) == len(columns) - 1
        assert [b - a + 1 for a, b in rules] == spans
        assert (rules[0][0], rules[-1][1]) == (3, len(columns) + 1)
        for line in body.split("\n"):
            if line.endswith(r"\\") and r"\multicolumn" not in line:
                assert len(re.findall(r"(?<!\\)&", line)) == len(columns)
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 1


def test_markdown_names_the_network_over_every_column(table: WideTable) -> None:
    lines = [line for line in markdown([table]).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    heads = [head.strip() for head in lines[0].strip("|").split("|")][2:]
    assert heads == [f"{table.blocks[i].heading}<br>{width}" for i, width in table.columns]
    assert len(lines) == 2 + 2 * len(table.rows)


def test_html_groups_span_their_columns(table: WideTable) -> None:
    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.spans: list[int] = []
            self.counts: list[int] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            self.spans += [int(given["colspan"] or 0)] if "colspan" in given else []
            if tag == "tr":
                self.counts.append(0)
            if tag in ("td", "th"):
                self.counts[-1] += int(given.get("colspan") or 1)
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(html([table]))
    assert checker.open == []
    assert checker.spans == [len(block.widths) for block in table.blocks]
    first, second, *rows = checker.counts
    assert (first, second) == (2 + len(table.columns), len(table.columns))
    assert set(rows) == {2 + len(table.columns)}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_joins_and_changes_nothing_where_there_is_one_block(dfqbench: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "one", 20, 50)
    make_store(tmp_path / "two", 300, 50)
    for output in ("text", "markdown", "latex", "html"):
        words = ["table", "--format", output, "--results"]
        assert dfqbench(*words, tmp_path / "one", "--layout", "wide") == dfqbench(*words, tmp_path / "one")
        wide, plain = (dfqbench(*words, tmp_path / "two", *more)[1] for more in (("--layout", "wide"), ()))
        assert ("Methods by networks" in wide, "Methods by networks" in plain) == (True, False)
    code, _, err = dfqbench("table", "--results", tmp_path / "two", "--layout", "wide", "--format", "csv")
    assert (code, err.count("\n"), "--layout wide" in err) == (2, 1, True)
    code, _, err = dfqbench("table", "--results", tmp_path / "two", "--layout", "broad")
    assert (code, err) == (2, "dfqbench: --layout 'broad': blocks, wide or factorial\n")

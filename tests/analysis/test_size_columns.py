"""Size and work in tables, plots and the report; `-` where results have none; and a student's file that nothing of this opens."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from synthetic_store import cells, make_store, sizes, write_cell, write_failure

from dfqbench.analysis.plots.drawn import Drawn
from dfqbench.analysis.plots.figures import prepare
from dfqbench.analysis.plots.kinds import draw
from dfqbench.analysis.records import Reading, read_store
from dfqbench.analysis.report.report import page
from dfqbench.analysis.size import COLUMNS, sizes_of, three_digits
from dfqbench.analysis.tables.blocks import Block, blocks
from dfqbench.analysis.tables.choice import Choice, Columns
from dfqbench.analysis.tables.formats import html, markdown
from dfqbench.analysis.tables.latex import latex
from dfqbench.analysis.tables.means import means_frame
from dfqbench.analysis.tables.printed import arranged, names_of, notes_of, texts_of
from dfqbench.analysis.tables.wide import WideTable, side_by_side
from dfqbench.errors import UserError
from dfqbench.store import Store

Run = Callable[..., tuple[int, str, str]]
HEADS = ["MB", "smaller", "bits/weight", "GBOPs"]


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    """Two methods at two widths on two networks; one cell is of an earlier version, one row diverged."""
    store = Store(tmp_path_factory.mktemp("sized") / "r", writable=True)
    for cell in cells(500):
        if cell.method in ("gdfq", "round") and str(cell.bits) in ("w8a8", "w4a4") and cell.seed < 2:
            if (cell.method, str(cell.bits), cell.teacher.label) == ("round", "w4a4", "resnet32"):
                write_failure(store, cell)
            else:
                write_cell(store, cell, **{"size": sizes(cell)} if cell.method == "round" or cell.seed else {})
    return read_store(store)


def found(reading: Reading, *beside: str) -> list[Block]:
    choice = Choice(columns=Columns.of(",".join(f"+{name}" for name in beside)))
    return [arranged(block, choice) for block in blocks([*reading.results, *reading.unfinished])]


def test_columns_stand_beside_every_accuracy_that_has_them(reading: Reading) -> None:
    first, second = found(reading, *COLUMNS)
    texts, bold = texts_of(first)
    assert [name for name in names_of(texts) if name in HEADS] == HEADS * 2
    assert not bold[[column for column in bold.columns if column[1] in HEADS]].any(axis=None)
    assert texts["w4a4"][HEADS].to_numpy().tolist() == [["0.143", "7.23x", "4.00", "0.649"]] * 2, "of a row's cells, one knows its size"
    assert texts["w8a8"][HEADS].to_numpy().tolist() == [["0.271", "3.82x", "8.00", "2.60"]] * 2
    texts, _ = texts_of(second)
    at_4 = dict(zip(texts["method", "method"], texts["w4a4"][HEADS].to_numpy().tolist(), strict=True))
    assert at_4 == {"gdfq": ["0.143", "7.23x", "4.00", "0.649"], "round": ["-"] * 4}, "what diverged has no size"
    assert "in full precision, resnet20: 1.03 MB, 41.5 GBOPs" in notes_of(first)
    assert not any("earlier version" in note for note in notes_of(first))


def test_without_being_asked_for_tables_are_as_they_were(reading: Reading, tmp_path: Path) -> None:
    texts, _ = texts_of(found(reading)[0])
    assert not set(names_of(texts)) & set(HEADS)
    assert not any("MB" in note or "GBOPs" in note for note in notes_of(found(reading)[0]))


def test_a_store_of_before_shows_dashes_and_says_why(tmp_path: Path) -> None:
    reading = read_store(make_store(tmp_path / "r", 10))
    (block,) = found(reading, "size", "bops")
    texts, _ = texts_of(block)
    assert set(texts[[column for column in texts.columns if column[1] in HEADS]].to_numpy().flat) == {"-"}
    notes = notes_of(block)
    assert "- in MB, GBOPs: the results were written by an earlier version, which did not count it" in notes
    assert not any("full precision" in note for note in notes)


def test_side_by_side_they_are_lines_below_the_accuracies_in_the_order_asked_for(reading: Reading) -> None:
    (table,) = side_by_side(found(reading, "bops", "size"))
    assert isinstance(table, WideTable)
    texts, _ = texts_of(table)
    assert [says for row, says in texts.index if row == 0] == ["accuracy", "drop", "GBOPs", "MB"]
    lines = texts.loc[0].set_index(("method", "method"))
    assert lines.loc["MB"].tolist()[1:] == ["0.271", "0.143", "0.271", "-"]
    assert "in full precision, resnet20: 1.03 MB, 41.5 GBOPs; resnet32: 1.03 MB, 41.5 GBOPs" in notes_of(table)


@pytest.mark.parametrize("layout", [list, side_by_side])
def test_every_format_has_them(reading: Reading, layout: Callable[[list[Block]], list[Block | WideTable]]) -> None:
    tables = layout(found(reading, "size", "weight-bits"))
    for text in (markdown(tables), latex(tables), html(tables)):
        assert all(word in text for word in ("0.143", "4.00", "bits/weight", "full precision"))


def test_means_have_them_always(reading: Reading) -> None:
    frame = means_frame(found(reading)).set_index(["teacher", "method", "bits"])
    assert frame.loc[("resnet20", "gdfq", "w4a4")].bytes == 150_000
    assert frame.loc[("resnet20", "gdfq", "w4a4")].compression == 7.2293
    assert pd.isna(frame.loc[("resnet32", "round", "w4a4")].bytes)


def test_the_command(dfqbench: Run, reading: Reading) -> None:
    where = ("--results", reading.store.root)
    code, out, _ = dfqbench("table", *where, "--columns", "+size,+bops")
    assert code == 0
    (head, line, *_) = (words for line in out.splitlines() if (words := line.split()) and words[0] in ("method", "gdfq"))
    assert [name for name in head if name in HEADS] == ["MB", "GBOPs"] * 2
    assert {"0.143", "0.649"} <= set(line)
    assert dfqbench("table", *where, "--columns", "size,weight")[::2] == (
        2,
        "dfqbench: --columns 'weight': did you mean 'weight-bits'? known: bops, compression, drop, follows, published, seconds, seeds, size, steps, "
        "weight-bits, or a bit width like w4a4\n",
    )  # fmt: skip
    _, out, _ = dfqbench("table", *where, "--format", "csv")
    frame = pd.read_csv(io.StringIO(out))
    assert frame.bytes.count() == 10
    assert frame.status.value_counts().to_dict() == {"done": 14, "diverged": 2}


def test_columns_are_named_once_each_and_the_guide_has_all() -> None:
    assert Columns.of(" size,bops,,size").beside == ("size", "bops")
    assert Columns.of("") == Columns()
    with pytest.raises(UserError, match="did you mean 'compression'"):
        Columns.of("compresion")
    guide = (Path(__file__).parents[2] / "results" / "README.md").read_text()
    assert all(f"| `{name}` |" in guide for name in COLUMNS)


@pytest.mark.parametrize(("value", "said"), [(0.07, "0.0700"), (0.7, "0.700"), (1.034, "1.03"), (41.52, "41.5"), (1858.2, "1858"), (999.6, "1000")])
def test_numbers_have_three_digits_at_least(value: float, said: str) -> None:
    assert three_digits(value) == said


@pytest.mark.parametrize("size", [None, 3, {}, {"student": {}}, {"student": None, "teacher": None}, "zero"])
def test_a_size_that_cannot_be_true_is_none(size: object) -> None:
    good = sizes(next(cells(1)))
    assert sizes_of({"size": good}) is not None
    assert sizes_of({"size": good | {"student": good["student"] | {"bytes": 0}} if size == "zero" else size}) is None


# --- plot and report --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(reading: Reading) -> Drawn:
    return prepare(reading)


def test_accuracy_is_drawn_against_size_and_work_teacher_by_teacher(drawn: Drawn) -> None:
    (figure,) = draw("size", drawn)
    said = [text.get_text() for text in figure.texts]
    xlabels = ["size (MB); the teacher has 1.03", "work per image (GBOPs); the teacher has 41.5"]
    assert [text for text in said if "teacher has" in text] == xlabels * 2
    assert [text for text in said if " on made-up" in text] == ["resnet20 on made-up"] * 2 + ["resnet32 on made-up"] * 2
    places = {round(float(x), 3) for line in figure.axes[0].lines for x in line.get_xdata() if line.get_marker() != "None"}
    assert places == {0.143, 0.271}
    means = {entry.mean for row in drawn.blocks[0].rows for entry in row.entries.values()}
    assert means <= {float(y) for line in figure.axes[1].lines for y in line.get_ydata()}
    assert {text.get_text() for text in figure.axes[0].texts} >= {"W8A8", "W4A4"}


def test_where_all_students_have_one_size_the_axis_still_has_numbers(tmp_path: Path) -> None:
    (figure,) = draw("size", prepare(read_store(make_store(tmp_path / "r", 5, sized=True))))
    for ax in figure.axes:
        low, high = ax.get_xlim()
        assert high / low == pytest.approx(3)
        assert len(ax.get_xticks()) >= 2


def test_the_report_lists_them_and_says_them_of_every_cell(reading: Reading) -> None:
    data = json.loads(page(reading, "sized").split('<script type="application/json" id="data">')[1].split("</script>")[0])
    by_id = {cell["id"]: cell for cell in data["cells"]}
    for result in reading.results:
        cell = by_id[result["id"]]
        if "size" not in result:
            assert not {"mb", "gbops", "facts"} & cell.keys()
        elif cell["bits"] == "w4a4":
            assert (cell["mb"], cell["gbops"]) == (0.1431, 0.6488)
            assert cell["facts"] == [
                ["0.143 MB", "7.23x smaller than the teacher's 1.03 MB, 4.00 bits/weight"],
                ["0.649 GBOPs", "of work per image; the teacher has 41.5"],
            ]


# --- students are not opened ------------------------------------------------------------------------------------------


COMMANDS = {
    "table": "table",
    "csv": "table --format csv",
    "means": "table --format csv-means",
    "wide": "table --layout wide",
    "plot": "plot --kind accuracy --format png",
    "report": "report",
    "merge": "merge OTHER",
    "results": "results",
}
WATCHED = """
import sys

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ("open", "os.open") else None)
import dfqbench
from dfqbench.cli import app
try:
    dfqbench.results(sys.argv[-1]) if sys.argv[1] == "results" else app.main()
finally:
    assert any(name.endswith("result.json") for name in opened), "the hook sees what is opened"
    assert not [name for name in opened if name.endswith("student.safetensors")], "a student was opened"
    assert "torch" not in sys.modules and "safetensors" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_reading_a_store_opens_no_student(tmp_path: Path, command: str) -> None:
    store = make_store(tmp_path / "r", 6)
    students = [store.folder(cell_id) / "student.safetensors" for cell_id in store.ids()]
    for student in students:
        student.write_bytes(b"\xff" * 1000)
    words = command.replace("OTHER", str(make_store(tmp_path / "other", 8).root)).split()
    call = [sys.executable, "-c", WATCHED, *words, "--results", str(store.root)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {student.read_bytes() for student in students} == {b"\xff" * 1000}


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((1.0, 0.989), None),
        ((1.0, 0.0903), "100 % of its multiplications by weights have quantized weights, 9.03 % of all quantized activations; the rest is in float"),
        ((0.66, 0.66), "66 % of its multiplications by weights have quantized weights, 66 % of all quantized activations; the rest is in float"),
    ],
)
def test_what_is_in_float_is_a_note_of_the_table(shares: tuple[float, float], said: str | None, tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    for cell in [cell for cell in cells(500) if cell.method == "gdfq" and str(cell.bits) == "w4a4" and cell.teacher.label == "resnet20"][:1]:
        size = sizes(cell)
        size["student"] |= {"quantized": {"weights": shares[0], "activations": shares[1]}}
        write_cell(store, cell, size=size)
    (block,) = blocks(read_store(store).results)
    notes = [note for note in notes_of(block) if "in float" in note]
    assert notes == ([f"resnet20 under this protocol: {said}"] if said else [])

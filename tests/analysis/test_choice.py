"""Which rows and columns a table has, in which order, and what rows are called that have no label."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from synthetic_store import cells, sizes, write_cell, write_failure
from test_blocks import result

from dfqbench.analysis.names import name_rows
from dfqbench.analysis.records import Reading, read_store
from dfqbench.analysis.tables.blocks import Block, Row, blocks
from dfqbench.analysis.tables.choice import Choice, Columns
from dfqbench.analysis.tables.printed import arranged, names_of, notes_of, texts_of
from dfqbench.analysis.tables.terminal import print_tables
from dfqbench.analysis.tables.wide import WideTable, side_by_side
from dfqbench.errors import UserError
from dfqbench.store import Store

Run = Callable[..., tuple[int, str, str]]


def labels(table: Block | WideTable, **choice: Any) -> list[str]:
    return [row.label for row in arranged(table, Choice(**choice)).rows]


def measured(*rows: tuple[str, float | None, float | None], **changes: Any) -> list[dict[str, Any]]:
    """(method, accuracy at w4a4, at w3a3), which diverged where it is nan and is not there where it is None."""
    found = []
    for method, *accuracies in rows:
        for bits, top1 in zip(("w4a4", "w3a3"), accuracies, strict=True):
            if top1 is not None:
                lost = {"status": "diverged", "diverged_in": 7} if top1 != top1 else {}
                found.append(result(method, bits, 0, top1, **lost, **changes))
    return found


NAN = float("nan")
ROWS = (("best", 80.0, 60.0), ("wide", 90.0, 50.0), ("worst", 70.0, 40.0), ("lost", 95.0, NAN), ("lacking", 96.0, None))


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_best_at_the_narrowest_width_is_first_and_what_lacks_a_column_or_diverged_last() -> None:
    (block,) = blocks(measured(*ROWS))
    assert labels(block)[:3] == ["best", "wide", "worst"]
    assert sorted(labels(block)[3:]) == ["lacking", "lost"]
    assert labels(block, sort="w4a4") == ["wide", "best", "worst", "lacking", "lost"]
    assert labels(block, sort="w4a4", best_first=False) == ["worst", "best", "wide", "lost", "lacking"]
    assert labels(block, sort="method") == sorted(row[0] for row in ROWS)
    assert "rows: best to worst by w4a4, those that lack a column or diverged in one last" in notes_of(arranged(block, Choice(sort="w4a4")))


def test_what_diverged_says_so_and_when() -> None:
    (block,) = blocks(measured(*ROWS))
    texts, _ = texts_of(arranged(block, Choice()))
    shown = dict(zip(texts["method", "method"], texts["w3a3", "w3a3"], strict=True))
    assert (shown["lost"], shown["lacking"]) == ("diverged, epoch 7", "-")


def test_the_reference_stands_first_whatever_its_accuracy() -> None:
    found = measured(*ROWS)
    for each in found:
        each["cell"]["group"] = "reference" if each["cell"]["label"] == "worst" else "mine"
    (block,) = blocks(found)
    assert labels(block)[:2] == ["worst", "best"]
    assert labels(block, best_first=False)[0] == "worst"
    assert any(note.startswith("rows: those of the group reference, then best to worst") for note in notes_of(arranged(block, Choice())))


def test_rows_are_sorted_by_size_steps_and_seconds_the_least_first() -> None:
    small, large = (sizes(cell) for cell in cells(60) if (cell.method, cell.seed) == ("gdfq", 0) and str(cell.bits) in ("w4a4", "w8a8"))
    if small["student"]["bytes"] > large["student"]["bytes"]:
        small, large = large, small
    found = [result("a", size=large, steps=10), result("b", top1=60.0, size=small, steps=300, seconds={"own": 1.0, "shared": 0.0}), result("c")]
    (block,) = blocks(found)
    assert labels(block) == ["b", "a", "c"]
    for column in ("size", "compression", "bops", "weight-bits"):
        assert labels(block, sort=column) == ["b", "a", "c"], "what has no size is last"
    assert labels(block, sort="steps") == ["a", "c", "b"]
    assert labels(block, sort="seconds")[0] == "b"


def test_blocks_side_by_side_go_by_the_mean_over_their_columns_or_by_a_width() -> None:
    other = {"cell__teacher": {"label": "resnet50", "model": "timm:resnet50", "weights_sha256": "cd"}}
    found = measured(("a", 80.0, 60.0), ("b", 70.0, 65.0)) + measured(("a", 80.0, 60.0), ("b", 79.0, 61.0), **other)
    (table,) = side_by_side([arranged(block, Choice()) for block in blocks(found)])
    assert isinstance(table, WideTable)
    assert labels(table) == ["a", "b"]
    assert labels(table, sort="w3a3") == ["b", "a"]


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "heads"),
    [
        ("", ["method", "follows", "steps x batch", "seeds", "w4a4", "drop", "w3a3", "drop", "wall s/cell"]),
        ("w3a3,w4a4", ["method", "w3a3", "w4a4"]),
        ("w3a3", ["method", "w3a3"]),
        ("seconds,w4a4,size,drop,seeds", ["method", "wall s/cell", "w4a4", "MB", "drop", "seeds"]),
        ("drop", ["method", "w4a4", "drop", "w3a3", "drop"]),
        ("+size", ["method", "follows", "steps x batch", "seeds", "w4a4", "drop", "MB", "w3a3", "drop", "MB", "wall s/cell"]),
        ("+drop,+size", ["method", "follows", "steps x batch", "seeds", "w4a4", "drop", "MB", "w3a3", "drop", "MB", "wall s/cell"]),
    ],
)
def test_columns_are_those_that_are_asked_for_in_that_order(given: str, heads: list[str]) -> None:
    (block,) = blocks(measured(("a", 80.0, 60.0), ("b", 70.0, 50.0), size=sizes(next(cells(1)))))
    choice = Choice(columns=Columns.of(given))
    assert names_of(texts_of(arranged(block, choice))[0]) == heads
    notes = " ".join(notes_of(arranged(block, choice)))
    assert ("seconds per cell" in notes) == (heads[-1] == "wall s/cell" or heads[1] == "wall s/cell")
    assert ("drop: below the teacher" in notes) == ("drop" in heads)


@pytest.mark.parametrize(
    ("given", "said"),
    [("w4a4,sise", "--columns 'sise': did you mean 'size'?"), ("w4", "--columns 'w4': "), ("+size,bops", "either these columns alone, or with +")],
)
def test_what_is_no_column_is_told(given: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Columns.of(given)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Every row of the first block at two widths, of which one diverged."""
    store = Store(tmp_path_factory.mktemp("chosen") / "r", writable=True)
    for cell in cells(250):
        if cell.seed < 2 and str(cell.bits) in ("w4a4", "w3a3"):
            write_failure(store, cell) if (cell.method, str(cell.bits)) == ("zaq", "w3a3") else write_cell(store, cell, 300)
    return store


@pytest.fixture
def reading(store: Store) -> Reading:
    return name_rows(read_store(store))


@pytest.mark.parametrize(
    ("patterns", "methods"),
    [
        (["acq*"], ["acq"]),
        (["ACQ(*weight=0)"], ["acq"]),
        (["round", "/^g.*q$/"], ["gdfq", "gznq", "round"]),
        (["/dfq|zaq/"], ["gdfq", "zaq"]),
    ],
)
def test_rows_are_those_that_fit_a_pattern(reading: Reading, patterns: list[str], methods: list[str]) -> None:
    chosen = Choice(rows=tuple(patterns)).of(reading)
    assert sorted({r["cell"]["method"] for r in (*chosen.results, *chosen.failures)}) == methods
    (block,) = blocks([*chosen.results, *chosen.unfinished])
    assert {row.method for row in block.rows} == set(methods)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"rows": ("acd",)}, "--rows 'acd': no row matches; did you mean 'acq'?"),
        ({"rows": ("/(/",)}, "--rows '/(/': not a regular expression: "),
        ({"columns": Columns.of("w2a2")}, "--columns w2a2: no cell has this bit width; there are w4a4, w3a3"),
        ({"sort": "w2a2"}, "--sort w2a2: no cell has this bit width; there are w4a4, w3a3"),
    ],
    ids=str,
)
def test_a_row_or_width_that_is_not_there_is_told(reading: Reading, choice: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Choice(**choice).of(reading)


def test_what_cannot_be_sorted_by_is_told() -> None:
    with pytest.raises(UserError, match="--sort 'second': did you mean 'seconds'"):
        Choice(sort="second")


def test_every_format_has_the_same_rows_and_columns(store: Store, dfqbench: Run) -> None:
    choice = ("--results", store.root, "--rows", "g*", "--rows", "zaq", "--columns", "w3a3,seeds")
    for form in ("text", "markdown", "latex", "html"):
        code, out, err = dfqbench("table", *choice, "--format", form)
        assert (code, err) == (0, "")
        assert [name for name in ("gdfq", "gznq", "zaq") if name in out] == ["gdfq", "gznq", "zaq"]
        assert out.index("zaq") > max(out.index("gdfq"), out.index("gznq"))
        assert "diverged, epoch 5" in out
        assert not re.search(r"lrq|acq|w4a4|W4/A4|s/cell", out)
    for form in ("csv", "csv-means"):
        frame = pd.read_csv(io.StringIO(dfqbench("table", *choice, "--format", form)[1]))
        assert set(frame.bits) == {"w3a3"}
        assert sorted(set(frame.method)) == ["gdfq", "gznq", "zaq"]
    wide = dfqbench("table", *choice, "--layout", "wide")[1]
    assert "w4a4" not in wide
    means = pd.read_csv(io.StringIO(dfqbench("table", *choice, "--format", "csv-means")[1]))
    assert list(means.method)[-1] == "zaq"
    full = pd.read_csv(io.StringIO(dfqbench("table", "--results", store.root, "--format", "csv")[1]))
    assert "acq(condition=none, consistency_weight=0)" in set(full.method), "programs get the settings whole"


# --- names without a label --------------------------------------------------------------------------------------------


def named(*variants: tuple[str, dict[str, Any]], **labels: str) -> dict[str, str]:
    """What rows are called that a sweep gives these methods and changed settings, by what they call themselves; in the end what is left out."""
    found = []
    for method, changed in variants:
        own = method + (f"({', '.join(f'{k}={v}' for k, v in sorted(changed.items()))})" if changed else "")
        cell = {"label": own, "name": labels.get(own, ""), "method": method, "changed": changed}
        found.append({"id": own, "cell": cell})
    reading = name_rows(Reading(Store(Path()), found))
    return {r["cell"]["settings"]: f"{r['cell']['label']} | {r['cell']['left_out']}" for r in reading.results}


def test_settings_that_all_rows_of_a_method_share_are_left_out() -> None:
    shared = {"images": 1280, "iterations": 300}
    assert named(("gznq", shared), ("gznq", shared | {"mode": "g"}), ("lrq", {"images": 1280}), ("round", {})) == {
        "gznq(images=1280, iterations=300)": "gznq | images=1280, iterations=300",
        "gznq(images=1280, iterations=300, mode=g)": "gznq(mode=g) | images=1280, iterations=300",
        "lrq(images=1280)": "lrq | images=1280",
        "round": "round | ",
    }


def test_of_settings_that_only_occur_together_the_shortest_stands_for_all_but_never_a_budget() -> None:
    assert list(named(("acq", {}), ("acq", {"matching_weight": 0, "cond": "no"}), ("acq", {"x": 1})).values()) == [
        "acq | matching_weight=0 with cond=no",
        "acq(cond=no) | matching_weight=0 with cond=no",
        "acq(x=1) | matching_weight=0 with cond=no",
    ]
    assert list(named(("m", {}), ("m", {"epochs": 1, "finetune": "True"})).values())[1] == "m(finetune=True) | epochs=1 with finetune=True"


def test_rows_that_differ_are_called_differently() -> None:
    variants: list[tuple[str, dict[str, Any]]] = [
        ("m", {k: v for k, v in (("a", a), ("bb", b), ("c", c)) if v is not None}) for a in (None, 1) for b in (None, [1, 2], 3) for c in (None, 5)
    ]
    assert len({name.partition(" | ")[0] for name in named(*variants).values()}) == len(variants) == 12


def test_a_label_stays_and_says_what_all_share() -> None:
    found = named(("m", {"a": 1, "b": 1}), ("m", {"a": 1, "b": 2, "cc": 3}), **{"m(a=1, b=1)": "mine"})
    assert found == {"m(a=1, b=1)": "mine | a=1", "m(a=1, b=2, cc=3)": "m(b=2, cc=3) | a=1"}


def test_a_note_says_whose_seeds_are_not_all_of_their_noise(reading: Reading) -> None:
    (block,) = blocks([*reading.results, *reading.unfinished])
    about = "images are optimised for hundreds of steps"
    for row in block.rows:
        row.settings["config"] = {"synthesis_iterations": 20}
    assert not any(note.startswith(about) for note in notes_of(block))
    block.rows[0].settings["config"] = {"synthesis_iterations": 300}
    (note,) = [note for note in notes_of(block) if note.startswith(about)]
    assert note.endswith(f": {block.rows[0].method}")


def test_the_note_says_what_the_names_leave_out(reading: Reading) -> None:
    (block,) = blocks([*reading.results, *reading.unfinished])
    row: Row = block.rows[0]
    row.left_out = "epochs=3"
    (note,) = [note for note in notes_of(block) if note.startswith("left out of the names, as it tells no rows of a method apart: ")]
    assert f"{row.method} epochs=3" in note
    assert "acq consistency_weight=0 with condition=none" in note


# --- a terminal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminals_lines_break_between_words(store: Store, width: int) -> None:
    reading = name_rows(read_store(store))
    (block,) = blocks([*reading.results, *reading.unfinished])
    out = io.StringIO()
    print_tables([arranged(block, Choice())], [], Console(file=out, width=width, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = {word for note in [block.title, *notes_of(arranged(block, Choice()))] for word in note.split() if len(word) < width - 6}
    assert words <= set(out.getvalue().split()), "no word is cut"
    names = {line[: max(16, width // 4)].strip() for line in lines}
    assert not {name for name in names if re.search(r"consistency_weigh$|condi$", name)}

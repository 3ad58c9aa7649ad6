"""Tables: what is averaged, what is compared, and what is never put into one block."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_store import cells, make_store, write_cell

from dfqbench.analysis.ledger import load_ledger
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.records import read_store
from dfqbench.analysis.tables.blocks import Block, Row, blocks
from dfqbench.analysis.tables.formats import html, markdown
from dfqbench.analysis.tables.latex import latex
from dfqbench.analysis.tables.means import means_frame, ranking
from dfqbench.analysis.tables.printed import names_of, notes_of, texts_of
from dfqbench.store import Store

RULES = {"ranges": "ema", "batch_norm": "fixed"}


def result(method: str = "gdfq", bits: str = "w4a4", seed: int = 0, top1: float = 50.0, **changes: Any) -> dict[str, Any]:
    """A finished cell in the store's format, with some keys (paths with dots) changed."""
    record: dict[str, Any] = {
        "id": f"{method}{bits}{seed}",
        "top1": top1,
        "best": {"epoch": 1, "top1": top1 + 1},
        "evaluations": 3,
        "images": 10_000,
        "steps": 100,
        "teacher": {"top1": 90.0},
        "seconds": {"own": 10.0, "shared": 20.0},
        "provenance": {"device_name": "a CPU", "device": "cpu"},
        "cell": {
            "label": method,
            "method": method,
            "changed": {},
            "fidelity": "code",
            "teacher": {"label": "resnet20", "model": "cifar:resnet20", "weights_sha256": "ab"},
            "evaluation": {"name": "digits"},
            "protocol": "lineage",
            "precision": "fp32",
            "bits": bits,
            "seed": seed,
            "identity": {"evaluation": "digest", "protocol": dict(RULES), "config": {"batch_size": 64}},
        },
    }
    record = copy.deepcopy(record)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = record
        for key in parents:
            place = place[key]
        place[last] = value
    return record


def shown(block: Block, label: str, column: str) -> str:
    """What a table prints."""
    texts, _ = texts_of(block)
    return next(str(line[names_of(texts).index(column)]) for line in texts.to_numpy() if line[0] == label)


def row_of(block: Block, label: str) -> Row:
    return next(row for row in block.rows if row.label == label)


def test_a_cell_shows_mean_and_sample_standard_deviation_over_seeds_and_the_drop() -> None:
    (block,) = blocks([result(seed=s, top1=t) for s, t in enumerate((50.0, 52.0, 54.0))])
    assert shown(block, "gdfq", "w4a4") == "52.00 ± 2.00"
    assert shown(block, "gdfq", "seeds") == "3"
    assert shown(block, "gdfq", "drop") == "38.00"


def test_columns_are_widths_from_wide_to_narrow_and_gaps_are_shown() -> None:
    (block,) = blocks([result(bits="w3a3"), result(bits="w8a8"), result("round", bits="w8a8", top1=40.0)])
    assert block.widths == ["w8a8", "w3a3"]
    assert shown(block, "round", "w3a3") == "-"
    assert [row.label for row in block.rows] == ["round", "gdfq"], "rows go from worst to best"


@pytest.mark.parametrize(
    "change",
    [
        {"cell__protocol": "hardware"},
        {"cell__precision": "bf16"},
        {"cell__teacher__weights_sha256": "cd"},
        {"cell__identity__evaluation": "another"},
        {"cell__identity__protocol": {**RULES, "first_bits": 8}},
        {"cell__identity__teacher": {"task": "another normalisation"}},
    ],
)
def test_what_cannot_be_compared_is_never_in_one_block(change: dict[str, Any]) -> None:
    found = blocks([result(), result(seed=1, **change)])
    assert len(found) == 2
    assert found[0].title != found[1].title, "a reader can tell them apart"


def test_one_set_under_two_names_is_one_block() -> None:
    assert len(blocks([result(), result(seed=1, cell__evaluation__name="my-digits")])) == 1


def test_other_budgets_are_other_rows() -> None:
    (block,) = blocks([result(), result(seed=1, steps=200)])
    assert [row.budget for row in block.rows] == ["100 x 64", "200 x 64"]


@pytest.mark.parametrize("change", [{"cell__identity__config": {"batch_size": 64, "student_lr": 1.0}}, {"cell__identity__method_version": 2}])
def test_settings_or_versions_that_no_label_shows_are_never_averaged(change: dict[str, Any]) -> None:
    (block,) = blocks([result(), result(seed=1, top1=60.0, **change)])
    assert [row.label for row in block.rows] == ["gdfq [1]", "gdfq [2]"]
    assert any("other settings or versions" in note for note in notes_of(block))


def test_a_methods_own_rules_are_marked_and_explained() -> None:
    own = {"ranges": "mse", "batch_norm": "fixed"}
    (block,) = blocks([result(), result(seed=1), result("gznq", cell__identity__protocol=own)])
    assert shown(block, "gznq*", "w4a4") == "50.00"
    assert "* the method's own rules: ranges mse (protocol: ema)" in notes_of(block)


def test_the_rule_decides_which_epoch_counts_and_is_named() -> None:
    (last,), (best,) = blocks([result()], "last"), blocks([result()], "best-on-test")
    assert (shown(last, "gdfq", "w4a4"), shown(best, "gdfq", "w4a4")) == ("50.00", "51.00")
    assert "rule 'last'" in notes_of(last)[0]
    assert "chosen on the test labels" in notes_of(best)[0]


# --- comparisons ------------------------------------------------------------------------------------------------------


def compared(tmp_path: Path, methods: dict[str, float], images: int = 2000) -> Block:
    """One block of W4A4 cells, five seeds each, whose accuracies are as given: images are right in order of difficulty."""
    import io

    import numpy as np

    from dfqbench.files import write_atomically, write_json

    store = Store(tmp_path / "r")
    for cell in cells(10_000):
        if (
            cell.method in methods
            and not cell.changed
            and str(cell.bits) == "w4a4"
            and cell.protocol.name == "lineage"
            and cell.teacher.label == "resnet20"
            and cell.precision == "fp32"
        ):
            found = write_cell(store, cell, images)
            random = np.random.default_rng(cell.seed)
            correct = np.sort(random.random(images) * 0.02) + np.arange(images) / images < methods[cell.method] / 100
            buffer = io.BytesIO()
            np.save(buffer, np.packbits(correct))
            write_atomically(store.folder(cell.id) / "correct.npy", buffer.getvalue())
            write_json(store.folder(cell.id) / "result.json", found | {"correct": int(correct.sum()), "top1": float(100 * correct.mean())})
    reading = read_store(store)
    assert not reading.skipped
    (block,) = blocks(reading.results, per_image=PerImage(reading))
    return block


def test_bold_are_the_best_and_all_that_cannot_be_told_from_it(tmp_path: Path) -> None:
    block = compared(tmp_path, {"gdfq": 80.0, "acq": 80.1, "zaq": 75.0, "lrq": 60.0})
    assert {row.label for row in block.rows if row.entries["w4a4"].best} == {"gdfq", "acq"}
    against = row_of(block, "zaq").entries["w4a4"].against_best
    assert against is not None
    assert against.value == pytest.approx(-5, abs=0.3)
    assert against.p < 1e-3


def test_nothing_is_bold_where_there_is_nothing_to_compare(tmp_path: Path) -> None:
    block = compared(tmp_path, {"gdfq": 80.0})
    assert not any(row.entries["w4a4"].best for row in block.rows)


def test_it_is_said_where_the_variance_of_seeds_is_from_and_no_bar_leaves_the_scale(tmp_path: Path) -> None:
    block = compared(tmp_path, {"gdfq": 99.9, "acq": 99.8, "zaq": 0.2})
    assert "the variance between seeds is estimated over all rows of a column (empirical Bayes)" in notes_of(block)
    for row in block.rows:
        estimate = row.entries["w4a4"].estimate
        assert estimate is not None
        assert 0 <= estimate.low < estimate.value < estimate.high <= 100
    singles = [replace(row, entries={w: replace(e, basis="unknown", sd=None) for w, e in row.entries.items()}) for row in block.rows]
    assert any("test images alone count" in note for note in notes_of(replace(block, rows=singles)))
    wide = [replace(row, entries={w: replace(e, basis="outlying") for w, e in row.entries.items()}) for row in block.rows[:1]] + block.rows[1:]
    assert any("far more scatter between seeds than in the rest of the column: zaq (w4a4);" in note for note in notes_of(replace(block, rows=wide)))


def test_without_per_image_results_a_cell_is_in_no_comparison_and_that_is_said(tmp_path: Path) -> None:
    compared(tmp_path, {"gdfq": 80.0, "zaq": 75.0, "lrq": 60.0})
    store = Store(tmp_path / "r")
    victim = next(r for r in read_store(store).results if r["cell"]["label"] == "lrq")
    (store.folder(victim["id"]) / "correct.npy").write_bytes(b"not an array")
    reading = read_store(store)
    per_image = PerImage(reading)
    assert len(per_image.missing) == 1
    (block,) = blocks(reading.results, per_image=per_image)
    assert row_of(block, "gdfq").entries["w4a4"].best
    assert row_of(block, "lrq").entries["w4a4"].against_best is None
    assert any("1 entries are not compared" in note for note in notes_of(block))


def test_the_best_epoch_is_not_compared_with_the_last_epochs_images(tmp_path: Path) -> None:
    reading = read_store(make_store(tmp_path / "r", 100))
    (block,) = blocks(reading.results, "best-on-test", per_image=PerImage(reading))
    assert not any(entry.best for row in block.rows for entry in row.entries.values())
    assert any("nothing is bold" in note for note in notes_of(block))


@pytest.mark.slow
def test_average_ranks_are_over_every_width_of_every_block(tmp_path: Path) -> None:
    reading = read_store(make_store(tmp_path / "r", 500))
    found = blocks(reading.results)
    ranked = ranking(found)
    assert ranked[0].startswith("average rank over 10 columns (1 is best): acq ")
    label, ranks = ranked[0].split()[-2], [float(rank) for rank in re.findall(r" (\d+\.\d\d)(?:;|$)", ranked[0])]
    assert (label, len(ranks), ranks) == ("round", 10, sorted(ranks))
    assert sum(ranks) == pytest.approx(55, abs=0.05), "ten rows share the ranks 1 to 10"
    assert ranking(found[:1][:0]) == []


# --- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_is_shown_with_its_distance_in_standard_errors(tmp_path: Path) -> None:
    from test_ledger import papers_cell

    (block,) = blocks([papers_cell(tmp_path)], ledger=load_ledger())
    entry = block.rows[0].entries["w4a4"]
    assert entry.published is not None
    text = shown(block, "gdfq", "published")
    expected = entry.published.distance(entry.mean) / entry.error
    assert text == f"90.11-90.25 ({expected:+.1f} se)"
    assert any("one figure each" in note for note in notes_of(block))


def test_where_no_claim_fits_there_is_no_column_but_a_reason(tmp_path: Path) -> None:
    from test_ledger import papers_cell

    (block,) = blocks([papers_cell(tmp_path, name="cifar10-jpeg")], ledger=load_ledger())
    assert "published" not in names_of(texts_of(block)[0])
    assert "no published number is about this test set" in notes_of(block)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Block]:
    reading = read_store(make_store(tmp_path_factory.mktemp("store") / "r", 500))
    return blocks(reading.results, ledger=load_ledger(), per_image=PerImage(reading))


def test_markdown_has_one_table_line_per_row_and_no_stray_stars(found: list[Block]) -> None:
    text = markdown(found, ranking(found))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == sum(len(block.rows) + 1 for block in found)
    assert len({line.count("|") for line in lines}) == 1
    assert "**" in text
    own = blocks([result(), result("gznq", cell__identity__protocol={"ranges": "mse", "batch_norm": "fixed"})])
    assert "gznq\\*" in markdown(own)


def test_latex_is_balanced_and_every_row_has_every_column(found: list[Block]) -> None:
    odd = blocks([result("a_b%c&d#e{f}~g^h\\i$j")])
    for text in (latex(found, ranking(found)), latex(odd)):
        tables = re.findall(r"\\begin\{tabular\}\{((?:p\{12em\})?[lr]+)\}\n\\toprule\n(.*?)\\bottomrule\n\\end\{tabular\}", text, re.DOTALL)
        begun, ended = (re.findall(rf"\\{what}\{{(table\*?)\}}", text) for what in ("begin", "end"))
        assert begun == ended
        assert len(tables) >= len(begun) > 0
        for columns, body in tables:
            columns = columns.replace("p{12em}", "l")
            for row in re.sub(r"\\(midrule|cmidrule.*)\n", "", body).strip().split("\n"):
                assert row.endswith(r" \\")
                spanned = sum(int(count) - 1 for count in re.findall(r"\\multicolumn\{(\d+)\}", row))
                assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 - spanned
        bare = re.sub(r"\\[\\{}%&#_$]|~\\cite", "", text.split("\n", 1)[1])
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        assert not re.search(r"[#%~^]|(?<![A-Za-z])_", bare)


def test_a_latex_table_that_is_too_wide_is_set_small_and_in_pieces_that_keep_a_widths_columns_together() -> None:
    widths = ("w8a8", "w6a6", "w5a5", "w4a4", "w3a3", "w2a2")
    one, six = ([result(bits=bits, seed=seed) for bits in some for seed in (0, 1)] for some in (widths[:1], widths))
    assert r"\begin{table}" in latex(blocks(one))
    text = latex(blocks(six))
    assert text.count(r"\begin{table*}") == 1
    heads = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.startswith("method & ")]
    assert len(heads) == 2
    assert [head for row in heads for head in row[4:]] == ["top-1", "drop"] * 6 + ["wall s/cell"]
    assert all(row[:4] == ["method", "follows", "steps x batch", "seeds"] and row[4] != "drop" for row in heads)
    assert [width.replace("a", "/a").upper() for width in widths] == re.findall(r"\\shortstack\{(W\d/A\d)\}", text)


def test_html_is_well_formed(found: list[Block]) -> None:
    from html.parser import HTMLParser

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.rows = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.rows += tag == "tr"
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(html(blocks([result("<script>alert(1)</script>")])))
    assert checker.open == []
    checker.feed(html(found, ranking(found)))
    assert checker.open == []
    assert checker.rows == 2 + sum(len(block.rows) + 1 for block in found)
    assert "<script>" not in html(blocks([result("<script>")]))


def test_means_have_a_line_per_row_and_width_that_agrees_with_the_cells(found: list[Block]) -> None:
    frame = means_frame(found)
    assert len(frame) == sum(len(row.entries) for block in found for row in block.rows) == 100
    assert (frame.n == 5).all()
    assert ((frame.low < frame.top1) & (frame.top1 < frame.high)).all()
    assert (frame.groupby(["teacher", "bits"]).best.sum() >= 1).all()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_a_terminal_of_any_width_cuts_no_number(found: list[Block], width: int) -> None:
    import io

    from rich.console import Console

    from dfqbench.analysis.tables.terminal import print_tables

    out = io.StringIO()
    block = copy.copy(found[0])
    block.widths = block.widths[-2:]
    print_tables([block], [], Console(file=out, width=width, force_terminal=True, color_system=None))
    text = out.getvalue()
    for row in block.rows:
        for name in block.widths:
            assert f"{row.entries[name].mean:.2f}" in text
    assert ("left out" in text) == (width < 120)


def test_a_setting_that_is_a_list_is_not_taken_for_a_numbered_row() -> None:
    (block,) = blocks([result("gdfq(milestones=[1,2])")])
    assert not [note for note in notes_of(block) if note.startswith("[1], [2]")]


def test_what_a_preset_has_for_each_width_is_one_row_and_told() -> None:
    def at(bits: str, mixed: int, **changes: Any) -> dict[str, Any]:
        return result("qimera", bits, cell__identity__config={"batch_size": 64, "mixed_classes": mixed}, **changes)

    given = [("w5a5", 100), ("w4a4", 500), ("w3a3", 500)]
    (apart,) = blocks([at(bits, mixed) for bits, mixed in given])
    assert [row.label for row in apart.rows] == ["qimera [1]", "qimera [2]"]
    (together,) = blocks([at(bits, mixed, cell__by_width=["mixed_classes"]) for bits, mixed in given])
    (row,) = together.rows
    assert set(row.entries) == {"w5a5", "w4a4", "w3a3"}
    assert "by bit width, as its preset has it: qimera mixed_classes 100 (w5a5), 500 (w4a4, w3a3)" in notes_of(together)

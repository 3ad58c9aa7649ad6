"""A row of which a cell shows that it fails has a `!`, and a note says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic_store import cells, write_cell

from dfqbench.analysis.records import read_store
from dfqbench.analysis.tables.blocks import Block, blocks
from dfqbench.analysis.tables.formats import html, markdown
from dfqbench.analysis.tables.latex import latex
from dfqbench.analysis.tables.printed import notes_of, texts_of
from dfqbench.store import Store

RISES = [{"kind": "loss", "epoch": 9, "text": "the loss rises: 3 on average over 5 epochs, 2 in the first"}]


def block_of(store: Store) -> Block:
    (block,) = blocks(read_store(store).results)
    return block


def made(store: Store, methods: tuple[str, ...], **changes: Any) -> None:
    """Cells of these methods with their own settings at w8a8 and w3a3, seeds 0 to 2; changes: of the result of the first one's seed 1 at w3a3."""
    wanted = [cell for cell in cells(250) if cell.method in methods and not cell.changed and str(cell.bits) in ("w8a8", "w3a3") and cell.seed < 3]
    for cell in wanted:
        changed = (cell.method, str(cell.bits), cell.seed) == (methods[0], "w3a3", 1)
        write_cell(store, cell, **(changes if changed else {}))


def printed(block: Block) -> dict[tuple[str, str], str]:
    texts, _ = texts_of(block)
    return {(row["method", "method"], width): row[width, width] for _, row in texts.iterrows() for width in block.widths}


def notes(block: Block) -> list[str]:
    return [note for note in notes_of(block) if note.startswith("!")]


def test_one_cell_of_a_row_is_enough_and_other_columns_have_no_mark(tmp_path: Path) -> None:
    made(Store(tmp_path), ("gdfq", "acq"), warnings=RISES)
    block = block_of(Store(tmp_path))
    marked = {place for place, text in printed(block).items() if "!" in text}
    assert marked == {("gdfq", "w3a3")}
    assert latex([block]).count(r"\rlap{\,!}") == 1, "it moves no number"
    assert re.search(r"\d\\rlap\{\\,!\}", latex([block])), "right behind its number"
    assert notes(block) == ["! the loss rose above that of the first epoch: gdfq (w3a3)"]
    assert all("!" in write([block]) and "the loss rose" in write([block]) for write in (markdown, html, latex))


def test_what_is_below_plain_rounding_in_the_same_table_is_marked(tmp_path: Path) -> None:
    made(Store(tmp_path), ("gdfq", "round"))
    store = Store(tmp_path)
    assert notes(block_of(store)) == []
    for path in tmp_path.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        if result["cell"]["method"] == "gdfq" and result["cell"]["bits"] == "w3a3":
            path.write_text(json.dumps(result | {"top1": 50.0, "correct": 500}))
    assert notes(block_of(store)) == ["! below plain rounding (`round`) by more than a standard error: gdfq (w3a3)"]
    for path in tmp_path.glob("runs/*/result.json"):
        if json.loads(path.read_text())["cell"]["method"] == "round":
            path.unlink()
    assert notes(block_of(store)) == [], "without `round` nothing is known"


@pytest.mark.parametrize("shortfall", [0.2, 5.0])
def test_a_shortfall_within_the_standard_error_is_not_one(tmp_path: Path, shortfall: float) -> None:
    made(Store(tmp_path), ("gdfq", "round"))
    results = read_store(Store(tmp_path)).results
    plain = sum(r["top1"] for r in results if r["cell"]["method"] == "round" and r["cell"]["bits"] == "w8a8") / 3
    for r in results:
        if r["cell"]["method"] == "gdfq" and r["cell"]["bits"] == "w8a8":
            r["top1"] = plain - shortfall
    (block,) = blocks(results)
    assert bool(notes(block)) == (shortfall > 1)


def test_of_a_result_without_warnings_the_history_is_asked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made(store, ("gdfq", "acq"))
    old = next(path for path in sorted(tmp_path.glob("runs/*/result.json")) if json.loads(path.read_text())["cell"]["method"] == "gdfq")
    result = json.loads(old.read_text())
    del result["warnings"]
    old.write_text(json.dumps(result))
    assert notes(block_of(store)) == []
    rising = "".join(f"{epoch},train,{epoch}.0\n" for epoch in range(1, 41))
    (old.parent / "history.csv").write_text("epoch,phase,loss\n" + rising)
    assert notes(block_of(store)) == [f"! the loss rose above that of the first epoch: gdfq ({result['cell']['bits']})"]
    (old.parent / "history.csv").write_text("epoch,phase,loss\n1,train,1.0\n2,train,much\n")
    assert notes(block_of(store)) == [], "damaged"
    (old.parent / "history.csv").unlink()
    assert notes(block_of(store)) == []

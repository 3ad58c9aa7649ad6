"""`dfqbench compare`: two cells image by image, held against hand-worked counts, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_store import cells, write_cell

from dfqbench.analysis.compare import compare
from dfqbench.errors import UserError
from dfqbench.files import write_atomically, write_json
from dfqbench.quantization import Bits
from dfqbench.store import Store
from dfqbench.sweep.cell import Cell, EvaluationCard

Run = Callable[..., tuple[int, str, str]]
FIRST = next(iter(cells(1)))
IMAGES = 1000


def finished(store: Store, cell: Cell, right: np.ndarray[Any, Any], **changes: Any) -> str:
    """A finished cell that got these images right (booleans)."""
    buffer = io.BytesIO()
    np.save(buffer, np.packbits(right))
    made = write_cell(store, cell, len(right))
    write_json(store.folder(cell.id) / "result.json", made | {"correct": int(right.sum()), "top1": float(100 * right.mean())} | changes)
    write_atomically(store.folder(cell.id) / "correct.npy", buffer.getvalue())
    return cell.id


def pair(store: Store, **changes: Any) -> tuple[str, str]:
    """600 images both get right, 100 only the first, 60 only the second, 240 neither."""
    number = np.arange(IMAGES)
    ours = finished(store, FIRST, number < 700)
    return ours, finished(store, dataclasses.replace(FIRST, **changes), (number < 600) | ((number >= 700) & (number < 760)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "r", writable=True)


def test_the_four_counts_the_difference_and_its_tests(store: Store) -> None:
    ours, theirs = pair(store, seed=7)
    found = compare(store, ours, theirs)
    assert (found.both, found.test.only_first, found.test.only_second, found.neither) == (600, 100, 60, 240)
    assert found.difference.value == pytest.approx(4.0)
    # the difference of an image is +1, -1 or 0: variance 0.16 - 0.04^2 over 1000 images, in percent
    assert found.difference.error == pytest.approx(100 * ((0.16 - 0.04**2) / 1000) ** 0.5, rel=0.1)
    assert found.difference.low == pytest.approx(4 - 1.96 * found.difference.error, rel=1e-3)
    assert found.test.p == pytest.approx(_binomial_tail(100, 160), rel=1e-9)
    back = compare(store, theirs, ours)
    assert back.difference.value == -found.difference.value
    assert (back.test.only_first, back.test.only_second) == (60, 100)


def _binomial_tail(most: int, n: int) -> float:
    """Two-sided: twice the probability of `most` heads or more in n fair throws."""
    from math import comb

    return 2 * sum(comb(n, k) for k in range(most, n + 1)) / 2**n


def test_what_differs_is_named_with_both_values(store: Store) -> None:
    config = {**FIRST.config, "epochs": 41, "new": None}
    changes = {"config": config, "bits": Bits(3, 3), "seed": 7, "precision": "bf16", "method_version": 2}
    ours, theirs = pair(store, **changes, protocol=FIRST.protocol.model_copy(update={"first_bits": 8}))
    said = {(d.what, d.first, d.second) for d in compare(store, ours, theirs).differences}
    assert said == {
        ("bits", "w8a8", "w3a3"), ("seed", "0", "7"), ("epochs", "40", "41"), ("new", None, "None"), ("precision", "fp32", "bf16"),
        ("method_version", "1", "2"), ("protocol.first_bits", "None", "8"),
    }  # fmt: skip


def test_another_teacher_and_other_versions_are_named(store: Store) -> None:
    ours = finished(store, FIRST, np.arange(IMAGES) < 700)
    teacher = dataclasses.replace(FIRST.teacher, label="other", weights_sha256="f" * 64)
    provenance = {"device": "cpu", "device_name": "a CPU", "packages": {"torch": "2.15"}, "host": "elsewhere"}
    theirs = finished(store, dataclasses.replace(FIRST, teacher=teacher), np.arange(IMAGES) < 600, provenance=provenance)
    said = {d.what: (d.first, d.second) for d in compare(store, ours, theirs).differences}
    assert said["teacher"] == ("resnet20", "other")
    assert said["teacher.weights"] == ("0" * 12, "f" * 12)
    assert said["packages.torch"] == ("2.14.1", "2.15")
    assert said["device_name"] == ("a GPU", "a CPU")
    assert "host" not in said


def test_an_id_may_be_cut_as_long_as_it_is_one_cells(store: Store) -> None:
    ours, theirs = pair(store, seed=7)
    short = next(n for n in range(1, 13) if ours[:n] != theirs[:n])
    assert (store.find(ours[:short]), store.find(ours)) == (ours, ours)
    (store.root / "runs" / f"{ours[:-1]}{'0' if ours[-1] != '0' else '1'}").mkdir()
    with pytest.raises(UserError, match=f"'{ours[:11]}': 2 cells have such an id: "):
        store.find(ours[:11])
    assert store.find(ours) == ours
    with pytest.raises(UserError, match=r"no cell in .* has such an id"):
        store.find("xyz")


def test_what_cannot_be_compared_is_told_in_a_line(store: Store) -> None:
    ours, theirs = pair(store, seed=7)
    with pytest.raises(UserError, match=f"are the same cell, {ours}"):
        compare(store, ours, ours)
    elsewhere = finished(store, dataclasses.replace(FIRST, evaluation=EvaluationCard("other", "e" * 64, 10, IMAGES)), np.arange(IMAGES) < 9)
    with pytest.raises(UserError, match=r"on made-up \(1000 images, 00000000\) and .* on other \(1000 images, eeeeeeee\): only cells on the same"):
        compare(store, ours, elsewhere)
    (store.folder(theirs) / "correct.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"correct\.npy: missing, damaged or not this result's"):
        compare(store, ours, theirs)
    (store.folder(theirs) / "correct.npy").unlink()
    with pytest.raises(UserError, match=r"correct\.npy: missing, damaged or not this result's"):
        compare(store, ours, theirs)
    (store.folder(theirs) / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: damaged"):
        compare(store, ours, theirs)
    (store.folder(theirs) / "result.json").unlink()
    with pytest.raises(UserError, match=f"cell {theirs} is not finished"):
        compare(store, ours, theirs)
    store.write_failure(theirs, "ValueError", "out of luck\nand more", "")
    with pytest.raises(UserError, match=f"^cell {theirs} failed: ValueError: out of luck$"):
        compare(store, ours, theirs)


def test_the_command_prints_all_of_it(dfqbench: Run, store: Store) -> None:
    ours, theirs = pair(store, seed=7)
    code, out, err = dfqbench("compare", ours, theirs, "--results", store.root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"first   {ours}  gdfq resnet20 made-up w8a8 seed 0: 70.00 % (700 of 1000)"
    assert lines[3].startswith("first - second: +4.00 points, 95 % interval +")
    assert [line.split() for line in lines[8:10]] == [["first", "right", "600", "100"], ["first", "wrong", "60", "240"]]
    assert lines[-2:] == ["they differ in", "  seed: 0 | 7"]
    code, out, err = dfqbench("compare", ours, "nothing", "--results", store.root)
    assert (code, out, err.count("\n")) == (2, "", 1)

"""A history shows that a run fails: by which rule, since which epoch, and that good runs are left alone, those of the reference stores too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dfqbench.analysis.warning_signs import read_rows, signs

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


def with_losses(*losses: float) -> list[dict[str, Any]]:
    """Two epochs of warm-up, then one for each loss."""
    warm_up = [{"epoch": epoch, "phase": "warm-up"} for epoch in (1, 2)]
    return [*warm_up, *({"epoch": 3 + i, "phase": "train", "loss": loss} for i, loss in enumerate(losses))]


def kinds(history: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(sign.kind, sign.epoch) for sign in signs(history)]


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [
        ((2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), None),
        ((2.0, 2.5, 2.5, 2.5, 2.5), None),  # too few epochs after the first to tell
        ((2.0, 2.5, 2.5, 2.5, 2.5, 2.5), 8),
        ((2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0), 10),  # since the mean of five is above the first
        ((2.0, 2.5, 1.0, 2.5, 1.0, 2.5, 1.0), None),  # one epoch alone is noise
        ((-2.0, -1.0, -1.0, -1.0, -1.0, -1.0), 8),  # a loss may be negative
        ((2.0, 1.0, 1.0, 1.0, 1.0, float("nan")), None),  # that is told as what it is: diverged
    ],
)
def test_a_loss_rises_when_five_epochs_are_on_average_above_the_first(losses: tuple[float, ...], epoch: int | None) -> None:
    assert kinds(with_losses(*losses)) == ([("loss", epoch)] if epoch else [])


def test_epochs_before_training_are_not_judged() -> None:
    row = {
        "epoch": 1,
        "phase": "warm-up",
        "clipped": 99.0,
        "range_change": 10.0,
        "student_agrees": 1.0,
        "rounding_agrees": 99.0,
        "agreement_error": 1.0,
    }
    assert kinds([row]) == []


def test_what_a_layer_clips_counts_beside_what_it_clipped_before_training() -> None:
    def history(before: float, after: float) -> list[dict[str, Any]]:
        return [{"epoch": 1, "clipped": before}, {"epoch": 2, "loss": 1.0, "clipped": after}]

    assert kinds(history(0.1, 9.0)) == []
    assert kinds(history(0.1, 60.0)) == [("clipped", 2)]
    assert kinds(history(40.0, 60.0)) == [], "ranges that cut off so much by design"
    assert kinds([{"epoch": 1, "loss": 1.0, "clipped": 60.0}]) == [("clipped", 1)], "nothing is known from before"


def test_agreement_below_plain_rounding_must_be_more_than_chance() -> None:
    def row(ours: float, plain: float, error: float) -> list[dict[str, Any]]:
        return [{"epoch": 1, "loss": 1.0, "student_agrees": ours, "rounding_agrees": plain, "agreement_error": error}]

    for ours, error in ((90.0, 1.0), (80.0, 0.0), (76.0, 0.1), (70.0, 7.0)):  # above, equal, a few images, chance
        assert kinds(row(ours, 80.0, error)) == []
    (sign,) = signs(row(70.0, 80.0, 5.0))
    assert sign.as_dict() == {
        "kind": "agreement",
        "epoch": 1,
        "text": "the student agrees with the teacher on 70 % of the last synthetic images, plain rounding on 80 %",
    }


def test_ranges_that_jump_in_training() -> None:
    assert kinds([{"epoch": 1, "loss": 1.0, "range_change": 1.4}]) == []
    assert kinds([{"epoch": 1, "loss": 1.0, "range_change": 1.4}, {"epoch": 2, "loss": 1.0, "range_change": 30.0}]) == [("ranges", 2)]


def test_each_kind_is_told_with_the_epoch_in_which_it_began() -> None:
    history = with_losses(2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0)
    history[4] |= {"clipped": 50.0}
    history[6] |= {"clipped": 80.0}
    assert kinds(history) == [("loss", 8), ("clipped", 5)]


def cells(store: str) -> list[tuple[dict[str, Any], float | None, list[dict[str, Any]]]]:
    """(record, top-1 in percent or None where it failed, history) of each cell of a reference store in which a student was trained."""
    found = []
    for folder in sorted((REFERENCE / store / "runs").iterdir()):
        rows, result = read_rows(folder / "history.csv"), folder / "result.json"
        if any("loss" in row for row in rows):
            top1 = json.loads(result.read_text())["top1"] if result.exists() else None
            found.append((json.loads((folder / "cell.json").read_text()), top1, rows))
    return found


@pytest.mark.parametrize("store", ["cifar10-jpeg-study", "cifar10-jpeg", "cifar10-jpeg-bf16", "no-data-score"])
def test_of_the_reference_stores_no_good_cell_is_flagged(store: str) -> None:
    """Good is everything above 60 %: their histories hold the loss, and rules that need more than that do not fire."""
    trained = cells(store)
    assert len(trained) > 3
    assert [(cell["label"], cell["bits"], top1) for cell, top1, rows in trained if top1 is not None and top1 > 60 and signs(rows)] == []


def test_of_the_study_the_failing_cells_whose_loss_rises_are_flagged() -> None:
    flagged = {(cell["method"], cell["bits"], cell["seed"]) for cell, _, rows in cells("cifar10-jpeg-study") if signs(rows)}
    assert flagged == {("intraq", "w4a4", 0), ("intraq", "w4a4", 1), ("zaq", "w3a3", 0), ("zaq", "w3a3", 1)}


def test_a_history_that_is_not_there_shows_nothing(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "history.csv") == []
    assert signs([]) == []

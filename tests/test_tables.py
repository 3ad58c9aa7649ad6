"""Tables: what is averaged, and what is never put into one block."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmark.tables import blocks, load_frame, markdown

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
        "provenance": {"device_name": "a CPU"},
        "cell": {
            "label": method,
            "fidelity": "code",
            "teacher": {"label": "resnet20", "weights_sha256": "ab"},
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


def test_a_cell_shows_mean_and_sample_standard_deviation_over_seeds() -> None:
    (block,) = blocks([result(seed=s, top1=t) for s, t in enumerate((50.0, 52.0, 54.0))])
    assert block.frame.loc["gdfq", "w4a4"] == "52.00 ± 2.00"
    assert block.frame.loc["gdfq", "seeds"] == "3"


def test_columns_are_widths_from_wide_to_narrow_and_gaps_are_shown() -> None:
    (block,) = blocks([result(bits="w3a3"), result(bits="w8a8"), result("round", bits="w8a8", top1=40.0)])
    assert [c for c in block.frame.columns if c.startswith("w")] == ["w8a8", "w3a3"]
    assert block.frame.loc["round", "w3a3"] == "-"
    assert list(block.frame.index) == ["round", "gdfq"], "rows go from worst to best"


@pytest.mark.parametrize(
    "change",
    [
        {"cell__protocol": "hardware"},
        {"cell__precision": "bf16"},
        {"cell__teacher__weights_sha256": "cd"},
        {"cell__identity__evaluation": "another"},
    ],
)
def test_what_cannot_be_compared_is_never_in_one_block(change: dict[str, Any]) -> None:
    assert len(blocks([result(), result(seed=1, **change)])) == 2


def test_one_set_under_two_names_is_one_block() -> None:
    assert len(blocks([result(), result(seed=1, cell__evaluation__name="my-digits")])) == 1


def test_other_budgets_are_other_rows() -> None:
    (block,) = blocks([result(), result(seed=1, steps=200)])
    assert list(block.frame["steps x batch"]) == ["100 x 64", "200 x 64"]


def test_a_methods_own_rules_are_marked_and_explained() -> None:
    own = {"ranges": "mse", "batch_norm": "fixed"}
    (block,) = blocks([result(), result(seed=1), result("gznq", cell__identity__protocol=own)])
    assert "gznq*" in block.frame.index
    assert "* the method's own rules: ranges mse (protocol: ema)" in block.notes


def test_the_rule_decides_which_epoch_counts_and_is_named() -> None:
    (last,), (best,) = blocks([result()], "last"), blocks([result()], "best-on-test")
    assert (last.frame.loc["gdfq", "w4a4"], best.frame.loc["gdfq", "w4a4"]) == ("50.00", "51.00")
    assert "rule 'last'" in last.notes[0]
    assert "chosen on the test labels" in best.notes[0]


def test_the_cost_of_a_cell_is_its_own_and_the_shared_seconds() -> None:
    assert load_frame([result()]).seconds.tolist() == [30.0]


def test_markdown_has_one_table_line_per_method() -> None:
    text = markdown(blocks([result(), result("round", top1=40.0)]))
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")] == ["method", "round", "gdfq"]

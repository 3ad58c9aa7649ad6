"""What differs between two states, and that it carries one over to the other without touching anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dfqbench.engine.state_difference import changed, difference

BEFORE: dict[str, Any] = {"a": torch.zeros(2), "b": {"x": 1, "y": [1.0, (2, "two")]}, "list": [], "nan": float("nan"), "gone": torch.ones(1)}
AFTER: dict[str, Any] = {"a": torch.ones(2), "b": {"x": 1, "y": [1.0, (3, "two")]}, "list": [torch.ones(3)], "nan": float("nan"), "new": None}


def test_a_difference_turns_one_state_into_the_other() -> None:
    found = difference(BEFORE, AFTER)
    assert difference(changed(BEFORE, found), AFTER) is None
    assert isinstance(changed(BEFORE, found)["b"]["y"][1], tuple)
    assert changed(BEFORE, None) is BEFORE
    assert difference(AFTER, AFTER) is None


def test_what_did_not_change_stays_as_another_state_has_it() -> None:
    other = {**BEFORE, "b": {"x": 7, "y": [9.0, (2, "too")], "z": "more"}, "unknown": 5}
    end = changed(other, difference(BEFORE, AFTER))
    assert end["b"] == {"x": 7, "y": [9.0, (3, "too")], "z": "more"}
    assert end["unknown"] == 5
    assert torch.equal(end["a"], torch.ones(2))
    assert "gone" not in end


@pytest.mark.parametrize(
    ("one", "other"),
    [(0.0, 0), (True, 1), ([1], (1,)), (torch.tensor(0.0), torch.tensor(-0.0)), (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), 0.0)],
)
def test_equal_numbers_that_are_not_the_same_bits_differ(one: Any, other: Any) -> None:
    assert difference(one, other) is not None

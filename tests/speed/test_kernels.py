"""How many kernels a step launches: on a GPU a small network's step takes as long as launching them."""

from __future__ import annotations

import pytest
from kernels_per_step import counted


@pytest.mark.slow
@pytest.mark.parametrize(("method", "own"), [("gdfq", 350), ("ait", 900)])
def test_a_step_launches_few_kernels_and_waits_for_none(method: str, own: int) -> None:
    ((shared, student, waits),) = counted(method).values()
    assert shared <= 350
    assert student <= own
    assert waits == 0

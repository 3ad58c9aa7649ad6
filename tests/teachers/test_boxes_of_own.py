"""Where a network of one's own says where the boxes of all positions are: in itself, or in the file that its factory is in; or it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dfqbench.errors import UserError
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep

SweepFile = Callable[..., Path]
QUIET = """
import torch
from dfqbench.testing import small_task
from dfqbench.testing.networks import SmallDetector
class Quiet(SmallDetector):
    boxes = None
def build():
    torch.manual_seed(0)
    return Quiet(small_task(classes=5, size=16, kind="detect", width=24))
"""


@pytest.mark.parametrize(("more", "count"), [("", 0), ("boxes = SmallDetector.boxes", 1), ("Quiet.boxes = staticmethod(SmallDetector.boxes)", 1)])
def test_boxes_are_looked_for_in_the_network_and_beside_its_factory(sweep_file: SweepFile, tmp_path: Path, more: str, count: int) -> None:
    (tmp_path / "net.py").write_text(QUIET + more)
    teacher = {"model": f"{tmp_path}/net.py:build", "kind": "detect", "classes": 5, "size": [16, 24], "mean": [0.5] * 3, "std": [0.25] * 3}
    settings = {"teachers": [teacher], "methods": ["tszsq"], "evaluate": "none", "selection": {"images": "gaussian", "count": 16, "seed": 5}}
    file = sweep_file(**settings, seeds=[0], bits=["w4a4"])
    if count:
        (cell,) = load_sweep(file, cache_folder()).cells
        assert cell.teacher.offers["boxes"] == 1
    else:
        with pytest.raises(UserError, match="does not have what method tszsq needs: boxes"):
            load_sweep(file, cache_folder())

"""`dfqbench speed --overheads`: what is measured is what is said, and nothing is asserted about how long it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dfqbench.files import read_json
from dfqbench.speed import overheads
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("cells", [1, 10, 300])
def test_the_sweep_has_as_many_cells_as_are_spoken_of(tmp_path: Path, cells: int) -> None:
    config = overheads.sweep_of(tmp_path / "sweep.yaml", overheads.made_up_teacher(tmp_path), cells)
    assert len(load_sweep(config, cache_folder()).cells) == cells


@pytest.mark.slow
def test_a_worker_is_measured_up_to_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = overheads.sweep_of(tmp_path / "sweep.yaml", overheads.made_up_teacher(tmp_path), 1)
    overheads.first_step(str(config), str(tmp_path / "r"), "cpu")
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line).keys() == {"reached", "processor"}
    store = Store(tmp_path / "r")
    assert [store.progress(cell_id)["step"] for cell_id in store.ids()] == [1]  # type: ignore[index]


@pytest.mark.slow
def test_overheads_are_written_as_they_were_measured(dfqbench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overheads, "measure", partial(overheads.measure, cells=10, steps=20))
    code, out, _ = dfqbench("speed", "--overheads", "--device", "cpu", "--rounds", 1, "--out", tmp_path / "overheads.json")
    assert code == 0
    written = read_json(tmp_path / "overheads.json")
    assert written["command"].startswith("dfqbench speed --overheads")
    plan, finished, worker, memory = written["overheads"]
    assert plan["notes"]["said"] == "10 cells: 10 missing"
    assert finished["notes"]["said"] == "0 cells to run, 10 already done"
    assert (plan["wanted"], finished["wanted"], worker["wanted"], memory["wanted"]) == (2.0, 5.0, 10.0, None)
    assert memory["notes"]["resident_mb"].keys() == {"10", "20"}
    assert all(len(o["clock"]) == len(o["processor"]) == 1 and min(o["clock"] + o["processor"]) > 0 for o in written["overheads"])
    assert "MB after 20" in out
    assert "written to" in out

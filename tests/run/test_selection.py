"""Choosing settings without real data: the measure by hand, and that no real image takes part."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfqbench.data.sets import EvaluationSet
from dfqbench.run import agreement as run_agreement
from dfqbench.run.agreement import kept_images
from dfqbench.run.options import StopFlag
from dfqbench.run.selection import agreement, selection_frame
from dfqbench.task import Task

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
IMAGES = {"images": {"gznq": {"images": 16, "synthesis_batch": 8, "synthesis_iterations": 2, "confidence": 0.0}}, "count": 12}


def test_images_that_another_process_made_meanwhile_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two start at once: what both go on with are the images in the file, and those are of one."""
    path, made, maker, teacher = tmp_path / "unseen" / "images.safetensors", [torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)], Mock(), Mock()
    taken = []

    def make(*_: Any) -> Tensor:
        mine = made.pop()
        if made:
            taken.append(kept(teacher))
        return mine

    def kept(teacher: Any) -> Tensor:
        return kept_images(path, maker, teacher, torch.device("cpu"), 2, lambda line: None, StopFlag())

    monkeypatch.setattr(run_agreement, "made_images", make)
    monkeypatch.setattr(run_agreement, "rehearse", lambda *_: None)
    taken.append(kept(teacher))
    assert [float(images.mean()) for images in (*taken, kept(teacher))] == [0, 0, 0]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


class Fixed(nn.Module):
    """Answers every image with the same logits."""

    task = Task(2, 3, 1, (0.0,) * 3, (1.0,) * 3)

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def test_agreement_is_the_divergence_from_the_teacher_in_nats() -> None:
    teacher, student = Fixed([0.0, np.log(3.0)]), Fixed([np.log(1.0), np.log(1.0)])
    found = agreement(student, teacher, torch.zeros(300, 1, 2, 2), nullcontext())  # type: ignore[arg-type]
    assert found.loss == pytest.approx(0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5))
    assert found.correct.shape == (300,)
    assert agreement(teacher, teacher, torch.zeros(3, 1, 2, 2), nullcontext()).loss == 0.0  # type: ignore[arg-type]


def test_select_ranks_by_divergence_without_a_real_image_and_runs_nothing_twice(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a real image was asked for")

    monkeypatch.setattr(EvaluationSet, "decode", forbidden)
    quick = {"warmup_epochs": 1, "calibration_epochs": 1}
    config = sweep_file(methods=[{"gdfq": {**quick, "bn_weight": [0.1, 5.0]}}], selection=IMAGES)
    ask = (config, "--results", tmp_path / "r", "--format", "csv")
    code, out, _ = dfqbench("select", *ask)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 4
    means = {name: np.mean([float(r["kl"]) for r in rows if r["method"] == name]) for name in {r["method"] for r in rows}}
    assert rows[0]["method"] == rows[1]["method"] == min(means, key=lambda name: means[name])
    assert all(float(r["kl"]) > 0 for r in rows)
    assert {"generator_bns", "loss", "wall_seconds"} <= rows[0].keys()
    assert "seconds" not in rows[0]
    kept = sorted((tmp_path / "r" / "selections" / "small").iterdir())
    assert [p.suffix for p in kept] == [".json"] * 4 + [".safetensors"]
    record = json.loads(kept[0].read_text())
    assert record["images"]["count"] == 12
    assert record["images"]["cell"]["seed"] == 1000
    before = {p: p.stat().st_mtime_ns for p in kept}
    assert dfqbench("select", *ask)[1] == out
    assert {p: p.stat().st_mtime_ns for p in kept} == before
    assert not list((tmp_path / "r" / "runs").iterdir())


def test_a_method_of_which_a_cell_diverged_is_not_ranked_by_the_cells_that_are_left() -> None:
    def record(method: str, bits: str, kl: float | None) -> dict[str, Any]:
        said = {"failed": None if kl else "diverged: the loss is nan in epoch 5", "last": {"seconds": 3.0}, "provenance": {"device": "cuda"}}
        return {"cell": {"label": method, "bits": bits, "seed": 0}, "kl": kl, "agreement": kl and 90.0, **said}

    records = [record("wild", "w4a4", 0.1), record("wild", "w3a3", None), record("tame", "w4a4", 0.2), record("tame", "w3a3", 0.4)]
    frame = selection_frame(records)
    assert frame.method.tolist() == ["tame", "tame", "wild", "wild"]
    assert frame.gpu_seconds.tolist() == [3.0] * 4
    assert selection_frame(records[1:2]).failed.tolist() == ["diverged: the loss is nan in epoch 5"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "selection: missing"),
        ({"selection": {**IMAGES, "images": {"gdfq": {"bn_weight": [0.1, 1.0]}}}}, "selection.images: 2 variants"),
        ({"selection": {**IMAGES, "images": "gdfk"}}, "gdfq"),
        ({"selection": {"images": "gdfq", "seed": 0}, "methods": ["round", "gdfq"]}, "selection.seed: 0 is also a seed of the sweep"),
    ],
)
def test_a_selection_that_cannot_work_is_told(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    code, _, err = dfqbench("select", sweep_file(**changes), "--results", tmp_path / "r")
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "r" / "selections").exists(), "nothing was trained before"


def test_a_selection_is_no_part_of_any_cell(sweep_file: SweepFile) -> None:
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.load import load_sweep

    plain = [cell.id for cell in load_sweep(sweep_file(), cache_folder()).cells]
    assert [cell.id for cell in load_sweep(sweep_file(selection=IMAGES), cache_folder()).cells] == plain

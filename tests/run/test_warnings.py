"""A failing run says so while it runs: once for each kind and cell, in its log and its result, also through an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dfqbench.run.options import Options, StopFlag
from dfqbench.run.watcher import Watcher
from dfqbench.store import Store

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

# its loss rises by one every epoch, whatever the student does; with `harm`, the student is taken away from what it knows
SINKING = '''
import torch

from dfqbench import Batch, Field, Method, Phase, TrainingConfig, register


@register("sinking", paper="none", fidelity="paper", shares_synthesis=True)
class Sinking(Method):
    """Fails."""

    class Config(TrainingConfig):
        harm: float = Field(0.0, description="of the student")

    def setup(self):
        self.count = 0

    def phases(self):
        return [Phase("calibrate", 1, calibration_epochs=1), Phase("train", self.config.epochs - 1, distill=True)]

    def synthesize(self):
        self.count += 1
        images = self.draw_noise(self.config.batch_size, *self.task.image_shape)
        return Batch(images, None, self.teacher(images).detach())

    def distill(self, student, batch):
        away = (student(batch.images) + self.teacher(batch.images)).square().mean()  # towards the opposite of the teacher's answers
        return self.config.harm * away - (self.config.harm * away).detach() + self.count
'''


@pytest.fixture(scope="module")
def sinking(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plugin") / "sinking.py"
    path.write_text(SINKING)
    return str(path)


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]


@pytest.mark.slow
def test_a_rising_loss_is_told_once_for_each_cell(sweep_file: SweepFile, dfqbench: Run, sinking: str, tmp_path: Path) -> None:
    config = sweep_file(methods=["sinking"], plugins=[sinking], budget={"epochs": 10, "iterations": 2, "batch_size": 8})
    code, out, err = dfqbench("run", config, "--results", tmp_path / "r")
    assert code == 0, err
    told = [line.strip() for line in out.splitlines() if "warning" in line]
    assert len(told) == 2, "two widths"
    said = "the loss rises: 9.5 on average over 5 epochs, 3.5 in the first (epoch 7)"
    assert all("sinking tiny digits w" in line and line.endswith(said) for line in told)
    for result in results(tmp_path / "r"):
        (sign,) = result["warnings"]  # type: ignore[attr-defined]
        assert (sign["kind"], sign["epoch"]) == ("loss", 7)
        assert (tmp_path / "r" / "runs" / str(result["id"]) / "log.txt").read_text().count("warning: the loss rises") == 1
    _, out, _ = dfqbench("table", config, "--results", tmp_path / "r")
    assert "! the loss rose above that of the first epoch: sinking (w4a4, w3a3)" in out


def test_a_student_that_gives_other_answers_than_plain_rounding_is_told_at_the_end(
    sweep_file: SweepFile, dfqbench: Run, sinking: str, tmp_path: Path
) -> None:
    budget = {"epochs": 3, "iterations": 20, "batch_size": 32}
    methods = [{"sinking": {"harm": 1.0, "student_lr": 0.05}}]
    code, out, err = dfqbench("run", sweep_file(methods=methods, bits=["w8a8"], plugins=[sinking], budget=budget), "--results", tmp_path / "r")
    assert code == 0, out + err
    (result,) = results(tmp_path / "r")
    kinds = [sign["kind"] for sign in result["warnings"]]  # type: ignore[attr-defined]
    assert "agreement" in kinds, result["warnings"]
    assert "plain rounding on " in out
    header, *rows = (tmp_path / "r" / "runs" / str(result["id"]) / "history.csv").read_text().splitlines()
    assert {"clipped", "student_agrees", "rounding_agrees", "agreement_error"} <= set(header.split(","))
    assert len(rows) == 3


def test_after_an_interruption_what_was_told_is_not_told_again(tmp_path: Path) -> None:
    """The watcher of the process that goes on reads it from the histories."""
    said: list[str] = []
    progress = SimpleNamespace(say=lambda line, style="": said.append(line))
    history = [{"epoch": 1, "loss": 1.0, "clipped": 50.0}]
    trainee = SimpleNamespace(name="w4a4", history=history, cell=SimpleNamespace(id="0" * 12))
    lockstep = SimpleNamespace(trainees=[trainee], active=[trainee], steps_done=0, steps=1)
    store = Store(tmp_path)
    store.folder("0" * 12).mkdir(parents=True)
    watcher = Watcher(store, tmp_path / "c.pt", Options(), progress, StopFlag(), None)  # type: ignore[arg-type]
    watcher.start(lockstep)  # type: ignore[arg-type]
    watcher.warn(lockstep)  # type: ignore[arg-type]
    assert said == []
    history.append({"epoch": 2, "loss": 1.0, "clipped": 60.0, "range_change": 9.0})
    for _ in range(2):
        watcher.warn(lockstep)  # type: ignore[arg-type]
    (line,) = said
    assert "an activation range changed by a factor of 9 in one epoch (epoch 2)" in line

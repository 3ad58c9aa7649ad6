"""The lockstep engine: students share images and nothing else, and an interruption leaves no trace."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfqbench import Batch, Method, TrainingConfig, stream_seed
from dfqbench.engine.evaluate import Evaluation, state_hash
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.engine.method_state import restore_state, state_of
from dfqbench.method.learning_rate import learning_rate
from dfqbench.method.log import Log
from dfqbench.network import Teacher
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Bundle, Cell, bundles
from dfqbench.sweep.load import LoadedSweep, load_sweep
from dfqbench.teachers import load
from dfqbench.testing import StopAfter

SweepFile = Callable[..., Path]


def no_evaluation(student: Any) -> Evaluation:
    return Evaluation(np.array([True]), 100.0, None, 0.0)


def start(loaded: LoadedSweep, cells: tuple[Cell, ...], **options: Any) -> Lockstep:
    card = cells[0].teacher
    teacher = Teacher(load(loaded.teachers[card]), card.task)
    return Lockstep(Bundle(cells), teacher, torch.device("cpu"), options.pop("evaluate", no_evaluation), **options)


def hashes(lockstep: Lockstep) -> dict[str, str]:
    return {t.name: state_hash(t.student) for t in lockstep.trainees}


@pytest.mark.parametrize("protocol", ["lineage", "hardware"])
def test_lockstep_gives_the_same_bits_as_running_alone(sweep_file: SweepFile, protocol: str) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4", "w3a3", "w5a5", "w8a8"], protocol=protocol), cache_folder())
    (bundle,) = bundles(loaded.cells)
    together = start(loaded, bundle.cells)
    together.run(StopAfter())
    (w4a4,) = (cell for cell in bundle.cells if str(cell.bits) == "w4a4")
    alone = start(loaded, (w4a4,))
    alone.run(StopAfter())
    assert hashes(alone)["w4a4"] == hashes(together)["w4a4"]
    assert len(set(hashes(together).values())) == 4


def test_training_moves_weights_and_calibration_sets_ranges(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4"]), cache_folder())
    lockstep = start(loaded, tuple(loaded.cells))
    student = lockstep.trainees[0].student
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(Interrupted):
        lockstep.run(StopAfter(stop_after=3))
    assert all(q.has_range for q in student.quantizers.values())
    assert torch.equal(before["traced.stem.layer.weight"], student.state_dict()["traced.stem.layer.weight"]), "warm-up must not train the student"
    lockstep.run(StopAfter())
    for name in ("traced.stem.layer.weight", "traced.bn1.weight", "traced.head.layer.bias"):
        assert not torch.equal(before[name], student.state_dict()[name]), name
    assert torch.equal(before["traced.bn1.running_mean"], student.state_dict()["traced.bn1.running_mean"])


def test_ranges_are_frozen_after_calibration_and_in_evaluation(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4"]), cache_folder())
    seen: list[dict[str, float]] = []

    def evaluate(student: Any) -> Evaluation:
        before = state_hash(student)
        student(torch.randn(4, 3, 16, 16) * 50)
        assert state_hash(student) == before
        seen.append({name: float(q.scale) for name, q in student.quantizers.items()})
        return no_evaluation(student)

    start(loaded, tuple(loaded.cells), evaluate=evaluate, evaluate_every=1).run(StopAfter())
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [2, 4, 7, 12])
def test_interrupted_equals_uninterrupted(sweep_file: SweepFile, stop_after: int) -> None:
    """In the warm-up, at its end, in training, and after the last step; also through a state that went through a file."""
    loaded = load_sweep(sweep_file(), cache_folder())
    cells = bundles(loaded.cells)[0].cells
    whole = start(loaded, cells)
    whole.run(StopAfter())
    first = start(loaded, cells)
    with pytest.raises(Interrupted):
        first.run(StopAfter(stop_after))
    torch.manual_seed(999)  # whatever else ran in between
    second = start(loaded, cells)
    second.restore(first.state())
    second.run(StopAfter())
    assert hashes(second) == hashes(whole)
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in t.history] for t in second.trainees]
    assert untimed == [[{k: v for k, v in row.items() if k != "seconds"} for row in t.history] for t in whole.trainees]


@pytest.mark.slow
def test_both_clocks_go_on_where_they_were_and_an_old_state_has_no_processor_time(sweep_file: SweepFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that a test moves: the wall clock by 5 s, the processor's by 1 s whenever it is read."""
    ticks = {"wall": 0.0, "cpu": 0.0}

    def clock(name: str, step: float) -> float:
        ticks[name] += step
        return ticks[name]

    monkeypatch.setattr(time, "perf_counter", lambda: clock("wall", 5.0))
    monkeypatch.setattr(time, "process_time", lambda: clock("cpu", 1.0))
    loaded = load_sweep(sweep_file(), cache_folder())
    cells = bundles(loaded.cells)[0].cells
    whole, first = start(loaded, cells), start(loaded, cells)
    whole.run(StopAfter())
    assert whole.watch.cpu == {name: seconds / 5 for name, seconds in whole.watch.read().items()}
    with pytest.raises(Interrupted):
        first.run(StopAfter(5))
    state = first.state()
    second = start(loaded, cells)
    second.restore(state)
    second.run(StopAfter())
    assert (second.watch.read(), second.watch.cpu) == (whole.watch.read(), whole.watch.cpu)
    del state["cpu_seconds"]
    second = start(loaded, cells)
    second.restore(state)
    second.run(StopAfter())
    assert second.watch.read() == whole.watch.read()
    assert all(map(math.isnan, second.watch.cpu.values())), "a part of it was not measured"


@pytest.mark.slow
def test_seeds_differ_and_one_seed_repeats(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4"], seeds=[0, 1]), cache_folder())
    ends = []
    for cell in (loaded.cells[0], loaded.cells[1], loaded.cells[0]):
        lockstep = start(loaded, (cell,))
        lockstep.run(StopAfter())
        ends.append(hashes(lockstep)["w4a4"])
    assert ends[0] == ends[2] != ends[1]


def test_a_student_that_diverges_leaves_and_the_others_keep_their_bits(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(), cache_folder())
    cells = bundles(loaded.cells)[0].cells
    healthy = start(loaded, cells)
    healthy.run(StopAfter())
    sick = start(loaded, cells)
    with torch.no_grad():
        next(sick.trainees[1].student.parameters()).fill_(float("nan"))
    sick.run(StopAfter())
    assert sick.trainees[1].failed is not None
    assert "diverged" in sick.trainees[1].failed
    assert hashes(sick)[sick.trainees[0].name] == hashes(healthy)[sick.trainees[0].name]


def test_the_teacher_is_untouched(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4"]), cache_folder())
    lockstep = start(loaded, tuple(loaded.cells))
    before = state_hash(lockstep.teacher)
    lockstep.run(StopAfter())
    assert state_hash(lockstep.teacher) == before
    assert all(p.grad is None for p in lockstep.teacher.parameters())


def test_bf16_trains_with_ranges_and_weights_in_fp32(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4"], precision="bf16"), cache_folder())
    lockstep = start(loaded, tuple(loaded.cells))
    lockstep.run(StopAfter())
    student = lockstep.trainees[0].student
    assert all(value.dtype == torch.float32 for value in student.state_dict().values() if value.is_floating_point())
    assert np.isfinite(lockstep.trainees[0].history[-1]["loss"])


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1.0), (1, 1.0), (2, 0.1), (4, 0.1), (5, 0.01), (99, 0.01)])
def test_milestones_count_from_the_first_epoch_and_are_not_rescaled(epoch: int, rate: float) -> None:
    assert learning_rate(1.0, [2, 5], 0.1, epoch) == pytest.approx(rate)


def test_learning_rates_follow_the_milestones(sweep_file: SweepFile) -> None:
    settings = {"warmup_epochs": 1, "calibration_epochs": 1, "milestones": [2], "lr_decay": 0.5, "student_lr": 0.01, "generator_lr": 0.02}
    loaded = load_sweep(sweep_file(bits=["w4a4"], methods=[{"gdfq": settings}]), cache_folder())
    lockstep = start(loaded, tuple(loaded.cells))
    lockstep.run(StopAfter())
    rates = [row.get("student_lr") for row in lockstep.trainees[0].history]
    assert rates == [None, 0.01, 0.005]
    assert lockstep.method.optimizer.param_groups[0]["lr"] == 0.01  # type: ignore[attr-defined]


def test_a_student_can_be_trained_without_momentum(sweep_file: SweepFile) -> None:
    settings = {"warmup_epochs": 1, "calibration_epochs": 1, "student_momentum": 0}
    loaded = load_sweep(sweep_file(bits=["w4a4"], methods=[{"gdfq": settings}]), cache_folder())
    lockstep = start(loaded, tuple(loaded.cells))
    lockstep.run(StopAfter())
    assert np.isfinite(lockstep.trainees[0].history[-1]["loss"])


class Keeper(Method):
    """Holds one of everything that a checkpoint must carry."""

    class Config(TrainingConfig):
        pass

    def setup(self) -> None:
        self.net = torch.nn.Linear(2, 2)
        self.optimizers = [torch.optim.Adam(self.net.parameters())]
        self.tensor, self.count, self.text = torch.zeros(3), 0, "a"
        self.nested = {"centers": [torch.zeros(2), 1.5], "pair": (1, None)}
        self.own_stream = torch.Generator().manual_seed(1)

    def synthesize(self) -> Batch:
        raise NotImplementedError


def test_every_attribute_of_a_method_is_checkpointed(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(), cache_folder())
    card = loaded.cells[0].teacher
    teacher = Teacher(load(loaded.teachers[card]), card.task)
    old, new = Keeper(teacher, Keeper.Config(), 0), Keeper(teacher, Keeper.Config(), 0)
    old.setup()
    new.setup()
    old.net(torch.randn(1, 2)).sum().backward()
    old.optimizers[0].step()
    old.tensor += 5
    old.count, old.text = 3, "b"
    old.nested["centers"].append(torch.ones(1))  # type: ignore[attr-defined]
    torch.rand(3, generator=old.own_stream)
    old.draw_noise(4)
    restore_state(new, state_of(old))
    assert torch.equal(new.net.weight, old.net.weight)
    assert new.optimizers[0].state_dict()["state"][0]["step"] == 1
    assert torch.equal(new.tensor, old.tensor)
    assert (new.count, new.text, new.nested["pair"]) == (3, "b", (1, None))
    assert len(new.nested["centers"]) == 3
    assert torch.equal(torch.rand(2, generator=new.own_stream), torch.rand(2, generator=old.own_stream))
    assert torch.equal(new.draw_noise(2), old.draw_noise(2))


def test_what_a_checkpoint_holds_is_restored_to_where_the_method_computes(sweep_file: SweepFile) -> None:
    """A checkpoint is read onto the CPU. The device of the test is torch's `meta`, which every machine has."""
    loaded = load_sweep(sweep_file(), cache_folder())
    card = loaded.cells[0].teacher
    teacher = Teacher(load(loaded.teachers[card]), card.task)
    old, new = Keeper(teacher, Keeper.Config(), 0), Keeper(teacher, Keeper.Config(), 0)
    for method in (old, new):
        method.setup()
    old.nested["centers"].append(torch.ones(1))  # type: ignore[attr-defined]
    old.log("loss", torch.ones(()))
    new.device = torch.device("meta")
    restore_state(new, state_of(old))
    assert new.nested["centers"][0].device.type == "cpu", "what is there already keeps its place"  # type: ignore[attr-defined]
    assert new.nested["centers"][2].device.type == "meta"  # type: ignore[attr-defined]
    assert new._log.sums[""]["loss"][0].device.type == "meta"


def test_sums_of_logged_values_stay_where_they_are_and_start_again_from_zero() -> None:
    log = Log()
    log.add("loss", torch.tensor(2.0))
    log.add("loss", torch.tensor(4.0))
    place = log.sums[""]["loss"][0].data_ptr()
    assert log.averages("") == {"loss": 3.0}
    log.reset()
    assert log.averages("") == {}
    log.add("loss", torch.tensor(5.0))
    assert log.averages("") == {"loss": 5.0}
    assert log.sums[""]["loss"][0].data_ptr() == place


def test_an_attribute_that_cannot_be_checkpointed_is_named(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(), cache_folder())
    card = loaded.cells[0].teacher
    method = Keeper(Teacher(load(loaded.teachers[card]), card.task), Keeper.Config(), 0)
    method.setup()
    method.nested["file"] = Path("x")  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"self\.nested\['file'\] is a PosixPath"):
        state_of(method)


def test_random_streams_depend_on_seed_and_name_alone() -> None:
    assert stream_seed(0, "noise") == stream_seed(0, "noise")
    assert len({stream_seed(0, "noise"), stream_seed(1, "noise"), stream_seed(0, "labels")}) == 3


def run_cli(config: Path, results: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "dfqbench.cli", "run", str(config), "--results", str(results), "--threads", "1", "--checkpoint-every", "0.05"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finished(results: Path) -> dict[str, Any]:
    import json

    found = [json.loads(p.read_text()) for p in results.glob("runs/*/result.json")]
    return {r["cell"]["bits"]: (r["student_state"], r["top1"], r["correct"]) for r in found}


@pytest.mark.slow
def test_killed_three_times_at_random_moments_a_cell_ends_with_the_same_bits(sweep_file: SweepFile, tmp_path: Path) -> None:
    config = sweep_file(budget={"epochs": 12, "iterations": 20, "batch_size": 8}, evaluate_every=4)
    whole = run_cli(config, tmp_path / "whole")
    killed_after = []
    moments = random.Random(int.from_bytes(os.urandom(4), "big"))
    for _ in range(3):
        process = run_cli(config, tmp_path / "killed")
        checkpoint = tmp_path / "killed" / "bundles"
        before = {p: p.stat().st_mtime_ns for p in checkpoint.glob("*/checkpoint.pt")}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            now = {p: p.stat().st_mtime_ns for p in checkpoint.glob("*/checkpoint.pt")}
            if now and now != before:
                break
            time.sleep(0.01)
        wait = moments.uniform(0.0, 0.4)
        time.sleep(wait)
        killed_after.append(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = run_cli(config, tmp_path / "killed")
    output, _ = last.communicate(timeout=120)
    assert last.returncode == 0, output
    assert whole.communicate(timeout=120) is not None
    assert whole.returncode == 0
    assert "resumed at step" in output, f"nothing was left to resume after {killed_after}: {output}"
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "bundles").glob("*/checkpoint.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_at_the_step_and_the_same_command_goes_on(sweep_file: SweepFile, tmp_path: Path, number: signal.Signals) -> None:
    config = sweep_file(budget={"epochs": 200, "iterations": 20, "batch_size": 16})
    process = run_cli(config, tmp_path / "r")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "r" / "bundles").glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143), output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "r").glob("runs/*/lease.json"))

"""Images that cells share: taken over, they give the bits that making them gives, and no trouble with them costs more than making them."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dfqbench import MethodConfig, UserError
from dfqbench.engine import synthesis_cache
from dfqbench.engine.lockstep import Lockstep
from dfqbench.method.contract import Method, Phase
from dfqbench.method.registry import find_method, register
from dfqbench.method.settings import Field
from dfqbench.run.options import Options, StopFlag, Summary
from dfqbench.run.progress import Progress
from dfqbench.run.runner import run_sweep
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.testing import Trial
from dfqbench.testing.declarations import images_do_not_depend_on_what_comes_after
from dfqbench.testing.outcomes import NO_EXCUSE
from dfqbench_methods.parts.stored_images import StoredImages

SweepFile = Callable[..., Path]
GZNQ = {"images": 16, "synthesis_batch": 8, "synthesis_iterations": 3, "confidence": 0.0}
STORED = {"images": 8, "synthesis_batch": 4, "synthesis_iterations": 3, "calibration_epochs": 1}
MAKING = {"gznq": 6, "lrq": 6, "intraq": 6}  # steps


class Counting(Progress):
    """Counts the steps of phases called `images`, and asks for a stop after so many steps."""

    def __init__(self, stop: StopFlag, stop_after: int | None):
        super().__init__(Console(file=io.StringIO()))
        self.flag, self.stop_after, self.taken, self.making = stop, stop_after, 0, 0

    def step(self, phase: str) -> None:
        self.taken += 1
        self.making += phase == "images"
        if self.taken == self.stop_after:
            self.flag.signal = 15


@pytest.fixture
def run(sweep_file: SweepFile) -> Callable[..., tuple[Summary, Counting]]:
    """Runs methods with their settings into a folder, one w4a4 cell each where `bits` does not say else."""

    def call(results: Path, *methods: dict[str, Any], stop_after: int | None = None, **changes: Any) -> tuple[Summary, Counting]:
        config = sweep_file(**{"methods": list(methods), "bits": ["w4a4"], "budget": {"epochs": 2, "iterations": 3, "batch_size": 8}, **changes})
        stop = StopFlag()
        progress = Counting(stop, stop_after)
        return run_sweep(load_sweep(config, cache_folder()), Store(results, writable=True), Options("cpu"), progress, stop), progress

    return call


def ends(results: Path) -> dict[str, Any]:
    """By cell id: the student's bits, what it got right, and the history without seconds."""
    found = {}
    for result in Store(results).results()[0]:
        rows = list(csv.DictReader((results / "runs" / result["id"] / "history.csv").open()))
        found[result["id"]] = (result["student_state"], result["top1"], [{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    return found


def result_of(results: Path, method: str, **changed: Any) -> dict[str, Any]:
    (found,) = [
        r for r in Store(results).results()[0] if r["cell"]["method"] == method and changed.items() <= r["cell"]["identity"]["config"].items()
    ]
    return found


def folders(results: Path) -> list[Path]:
    return sorted((results / "images").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "other"),
    [
        ("gznq", GZNQ, {"finetune": True, "student_lr": 0.01, "batch_size": 4}),
        ("gznq", {**GZNQ, "mode": "generator"}, {"finetune": True}),
        ("lrq", STORED, {"latent_dim": 7, "generator_lr": 0.05, "batch_size": 4, "milestones": [0, 1], "attention": "after"}),
        ("intraq", STORED, {"calibration_batch": 5, "student_lr": 0.01, "iterations": 2, "conditioning": "batch-norm"}),
    ],
)
def test_a_cell_that_takes_images_over_ends_with_the_bits_that_it_has_alone(
    run: Callable[..., Any], tmp_path: Path, method: str, settings: dict[str, Any], other: dict[str, Any]
) -> None:
    first, second = {method: settings}, {method: {**settings, **other}}
    assert run(tmp_path / "shared", first)[1].making == MAKING[method]
    summary, progress = run(tmp_path / "shared", first, second, evaluate_every=1)
    assert (summary.done, progress.making) == (1, 0)
    assert run(tmp_path / "alone", second, evaluate_every=1)[1].making == MAKING[method]
    assert run(tmp_path / "alone-too", first)[1].making == MAKING[method]
    assert ends(tmp_path / "shared") == ends(tmp_path / "alone") | ends(tmp_path / "alone-too")
    assert all(float(rows[0]["image_loss"]) > 0 for _, _, rows in ends(tmp_path / "shared").values())
    assert len(folders(tmp_path / "shared")) == 1


def test_a_cells_cost_has_the_seconds_of_images_that_it_took_over_and_says_whose_they_were(run: Callable[..., Any], tmp_path: Path) -> None:
    run(tmp_path, {"gznq": GZNQ}, {"gznq": {**GZNQ, "finetune": True}})
    maker, taker = result_of(tmp_path, "gznq", finetune=False), result_of(tmp_path, "gznq", finetune=True)
    assert "images" not in maker["provenance"]
    said = taker["provenance"]["images"]
    assert said["cell"] == maker["id"]
    assert 0 < said["seconds"] <= maker["seconds"]["shared"]
    assert taker["seconds"]["shared"] > said["seconds"]
    manifest = json.loads(next((tmp_path / "images").glob("*/images.json")).read_text())
    assert 0 < manifest["cpu_seconds"] <= maker["cpu_seconds"]["shared"]
    assert taker["cpu_seconds"]["shared"] > manifest["cpu_seconds"]
    assert f"images taken over from cell {maker['id']}" in (tmp_path / "runs" / taker["id"] / "log.txt").read_text()


@pytest.mark.slow
def test_other_bits_and_protocols_share_and_whatever_changes_images_does_not(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(tmp_path, {"gznq": GZNQ})[1].making == 6
    assert run(tmp_path, {"gznq": GZNQ}, bits=["w4a4", "w3a3"])[1].making == 0
    assert run(tmp_path, {"gznq": GZNQ}, protocol="hardware")[1].making == 0
    for changes in ({"seeds": [1]}, {"precision": "bf16"}):
        assert run(tmp_path, {"gznq": GZNQ}, **changes)[1].making == 6
    assert run(tmp_path, {"gznq": {**GZNQ, "image_lr": 0.2}})[1].making == 6
    assert len(folders(tmp_path)) == 4


def test_a_method_that_names_no_settings_shares_between_protocols_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    zeroq = {"zeroq": {"images": 4, "synthesis_iterations": 5}}
    run(tmp_path / "shared", zeroq)
    summary, progress = run(tmp_path / "shared", zeroq, protocol="hardware")
    assert (summary.done, progress.taken) == (1, 1)
    run(tmp_path / "alone", zeroq)
    run(tmp_path / "alone", zeroq, protocol="hardware")
    assert ends(tmp_path / "shared").keys() == ends(tmp_path / "alone").keys()


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, 6, 8])
def test_interrupted_anywhere_the_images_are_kept_and_taken_over_all_the_same(run: Callable[..., Any], tmp_path: Path, stop_after: int) -> None:
    """In the middle of a batch of images, after the last step of the making, and after it."""
    post, fine = {"gznq": GZNQ}, {"gznq": {**GZNQ, "finetune": True}}
    run(tmp_path / "alone", post)
    run(tmp_path / "alone", fine)
    for folder in (tmp_path / "alone" / "images").iterdir():
        assert (folder / "images.json").exists()
    assert run(tmp_path / "shared", fine, stop_after=stop_after)[0].interrupted
    run(tmp_path / "shared", fine)
    assert run(tmp_path / "shared", post)[1].making == 0
    assert {k: v[:2] for k, v in ends(tmp_path / "shared").items()} == {k: v[:2] for k, v in ends(tmp_path / "alone").items()}


def test_interrupted_after_the_takeover_a_cell_still_knows_whose_images_it_has(run: Callable[..., Any], tmp_path: Path) -> None:
    fine = {"gznq": {**GZNQ, "finetune": True}}
    run(tmp_path / "shared", {"gznq": GZNQ})
    maker = result_of(tmp_path / "shared", "gznq")["id"]
    assert run(tmp_path / "shared", fine, stop_after=4)[0].interrupted
    synthesis_cache.shutil.rmtree(tmp_path / "shared" / "images")  # which may happen at any time
    assert run(tmp_path / "shared", fine)[1].making == 0
    taker = result_of(tmp_path / "shared", "gznq", finetune=True)
    assert taker["provenance"]["images"]["cell"] == maker
    run(tmp_path / "alone", fine)
    assert ends(tmp_path / "alone").items() <= ends(tmp_path / "shared").items()


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it may be the same file as one of a bundle
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.thorough("flipped", "state.pt")
@pytest.mark.parametrize("name", ["images-0000.safetensors", "images-0001.safetensors", "state.pt", "images.json"])
@pytest.mark.parametrize("damage", [flipped, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_named_and_the_images_are_made_again(
    run: Callable[..., Any], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    fine = {"gznq": {**GZNQ, "finetune": True}}
    run(tmp_path / "shared", {"gznq": GZNQ})
    (folder,) = folders(tmp_path / "shared")
    damage(folder / name)
    assert run(tmp_path / "shared", fine)[1].making == 6
    taker = result_of(tmp_path / "shared", "gznq", finetune=True)
    log = (tmp_path / "shared" / "runs" / taker["id"] / "log.txt").read_text()
    assert f"{folder} are damaged" in log
    assert name == "images.json" or name in log
    assert "images" not in taker["provenance"]
    run(tmp_path / "alone", fine)
    assert ends(tmp_path / "alone").items() <= ends(tmp_path / "shared").items()
    assert run(tmp_path / "shared", {"gznq": {**GZNQ, "finetune": True, "student_lr": 0.5}})[1].making == 0, "whole again"


def test_a_full_disk_costs_a_line_and_no_result(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synthesis_cache, "write_atomically", full)
    summary, _ = run(tmp_path, {"gznq": GZNQ})
    assert (summary.done, summary.failed) == (1, 0)
    log = (tmp_path / "runs" / result_of(tmp_path, "gznq")["id"] / "log.txt").read_text()
    assert "images are not kept for other cells (No space left on device)" in log
    assert not (tmp_path / "images").exists() or folders(tmp_path) == []


def test_where_another_process_is_faster_its_images_stay(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "other", {"gznq": GZNQ})
    write = synthesis_cache.SynthesisCache._write

    def overtaken(made: synthesis_cache.SynthesisCache, folder: Path) -> None:
        write(made, folder)
        synthesis_cache.shutil.copytree(tmp_path / "other" / "images", tmp_path / "r" / "images", dirs_exist_ok=True)

    monkeypatch.setattr(synthesis_cache.SynthesisCache, "_write", overtaken)
    assert run(tmp_path / "r", {"gznq": {**GZNQ, "finetune": True}})[0].done == 1
    (folder,) = folders(tmp_path / "r")
    assert json.loads((folder / "images.json").read_text())["made_by"] == result_of(tmp_path / "other", "gznq")["id"]
    log = (tmp_path / "r" / "runs" / result_of(tmp_path / "r", "gznq")["id"] / "log.txt").read_text()
    assert "not kept" not in log


@pytest.mark.slow
def test_two_processes_at_once_end_as_two_that_run_alone(run: Callable[..., Any], sweep_file: SweepFile, tmp_path: Path) -> None:
    post, fine = {"gznq": GZNQ}, {"gznq": {**GZNQ, "finetune": True}}
    same = {"bits": ["w4a4"], "budget": {"epochs": 2, "iterations": 3, "batch_size": 8}}
    processes = []
    for number, method in enumerate((post, fine)):
        config = sweep_file(methods=[method], **same).rename(tmp_path / f"{number}.yaml")
        words = [sys.executable, "-m", "dfqbench.cli", "run", str(config), "--results", str(tmp_path / "both"), "--threads", "1", "--device", "cpu"]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    run(tmp_path / "alone", post)
    run(tmp_path / "alone", fine)
    assert ends(tmp_path / "both") == ends(tmp_path / "alone")
    assert len(folders(tmp_path / "both")) == 1


@contextmanager
def registered(name: str, cls: type[Any]) -> Iterator[type[Method]]:
    from dfqbench.method import registry

    registry.discover()
    try:
        yield register(name, paper="x", fidelity="paper", shares_synthesis=True)(cls)
    finally:
        registry._methods.pop(name, None)


class FalseWord(StoredImages):
    """Says that the learning rate of the images comes after them; its images do depend on it, through `setup`."""

    class Config(StoredImages.Config):
        after_images = StoredImages.Config.after_images | {"first_step"}
        first_step: float = Field(0.5, gt=0)

    def setup(self) -> None:
        super().setup()
        self.step = self.config.first_step

    def begin_batch(self) -> None:
        super().begin_batch()
        self.pixel_optimizer.param_groups[0]["lr"] = self.step

    def phases(self) -> list[Phase]:
        return super().phases()[:1]


class ReadsAhead(FalseWord):
    """Reads it while images are made, under one choice only."""

    class Config(FalseWord.Config):
        eager: bool = False

    def setup(self) -> None:
        super().setup()
        self.step = 0.5

    def begin_batch(self) -> None:
        super().begin_batch()
        if self.config.eager:
            self.step += self.config.first_step


class OtherPlan(FalseWord):
    """The setting changes how many images there are."""

    def setup(self) -> None:
        super().setup()
        self.step = 0.5

    def phases(self) -> list[Phase]:
        (making,) = super().phases()
        return [Phase(making.name, 1 + (self.config.first_step > 1), iterations=making.iterations, step=making.step)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (FalseWord, "with first_step = 1.5 other images are made"),
        (ReadsAhead, "the making of images reads first_step"),
        (OtherPlan, "first_step = 1.5"),
    ],
)
def test_a_false_declaration_fails_its_check(cls: type[Any], said: str) -> None:
    with registered(cls.__name__.lower(), cls) as method, pytest.raises(AssertionError, match=said):
        images_do_not_depend_on_what_comes_after(Trial(method))


def test_a_declared_setting_that_cannot_be_tried_is_no_declaration() -> None:
    class FreeText(FalseWord):
        class Config(FalseWord.Config):
            after_images = StoredImages.Config.after_images | {"note"}
            note: str = "anything"

    with registered("free-text", FreeText) as method, pytest.raises(AssertionError, match="after_images names note, of which no second valid value"):
        images_do_not_depend_on_what_comes_after(Trial(method))


def test_the_check_cannot_be_excused() -> None:
    assert "images_do_not_depend_on_what_comes_after" in NO_EXCUSE
    images_do_not_depend_on_what_comes_after(Trial(find_method("gznq")))


def test_a_name_that_is_no_setting_is_told_at_once() -> None:
    class Misspelt(Method):
        class Config(MethodConfig):
            after_images = {"temprature"}
            temperature: float = 20.0

    with pytest.raises(UserError, match=r"method misspelt: after_images 'temprature'.*temperature"):
        register("misspelt", paper="x", fidelity="paper")(Misspelt)


def test_a_plan_without_making_has_nothing_to_share() -> None:
    lockstep: Lockstep = Trial(find_method("gdfq")).start()
    assert lockstep.making_epochs == 0
    assert Trial(find_method("gznq")).start().making_epochs == 1


def test_images_depend_on_the_file_of_the_method_that_makes_them() -> None:
    for host in ("intraq", "lrq"):
        settings = {"host": host, "host_settings": STORED, "calibration_epochs": 1}
        found = synthesis_cache.dependencies(Trial(find_method("qat"), settings).start())
        assert found["host_source"] == [find_method(host).info.source_sha256]
        other = synthesis_cache.dependencies(Trial(find_method("qat"), settings | {"student": "ait", "end": "squant"}).start())
        assert other == found, "and not on who trains on them"
    assert "host_source" not in synthesis_cache.dependencies(Trial(find_method("intraq"), STORED).start())

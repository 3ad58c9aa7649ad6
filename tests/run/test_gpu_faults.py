"""What a run does on a GPU beside training, on a pretended one: its settings, its faults, its memory, its record."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pretended_cuda import PretendedCuda
from pretended_parts import Graph
from torch import Tensor, nn
from torch.nn import functional

from dfqbench import Batch, Student
from dfqbench.data import Images
from dfqbench.engine.device import check_device, settings_kept, use_device
from dfqbench.engine.evaluate import evaluate
from dfqbench.engine.lockstep import Lockstep
from dfqbench.errors import Notice, UserError
from dfqbench.method.registry import find_method, register
from dfqbench.run import rehearsal, scoring
from dfqbench.run.agreement import agreement
from dfqbench.run.rehearsal import small
from dfqbench.store.provenance import provenance
from dfqbench.testing import BUDGET, Trial, small_images, small_task, small_teacher

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    """A pretended GPU; torch's global settings are afterwards as they were."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    with settings_kept(), PretendedCuda() as device:
        yield device


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:1", "1 GPU visible here, numbered from cuda:0"),
        ("cuda:7", "1 GPU visible"),
        ("mps", "cuda:N is expected"),
        ("gpu", "cuda:N is expected"),
    ],
)
def test_a_device_that_is_not_there_is_refused(gpu: PretendedCuda, name: str, said: str) -> None:
    assert check_device("cuda:0").type == check_device("auto").type == "cuda"
    with pytest.raises(UserError, match=said):
        check_device(name)


def test_on_a_gpu_fp32_is_fp32_and_the_same_work_gives_the_same_bits(gpu: PretendedCuda) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    use_device("cpu")
    assert torch.backends.cudnn.allow_tf32, "a CPU's process is left as it is"
    use_device("cuda")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) == (True, False)
    assert not torch.utils.deterministic.fill_uninitialized_memory, "which would cost a kernel for each new tensor"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.slow
def test_tf32_is_a_precision_of_its_own(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in what scores a student; not in what is shared with cells of other precisions, nor afterwards."""
    seen = set[tuple[str, bool]]()

    def told(name: str, of: Any) -> Any:
        def run(*given: Any, **more: Any) -> Any:
            seen.add((f"{name} {getattr(given[0], 'bits', '')}".strip(), torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32))
            return of(*given, **more)

        return run

    monkeypatch.setattr(Lockstep, "step", told("step", Lockstep.step))
    monkeypatch.setattr(scoring, "evaluate_task", told("evaluation", scoring.evaluate_task))
    file = sweep_file(bits=["w4a4"], precision="tf32")
    code, out, _ = dfqbench("run", file, "--results", tmp_path / "r", "--device", "cuda", "--no-graphs")
    assert (code, seen) == (0, {("step", True), ("evaluation", False), ("evaluation w4a4", True)})
    assert not torch.backends.cudnn.allow_tf32
    code, out, _ = dfqbench("table", file, "--results", tmp_path / "r")
    assert "protocol lineage, tf32" in out
    student = next((tmp_path / "r").glob("runs/*/student.safetensors"))
    with pytest.warns(Notice, match="trained in tf32, which only a GPU has: on cpu it computes in fp32"):
        assert dfqbench("evaluate", student, "--on", "digits", "--device", "cpu")[0] == 0


def test_tf32_without_a_gpu_is_told(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    code, _, err = dfqbench("run", sweep_file(precision="tf32"), "--results", tmp_path / "r", "--device", "cpu")
    assert (code, err) == (2, "dfqbench: precision: tf32: only a GPU has it, and the device is cpu\n")


class Reached(Exception):
    """A command has come to setting up its device."""


@pytest.mark.parametrize("command", ["run", "select", "speed", "speed --overheads", "quantize", "evaluate", "pretrain"])
def test_every_command_that_computes_sets_up_its_device(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tiny_teacher: str, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(mode: bool) -> None:
        raise Reached

    monkeypatch.setattr("torch.use_deterministic_algorithms", reached)
    file = sweep_file(selection={"images": {"gznq": {"images": 16}}, "count": 12, "seed": 9})
    words: dict[str, list[object]] = {
        "run": [file, "--results", tmp_path / "r"],
        "select": [file, "--results", tmp_path / "r"],
        "speed": ["--methods", "gdfq"],
        "speed --overheads": ["--overheads"],
        "quantize": [tiny_teacher, "--to", tmp_path / "x.safetensors", "--results", tmp_path / "r"],
        "evaluate": [tmp_path / "x.safetensors", "--on", "digits"],
        "pretrain": ["digits", "--out", tmp_path / "x.safetensors"],
    }
    with pytest.raises(Reached):
        dfqbench(command.split()[0], *words[command], "--device", "cuda")


def failures(results: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in results.glob("runs/*/failed.json")]


def raising(error: Exception) -> Callable[..., Any]:
    def synthesize(*_: Any) -> Any:
        raise error

    return synthesize


def test_a_dead_gpu_ends_the_process_and_costs_no_cell(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported")

    def synthesize(*_: Any) -> Any:
        monkeypatch.setattr("torch.cuda.synchronize", raising(dead))
        raise dead

    monkeypatch.setattr(find_method("gdfq"), "synthesize", synthesize)
    code, _, err = dfqbench("run", sweep_file(seeds=[0, 1]), "--results", tmp_path / "r", "--device", "cuda")
    assert code == 2
    assert "cuda:0 answers no more (AcceleratorError: CUDA error: an illegal memory access was encountered): this process ends" in err
    assert "the same command goes on from what is saved" in err
    assert failures(tmp_path / "r") == []
    assert dfqbench("plan", sweep_file(seeds=[0, 1]), "--results", tmp_path / "r")[1].count("missing") == 4 + 1, "four cells, and the sum"


def test_a_gpu_that_dies_of_replayed_steps_says_how_to_go_without(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay(*_: Any) -> None:
        dead = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        monkeypatch.setattr("torch.cuda.synchronize", raising(dead))
        raise dead

    monkeypatch.setattr(Graph, "replay", replay)
    code, _, err = dfqbench("run", sweep_file(), "--results", tmp_path / "r", "--device", "cuda")
    assert (code, "as a check: try again with --no-graphs" in err) == (2, True)
    assert failures(tmp_path / "r") == []


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), torch.AcceleratorError("CUDA error: invalid argument")])
def test_an_error_that_the_gpu_survives_is_the_cells_own(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(find_method("gdfq"), "synthesize", raising(error))
    code, _, _ = dfqbench("run", sweep_file(seeds=[0, 1]), "--results", tmp_path / "r", "--device", "cuda")
    assert (code, [failure["message"] for failure in failures(tmp_path / "r")]) == (1, [str(error)] * 4)


def test_a_bundle_that_does_not_fit_says_what_to_lower(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB of which")
    monkeypatch.setattr(find_method("gdfq"), "synthesize", raising(error))
    dfqbench("run", sweep_file(), "--results", tmp_path / "r")
    said = "CUDA out of memory. Tried to allocate 2.00 GiB: lower batch_size (8) or fewer bit widths at once (2 trained side by side)"
    assert [(failure["kind"], failure["message"]) for failure in failures(tmp_path / "r")] == [("OutOfMemoryError", said)] * 2


class Samples(find_method("gdfq")):  # type: ignore[misc]
    """Looks at its images through a sampling grid, in training alone."""

    def distill(self, student: Student, batch: Batch) -> Tensor:
        grid = self.grid.expand(len(batch.images), -1, -1, -1)
        seen = functional.grid_sample(self.scale * batch.images, grid, align_corners=False)
        return super().distill(student, Batch(seen, batch.labels, batch.teacher_logits))

    def setup(self) -> None:
        super().setup()
        ticks = torch.linspace(-1, 1, self.task.size)
        self.grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), 2)
        self.scale = torch.ones(()).requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "select"])
def test_what_has_no_deterministic_kernel_is_named_before_the_first_step(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, command: str
) -> None:
    if command == "run":
        register("samples", paper="x", fidelity="paper", shares_synthesis=True)(Samples)
    quick = {"warmup_epochs": 1, "calibration_epochs": 1}
    images = {"images": {"gznq": {"images": 16, "synthesis_batch": 8, "synthesis_iterations": 2, "confidence": 0.0}}, "count": 12, "seed": 9}
    file = sweep_file(methods=[{"samples": quick}, {"gdfq": quick}], bits=["w4a4"], selection=images)
    code, out, _ = dfqbench(command, file, "--results", tmp_path / "r", "--device", "cuda")
    told = "samples: grid_sampler_2d_backward has no deterministic kernel on a GPU: the same settings need not give the same bits again"
    assert (code, out.count("has no deterministic kernel"), out.count(told)) == (0, 1, 1)
    if command == "run":
        results = [json.loads(path.read_text()) for path in (tmp_path / "r").glob("runs/*/result.json")]
        assert {r["cell"]["method"]: r["provenance"]["deterministic"] for r in results} == {"samples": False, "gdfq": True}
        log = next(p for p in (tmp_path / "r").glob("runs/*/log.txt") if "samples" in p.read_text()).read_text()
        assert log.index("no deterministic kernel") < log.index("started, 12 steps")


class CountsElsewhere(find_method("gdfq")):  # type: ignore[misc]
    """Says that its steps are all alike, and counts them where nobody looks."""

    taken: ClassVar[list[int]] = [0]

    def setup(self) -> None:
        super().setup()
        self.taken[0] = 0

    def synthesize(self) -> Batch:
        self.taken[0] += 1
        batch = super().synthesize()
        return replace(batch, images=batch.images * (1 + 0.01 * self.taken[0]))


@pytest.mark.slow
def test_steps_are_replayed_unless_that_is_refused_or_a_check_of_it_fails(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "REPLAYED", 6)
    register("counts", paper="x", fidelity="paper", shares_synthesis=True)(CountsElsewhere)
    file = sweep_file(methods=[{name: {"warmup_epochs": 1, "calibration_epochs": 1, "iterations": 6}} for name in ("gdfq", "counts")], bits=["w4a4"])
    found = {}
    for words in ([], ["--no-graphs"], ["--graphs"]):
        store = tmp_path / ("".join(words) or "unsaid")
        code, out, err = dfqbench("run", file, "--results", store, "--device", "cuda", *words)
        assert (code, err) == (0, "")
        told = "steps of counts are not replayed but run as they are: replayed steps end with other bits than steps that are run as they are"
        assert out.count(told) == (not words)
        results = [json.loads(path.read_text()) for path in store.glob("runs/*/result.json")]
        found[store.name] = {r["cell"]["method"]: (r["provenance"].get("graphs", False), r["student_state"]) for r in results}
    assert {name: {m: graphs for m, (graphs, _) in of.items()} for name, of in found.items()} == {
        "unsaid": {"gdfq": True, "counts": False},
        "--no-graphs": {"gdfq": False, "counts": False},
        "--graphs": {"gdfq": True, "counts": True},
    }
    assert len({of["gdfq"][1] for of in found.values()}) == 1
    assert found["unsaid"]["counts"] == found["--no-graphs"]["counts"] != found["--graphs"]["counts"]


@pytest.mark.slow
def test_students_on_streams_of_their_own(
    gpu: PretendedCuda, dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student's graph waits for the images, and nothing goes on before all students are done."""
    order = list[str]()

    class Stream(torch.cuda.Stream):  # type: ignore[misc]
        number = 0

        def __init__(self, *_: Any) -> None:
            Stream.number += 1
            self.name = f"stream {Stream.number}"

        def wait_stream(self, other: Any) -> None:
            order.append(f"{self.name} waits for {getattr(other, 'name', 'the main stream')}")

    class Main(torch.cuda.Stream):  # type: ignore[misc]
        name = "the main stream"
        wait_stream = Stream.wait_stream

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        order.append(f"on {stream.name}")
        yield
        order.append("back")

    real = Graph.replay
    monkeypatch.setattr(rehearsal, "REPLAYED", 5)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Graph, "replay", lambda graph: (order.append("replay"), real(graph))[1])
    file = sweep_file(budget={"epochs": 2, "iterations": 5, "batch_size": 8})
    found = {}
    for words in ("--graphs", "--streams"):
        code, _, err = dfqbench("run", file, "--results", tmp_path / words, "--device", "cuda", words)
        assert (code, err) == (0, "")
        results = [json.loads(path.read_text()) for path in (tmp_path / words).glob("runs/*/result.json")]
        found[words] = {r["student_state"] for r in results}
        assert [(r["provenance"]["graphs"], r["provenance"].get("streams", False)) for r in results] == [(True, words == "--streams")] * 2
    assert found["--graphs"] == found["--streams"]
    number = Stream.number
    one, two = f"stream {number - 1}", f"stream {number}"
    step = ["replay"]
    for student in (one, two):
        step += [f"{student} waits for the main stream", f"on {student}", "replay", "back"]
    assert order[-len(step) - 2 :] == [*step, f"the main stream waits for {two}", f"the main stream waits for {one}"]
    code, _, err = dfqbench("run", file, "--results", tmp_path / "r", "--device", "cpu", "--streams")
    assert (code, err) == (2, "dfqbench: --streams: several students at once need a GPU, and the device is cpu\n")


@pytest.mark.parametrize("name", ["gdfq", "ait", "gznq", "lrq", "zeroq", "zaq", "round"])
def test_what_is_rehearsed_takes_seconds_whatever_the_settings(name: str) -> None:
    cell = Trial(find_method(name), {"epochs": 1000} if "epochs" in find_method(name).Config.model_fields else None).start().bundle.cells[0]
    long = replace(cell, config=find_method(name).Config().model_dump(mode="json"))
    quick = small(long)
    assert quick is not None
    phases = find_method(name)(small_teacher(small_task()), find_method(name).Config(**quick.config), 0).phases() if name != "lrq" else []
    assert sum(phase.epochs * (phase.iterations or BUDGET["iterations"]) for phase in phases) <= 30


class OutOfMemory(nn.Module):
    """Answers no more than so many images at once."""

    def __init__(self, network: nn.Module, most: int):
        super().__init__()
        self.network, self.most = network, most

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        logits: Tensor = self.network(images)
        return logits


def test_evaluation_that_runs_out_of_memory_goes_on_with_smaller_batches() -> None:
    teacher, task, images, tried = small_teacher(small_task()), small_task(), small_images(small_task()), list[int]()
    whole = evaluate(teacher, images, task)
    found = evaluate(OutOfMemory(teacher, 9), images, task, batch_size=32, smaller=tried.append)
    assert tried == [16, 8]
    assert np.array_equal(found.correct, whole.correct)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(OutOfMemory(teacher, 0), images, task)
    tried.clear()
    noise = torch.randn(300, *task.image_shape)
    same = agreement(OutOfMemory(teacher, 70), teacher, noise, torch.autocast("cpu", enabled=False), tried.append)  # type: ignore[arg-type]
    assert (tried, same.top1) == ([128, 64], 100.0)


@pytest.mark.slow
def test_a_run_says_that_it_evaluated_in_smaller_batches_and_keeps_to_them(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = Images.batches, list[int]()

    def batches(self: Images, size: int) -> Any:
        sizes.append(size)
        if size > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, size)

    monkeypatch.setattr(Images, "batches", batches)
    code, out, _ = dfqbench("run", sweep_file(), "--results", tmp_path / "r")
    assert code == 0
    assert out.count("out of memory in evaluation: tried again with batches of 125") == 1
    assert sizes == [500, 250, 125, 125, 125], "the teacher, then both students"
    log = next((tmp_path / "r").glob("runs/*/log.txt")).read_text()
    assert "tried again with batches of 125" in log


@pytest.mark.slow
def test_nothing_of_a_finished_bundle_is_kept_alive(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's collector of circles, which may come late: on a GPU each bundle holds gigabytes."""
    held: list[list[Any]] = []
    alive: list[int] = []
    real = Lockstep.__init__

    def init(self: Lockstep, *args: Any, **kwargs: Any) -> None:
        alive.append(sum(reference() is not None for bundle in held for reference in bundle))
        real(self, *args, **kwargs)
        student = self.trainees[0].student
        parts = [self, self.method, student, next(student.parameters()), self.trainees[0].optimizer, self.method.stored, self.method.pixels]
        held.append([weakref.ref(part) for part in parts])

    monkeypatch.setattr(Lockstep, "__init__", init)
    lrq = {"lrq": {"images": 8, "synthesis_batch": 4, "synthesis_iterations": 2, "calibration_epochs": 1}}
    gc.collect()
    gc.disable()
    try:
        code, _, _ = dfqbench("run", sweep_file(methods=[lrq], bits=["w4a4"], seeds=[0, 1, 2, 3]), "--results", tmp_path / "r")
    finally:
        gc.enable()
    assert code == 0
    assert len(held) == 4
    assert alive == [0, 0, 0, 0]


def test_recorded_steps_do_not_keep_their_lockstep_alive() -> None:
    lockstep = Trial(find_method("gdfq")).start()
    gc.collect()  # what the first tracing of a process leaves
    lockstep.replay_steps(print)
    reference = weakref.ref(lockstep)
    gc.disable()
    try:
        del lockstep
        assert reference() is None
    finally:
        gc.enable()


def test_a_gpus_record_names_whose_kernels_ran(gpu: PretendedCuda) -> None:
    found = provenance(torch.device("cuda"))
    assert {"driver", "cuda", "cudnn"} <= found.keys()
    assert (found["device_name"], found["cuda"]) == ("Pretended GPU", torch.version.cuda)
    assert not {"driver", "cudnn"} & provenance(torch.device("cpu")).keys()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0\n",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build  (dvs-builder@U16)\nGCC version: 12.3\n", "560.35.03"),
        ("nothing of the kind", None),
    ],
)
def test_the_driver_is_the_kernel_modules(text: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfqbench.store.provenance import driver_version

    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert driver_version.__wrapped__() == version

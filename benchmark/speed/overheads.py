"""What a run costs beside its arithmetic: planning, recognising what is done, starting a worker, and memory that a long run might lose.

Every time is measured in processes of their own, as a user's command is, and told twice: by the clock, and as processor time (user and system),
which a busy machine distorts less.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dfqbench.yaml_file import write_yaml

CELLS = 10_000
STEPS = 80_000
EARLY = 1_000  # steps after which memory is first read: by then every buffer is there
BITS = ["w8a8", "w6a6", "w5a5", "w4a4", "w3a3"]
SEEDS = 20
TEACHER = "resnet20"


@dataclass(frozen=True)
class Overhead:
    """wanted: at most so many seconds (None: no limit is set). clock, processor: seconds of every round. notes: what else was read."""

    what: str
    wanted: float | None
    clock: list[float]
    processor: list[float]
    notes: dict[str, Any]

    @property
    def seconds(self) -> tuple[float, float]:
        """The median round: by the clock, and of the processor."""
        return statistics.median(self.clock), statistics.median(self.processor)


def measure(device: str, rounds: int, say: Callable[[str], None], cells: int = CELLS, steps: int = STEPS) -> Iterator[Overhead]:
    """The four, one after the other; takes minutes, most of it for memory."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        weights = made_up_teacher(folder)
        large = sweep_of(folder / "large.yaml", weights, cells)
        _command("plan", large, folder / "none")  # once unmeasured: digests of teacher and set are remembered from now on
        say(f"planning {cells} cells")
        yield _timed(f"plan {cells} cells", 2.0, rounds, lambda: _command("plan", large, folder / "none"))
        finished = folder / "finished"
        pretend_finished(large, finished)
        say(f"recognising {cells} finished cells")
        yield _timed(f"recognise {cells} finished cells (run)", 5.0, rounds, lambda: _command("run", large, finished, "--device", device))
        small = sweep_of(folder / "small.yaml", weights, 1)
        say("starting a worker")
        runs = [_child("first_step", str(small), str(folder / f"worker-{number}"), device) for number in range(rounds)]
        clock, processor = [run["reached"] - run["began"] for run in runs], [run["processor"] for run in runs]
        yield Overhead(f"start a worker: process to first step, digits, {TEACHER}", 10.0, clock, processor, {})
        say(f"memory over {steps} steps")
        run = _child("resident_memory", str(steps), device)
        taken = [run["reached"] - run["began"]]
        yield Overhead(f"memory over {steps} steps, two students in lockstep", None, taken, [run["processor"]], {"resident_mb": run["resident_mb"]})


def made_up_teacher(folder: Path) -> Path:
    """Weights that nobody trained: nothing measured here depends on their values."""
    import torch
    from safetensors.torch import save_file

    from dfqbench.teachers.cifar import cifar_resnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(cifar_resnet(TEACHER).state_dict(), folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


def sweep_of(path: Path, weights: Path, cells: int) -> Path:
    """A sweep of so many cells (or a few more, where no grid has that many) of GDFQ on the digits."""
    bits, seeds = BITS[: min(len(BITS), cells)], list(range(min(SEEDS, max(1, cells // len(BITS)))))
    variants = -(-cells // (len(bits) * len(seeds)))
    content = {
        "name": path.stem,
        "teachers": [{"model": f"cifar:{TEACHER}", "weights": str(weights), "classes": 10}],
        "evaluate": "digits",
        "methods": [{"gdfq": {"bn_weight": [0.1 + number for number in range(variants)], "warmup_epochs": 1, "calibration_epochs": 1}}],
        "bits": bits,
        "seeds": seeds,
        "budget": {"epochs": 2, "iterations": 10, "batch_size": 32},
    }
    path.write_text(write_yaml(content), encoding="utf-8")
    return path


def pretend_finished(config: Path, results: Path) -> None:
    """A store in which every cell of a sweep is done, with records as large as real ones."""
    import torch

    from dfqbench.store.cache import cache_folder
    from dfqbench.store.provenance import provenance
    from dfqbench.sweep.load import load_sweep

    on = provenance(torch.device("cpu"))
    for cell in load_sweep(config, cache_folder()).cells:
        path = results / "runs" / cell.id / "result.json"
        path.parent.mkdir(parents=True)
        result = {"id": cell.id, "cell": cell.record(), "top1": 50.0, "seconds": {"own": 1.0, "shared": 1.0, "bundle": [cell.id]}, "provenance": on}
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _timed(what: str, wanted: float, rounds: int, command: Callable[[], str]) -> Overhead:
    clock, processor, answer = [], [], ""
    for _ in range(rounds):
        began, before = time.perf_counter(), os.times()
        answer = command()
        after = os.times()
        clock.append(time.perf_counter() - began)
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return Overhead(what, wanted, clock, processor, {"said": answer})


def _command(name: str, config: Path, results: Path, *more: str) -> str:
    """Runs dfqbench as a user does; the last line that says how many cells there are."""
    words = [sys.executable, "-m", "dfqbench.cli", name, str(config), "--results", str(results), *more]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return next((line for line in reversed(done.stdout.splitlines()) if " cells" in line), "")


def _child(function: str, *given: str) -> dict[str, Any]:
    """What a function of this module prints in a process of its own, with `began`: the time at which that was started."""
    code = f"import sys; from dfqbench.speed import overheads; overheads.{function}(*sys.argv[1:])"
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code, *given], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer | {"began": began}


def _tell(**found: Any) -> None:
    print(json.dumps({"reached": time.time(), "processor": time.process_time(), **found}), flush=True)


def first_step(config: str, results: str, device: str) -> None:
    """Runs a sweep as `dfqbench run` does, into a new folder, until its first step is done; prints when that was."""
    from rich.console import Console

    from dfqbench.run.options import Options, StopFlag
    from dfqbench.run.progress import Progress
    from dfqbench.run.runner import run_sweep
    from dfqbench.store import Store
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.load import load_sweep

    stop = StopFlag()

    class UntilTheFirst(Progress):
        def step(self, phase: str) -> None:
            if stop.signal is None:
                _tell()
                stop.signal = 15

    loaded, store = load_sweep(Path(config), cache_folder()), Store(results, writable=True)
    run_sweep(loaded, store, Options(device), UntilTheFirst(Console(stderr=True, quiet=True)), stop)


def resident_memory(steps: str, device: str) -> None:
    """Trains two students in lockstep on a tiny network for so many steps; prints the process's resident megabytes (10^6) after some of them."""
    import numpy as np

    from dfqbench.engine.device import use_device
    from dfqbench.engine.evaluate import Evaluation
    from dfqbench.engine.lockstep import Lockstep
    from dfqbench.method.contract import Phase
    from dfqbench.method.registry import find_method
    from dfqbench.testing.trial import Trial, small_task

    last, resident = int(steps), {}
    read_after = {min(EARLY, last), last // 2, last}

    class Reader:
        def step(self, lockstep: Lockstep, phase: Phase) -> None:
            done = lockstep.steps_done
            if done in read_after:
                pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
                resident[str(done)] = round(int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

        def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
            """Nothing to do."""

    settings: dict[str, float] = {"epochs": 1 + -(-last // 100), "iterations": 100, "batch_size": 2, "warmup_epochs": 1, "calibration_epochs": 1}
    settings |= {"generator_lr": 1e-6, "student_lr": 1e-9}  # batches of two teach nothing: at the usual rates students diverge, and leave
    trial = Trial(find_method("gdfq"), settings)
    lockstep = trial.start(bits=("w4a4", "w3a3"), task=small_task(size=16), device=use_device(device))
    lockstep.evaluate, lockstep.evaluate_every = lambda student: Evaluation(np.array([True]), 100.0, None, 0.0), None
    lockstep.run(Reader())
    missing = read_after - {int(step) for step in resident}
    if missing:
        raise RuntimeError(f"the run ended after {lockstep.steps_done} of {last} steps: memory after {min(missing)} is not known")
    _tell(resident_mb=resident)


def record(found: list[Overhead], command: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """What results/speed/overheads-<device>.json holds."""
    return {"command": command, "overheads": [asdict(overhead) for overhead in found], "provenance": provenance}

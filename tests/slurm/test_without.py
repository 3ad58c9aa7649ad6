"""Where there is no Slurm: wrong words, the same plan in local processes, and status from the disk alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from place import Place, numbers


def test_a_missing_sbatch_is_one_line(no_cluster: Place) -> None:
    done = no_cluster.dfqbench("submit", no_cluster.sweep("small"), "--profile", "cpu")
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert "sbatch is not on PATH" in done.err
    assert "--local" in done.err
    assert not list(no_cluster.folder.glob("results/sweeps/*"))


def test_all_wrong_keys_of_a_profile_are_told_at_once(no_cluster: Place) -> None:
    profile = no_cluster.profile("wrong", partion="main", time="soon", gpus=-1, memory="lots", sbatch={"array": "0-3"})
    done = no_cluster.dfqbench("submit", no_cluster.sweep("small"), "--profile", profile)
    assert (done.code, done.out) == (2, "")
    lines = done.err.splitlines()
    assert len(lines) == 5, done.err
    for said in ("did you mean 'partition'?", "time: 'soon': a time like 240", "gpus: -1", "memory: 'lots'", "array is set by dfqbench itself"):
        assert sum(said in line for line in lines) == 1, done.err
    assert not (no_cluster.folder / "results").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "gpus"], "did you mean 'gpu'?"),
        (["--profile", "cpu", "--results", "/proc/results", "--local"], "cannot be written"),
        (["--profile", "cpu", "--local", "--dry-run"], "take one of them"),
        (["--profile", "gpu", "--local"], "none is visible here"),
    ],
)
def test_wrong_words_get_one_line(no_cluster: Place, words: list[str], said: str) -> None:
    done = no_cluster.dfqbench("submit", no_cluster.sweep("small"), *words, CUDA_VISIBLE_DEVICES="")
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_status_reads_the_disk_alone(no_cluster: Place) -> None:
    config = no_cluster.sweep("small", methods=["round"])
    assert no_cluster.dfqbench("status", config).out.splitlines()[-1] == "2 cells: 2 missing"
    assert no_cluster.dfqbench("run", config, "--threads", 1).code == 0
    done = no_cluster.dfqbench("status", config)
    assert done.out.splitlines()[-1] == "2 cells: 2 done"
    assert done.err == ""
    assert "no job of small" in no_cluster.dfqbench("cancel", config).out


BAD = '''
import os
import pathlib
import signal

from dfqbench import Method, MethodConfig, Phase, Batch, register


class _Bad(Method):
    class Config(MethodConfig):
        iterations: int = 5

    def phases(self):
        return [Phase("train", 1, calibration_epochs=1)]

    def synthesize(self):
        self.go_wrong()
        images = self.draw_noise(8, *self.task.image_shape)
        return Batch(images, None, self.teacher(images))

    def go_wrong(self):
        pass


@register("killed", paper="none", fidelity="paper", shares_synthesis=True)
class Killed(_Bad):
    """Takes all memory, as the kernel sees it."""

    def go_wrong(self):
        os.kill(os.getpid(), signal.SIGKILL)


@register("raising", paper="none", fidelity="paper", shares_synthesis=True)
class Raising(_Bad):
    """Has a mistake in it, until a file says otherwise."""

    def go_wrong(self):
        if not pathlib.Path("mended").exists():
            raise MemoryError("more than there is")


@register("good", paper="none", fidelity="paper", shares_synthesis=True)
class Good(_Bad):
    """Does no harm."""
'''


def test_one_bad_cell_does_not_sink_the_others_of_its_process(no_cluster: Place) -> None:
    """In one chain: a worker that is killed every time, a method that raises, and a good one behind them."""
    (no_cluster.folder / "bad.py").write_text(BAD)
    config = no_cluster.sweep("bad", methods=["killed", "raising", "good", "round"], plugins=["bad.py"], bits=["w4a4"], budget=None)
    profile = no_cluster.profile("chain", chain=4)
    done = no_cluster.dfqbench("submit", config, "--profile", profile, "--local")
    assert done.code == 1, done.out + done.err
    assert "2 of 4 cells done" in done.out
    assert {label for _, _, label in no_cluster.results()} == {"good", "round"}
    failures = {json.loads(p.read_text())["kind"]: json.loads(p.read_text())["message"] for p in no_cluster.folder.glob("results/runs/*/failed.json")}
    assert failures == {"WorkerDied": "3 workers died of it, the last one killed by SIGKILL (out of memory?)", "MemoryError": "more than there is"}
    shown = no_cluster.dfqbench("status", config).out
    assert "MemoryError: more than there is" in shown
    assert shown.splitlines()[-1] == "4 cells: 2 failed, 2 done"

    (no_cluster.folder / "mended").touch()
    again = no_cluster.dfqbench("submit", config, "--profile", profile, "--local")
    assert "2 of 4 cells: failed (--retry-failed tries them again)" in again.out
    assert "nothing to submit" in again.out
    again = no_cluster.dfqbench("submit", config, "--profile", profile, "--local", "--retry-failed")
    assert again.code == 1
    assert {label for _, _, label in no_cluster.results()} == {"good", "round", "raising"}
    assert no_cluster.dfqbench("status", config).out.splitlines()[-1] == "4 cells: 1 failed, 3 done"


def test_processes_side_by_side_stop_together_and_go_on(no_cluster: Place, reference) -> None:
    expected, _ = reference("slow")
    config = no_cluster.slow_sweep("slow", seeds=[0, 1])
    profile = no_cluster.profile("pair", cpus=2, side_by_side=2)
    process = no_cluster.start("submit", config, "--profile", profile, "--local", PAUSE="0.3")

    def both_move() -> bool:
        found = [json.loads(path.read_text()) for path in Path(no_cluster.folder).glob("results/runs/*/progress.json")]
        return len(found) == 4 and all(f["step"] > 0 for f in found)

    no_cluster.wait("both are in the middle", both_move)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, ""), out + err
    assert "the same command goes on from there" in out
    assert no_cluster.dfqbench("status", config).out.splitlines()[-1] == "4 cells: 4 missing"
    done = no_cluster.dfqbench("submit", config, "--profile", profile, "--local")
    assert done.code == 0, done.out + done.err
    assert done.out.count("resumed at step") == 2
    assert numbers(no_cluster.results()) == {key: value for key, value in expected.items() if key[0] in (0, 1)}


SEEING = '''
import os

from dfqbench import register
from dfqbench_methods.round import Round


@register("seeing", paper="none", fidelity="paper", shares_synthesis=True)
class Seeing(Round):
    """Fails where its process has inherited how somebody wants Python to behave."""

    def finish(self, student):
        assert os.environ["PYTHONPATH"].endswith("/kept")
        if seen := [name for name in os.environ if name in ("PYTHONWARNINGS", "PYTHONHASHSEED", "PYTHONDEVMODE")]:
            raise RuntimeError(f"{seen}")
        super().finish(student)
'''


@pytest.mark.slow
def test_workers_do_not_inherit_how_somebody_wants_python_to_behave(no_cluster: Place) -> None:
    (no_cluster.folder / "seeing.py").write_text(SEEING)
    config = no_cluster.sweep("seen", methods=["seeing"], plugins=["seeing.py"], bits=["w4a4"], budget=None)
    python = {"PYTHONWARNINGS": "always", "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), "/kept"])}
    done = no_cluster.dfqbench("submit", config, "--profile", no_cluster.profile("p"), "--local", **python)
    assert (done.code, len(no_cluster.results())) == (0, 1), done.out + done.err

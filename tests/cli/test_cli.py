"""The command line, as its users meet it: what it prints, how it exits, and what it does not import."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfqbench.store import Lease
from dfqbench.sweep.cell import ENGINE_VERSION

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def results_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]


def test_run_leaves_a_complete_record_and_does_nothing_the_second_time(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    config, results = sweep_file(evaluate_every=1), tmp_path / "r"
    code, out, err = dfqbench("run", config, "--results", results)
    assert (code, err) == (0, "")
    assert "2 cells to run" in out
    assert "2 done" in out
    found = {r["cell"]["bits"]: r for r in results_of(results)}
    assert set(found) == {"w4a4", "w3a3"}
    result = found["w4a4"]
    folder = results / "runs" / result["id"]
    assert {p.name for p in folder.iterdir()} == {
        *("cell.json", "result.json", "history.csv", "correct.npy", "samples.png", "log.txt", "student.safetensors")
    }
    correct = np.unpackbits(np.load(folder / "correct.npy"))[: result["images"]]
    assert correct.sum() == result["correct"]
    assert result["top1"] == pytest.approx(100 * result["correct"] / result["images"])
    assert result["teacher"]["images"] == result["images"] == 599
    assert (result["last_epoch"], result["steps"], result["evaluations"]) == (3, 8, 3)
    assert result["best"]["top1"] >= result["top1"]
    assert result["provenance"]["threads"] >= 1
    weights, macs = 216 + 576 + 1152 + 2304 + 160, 256 * (216 + 576) + 64 * (1152 + 2304) + 160
    assert result["size"]["teacher"] == {
        "bytes": 4 * (weights + 4 * 48 + 10),
        "weight_bits": 32.0,
        "macs": macs,
        "bops": macs * 1024,
        "quantized": {"weights": 0.0, "activations": 0.0},
    }
    grids = 8 * (8 + 8 + 16 + 16 + 10) + 8 * 4
    assert result["size"]["student"]["bytes"] == weights / 2 + grids + 4 * (4 * 48 + 10)
    assert found["w3a3"]["size"]["student"]["bops"] == 3 * 32 * (256 * 216 + 160) + 9 * (macs - 256 * 216 - 160)
    assert sorted(result["seconds"]["bundle"]) == sorted(r["id"] for r in found.values())
    history = list(csv.DictReader(io.StringIO((folder / "history.csv").read_text())))
    assert [row["phase"] for row in history] == ["warm-up", "train", "train"]
    assert float(history[-1]["top1"]) == result["top1"]
    assert not list((results / "bundles").glob("*")) if (results / "bundles").exists() else True

    before = {p: p.stat().st_mtime_ns for p in results.glob("runs/**/*")}
    code, out, _ = dfqbench("run", config, "--results", results)
    assert code == 0
    assert "0 cells to run, 2 already done" in out
    assert {p: p.stat().st_mtime_ns for p in results.glob("runs/**/*")} == before


def test_plan_says_what_is_done_missing_stale_running_and_failed(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "r"
    methods = [{"round": {"n": 3.0}}]
    assert "2 missing" in dfqbench("plan", sweep_file(methods=methods), "--results", results)[1]
    assert not results.exists(), "plan writes nothing"
    assert dfqbench("run", sweep_file(methods=methods), "--results", results)[0] == 0
    assert "2 done" in dfqbench("plan", sweep_file(methods=methods), "--results", results)[1]

    with monkeypatch.context() as later:
        later.setattr("dfqbench.sweep.cell.ENGINE_VERSION", ENGINE_VERSION + 1)
        _, out, _ = dfqbench("plan", sweep_file(methods=methods), "--results", results)
    assert "2 stale" in out
    assert f"stale (finished with engine {ENGINE_VERSION}, now {ENGINE_VERSION + 1})" in out
    for other in ({"protocol": {"first_bits": 8}}, {"protocol": "hardware"}, {"precision": "bf16"}):
        _, out, _ = dfqbench("plan", sweep_file(methods=methods, **other), "--results", results)
        assert "2 missing" in out, "another experiment, in a table of its own"
        assert "stale" not in out

    (cell,) = {r["id"] for r in results_of(results) if r["cell"]["bits"] == "w4a4"}
    (results / "runs" / cell / "result.json").unlink()
    assert Lease(results / "runs" / cell / "lease.json").acquire()
    assert f"running (process {os.getpid()}" in dfqbench("plan", sweep_file(methods=methods), "--results", results)[1]


PLUGIN = """
from dfqbench import Method, register


@register("raiser", paper="none", fidelity="paper")
class Raiser(Method):
    \"\"\"Fails at the end, until a file says otherwise.\"\"\"

    def finish(self, student):
        import pathlib
        if not pathlib.Path({flag!r}).exists():
            raise ValueError("out of luck")
        student.set_ranges_from_bn(3.0)


@register("forgetful", paper="none", fidelity="paper")
class Forgetful(Method):
    \"\"\"Never sets a range.\"\"\"
"""


def test_a_failed_cell_keeps_its_traceback_sinks_no_other_and_is_retried_only_when_asked(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path
) -> None:
    plugin = tmp_path / "raiser.py"
    plugin.write_text(PLUGIN.format(flag=str(tmp_path / "lucky")))
    config, results = sweep_file(methods=["raiser", "round", "forgetful"], plugins=[str(plugin)], bits=["w4a4"]), tmp_path / "r"
    code, out, _ = dfqbench("run", config, "--results", results)
    assert code == 1
    assert "1 done, 2 failed" in out
    assert "ValueError: out of luck" in out
    assert "activation quantizers have no range (relu" in out
    _, out, _ = dfqbench("plan", config, "--results", results)
    assert "failed (ValueError: out of luck)" in out
    failures = [json.loads(p.read_text()) for p in results.glob("runs/*/failed.json")]
    assert any("Traceback" in f["traceback"] and "raiser.py" in f["traceback"] for f in failures)

    (tmp_path / "lucky").touch()
    code, out, _ = dfqbench("run", config, "--results", results)
    assert code == 1
    assert "0 cells to run, 1 already done" in out
    assert "2 failed earlier (" in out
    assert "1 x ValueError: out of luck" in out
    assert "--retry-failed tries them again" in out
    assert "0 done, 2 failed earlier" in out
    code, _, err = dfqbench("table", config, "--results", results)
    assert code == 0
    assert "are not done" not in err
    assert f"2 of 3 cells failed, dfqbench run {config} --results {results} --retry-failed tries them again:\n" in err
    assert "raiser tiny digits w4a4 seed 0: ValueError: out of luck" in err
    code, out, _ = dfqbench("run", config, "--results", results, "--retry-failed")
    assert "1 done, 1 failed" in out
    assert len(list(results.glob("runs/*/failed.json"))) == 1


def test_a_sweep_whose_cells_have_all_failed_never_looks_done(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    plugin = tmp_path / "unlucky.py"
    plugin.write_text(PLUGIN.format(flag=str(tmp_path / "lucky")).replace("raiser", "unlucky").replace("forgetful", "oblivious"))
    config, results = sweep_file(methods=["unlucky"], plugins=[str(plugin)]), tmp_path / "r"
    assert dfqbench("run", config, "--results", results)[0] == 1
    code, out, _ = dfqbench("run", config, "--results", results)
    assert code == 1
    assert "0 cells to run\n2 failed earlier (ValueError: out of luck); --retry-failed tries them again\n0 done, 2 failed earlier\n" in out
    code, _, err = dfqbench("table", config, "--results", results)
    assert code == 2
    assert f"nothing is finished in {results / 'runs'} of {config}: dfqbench run {config} --results {results} --retry-failed" in err
    (tmp_path / "lucky").touch()
    assert dfqbench("run", config, "--results", results, "--retry-failed")[0] == 0
    assert dfqbench("run", config, "--results", results)[0] == 0


@pytest.mark.slow
def test_two_runs_at_once_share_the_cells(sweep_file: SweepFile, tmp_path: Path) -> None:
    config, results = (
        sweep_file(methods=["gdfq"], seeds=[0, 1], bits=["w4a4"], budget={"epochs": 4, "iterations": 30, "batch_size": 16}),
        tmp_path / "r",
    )
    command = [sys.executable, "-m", "dfqbench.cli", "run", str(config), "--results", str(results), "--threads", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(results_of(results)) == 2
    starts = sum(path.read_text().count("started") for path in results.glob("runs/*/log.txt"))
    assert starts == 2


def test_evaluation_that_changed_a_student_is_a_failure(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfqbench.quantization.student import Student
    from dfqbench.run import scoring

    honest = scoring.evaluate_task

    def meddling(network: Any, *words: Any, **options: Any) -> Any:
        if isinstance(network, Student):
            next(iter(network.quantizers.values())).scale.mul_(1.01)
        return honest(network, *words, **options)

    monkeypatch.setattr(scoring, "evaluate_task", meddling)
    code, out, _ = dfqbench("run", sweep_file(methods=["round"], bits=["w4a4"]), "--results", tmp_path / "r")
    assert code == 1
    assert "evaluation changed the student" in out


def test_mistakes_are_told_on_standard_error_with_exit_code_2_and_nothing_is_written(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    config = sweep_file(methods=["gdqf"], bits=["w9a9"])
    for command in ("run", "plan"):
        code, out, err = dfqbench(command, config, "--results", tmp_path / "r")
        assert (code, out) == (2, "")
        assert [line.split(": ")[0] for line in err.splitlines()] == ["dfqbench", "dfqbench"]
        assert "did you mean 'gdfq'?" in err
        assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "nowhere.yaml"], "no config 'nowhere.yaml'"),
        (["table", "--results", "nosuch"], "results folder nosuch: there is no such folder"),
        (["table", "--rule", "first"], "--rule 'first': last or best-on-test"),
        (["table", "--format", "pdf"], "--format 'pdf': text, markdown, latex, html, csv or csv-means"),
        (["plot", "--kind", "acuracy"], "did you mean 'accuracy'?"),
        (["plot", "--format", "gif"], "--format 'gif': png, pdf or svg"),
        (["plot", "--results", "nosuch"], "results folder nosuch: there is no such folder"),
        (["report", "--results", "nosuch"], "results folder nosuch: there is no such folder"),
        (["report", "--rule", "first"], "--rule 'first': last or best-on-test"),
        (["merge", "nowhere"], "nowhere: no results folder (it has no runs/)"),
        (["run", "quickstart", "--wandb", "on"], "--wandb 'on': online, offline or off"),
        (["wandb", "sync", "--results", "nosuch"], "results folder nosuch: there is no such folder"),
        (["models", "resnot999"], "no network matches 'resnot999'"),
        (["methods", "show", "gdqf"], "did you mean 'gdfq'?"),
        (["pretrain", "digits", "--out", "x.bin"], "x.bin"),
        (["pretrain", "digit", "--out", "x.safetensors"], "did you mean 'digits'?"),
    ],
)
def test_wrong_words_get_one_line(dfqbench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = dfqbench(*words)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_empty_results_folder_has_nothing_that_is_finished(dfqbench: Run, tmp_path: Path) -> None:
    code, _, err = dfqbench("table", "--results", tmp_path)
    assert (code, err) == (2, f"dfqbench: nothing is finished in {tmp_path / 'runs'}\n")


@pytest.mark.parametrize("place", ["file", "/proc/results"])
def test_a_results_folder_that_cannot_be_one_is_told(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = dfqbench("run", sweep_file(), "--results", tmp_path / place)
    assert code == 2
    assert "is a file" in err or "cannot be written" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_graphs_without_a_gpu_are_told(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    code, _, err = dfqbench("run", sweep_file(), "--results", tmp_path / "r", "--device", "cpu", "--graphs")
    assert (code, err) == (2, "dfqbench: --graphs: CUDA graphs need a GPU, and the device is cpu\n")
    assert not list((tmp_path / "r").glob("runs/*"))


def test_a_device_that_is_not_there_is_told(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    assert "auto, cpu, cuda or cuda:N is expected" in dfqbench("run", sweep_file(), "--results", tmp_path / "r", "--device", "tpuu")[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: str) -> tuple[Path, Path]:
    """A config and its finished results."""
    import yaml

    folder = tmp_path_factory.mktemp("finished")
    config = folder / "sweep.yaml"
    content = {
        "name": "done",
        "teachers": [tiny_teacher],
        "evaluate": "digits",
        "methods": ["round", {"round": {"n": 2.0}}],
        "bits": ["w8a8", "w4a4"],
    }
    config.write_text(yaml.safe_dump(content))
    words = [sys.executable, "-m", "dfqbench.cli", "run", str(config), "--results", str(folder / "r")]
    subprocess.run(words, check=True, capture_output=True, env=os.environ | {"DFQBENCH_CACHE": str(folder / "cache")})
    return config, folder / "r"


def test_table_shows_rows_by_method_and_columns_by_bits(dfqbench: Run, finished: tuple[Path, Path]) -> None:
    config, results = finished
    code, out, err = dfqbench("table", config, "--results", results)
    assert (code, err) == (0, "")
    assert "tiny on digits (599 images): teacher " in out
    header, *rows = (line.replace("*", "").split() for line in out.splitlines()[2:5])
    assert header[-5:] == ["w8a8", "drop", "w4a4", "drop", "CPU-s/cell"]
    assert {row[0] for row in rows} == {"round", "round(n=2)"}
    by_bits = {(r["cell"]["label"], r["cell"]["bits"]): f"{r['top1']:.2f}" for r in results_of(results)}
    for row in rows:
        assert [row[-5], row[-3]] == [by_bits[row[0], "w8a8"], by_bits[row[0], "w4a4"]]
    assert "rule 'last'" in out


def test_table_as_csv_has_a_line_per_cell(dfqbench: Run, finished: tuple[Path, Path]) -> None:
    _, out, _ = dfqbench("table", "--results", finished[1], "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 4
    assert {float(row["top1"]) for row in rows} == {r["top1"] for r in results_of(finished[1])}


def test_table_names_damaged_files_and_goes_on(dfqbench: Run, finished: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(finished[1], tmp_path / "r")
    victim = next((tmp_path / "r").glob("runs/*/result.json"))
    victim.write_text(victim.read_text()[:100])
    code, out, err = dfqbench("table", "--results", tmp_path / "r")
    assert code == 0
    assert f"skipped: {victim}" in err
    assert "1 skipped, nothing was changed" in err
    assert "tiny on digits" in out


def test_what_was_not_run_is_named_with_the_command_that_runs_it(
    dfqbench: Run, finished: tuple[Path, Path], sweep_file: SweepFile, tmp_path: Path
) -> None:
    import yaml

    content = yaml.safe_load(finished[0].read_text())
    more = sweep_file(
        **{key: content[key] for key in ("teachers", "evaluate")}, budget=None, methods=["round", {"round": {"n": [2.0, 4.0]}}], bits=["w8a8"]
    )
    out = finished[1].parent / "figures"
    code, printed, err = dfqbench("plot", more, "--results", finished[1], "--out", out, "--kind", "accuracy")
    assert code == 0
    assert f"1 of 3 cells are not done, dfqbench run {more} --results {finished[1]} runs them:\n  round(n=4) tiny digits w8a8 seed 0" in err
    assert {line.rpartition("/")[2] for line in printed.splitlines()} == {"accuracy.png", "accuracy.pdf", "accuracy.svg"}
    code, printed, err = dfqbench("plot", more, "--results", finished[1], "--out", out, "--kind", "curves")
    assert (code, printed) == (2, "")
    assert "curves: no cell was evaluated between its epochs: set `evaluate_every` in the config" in err
    code, _, err = dfqbench("table", sweep_file(methods=["zeroq"]), "--results", finished[1])
    assert code == 2
    assert "nothing is finished in" in err.splitlines()[-1]
    assert "dfqbench run" in err.splitlines()[-1]
    plugin = tmp_path / "mine.py"
    plugin.write_text("")
    _, _, err = dfqbench("table", sweep_file(methods=["zeroq"]), "--results", finished[1], "--plugin", plugin)
    assert err.rstrip().endswith(f"--results {finished[1]} --plugin {plugin}")


def test_merge_reports_and_exits_with_1_on_a_conflict(dfqbench: Run, finished: tuple[Path, Path], tmp_path: Path) -> None:
    assert dfqbench("merge", finished[1], "--results", tmp_path / "all")[:2] == (0, f"4 new ({tmp_path / 'all'})\n")
    shutil.copytree(finished[1], tmp_path / "other")
    victim = next((tmp_path / "other").glob("runs/*/result.json"))
    victim.write_text(victim.read_text().replace('"student_state": "', '"student_state": "0'))
    code, out, err = dfqbench("merge", tmp_path / "other", "--results", tmp_path / "all")
    assert (code, out) == (1, f"3 already here, 1 conflicts ({tmp_path / 'all'})\n")
    assert err.startswith(f"conflict: {victim.parent}: round")


def without_torch(*words: str) -> list[str]:
    """Runs a command in a new process; the heavy modules that it imported."""
    code = (
        "import sys\nfrom dfqbench import cli\n"
        f"sys.argv = ['dfqbench', *{list(words)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('HEAVY', *(name for name in ('torch', 'torchvision', 'timm', 'wandb', 'sklearn', 'matplotlib') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.slow
def test_help_and_table_do_not_import_torch(finished: tuple[Path, Path]) -> None:
    config, results = finished
    assert without_torch("--help") == []
    assert without_torch("run", "--help") == []
    assert without_torch("table", "--results", str(results)) == []
    assert without_torch("table", str(config), "--results", str(results)) == []
    out = str(results.parent / "out")
    assert without_torch("plot", str(config), "--results", str(results), "--out", out, "--format", "svg") in ([], ["matplotlib"])
    assert without_torch("report", str(config), "--results", str(results), "--out", f"{out}/report.html") in ([], ["matplotlib"])
    assert without_torch("merge", str(results), "--results", f"{out}/merged") == []
    ids = sorted(p.name for p in (results / "runs").iterdir())[:2]
    assert without_torch("compare", *ids, "--results", str(results)) == []


def test_methods_are_listed_and_shown(dfqbench: Run) -> None:
    _, out, _ = dfqbench("methods")
    assert "gdfq" in out
    assert "arXiv:2003.03603" in out
    _, out, _ = dfqbench("methods", "show", "gdfq")
    assert "weight of the BN-statistics loss" in out
    assert "preset imagenet: batch_size=16" in out


def test_models_are_listed_by_wildcard(dfqbench: Run) -> None:
    _, out, _ = dfqbench("models", "cifar:*")
    assert {"cifar:resnet20", "cifar:resnet32", "cifar:resnet44", "cifar:resnet56"} <= {*out.split()}


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_lost(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up after two epochs; once there is room again the same command goes on and ends with the same bits."""
    from dfqbench import files
    from dfqbench.store import store

    config = sweep_file(bits=["w4a4"])
    assert dfqbench("run", config, "--results", tmp_path / "whole")[0] == 0
    real, calls = store.write_atomically, []

    def filling(path: Path, content: str | bytes) -> None:
        calls.append(path)
        if sum(p.name == "history.csv" for p in calls) > 2:
            raise OSError(28, "No space left on device")
        real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_atomically", filling)
        patched.setattr(files, "write_atomically", filling)
        code, _, err = dfqbench("run", config, "--results", tmp_path / "r", "--checkpoint-every", "0")
        assert code == 2
        assert "No space left on device" in err
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("r/runs/*/failed.json"))
    code, out, _ = dfqbench("run", config, "--results", tmp_path / "r")
    assert code == 0
    assert "resumed at step" in out
    ((one,), (other,)) = results_of(tmp_path / "r"), results_of(tmp_path / "whole")
    assert one["student_state"] == other["student_state"]


PICTURES = """
import torch
from dfqbench_methods.gdfq import GDFQ
from dfqbench import register

@register("{name}", paper="none", fidelity="paper", shares_synthesis=True)
class Shown(GDFQ):
    def pictures(self):
        return {{"red-square": torch.tensor([1.0, 0.0, 0.0])[:{shape}].view(-1, 1, 1).expand({shape}, 5, 5)}}
"""


@pytest.mark.parametrize(("name", "shape", "kept"), [("shows", 3, True), ("shows-badly", 1, False)])
def test_a_methods_pictures_are_kept_beside_its_samples_and_a_bad_one_costs_no_result(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, name: str, shape: int, kept: bool
) -> None:
    plugin = tmp_path / "shown.py"
    plugin.write_text(PICTURES.format(name=name, shape=shape))
    config = sweep_file(methods=[{name: {"warmup_epochs": 1, "calibration_epochs": 1}}], plugins=[str(plugin)], bits=["w4a4"])
    code, out, _ = dfqbench("run", config, "--results", tmp_path / "r")
    assert code == 0
    (folder,) = (tmp_path / "r" / "runs").iterdir()
    assert (folder / "samples.png").exists()
    assert (folder / "red-square.png").exists() == kept
    assert ("no pictures from shows-badly: ValueError: a picture is 3 x H x W, this one has the shape (1, 5, 5)" in out) != kept
    if kept:
        assert Image.open(folder / "red-square.png").getpixel((2, 2)) == (255, 0, 0)


def test_a_network_that_cannot_be_counted_costs_no_result(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(network: object) -> None:
        raise ValueError("no formula")

    monkeypatch.setattr("dfqbench.run.worker.size_of", fails)
    assert dfqbench("run", sweep_file(methods=["round"]), "--results", tmp_path / "r")[0] == 0
    first, second = results_of(tmp_path / "r")
    assert "size" not in first | second
    assert "no size: ValueError: no formula" in (tmp_path / "r" / "runs" / first["id"] / "log.txt").read_text()

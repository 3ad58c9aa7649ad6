"""The network of a finished cell: kept, measured again, compared, merged."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dfqbench import load_student
from dfqbench.data import find_set
from dfqbench.engine.evaluate import normalise

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
NAME = "student.safetensors"


@pytest.fixture
def ran(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A store with two finished cells, and their results by bits."""
    code, _, err = dfqbench("run", sweep_file(), "--results", tmp_path / "r")
    assert (code, err) == (0, "")
    return tmp_path / "r", {r["cell"]["bits"]: r for r in (json.loads(p.read_text()) for p in (tmp_path / "r").glob("runs/*/result.json"))}


def test_a_cell_is_measured_again_and_gets_the_same_images_right(
    dfqbench: Run, ran: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, found = ran
    result = found["w4a4"]
    file = results / "runs" / result["id"] / NAME
    said = f"top-1 {result['top1']:.2f} % ({result['correct']} of 599)"
    same = f"the same {result['correct']} of 599 images right as when it ended"
    assert (result["student"]["bytes"], result["student"]["sha256"]) == (file.stat().st_size, load_student(file).about["sha256"])
    for given in (result["id"], result["id"][:11], file, file.parent):
        code, out, err = dfqbench("evaluate", given, "--on", "digits", "--results", results, "--device", "cpu")
        assert (code, err) == (0, "")
        assert said in out
        assert same in out
    shutil.copy(file, tmp_path / "elsewhere.safetensors")
    assert same in dfqbench("evaluate", tmp_path / "elsewhere.safetensors", "--on", "digits", "--results", results)[1]
    alone = dfqbench("evaluate", tmp_path / "elsewhere.safetensors", "--on", "digits", "--results", tmp_path / "none")[1]
    assert said in alone
    assert "cell " not in alone

    kept = json.loads((file.parent / "result.json").read_text())
    kept["provenance"]["packages"]["torch"] = "1.0"
    (file.parent / "result.json").write_text(json.dumps(kept))
    other = load_student(file)
    monkeypatch.setattr("dfqbench.run.evaluation.load_student", lambda path: other)
    with torch.no_grad():
        other.traced.get_parameter("head.layer.bias")[0] += 50.0
    out = dfqbench("evaluate", result["id"], "--on", "digits", "--results", results)[1]
    gained, lost = map(int, re.search(r"(\d+) images right that were wrong, (\d+) wrong that were right \(torch 1.0 then", out).groups())  # type: ignore[union-attr]
    assert result["correct"] + gained - lost == int(re.search(r"\((\d+) of 599\)", out)[1])  # type: ignore[index]


@pytest.mark.slow
def test_a_cell_without_data_has_its_agreement_and_no_accuracy_until_it_is_measured(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    images = {"images": {"zeroq": {"images": 8, "synthesis_iterations": 2}}, "count": 8}
    config = sweep_file(evaluate="none", selection=images, methods=["round"], bits=["w4a4"], budget=None)
    assert dfqbench("run", config, "--results", tmp_path / "r")[0] == 0
    (path,) = (tmp_path / "r").glob("runs/*/result.json")
    (kept,) = (tmp_path / "r").glob("unseen/*.safetensors")
    result = json.loads(path.read_text())
    assert result["unseen_sha256"] == hashlib.sha256(load_file(kept)["images"].numpy().tobytes()).hexdigest()
    assert result["plain_rounding"] == {"agreement": result["agreement"], "kl": pytest.approx(result["kl"])}, "rounding is what this method does"
    out = dfqbench("table", config, "--results", tmp_path / "r")[1]
    assert "tiny without data, no accuracy: agreement with the teacher on 8 synthetic images (zeroq(" in out
    code, out, err = dfqbench("evaluate", result["id"], "--on", "digits", "--results", tmp_path / "r")
    assert (code, err) == (0, "")
    assert "digits: top-1 " in out
    said = f"cell {result['id']} was scored without data: agreement with its teacher {result['agreement']:.2f} %, KL "
    assert said in out
    assert "on 8 synthetic images (zeroq(" in out


def test_what_cannot_be_measured_again_is_one_line(dfqbench: Run, ran: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path) -> None:
    results, found = ran
    result = found["w3a3"]
    file = results / "runs" / result["id"] / NAME
    for given, on, why in (
        ("0" * 12, "digits", "no cell in"),
        (tmp_path / "absent.safetensors", "digits", "does not exist"),
        (result["id"], "nope", "unknown evaluation set"),
        (results / "runs", "digits", "it is no cell's folder"),
    ):
        code, out, err = dfqbench("evaluate", given, "--on", on, "--results", results)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert why in err
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = dfqbench("evaluate", result["id"], "--on", "digits", "--results", results)
    assert (code, err.count("\n")) == (2, 1)
    assert "damaged" in err
    file.unlink()
    assert "was not kept" in dfqbench("evaluate", result["id"], "--on", "digits", "--results", results)[2]
    assert dfqbench("table", "--results", results)[0] == 0


def test_the_loaded_module_gives_the_evaluated_answers(ran: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    results, found = ran
    student = load_student(found["w4a4"]["id"], results)
    images = find_set("digits").decode(student.task)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (student.task.mean, student.task.std))
    right = 0
    with torch.inference_mode():
        for pixels, labels in images.batches(500):
            right += int((student(normalise(torch.from_numpy(pixels), mean, std)).argmax(1) == torch.from_numpy(labels)).sum())
    assert right == found["w4a4"]["correct"]
    assert (student.about["cell"]["id"], student.about["last_epoch"]) == (found["w4a4"]["id"], found["w4a4"]["last_epoch"])


def test_a_store_may_keep_no_students(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    code, _, _ = dfqbench("run", sweep_file(store={"students": False}), "--results", tmp_path / "r")
    assert code == 0
    (cell, *_) = [path.name for path in (tmp_path / "r" / "runs").iterdir()]
    assert "was not kept" in dfqbench("evaluate", cell, "--on", "digits", "--results", tmp_path / "r")[2]
    assert not list((tmp_path / "r").glob(f"runs/*/{NAME}"))
    assert len(list((tmp_path / "r").glob("runs/*/result.json"))) == 2


def test_a_student_that_has_no_form_in_a_file_costs_no_result(
    dfqbench: Run, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfqbench.export.graph_text.PACKAGES", ())
    monkeypatch.setattr("dfqbench.export.graph_text._take_apart", _refuse)
    code, out, _ = dfqbench("run", sweep_file(), "--results", tmp_path / "r")
    assert code == 0
    assert "cannot be written to a file: no" in out
    kept = [json.loads(p.read_text()) for p in (tmp_path / "r").glob("runs/*/result.json")]
    assert [r["student"] for r in kept] == [{"not_kept": "the student cannot be written to a file: no"}] * 2
    assert not list((tmp_path / "r").glob(f"runs/*/{NAME}"))
    assert (
        "holds no student: the student cannot be written to a file: no"
        in dfqbench("evaluate", kept[0]["id"], "--on", "digits", "--results", tmp_path / "r")[2]
    )


def _refuse(*_: object) -> None:
    raise ValueError("no")


def test_files_and_cells_are_compared_alike(dfqbench: Run, ran: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path) -> None:
    results, found = ran
    first, second = found["w4a4"], found["w3a3"]
    shutil.copy(results / "runs" / second["id"] / NAME, tmp_path / "other.safetensors")
    _, cells, _ = dfqbench("compare", first["id"], second["id"], "--results", results)
    code, files, err = dfqbench("compare", first["id"], tmp_path / "other.safetensors", "--results", results, "--on", "digits")
    assert (code, err) == (0, "")
    figures = [line for line in cells.splitlines() if line.startswith(("first - second", "McNemar", "first right", "first wrong"))]
    assert len(figures) == 4
    assert all(line in files for line in figures)
    code, out, err = dfqbench("compare", first["id"], tmp_path / "other.safetensors", "--results", results)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--on" in err


def test_merge_brings_students_along(dfqbench: Run, ran: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path) -> None:
    results, found = ran
    assert dfqbench("merge", results, "--results", tmp_path / "all")[0] == 0
    for result in found.values():
        kept, brought = ((place / "runs" / result["id"] / NAME).read_bytes() for place in (results, tmp_path / "all"))
        assert kept == brought

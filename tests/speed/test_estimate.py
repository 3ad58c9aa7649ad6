"""Expected hours: hand-worked from finished cells and from measured speeds, and said with what they are from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_store import cells

from dfqbench.quantization import Bits
from dfqbench.speed.estimate import (
    FINISHED,
    NOTHING,
    SpeedFile,
    Speeds,
    hours,
    hours_anywhere,
    in_words,
    read_speed_files,
    rounded,
    step_seconds,
    steps_of,
)
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Bundle, bundles
from dfqbench.sweep.load import load_sweep
from dfqbench_slurm.profile import find_profile

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
FIRST = replace(next(iter(cells(1))), config={"epochs": 40, "iterations": 200, "batch_size": 64, "warmup_epochs": 4})
TWO = Bundle((FIRST, replace(FIRST, bits=Bits(4, 4))))
STORED = {"images": 10, "synthesis_batch": 4, "synthesis_iterations": 3, "calibration_epochs": 1}


def row(method: str, phase: str, widths: int, seconds: float, precision: str = "fp32", contender: str = "engine") -> dict[str, Any]:
    return {"method": method, "phase": phase, "contender": contender, "precision": precision, "widths": widths, "seconds": seconds}


GDFQ = [row("gdfq", "train", 1, 1.0), row("gdfq", "train", 4, 0.5), row("gdfq", "train", 1, 9.0, contender="textbook")]


def measured(folder: Path, rows: list[dict[str, Any]], name: str = "one", device: str = "cuda", batch_size: int = 32, **more: Any) -> list[SpeedFile]:
    folder.mkdir(exist_ok=True)
    provenance = {"device": device, "device_name": f"device {name}", "threads": 2}
    (folder / f"{name}.json").write_text(json.dumps({"batch_size": batch_size, "rows": rows, "provenance": provenance, **more}))
    found, skipped = read_speed_files([folder])
    assert skipped == []
    return found


def result_of(bundle: Bundle, own: float, shared: float, device: str = "cuda") -> dict[str, Any]:
    cell = bundle.cells[0]
    return {"cell": cell.record(), "seconds": {"own": own, "shared": shared}, "provenance": {"device": device}}


def loaded(sweep_file: SweepFile, method: dict[str, Any] | str, **changes: Any) -> list[Bundle]:
    return bundles(load_sweep(sweep_file(methods=[method], **changes), cache_folder()).cells)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 1.0, 4: 0.5}, {1: 1.0, 2: 4 / 3, 3: 5 / 3, 4: 2.0, 7: 3.0}),  # shared 2/3, own 1/3
        ({2: 0.6, 4: 0.5}, {1: 0.8, 2: 1.2, 3: 1.6, 4: 2.0}),  # shared 0.4, own 0.4
        ({1: 1.0, 4: 1.0}, {1: 1.0, 2: 2.0, 4: 4.0}),  # nothing shared
        ({1: 1.0}, {1: 1.0, 3: 3.0}),
        ({1: 4.0, 4: 0.5}, {1: 4.0, 3: 4.0}),  # noise: more widths never take less
    ],
)
def test_a_step_is_what_is_shared_and_what_each_width_adds(rates: dict[int, float], expected: dict[int, float]) -> None:
    assert {n: step_seconds(rates, n) for n in expected} == pytest.approx(expected)


def test_hours_come_first_from_finished_cells_of_the_same_kind(tmp_path: Path) -> None:
    longer = Bundle(tuple(replace(cell, seed=1, config=cell.config | {"epochs": 80}) for cell in TWO.cells))
    finished = [result_of(TWO, own=800.0, shared=1700.0), result_of(TWO, own=1000.0, shared=1900.0)]
    speeds = Speeds(finished, "cuda", measured(tmp_path, GDFQ))
    assert speeds.seconds(TWO) == pytest.approx(1800 + 2 * 900)
    assert speeds.seconds(longer) == pytest.approx(2 * (1800 + 2 * 900))
    assert hours([TWO, longer], speeds) == f"about 3 GPU-hours {FINISHED}"
    assert hours([TWO, longer], speeds, 2) == f"about 1.5 GPU-hours {FINISHED}"
    for other in (replace(FIRST, precision="bf16"), replace(FIRST, method="acq"), replace(FIRST, teacher=replace(FIRST.teacher, weights_sha256="f"))):
        assert speeds.seconds(Bundle((other,))) is None
    assert Speeds(finished, "cpu").seconds(TWO) is None
    assert Speeds([{"id": "odd", "cell": {}}, *finished], "cuda").seconds(TWO) is not None


def test_else_from_measured_speeds_scaled_by_steps_and_batch_size(tmp_path: Path) -> None:
    speeds = Speeds([], "cuda", measured(tmp_path, GDFQ, network="resnet20"))
    seconds = 40 * 200 * 4 / 3 * 64 / 32  # steps x seconds of two widths x batch
    expected = speeds.expected(TWO)
    assert expected is not None
    assert expected.seconds == pytest.approx(seconds)
    source = f"scaled by steps and batch size from {tmp_path / 'one.json'} (device one)"
    assert expected.source == source
    assert hours([TWO], speeds) == f"about 5.9 GPU-hours {source}"
    assert speeds.seconds(TWO) is None, "jobs are packed by finished cells alone"


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (GDFQ, {"network": "resnet56"}),
        (GDFQ, {"size": 64}),
        (GDFQ, {"device": "cpu"}),
        ([row("gdfq", "train", 1, 1.0, "bf16")], {}),
        ([row("acq", "train", 1, 1.0)], {}),
        ([row("gdfq", "train", 1, 1.0, contender="textbook")], {}),
    ],
)
def test_what_was_measured_on_something_else_says_nothing(tmp_path: Path, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    speeds = Speeds([], "cuda", measured(tmp_path, rows, **more))
    assert speeds.expected(TWO) is None
    assert hours([TWO], speeds) == (
        "GPU-hours: no figure is known (nothing of these methods and teachers has finished on cuda in this store); on such a device "
        "`dfqbench speed --methods gdfq --network cifar:resnet20 --out results/speed/NAME.json` would make one"
    )


def test_a_zoo_network_is_the_one_of_its_name_and_old_files_are_of_resnet20(tmp_path: Path) -> None:
    zoo = replace(FIRST, teacher=replace(FIRST.teacher, model="pytorchcv:resnet20_cifar10"))
    speeds = Speeds([], "cuda", measured(tmp_path, GDFQ))
    assert speeds.expected(Bundle((zoo,))) == speeds.expected(Bundle((FIRST,)))
    other = replace(FIRST, teacher=replace(FIRST.teacher, model="torchvision:resnet50"))
    assert "`dfqbench speed --methods gdfq --network torchvision:resnet50 --out" in hours([Bundle((other,))], speeds)


def test_of_several_files_the_slowest_counts_and_is_named(tmp_path: Path) -> None:
    measured(tmp_path, [row("gdfq", "train", 1, 2.0)], "slow")
    speeds = Speeds([], "cuda", measured(tmp_path, [row("gdfq", "train", 1, 1.0)], "fast"))
    expected = speeds.expected(Bundle((FIRST,)))
    assert expected is not None
    assert expected.seconds == pytest.approx(40 * 200 * 2.0 * 2)
    assert "device slow" in expected.source


def test_images_are_made_once_for_all_widths_and_students_train_after(sweep_file: SweepFile, tmp_path: Path) -> None:
    (two,) = loaded(sweep_file, {"lrq": STORED})
    assert steps_of(two.cells[0]) == {"images": 3 * 3, "train": 3 * 4}
    train = [row("lrq", "train", 1, 1.0), row("lrq", "train", 4, 0.5)]
    files = measured(tmp_path / "s", [*train, row("lrq", "images", 1, 0.5)], batch_size=2, network="tiny", size=16)
    expected = Speeds([], "cuda", files).expected(two)
    assert expected is not None
    assert expected.seconds == pytest.approx(9 * 0.5 * 4 / 2 + 12 * 4 / 3 * 8 / 2)
    half = measured(tmp_path / "s", train, batch_size=2, network="tiny", size=16)
    assert Speeds([], "cuda", half).expected(two) is None, "half of a cost is none"


def test_a_method_that_wraps_another_makes_that_ones_images(sweep_file: SweepFile, tmp_path: Path) -> None:
    (two,) = loaded(sweep_file, {"ait": {"host": "lrq", "host_settings": STORED}})
    files = measured(tmp_path / "s", [row("ait", "train", 1, 1.0), row("ait", "images", 1, 0.5)], batch_size=2, network="tiny", size=16)
    expected = Speeds([], "cuda", files).expected(two)
    assert expected is not None
    assert expected.seconds == pytest.approx(9 * 0.5 * 4 / 2 + 12 * 2 * 8 / 2)


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ({"gznq": {"images": 10, "synthesis_batch": 4, "synthesis_iterations": 3}}, {"images": 9}),
        ({"gznq": {"images": 10, "synthesis_batch": 4, "synthesis_iterations": 3, "finetune": True}}, {"images": 9, "train": 2 + 12}),
        ({"zeroq": {"synthesis_iterations": 7}}, {"images": 7}),
        ({"gdfq": {"warmup_epochs": 1}}, {"train": 12}),
        ("zaq", {"train": 12}),
        ("round", {}),
    ],
)
def test_steps_are_those_of_the_methods_own_phases(sweep_file: SweepFile, method: dict[str, Any] | str, steps: dict[str, int]) -> None:
    first, *_ = loaded(sweep_file, method)
    assert steps_of(first.cells[0]) == steps


def test_a_method_that_tells_its_phases_only_when_set_up_has_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dfqbench.method.registry import find_method

    class Late(find_method("gdfq")):  # type: ignore[misc]
        def phases(self) -> Any:
            return [self.generator]

    monkeypatch.setattr("dfqbench.method.registry.find_method", lambda name: Late)
    assert Speeds([], "cuda", measured(tmp_path, GDFQ)).expected(TWO) is None


def test_the_sum_says_of_how_many_bundles_by_what(tmp_path: Path) -> None:
    others = [Bundle((replace(FIRST, method=name, config={}),)) for name in ("acq", "round")]
    lrq = Bundle((replace(FIRST, method="lrq", config={}),))
    speeds = Speeds([result_of(others[0], 3600.0, 0.0)], "cuda", measured(tmp_path, [row("gdfq", "train", 1, 0.225)]))
    said = hours([Bundle((FIRST,)), *others, lrq], speeds)
    assert said == (
        f"about 2 GPU-hours: 1 bundle scaled by steps and batch size from {tmp_path / 'one.json'} (device one), 1 bundle {FINISHED}, "
        f"1 bundle {NOTHING}; no figure is known for 1 of 4 bundles; on such a device "
        "`dfqbench speed --methods lrq --network cifar:resnet20 --out results/speed/NAME.json` would make one"
    )
    assert hours_anywhere([others[1]], [speeds]) == [f"expected hours: 1 bundle {NOTHING}"]
    assert in_words(others[0], [speeds]) == f"about 1 h on a GPU {FINISHED}"
    assert in_words(lrq, [speeds]) == ""


def test_numbers_have_two_digits_and_no_exponent() -> None:
    assert [rounded(x) for x in (1234567.0, 123.4, 12.34, 1.234, 0.01234, 0.0)] == ["1200000", "120", "12", "1.2", "0.012", "0"]


def test_files_that_are_not_of_dfqbench_speed_are_named(tmp_path: Path) -> None:
    measured(tmp_path, GDFQ)
    for name, text in {
        "half": "{",
        "list": "[]",
        "empty": "{}",
        "overheads-one": "{}",
        "zero": '{"rows": [], "provenance": {}, "batch_size": 0}',
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    found, skipped = read_speed_files([tmp_path, tmp_path / "nowhere", tmp_path])
    assert len(found) == 1
    assert [line.split(":")[0] for line in skipped] == [str(tmp_path / f"{name}.json") for name in ("empty", "half", "list", "zero")]


def test_the_shipped_file_can_be_read() -> None:
    found, skipped = read_speed_files([Path(__file__).parents[2] / "results" / "speed"])
    assert skipped == []
    assert all(record.network and record.rates for record in found)
    assert found


def test_plan_and_a_dry_run_tell_hours_per_bundle_and_in_all(dfqbench: Run, sweep_file: SweepFile, tmp_path: Path) -> None:
    config, results = sweep_file(seeds=[0, 1]), tmp_path / "r"
    _, out, _ = dfqbench("plan", config, "--results", results)
    assert "what is not done: expected hours: no figure is known" in out
    results.mkdir()
    measured(results / "speed", [row("gdfq", "train", 1, 1800.0)], device="cpu", batch_size=8, network="tiny", size=16)
    (results / "speed" / "odd.json").write_text("{}")
    source = f"scaled by steps and batch size from {results / 'speed' / 'one.json'} (device one, 2 threads)"
    _, out, err = dfqbench("plan", config, "--results", results)
    assert f"w4a4, w3a3, seed 1: about 12 h on a CPU {source}\n" in out
    assert f"what is not done: about 24 job-hours on CPUs {source}\n" in out
    assert f"skipped: {results / 'speed' / 'odd.json'}: not a file of `dfqbench speed`" in err
    code, out, err = dfqbench("submit", config, "--results", results, "--profile", "cpu", "--dry-run")
    assert code == 0
    assert f"w4a4, w3a3, seed 1: about 12 h on a CPU {source}\n" in out
    together = find_profile("cpu")[1].side_by_side
    assert f"nothing is submitted\nabout {24 / together:g} job-hours on CPUs {source}\n" in out
    assert "odd.json" in err

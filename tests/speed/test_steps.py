"""`dfqbench speed`: everything is measured that is said to be, the counted arithmetic is right, and nothing is asserted about seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfqbench.cli import app as cli
from dfqbench.method.registry import find_method
from dfqbench.speed import floor
from dfqbench.speed.steps import Contender, Device, Stand, _replays, contenders, file_name, floor_of, phases_of
from dfqbench.teachers.cifar import CifarResNet
from dfqbench.testing import small_task
from dfqbench_methods.textbook import loops


def stand() -> Stand:
    torch.manual_seed(0)
    return Stand(CifarResNet(1), small_task(size=16), 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "phases"), [("gdfq", ["train"]), ("zaq", ["train"]), ("lrq", ["images", "train"]), ("gznq", ["images"]), ("round", [])]
)
def test_what_takes_time_is_what_is_measured(name: str, phases: list[str]) -> None:
    assert phases_of(find_method(name), stand()) == phases


def test_every_contender_takes_steps() -> None:
    found = contenders("gdfq", "train", stand(), loops()["gdfq"], ["fp32", "bf16"], ("w4a4", "w3a3"))
    assert [(c.name, c.precision, c.widths) for c in found] == [
        ("engine", "fp32", 1), ("engine", "fp32", 2), ("engine", "bf16", 1), ("engine", "bf16", 2), ("competent", "fp32", 1), ("textbook", "fp32", 1),
    ]  # fmt: skip
    for contender in found:
        contender.run()


@pytest.mark.parametrize("name", loops())
def test_every_textbook_loop_takes_the_steps_that_are_measured(name: str) -> None:
    for phase in phases_of(find_method(name), stand()):
        competent, textbook = contenders(name, phase, stand(), loops()[name], ["fp32"], ("w4a4",))[-2:]
        assert (competent.name, textbook.name) == ("competent", "textbook")
        competent.run()
        textbook.run()


def test_an_adversarial_method_is_measured_in_whole_turns() -> None:
    found = contenders("zaq", "train", stand(), loops()["zaq"], ["fp32"], ("w4a4", "w3a3"))
    assert {(c.steps, c.widths) for c in found} == {(5, 1)}


def test_what_cannot_be_replayed_is_told_and_not_measured_as_if_it_were() -> None:
    said: list[str] = []
    lockstep, planned = stand().lockstep(find_method("lrq"), "images", ("w4a4",), "fp32")
    assert not _replays(lockstep, lambda: lockstep.step(planned, calibrating=True), said.append, False)
    assert said
    assert "steps of lrq are not replayed" in said[0]


def test_the_floor_is_the_larger_of_arithmetic_and_bytes() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    x = torch.randn(2, 8, 10, 10)

    def run() -> None:
        with torch.no_grad():
            layer(x)

    flops, moved = 2 * 2 * 16 * 8 * 9 * 100, 4 * (2 * 8 * 100 + 16 * 8 * 9 + 2 * 16 * 100)
    contender = Contender("engine", "fp32", 1, 1, run, [])
    assert floor_of(contender, Device({"fp32": 1e6}, 1e30)) == pytest.approx(flops / 1e6)
    assert floor_of(contender, Device({"fp32": 1e30}, 1e6)) == pytest.approx(moved / 1e6)


@pytest.mark.parametrize("faster", ["product", "convolution"])
def test_the_devices_rate_is_that_of_the_faster_of_a_product_and_a_convolution(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 TFLOP/s in float32, and of 2 in bfloat16, the other gets a quarter; and small matrices a tenth of that."""
    images, channels, side = floor.LAYER
    small, large = (2 * side**3 for side in floor.MATRIX)
    seconds = list[float]()
    for rate in (1e12, 2e12):
        product, layer = (rate if kind == faster else rate / 4 for kind in ("product", "convolution"))
        seconds += [small / product * 10, large / product, 2 * 9 * channels**2 * images * side**2 / layer]
    answers = iter([*seconds, 1.0])  # the last one is the copy's
    monkeypatch.setattr(floor, "_best", lambda *_: next(answers))
    assert floor.measured_device(torch.device("cpu"), ["fp32", "bf16"]).flops == pytest.approx({"fp32": 1e12, "bf16": 2e12})


def test_where_a_product_would_take_minutes_that_of_small_matrices_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some CPUs have no bfloat16: a billion operations per second."""
    sides = list[int]()

    def product(side: int, *_: Any) -> float:
        sides.append(side)
        return 1e9

    monkeypatch.setattr(floor, "_product", product)
    monkeypatch.setattr(floor, "_best", lambda *_: 1e3)
    assert floor.measured_device(torch.device("cpu"), ["bf16"]).flops == {"bf16": 1e9}
    assert sides == [floor.MATRIX[0]]


def test_what_takes_long_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0])
    monkeypatch.setattr(floor, "timed", lambda *_: next(times))
    assert floor._best(lambda: None, torch.device("cpu")) == 3.0
    times = iter([1.0, 0.5, 0.4, 0.6, 0.5, 0.5])
    assert floor._best(lambda: None, torch.device("cpu")) == 0.4


@pytest.fixture
def small_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's rates by small work: where a CPU has no bf16 arithmetic the usual takes minutes."""
    for name, size in {"MATRIX": (32, 64), "LAYER": (1, 8, 8), "COPIED": 2**12}.items():
        monkeypatch.setattr(floor, name, size)


@pytest.mark.slow
@pytest.mark.usefixtures("small_floor")
def test_speed_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "speed.json"
    words = ["speed", "--methods", "gdfq", "--batch-size", "2", "--rounds", "2", "--seconds", "0", "--precisions", "fp32", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["dfqbench", *words])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["command"] == "dfqbench " + " ".join(words)
    assert (written["network"], written["size"], written["batch_size"]) == ("resnet20", 32, 2)
    assert [(row["contender"], row["widths"]) for row in written["rows"]] == [("engine", 1), ("engine", 4), ("competent", 1), ("textbook", 1)]
    assert all(row["seconds"] > 0 for row in written["rows"])
    assert written["rows"][-1]["against"] == 1.0
    assert "textbook" in printed
    assert "…" not in printed, "it fits 80 columns"


@pytest.mark.slow
@pytest.mark.usefixtures("small_floor")
def test_any_network_can_be_measured_with_the_settings_that_methods_have_for_its_kind(
    tiny_teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    words = ["--network", tiny_teacher, "--batch-size", "2", "--rounds", "1", "--seconds", "0", "--precisions", "fp32"]
    words += ["--out", str(out)]
    for more, code in (["--preset", "imagenet"], 0), (["--preset", "imagnet"], 2):
        monkeypatch.setattr("sys.argv", ["dfqbench", "speed", "--methods", "gdfq", *words, *more])
        with pytest.raises(SystemExit, match=str(code)):
            cli.main()
    written = json.loads(out.read_text())
    assert (written["network"], written["size"], written["preset"]) == ("tiny", 16, "imagenet")
    assert {row["contender"] for row in written["rows"]} == {"engine"}, "the textbook loops are written for other networks"
    assert "did you mean 'imagenet'?" in capsys.readouterr().err


def test_the_files_name_is_the_devices() -> None:
    assert file_name({"device": "cpu", "device_name": "Intel(R) Xeon(R) @ 2.0", "threads": 2}) == "intel-r-xeon-r-2-0-2-threads"
    assert file_name({"device": "cuda", "device_name": "NVIDIA H200", "threads": 16}) == "nvidia-h200"

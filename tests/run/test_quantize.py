"""One call from a trained network to its quantized copy, from Python and from the shell."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dfqbench
from dfqbench import Phase, UserError, load_student
from dfqbench.engine.lockstep import Lockstep
from dfqbench.testing.networks import SmallNetwork
from dfqbench.testing.trial import small_task

Run = Callable[..., tuple[int, str, str]]
TASK = {"size": 16, "classes": 10, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
FEW: dict[str, Any] = {"images": {"zeroq": {"images": 8, "synthesis_iterations": 2}}, "count": 8}
CODE = """
from dfqbench.testing.networks import SmallNetwork
from dfqbench.testing.trial import small_task

def build():
    return SmallNetwork(small_task(size=16))
"""


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallNetwork(small_task(size=16))


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Module:
    """Without stages."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def quantize(network: nn.Module, **changes: Any) -> Any:
    return dfqbench.quantize(network, **{"method": "round", "progress": False, "selection": FEW, **TASK, **changes})


def test_a_network_in_memory_is_quantized_and_stays_as_it_is(network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    student = quantize(network, bits="w8a8")
    assert torch.equal(random, torch.get_rng_state())
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert (str(student.bits), student.protocol.name, student.task.size) == ("w8a8", "hardware", 16)
    with torch.no_grad():
        apart = (student(images()) - network.eval()(images())).abs().max()
    assert 0 < apart < 0.5
    assert (student.score["images"], student.score["plain_rounding"]["kl"]) == (8, pytest.approx(student.score["kl"]))
    for wrong in (tmp_path, tmp_path / "s.pth", tmp_path / "none" / "s.safetensors"):
        with pytest.raises(UserError, match="a name that ends with"):
            student.save(wrong)
    student.save(tmp_path / "s.safetensors")
    assert torch.equal(dfqbench.load_student(tmp_path / "s.safetensors")(images()), student(images()))
    assert capsys.readouterr().out == ""


def test_it_is_exported_by_the_ending_of_the_name(network: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    student = quantize(network, bits="w4a4")
    for name in ("s.onnx", "s.pt2"):
        assert all(agreement.passes for agreement in student.export(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(UserError, match="must end with"):
        student.export(tmp_path / "s.tflite")


def test_settings_and_protocols_reach_the_method(network: nn.Module) -> None:
    wide, narrow = (quantize(network, protocol="lineage", n=n) for n in (6.0, 1.0))
    ratio = [float(w.scale / n.scale) for w, n in zip(wide.quantizers.values(), narrow.quantizers.values(), strict=True)]
    assert min(ratio) > 1
    assert quantize(network, protocol={"base": "lineage", "first_bits": 8}, bits="w4a4").layers["stem"].bits == 8


def test_the_same_call_answers_from_its_folder(network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = quantize(network, folder=tmp_path, progress=True)
    assert "1 cell to run" in capsys.readouterr().out
    again = quantize(network, folder=tmp_path, progress=True)
    assert "0 cells to run" in capsys.readouterr().out
    assert torch.equal(first(images()), again(images()))
    with torch.no_grad():
        next(network.parameters())[0] += 1  # other weights are another network
    assert quantize(network, folder=tmp_path).about["cell"]["id"] != first.about["cell"]["id"]
    network.relu = nn.LeakyReLU()  # type: ignore[assignment]
    ids = {quantize(network, folder=tmp_path).about["cell"]["id"]}
    network.relu = nn.LeakyReLU(0.2)  # type: ignore[assignment]
    assert quantize(network, folder=tmp_path).about["cell"]["id"] not in ids


def test_auto_keeps_the_student_that_is_nearest_to_the_network(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"images": 8, "synthesis_iterations": 2}
    few = ["round", {"zeroq": small}, {"gznq": {**small, "synthesis_batch": 8, "batch_size": 8, "confidence": 0.0}}]
    monkeypatch.setattr("dfqbench.run.quantize.AUTO", few)
    student = quantize(network, method="auto", bits="w3a3", folder=tmp_path, progress=True)
    out = capsys.readouterr().out
    assert out.count("(kept)") == 1
    kl = [float(line.split("KL ")[1].split()[0]) for line in out.splitlines() if ": KL " in line]
    assert len(kl) == 3
    assert kl == sorted(kl)
    assert student.score["kl"] == pytest.approx(kl[0], rel=1e-2)
    quantize(plain(), method="auto", progress=True)
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 1
    assert "gznq" in left_out[0]


def test_images_to_score_on_are_of_asked_classes_where_the_network_has_what_they_need(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where plain rounding has no ranges: what makes the images is asked, not rounding."""
    small = {"images": 8, "synthesis_iterations": 2}
    few = {"zeroq": small, "gznq": {**small, "synthesis_batch": 8, "confidence": 0.0}}
    monkeypatch.setattr("dfqbench.run.quantize.unseen_images", lambda count, method="gznq": {"images": {method: few[method]}, "count": count})
    network.norm0 = nn.Identity()  # type: ignore[assignment]
    network.norm2 = nn.GroupNorm(1, 16)  # type: ignore[assignment]
    with pytest.raises(UserError, match="ranges"):
        quantize(network)
    settings = {"method": "zeroq", "selection": None, **small}
    assert quantize(network, **settings).score["made"].startswith("gznq")
    assert quantize(plain(), **settings).score["made"].startswith("zeroq")


def test_what_cannot_be_is_told_in_one_line(network: nn.Module) -> None:
    for changes, why in (
        ({"size": None}, "size missing"),
        ({"mean": (123.0, 116.0, 103.0)}, "divide mean and std by 255"),
        ({"classes": 7}, r"not with \(1, 7\) logits"),
        ({"bits": "w9a9"}, "is not a bit width"),
        ({"method": "nope"}, "nope"),
        ({"method": "auto", "n": 2.0}, "settings are of one method"),
        ({"nn": 2.0}, "unknown setting"),
        ({"protocol": "nope"}, "unknown protocol"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            quantize(network, **changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"torch\.nn\.Module is wanted"):
        quantize(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="TorchScript"):
        quantize(torch.jit.trace(network.eval(), images()))
    with pytest.raises(UserError, match="features"):
        quantize(plain(), method="gznq")


def test_a_wrapped_network_is_unwrapped_and_attributes_are_known(network: nn.Module) -> None:
    for key, value in TASK.items():
        setattr(network, key, value)
    student = dfqbench.quantize(nn.DataParallel(network), method="round", progress=False, selection=FEW)
    assert (student.task.size, student.task.classes) == (16, 10)


@pytest.mark.slow
def test_an_interrupted_call_goes_on_from_its_folder(
    network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> Any:
        return quantize(network, method="gdfq", protocol="lineage", folder=tmp_path, epochs=6, iterations=20, batch_size=8, progress=True)

    step = Lockstep.step

    def interrupted(lockstep: Lockstep, phase: Phase, calibrating: bool) -> None:
        step(lockstep, phase, calibrating)
        if lockstep.steps_done == 30:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Lockstep, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call()
    capsys.readouterr()
    student = call()
    assert "resumed at step" in capsys.readouterr().out
    alone = quantize(network, method="gdfq", protocol="lineage", epochs=6, iterations=20, batch_size=8)
    assert torch.equal(student(images()), alone(images()))


@pytest.mark.slow
def test_an_allocator_gives_each_layer_its_width(dfqbench: Run, network: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CODE)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    student = quantize(network, bits="w3.5a4", allocate={"random": {"evaluations": 4}}, protocol="lineage", folder=tmp_path / "q")
    (kept,) = [json.loads(path.read_text()) for path in (tmp_path / "q" / "allocations").glob("*.json")]
    widths = {name: layer.bits for name, layer in student.layers.items()}
    assert widths == kept["bits"]
    assert len({*widths.values()}) > 1
    entries = {name: layer.layer.weight.numel() for name, layer in student.layers.items()}
    assert sum(entries[name] * bits for name, bits in widths.items()) <= 3.5 * sum(entries.values())
    assert kept["images"] == 4, "half of as many images as it is scored on"
    words = ["quantize", f"{tmp_path}/net.py:build", "--weights", tmp_path / "w.safetensors", "--size", 16, "--classes", 10, "--mean", "0.5,0.5,0.5"]
    words += ["--std", "0.25,0.25,0.25", "--method", "round", "--results", tmp_path / "r", "--to", tmp_path / "s.safetensors", "--images", 8]
    code, _, err = dfqbench(*words, "--bits", "w3a4", "--protocol", "lineage", "--allocate", "random: {evaluations: 4}")
    assert (code, err) == (0, "")
    found = load_student(tmp_path / "s.safetensors")
    assert (str(found.bits), len({layer.bits for layer in found.layers.values()}) > 1) == ("w3a4", True)
    for more, why in (
        (("--bits", "w3.5a4"), "'w3.5a4' is not a bit width"),
        (("--bits", "w9a4", "--allocate", "pareto"), "'w9a4' is not a bit width"),
        (("--bits", "w3a4", "--allocate", "parato"), "unknown allocator 'parato': did you mean 'pareto'?"),
        (("--bits", "w3a4", "--allocate", "3"), "allocate"),
    ):
        code, _, err = dfqbench(*words, *more)
        assert (code, why in err, "Traceback" in err) == (2, True, False), err


def test_from_the_shell(dfqbench: Run, network: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CODE)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    words = ["quantize", f"{tmp_path}/net.py:build", "--weights", tmp_path / "w.safetensors", "--size", 16, "--classes", 10, "--mean", "0.5,0.5,0.5"]
    words += ["--std", "0.25,0.25,0.25", "--method", "round", "--images", 8, "--results", tmp_path / "r", "--bits", "w4a4"]
    code, out, err = dfqbench(*words, "--to", tmp_path / "s.safetensors", "--set", "n=4.0")
    assert (code, err) == (0, "")
    assert "written to" in out
    student = quantize(network, bits="w4a4", n=4.0)
    assert torch.equal(student(images()), load_student(tmp_path / "s.safetensors")(images()))
    for more, why in (
        (("--to", tmp_path / "s.bin"), "must end with"),
        (("--to", tmp_path / "none" / "s.onnx"), "there is no folder"),
        (("--to", tmp_path / "s.pt2", "--set", "n"), "NAME=VALUE"),
        (("--to", tmp_path / "s.pt2", "--std", "a,b"), "a number per channel"),
        (("--to", tmp_path / "s.pt2", "--set", "m=3"), "unknown setting"),
    ):
        code, out, err = dfqbench(*words, *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert why in err

"""Released checkpoints: a student read from a file computes what the network computed whose state dict it is, and what does not fit is named.

`released` below is that network: the quantizer and the rebuilding of GDFQ's code, written again from the formulas (lineage.md, methods.md 1.5).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from pytorchcv.model_provider import get_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Student, Teacher, UserError
from dfqbench.engine.evaluate import evaluate, state_hash
from dfqbench.engine.method_state import set_up
from dfqbench.method.registry import find_method
from dfqbench.quantization import PROTOCOLS, Bits, find_protocol
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Cell
from dfqbench.sweep.load import load_sweep
from dfqbench.sweep.reproduce import config_of, recipe
from dfqbench.teachers import load, parse_teacher
from dfqbench.teachers.cifar import cifar_resnet
from dfqbench.testing import method_checks, small_task, small_teacher
from dfqbench.testing.networks import SmallNetwork

BITS = Bits(4, 3)


def rounded(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x on the signed levels between low and high, which have x's dimensions."""
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    scale = levels / (high - low).clamp(min=1e-8)
    zero = (scale * low).round() + half
    return ((scale * x - zero).round().clamp(-half, half - 1) + zero) / scale


class Range(nn.Module):
    """Their QuantAct, frozen."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        for name, value in (("x_min", 0.0), ("x_max", float(torch.rand(()) * 3 + 0.5)), ("beta", 0.9), ("beta_t", 0.0)):
            self.register_buffer(name, torch.tensor([value]))

    def forward(self, x: Tensor) -> Tensor:
        return rounded(x, self.x_min, self.x_max, self.bits)  # type: ignore[arg-type]


class Layer(nn.Module):
    """Their Quant_Conv2d and Quant_Linear: the float weight is put on its grid in every forward pass."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: int):
        super().__init__()
        self.bits, self.weight, self.bias = bits, layer.weight, layer.bias
        self.how = (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(1, self.weight.dim()))
        weight = rounded(self.weight, self.weight.amin(dims, True), self.weight.amax(dims, True), self.bits)
        return F.conv2d(x, weight, self.bias, *self.how) if self.how else F.linear(x, weight, self.bias)


def released(network: nn.Module, bits: Bits) -> nn.Module:
    """Their quantize_model: an nn.Sequential is built anew, so its children lose their names."""
    if type(network) in (nn.Conv2d, nn.Linear):
        return Layer(network, bits.weights)  # type: ignore[arg-type]
    if type(network) in (nn.ReLU, nn.ReLU6):
        return nn.Sequential(network, Range(bits.activations))
    if type(network) is nn.Sequential:
        return nn.Sequential(*(released(child, bits) for child in network.children()))
    new = copy.copy(network)
    new._modules = {name: child if "norm" in name else released(child, bits) for name, child in network.named_children()}  # type: ignore[assignment]
    return new


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and every statistic is another number, as after training."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return network.eval()


class Shared(nn.Module):
    """One ReLU for two places, a layer with a bias in an nn.Sequential of named children, and numbers for names."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential()
        for name, child in (("drop", nn.Dropout()), ("conv", nn.Conv2d(8, 8, 3)), ("act", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1))):
            self.body.add_module(name, child)
        self.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 10)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.relu(self.stem(x))).flatten(1)
        return self.heads[1](self.relu(self.heads[0](x)))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "theirs": (lambda: get_model("resnet20_cifar10"), 32),
    "ours": (lambda: cifar_resnet("resnet20"), 32),
    "depthwise, ReLU6": (lambda: get_model("mobilenetv2_wd4", num_classes=10), 224),
    "one ReLU for two places": (Shared, 32),
}


@functools.cache
def teacher_of(name: str) -> Teacher:
    """The network with other weights than those that are released."""
    build, size = NETWORKS[name]
    return Teacher(trained(build(), seed=1), small_task(size=size))


def student_of(file: Path, name: str = "theirs", protocol: str | dict[str, Any] = "lineage", **settings: Any) -> Student:
    """A student in float64, after the method has had it."""
    method, teacher = find_method("checkpoint"), teacher_of(name)
    student = Student(teacher, find_protocol(protocol).for_method("checkpoint", method.ranges, method.batch_norm), BITS).double()
    method(teacher, method.Config(file=file, **settings), seed=0).finish(student)
    return student


def saved(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


SweepFile = Callable[..., Path]
Their = tuple[dict[str, Tensor], Path]


@pytest.fixture
def their(tmp_path: Path) -> Their:
    """What a released ResNet-20 of pytorchcv holds, and its file."""
    state = released(trained(get_model("resnet20_cifar10")), BITS).state_dict()
    return state, saved(tmp_path / "r20_w4a3.pth", state)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_from_a_file_computes_what_the_released_network_computes(name: str, tmp_path: Path) -> None:
    build, size = NETWORKS[name]
    network = trained(build())
    other = released(copy.deepcopy(network), BITS)
    file = saved(tmp_path / "released.pt", other.state_dict())
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected, float_logits = other.double()(images), network.double()(images)
        logits = student_of(file, name)(images)
    assert (logits - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (logits - float_logits).abs().max() > 0.01 * expected.abs().max(), "the test would not see quantization"


def test_its_names_are_those_of_their_code(their: Their) -> None:
    names = list(their[0])
    assert names[0] == "features.0.conv.weight"
    assert {"features.0.activ.1.x_min", "features.2.0.identity_conv.conv.weight", "features.1.0.body.conv1.activ.1.beta_t", "output.bias"} < set(
        names
    )


def in_our_names(name: str) -> str:
    for place, own in enumerate(("init_block", "stage1", "stage2", "stage3")):
        name = name.replace(f"features.{place}.", f"features.{own}.")
    return re.sub(r"(stage\d)\.(\d)", lambda found: f"{found[1]}.unit{int(found[2]) + 1}", name)


def test_wrappers_safetensors_and_our_own_names_are_understood(their: Their, tmp_path: Path) -> None:
    state, file = their
    expected = state_hash(student_of(file))
    files = {
        "parallel.pth": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        "named.pth": {in_our_names(name): value for name, value in state.items()},  # nothing was rebuilt
        "scalars.pth": {name: value.squeeze() if name.endswith(("x_min", "x_max")) else value for name, value in state.items()},
        "zeroq.pth": {name: value for name, value in state.items() if not name.endswith(("beta", "beta_t", "num_batches_tracked"))},
        "shuffled.pth": dict(reversed(state.items())),
    }
    for name, content in files.items():
        assert state_hash(student_of(saved(tmp_path / name, content))) == expected, name
    save_file(state, tmp_path / "r20.safetensors")
    assert state_hash(student_of(tmp_path / "r20.safetensors")) == expected


def test_layers_of_other_names_are_matched_by_their_order_when_that_is_asked_for(tmp_path: Path) -> None:
    state = released(trained(cifar_resnet("resnet20")), BITS).state_dict()
    file = saved(tmp_path / "plain.pth", state)
    renamed = {name.replace("conv", "c").replace("bn", "b").replace("relu", "act.r").replace("linear", "fc"): value for name, value in state.items()}
    other = saved(tmp_path / "renamed.pth", renamed)
    assert state_hash(student_of(other, "ours", match="order")) == state_hash(student_of(file, "ours"))
    with pytest.raises(UserError, match=r"missing conv1.weight, bn1.weight, .* try `match: order`"):
        student_of(other, "ours")
    with pytest.raises(UserError, match="20 x layer, where the network has 22"):
        student_of(other, "theirs", match="order")
    save_file(state, tmp_path / "sorted.safetensors")
    with pytest.raises(UserError, match="keeps no order"):
        student_of(tmp_path / "sorted.safetensors", "ours", match="order")


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "an entry is missing": ({"features.0.conv.weight": None}, "missing features.0.conv.weight;"),
    "a range is missing": ({"features.0.activ.1.x_min": None}, "missing features.0.activ.1.x_min;"),
    "one range too many": (
        {"quant_input.x_min": torch.zeros(1), "quant_input.x_max": torch.ones(1)},
        "unexpected quant_input.x_min, quant_input.x_max;",
    ),
    "another bias": ({"features.0.conv.bias": torch.zeros(16)}, "unexpected features.0.conv.bias;"),
    "other classes": ({"output.weight": torch.zeros(100, 64)}, r"other shape: output.weight \(100, 64\) where the network has \(10, 64\);"),
    "a range per channel": (
        {"features.0.activ.1.x_max": torch.ones(16)},
        r"other shape: features.0.activ.1.x_max \(16,\) where",
    ),
    "not finite": ({"output.bias": torch.full((10,), torch.nan)}, "not numbers: output.bias"),
    "integers": ({"output.weight": torch.zeros(10, 64, dtype=torch.int8)}, "not numbers: output.weight"),
    "never tracked": ({"features.0.activ.1.x_max": torch.zeros(1)}, "features.0.activ.1.x_min to x_max is no range: 0 to 0"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_named(what: str, their: Their, tmp_path: Path) -> None:
    changes, said = MISFITS[what]
    state = {name: value for name, value in {**their[0], **changes}.items() if value is not None}
    with pytest.raises(UserError, match=said):
        student_of(saved(tmp_path / "changed.pth", state))


def test_what_does_not_fit_is_counted_beyond_three_and_the_student_stays_as_it_was(their: Their) -> None:
    method, teacher = find_method("checkpoint"), teacher_of("ours")
    student = Student(teacher, PROTOCOLS["lineage"], BITS)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(UserError, match=r"missing conv1.weight, bn1.weight, bn1.bias and \d+ more; unexpected features.0.* and \d+ more"):
        method(teacher, method.Config(file=their[1]), seed=0).finish(student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_quantizer_behind_no_module_is_named(their: Their) -> None:
    with pytest.raises(UserError, match="no range for x"):
        student_of(their[1], protocol={"base": "lineage", "input_bits": 8})


def test_a_folded_batch_norm_has_no_place_for_the_file(their: Their) -> None:
    with pytest.raises(UserError, match="method checkpoint needs batch norm 'fixed', protocol hardware has it 'folded'"):
        student_of(their[1], protocol="hardware")


# --- in a sweep ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_file(tiny_teacher: str, tmp_path: Path) -> Path:
    network = load(parse_teacher(tiny_teacher))
    return saved(tmp_path / "tiny_w4a4.pth", released(network, Bits(4, 4)).state_dict())


@pytest.mark.slow
def test_its_row_is_what_the_released_network_gets_right(
    tiny_file: Path, tiny_teacher: str, sweep_file: SweepFile, dfqbench: Run, tmp_path: Path
) -> None:
    config = sweep_file(methods=["round", {"checkpoint": {"file": str(tiny_file), "bits": "w4a4"}}], bits=["w5a5", "w4a4"], seeds=[0, 1], budget={})
    loaded = load_sweep(config, cache_folder())
    cells = [cell for cell in loaded.cells if cell.method == "checkpoint"]
    assert [(str(cell.bits), cell.seed, cell.label) for cell in cells] == [("w4a4", 0, "checkpoint(file=tiny_w4a4.pth)")]
    code, _, err = dfqbench("run", str(config), "--results", str(tmp_path / "results"))
    assert code == 0, err
    folder = tmp_path / "results" / "runs" / cells[0].id
    result = json.loads((folder / "result.json").read_text())
    assert (result["cell"]["fidelity"], result["steps"], result["cell"]["files"]) == ("released", 0, {"file": "tiny_w4a4.pth"})
    assert str(tiny_file.parent) not in json.dumps(result)

    (card,) = loaded.teachers
    network = released(load(loaded.teachers[card]), Bits(4, 4))
    network.load_state_dict(torch.load(tiny_file))
    correct = evaluate(network.eval(), loaded.evaluation.decode(card.task), card.task, device=torch.device("cpu")).correct
    ours = np.unpackbits(np.load(folder / "correct.npy"))[: len(correct)].astype(bool)
    assert (ours == correct).mean() > 0.995  # but for values that lie on the border of two levels

    code, shown, _ = dfqbench("table", "--results", str(tmp_path / "results"))
    assert "file=tiny_w4a4.pth" in shown, "which tells no rows apart, and stands in a note"
    assert "follows 'released': trained elsewhere, evaluated here" in " ".join(shown.split())


@pytest.mark.slow
def test_a_cell_is_the_files_content_and_not_its_path_nor_the_width_that_is_said(tiny_file: Path, sweep_file: SweepFile, tmp_path: Path) -> None:
    def only(file: Path, **settings: Any) -> Cell:
        (cell,) = load_sweep(sweep_file(methods=[{"checkpoint": {"file": str(file), **settings}}], bits=["w4a4"], budget={}), cache_folder()).cells
        return cell

    first = only(tiny_file)
    assert first.config["file"] == hashlib.sha256(tiny_file.read_bytes()).hexdigest()
    copied = tmp_path / "elsewhere.pth"
    copied.write_bytes(tiny_file.read_bytes())
    assert only(copied).id == first.id == only(tiny_file, bits="w4a4").id
    state = torch.load(tiny_file)
    saved(tiny_file, {**state, "head.bias": state["head.bias"] + 1})
    assert only(tiny_file).id != first.id, "an answer was remembered of a file that is another now"
    assert only(tiny_file, match="order").id != only(tiny_file).id
    with pytest.raises(UserError, match="is not the file any more that it was when the sweep was read"):
        set_up(first, small_teacher(small_task()), torch.device("cpu"), None)


def test_what_is_wrong_is_told_when_the_sweep_is_read(tiny_file: Path, sweep_file: SweepFile) -> None:
    for settings, bits, said in (
        ({"file": "no/where.pth"}, ["w4a4"], "methods[0].checkpoint.file: 'no/where.pth': there is no such file"),
        ({}, ["w4a4"], "methods[0].checkpoint.file: missing"),
        (
            {"file": str(tiny_file)},
            ["w4a4", "w3a3"],
            "methods[0].checkpoint: a checkpoint was made for one bit width, and its file",
        ),
        ({"file": str(tiny_file), "bits": "w4a4"}, ["w3a3"], "methods[0].checkpoint: bits: it was made for w4a4, which the sweep does not have"),
        ({"file": str(tiny_file), "bits": "4"}, ["w4a4"], "methods[0].checkpoint.bits: '4': string should match pattern"),
        ({"file": str(tiny_file), "layout": "other"}, ["w4a4"], "methods[0].checkpoint.layout: 'other': input should be 'gdfq'"),
    ):
        with pytest.raises(UserError) as caught:
            load_sweep(sweep_file(methods=[{"checkpoint": settings}], bits=bits, budget={}), cache_folder())
        assert said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_nothing_in_a_file_is_executed(sweep_file: SweepFile, dfqbench: Run, tmp_path: Path) -> None:
    saved(tmp_path / "whole.pth", released(cifar_resnet("resnet20"), BITS))  # a pickled network, not a state dict
    config = sweep_file(methods=[{"checkpoint": {"file": str(tmp_path / "whole.pth")}}], bits=["w4a4"], budget={})
    code, out, err = dfqbench("run", str(config), "--results", str(tmp_path / "results"))
    assert code == 1
    assert "whole.pth: refused: it asks to run" in out + err


def test_how_to_run_its_cell_again_names_the_file(tiny_file: Path, sweep_file: SweepFile) -> None:
    (cell,) = load_sweep(sweep_file(methods=[{"checkpoint": {"file": str(tiny_file)}}], bits=["w4a4"], budget={}), cache_folder()).cells
    assert config_of(cell.record())["methods"] == [{"checkpoint": {"file": "${FILE}", "layout": "gdfq", "match": "names"}}]
    told = recipe({"cell": cell.record(), "provenance": {}})
    assert f"export FILE=tiny_w4a4.pth   # sha256 {cell.config['file'][:16]}" in told


@pytest.mark.slow
def test_it_conforms_on_a_checkpoint_of_the_small_network(dfqbench: Run, tmp_path: Path) -> None:
    file = saved(tmp_path / "small.pth", released(SmallNetwork(small_task()), Bits(4, 4)).state_dict())
    code, out, err = dfqbench("methods", "check", "checkpoint", "--set", f"file={file}")
    assert (code, "any_task_works" in out, err) == (0, True, "")
    assert "13 checks: 12 held, 1 failed as declared" in out
    with pytest.raises(UserError, match="checkpoint cannot be checked without its settings file: they have no defaults"):
        method_checks(find_method("checkpoint"))
    for wrong in ("file", "fil=x"):
        code, _, err = dfqbench("methods", "check", "checkpoint", "--set", wrong)
        assert (code, err.startswith(f"dfqbench: --set {wrong}: NAME=VALUE is expected: ")) == (2, True)


def test_speed_says_that_it_has_settings_without_a_default(dfqbench: Run) -> None:
    code, _, err = dfqbench("speed", "--methods", "checkpoint")
    assert (code, err.strip()) == (2, "dfqbench: --methods checkpoint: it has settings without a default: file")

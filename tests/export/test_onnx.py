"""Students as ONNX files and torch.export programs: the same answers, integers packed as narrow as they are, and no file that answers otherwise."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from pytorchcv.model_provider import get_model
from random_networks import randomised
from torch import Tensor, nn

from dfqbench.data import find_set
from dfqbench.engine.evaluate import normalise
from dfqbench.errors import UserError
from dfqbench.export.export import export
from dfqbench.export.student_file import load_student_file, save_student
from dfqbench.export.verify import CLOSE, Agreement, Rejected, agreements, random_images
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, Protocol, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.teachers import UNTRAINED, parse_teacher
from dfqbench.teachers.build import build

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from dfqbench.export import onnx_ops, onnx_run  # noqa: E402
from dfqbench.export.onnx_file import SESSION_OPTIONS, export_onnx  # noqa: E402
from dfqbench.export.onnx_run import OFF, SHIPPED, metadata, options_of, runner, session, speed_ratio, verified  # noqa: E402

LINEAGE, HARDWARE = PROTOCOLS["lineage"], PROTOCOLS["hardware"]


def student_of(teacher: Teacher, protocol: Protocol, bits: Bits, images: Tensor | None = None) -> Student:
    """With ranges tracked on random images."""
    student = Student(teacher, protocol, bits)
    images = torch.cat([*random_images(teacher.task, 16)()]) if images is None else images
    student.track_ranges(True)
    with torch.no_grad():
        student(images)
    student.track_ranges(False)
    return student


# --- a network that knows something, on real images -------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Callable[[], Iterator[Tensor]]:
    """The 599 test images, normalised for `knowing`."""
    decoded = find_set("digits").decode(Task(10, 3, 16, (0.5,) * 3, (0.25,) * 3))
    mean, std = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
    images = [normalise(torch.from_numpy(pixels), mean, std) for pixels, _ in decoded.batches(200)]
    return lambda: iter(images)


@pytest.fixture(scope="module")
def knowing(tiny_teacher: str) -> Teacher:
    """The tiny network with a last layer fitted to the digits by least squares: about 95 % right, so that answers lie apart."""
    built = build(parse_teacher({"model": tiny_teacher, "weights": UNTRAINED}))
    decoded = find_set("digits").decode(built.task, "train")
    mean, std = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
    network: Any = built.network
    head, network.head = network.head, nn.Identity()
    pixels, labels = next(iter(decoded.batches(1198)))
    with torch.no_grad():
        features = network(normalise(torch.from_numpy(pixels), mean, std)).double()
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        wanted = torch.nn.functional.one_hot(torch.from_numpy(labels), 10).double() * 10
        fitted = torch.linalg.lstsq(features, wanted).solution.float()
        head.weight.copy_(fitted[:-1].T)
        head.bias.copy_(fitted[-1])
    network.head = head
    return Teacher(network, built.task)


WIDTHS = [Bits(8, 8), Bits(4, 4), Bits(3, 3), Bits(2, 2)]


@pytest.mark.parametrize("protocol", [LINEAGE, HARDWARE], ids=lambda p: p.name)
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
def test_the_file_answers_as_the_student_on_all_test_images(
    protocol: Protocol, bits: Bits, knowing: Teacher, digits: Callable[[], Iterator[Tensor]], tmp_path: Path
) -> None:
    student = student_of(knowing, protocol, bits)
    found = export(student, tmp_path / "a.onnx", batches=digits)
    assert [a.how for a in found] == [OFF, SHIPPED]
    for agreement in found:
        assert len(agreement.moved) == 599
        whole_biases = agreement.how == SHIPPED and protocol is HARDWARE and bits == Bits(8, 8)  # integer kernels round them
        if not whole_biases:
            assert not (agreement.differs & (agreement.margins > CLOSE)).any(), str(agreement)
        assert float(agreement.moved.median()) < (1e-2 if whole_biases else 1e-4) * agreement.largest
        if whole_biases:  # the same file without them
            floats = {**options_of(tmp_path / "a.onnx"), "session.disable_quant_qdq": "1"}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(onnx_run, "options_of", lambda path, options=floats: options)
                (in_floats,) = agreements(student, {"in floats": runner(session(tmp_path / "a.onnx"))}, digits)
            assert in_floats.holds, str(in_floats)
    found = export(student, tmp_path / "a.pt2", "torch", digits)
    assert all(a.holds for a in found), str(found[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.pt2"]


def test_pixels_half_a_level_off_get_the_level_that_the_student_gives_them(
    knowing: Teacher, digits: Callable[[], Iterator[Tensor]], tmp_path: Path
) -> None:
    student = student_of(knowing, HARDWARE, Bits(8, 8), next(digits()))
    quantizer = student.quantizers["x"]
    x = torch.cat([*digits()])
    off = x / quantizer.scale % 1
    assert ((off - 0.5).abs() < 1e-4).float().mean() > 0.99  # of all pixels: 256 values on 256 levels around 0
    for name, to in (("a.onnx", "onnx"), ("a.pt2", "torch")):
        assert export(student, tmp_path / name, to, digits)[0].holds  # type: ignore[arg-type]


def test_a_student_that_was_read_from_its_file_gives_the_same_onnx_file(knowing: Teacher, tmp_path: Path) -> None:
    for protocol in (LINEAGE, HARDWARE):
        student = student_of(knowing, protocol, Bits(4, 4))
        save_student(student, tmp_path / "s.safetensors", {})
        for name, network in (("trained", student), ("stored", load_student_file(tmp_path / "s.safetensors"))):
            export_onnx(network, tmp_path / name)
        assert (tmp_path / "trained").read_bytes() == (tmp_path / "stored").read_bytes()


# --- grids ------------------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Quantized input or activation far from zero, or of one sign; weights whose channels have one sign, are constant, or span zero."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 1), nn.Hardtanh(shift - 1, shift + 1), nn.Linear(4, 6)
        with torch.no_grad():
            self.conv.weight.normal_(0, 0.3, generator=generator)
            self.conv.weight[0].abs_().add_(2)
            self.conv.weight[1].abs_().add_(2).neg_()
            self.conv.weight[2].fill_(0.7)
            self.conv.bias.fill_(shift)  # type: ignore[union-attr]
            self.head.weight.normal_(0, 1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


PROTOCOLS_OF_USERS = {
    "lineage": LINEAGE,
    "hardware": HARDWARE,
    "per tensor": find_protocol({"weight_granularity": "per-tensor"}),
    "per tensor, symmetric": find_protocol({"weight_granularity": "per-tensor", "weight_symmetric": True, "activation_symmetric": True}),
    "first, last, input": find_protocol({"base": "hardware", "first_bits": 6, "last_bits": 5, "input_bits": 7, "weight_symmetric": False}),
}


@pytest.mark.parametrize("protocol", PROTOCOLS_OF_USERS)
def test_every_width_is_computed_as_it_is(protocol: str, tmp_path: Path) -> None:
    task, rules = Task(6, 3, 4, (0.5,) * 3, (0.25,) * 3), PROTOCOLS_OF_USERS[protocol]
    for bits, shift in itertools.product((2, 3, 5, 6, 7, 8), (0.0, 40.0)):
        student = student_of(Teacher(TwoLayers(shift), task), rules, Bits(bits, bits))
        found = verified(student, _written(student, tmp_path), random_images(task, 40))
        for agreement in found[:1] if bits == 8 and protocol == "hardware" else found:
            assert float(agreement.moved.median()) <= 2e-6 * max(agreement.largest, shift), (bits, shift, str(agreement))


def _written(student: Student, folder: Path) -> Path:
    export_onnx(student, folder / "a.onnx")
    return folder / "a.onnx"


@pytest.mark.parametrize("far", [1e4, 1e7])
def test_an_activation_range_that_no_integer_type_reaches(far: float, tmp_path: Path) -> None:
    teacher = Teacher(TwoLayers(), Task(6, 3, 4, (0.5,) * 3, (0.25,) * 3))
    student = student_of(teacher, LINEAGE, Bits(4, 4))
    (quantizer,) = student.quantizers.values()
    quantizer.set_range(far, far + 1)  # every value is clipped to its lower end
    kinds = [node.op_type for node in onnx.load(_written(student, tmp_path)).graph.node]
    assert ("QuantizeLinear" in kinds) == (far < 2**15 / 15)
    for agreement in verified(student, tmp_path / "a.onnx", random_images(student.task, 40)):
        assert float(agreement.moved.max()) <= 1e-6 * far


@pytest.mark.parametrize(("bits", "kind", "opset"), [(2, "UINT2", 25), (3, "UINT4", 21), (4, "UINT4", 21), (5, "UINT8", 21), (8, "UINT8", 21)])
def test_weights_are_packed_integers(bits: int, kind: str, opset: int, knowing: Teacher, tmp_path: Path) -> None:
    student = student_of(knowing, LINEAGE, Bits(bits, 4))
    model = onnx.load(_written(student, tmp_path))
    assert model.opset_import[0].version == opset
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, layer in student.layers.items():
        tensor = held[f"{name}.weight"]
        assert tensor.data_type == getattr(onnx.TensorProto, kind)
        width = {"UINT2": 2, "UINT4": 4, "UINT8": 8}[kind]
        assert len(tensor.raw_data) == math.ceil(layer.layer.weight.numel() * width / 8)
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(int), layer.codes().levels.numpy().astype(int))
    floats = [t for t in held.values() if t.data_type == onnx.TensorProto.FLOAT]
    assert sum(math.prod(t.dims) for t in floats) < sum(layer.layer.weight.numel() for layer in student.layers.values()) / 4


GRIDS = [("pow2", 4, "UINT4"), ("apot", 5, "UINT8"), ("kmeans", 3, "UINT4"), ("ternary", 2, "UINT2")]


@pytest.mark.parametrize("base", ["lineage", "hardware"])
@pytest.mark.parametrize(("grid", "bits", "kind"), GRIDS)
def test_weights_on_other_grids_are_places_in_a_table(grid: str, bits: int, kind: str, base: str, knowing: Teacher, tmp_path: Path) -> None:
    granularity = "per-tensor" if grid == "kmeans" else "per-channel"
    student = student_of(knowing, find_protocol({"base": base, "weight_grid": grid, "weight_granularity": granularity}), Bits(bits, 4))
    assert [a.how for a in export(student, tmp_path / "a.onnx") if a.holds] == [OFF, SHIPPED]
    assert all(a.holds for a in export(student, tmp_path / "a.pt2", "torch"))
    held = {tensor.name: tensor for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer}
    on_tables = [layer for layer in student.layers.values() if layer.protocol.weight_grid == grid]
    places = [t for name, t in held.items() if name.endswith(".weight") and t.data_type == getattr(onnx.TensorProto, kind)]
    tables = {t.raw_data for t in held.values() if t.data_type == onnx.TensorProto.FLOAT}
    assert len(places) == len(on_tables) == len(student.layers) - (2 if base == "hardware" else 0)
    assert all(codes.table is not None and codes.table.numpy().tobytes() in tables for codes in (layer.codes() for layer in on_tables))


def test_the_program_holds_integers_and_standard_operators(knowing: Teacher, tmp_path: Path) -> None:
    student = student_of(knowing, HARDWARE, Bits(4, 4))
    export(student, tmp_path / "a.pt2", "torch")
    extra = {"about.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    called = {str(node.target) for node in program.graph.nodes}
    wanted = {"quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"}
    assert {f"quantized_decomposed.{name}.default" for name in wanted} <= called
    assert not [k for k, v in program.state_dict.items() if v.dim() > 1 and v.is_floating_point()]
    assert sum(v.dtype == torch.int8 for v in program.state_dict.values()) == len(student.layers)
    assert json.loads(extra["about.json"])["bits"] == "w4a4"
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(program.module()(x), student(x))


# --- what the file says of itself -------------------------------------------------------------------------------------


def test_the_file_says_what_it_is_and_takes_any_number_of_images(knowing: Teacher, tmp_path: Path) -> None:
    student = student_of(knowing, LINEAGE, Bits(2, 8))
    path = tmp_path / "a.onnx"
    export_onnx(student, path, {"cell": "0123456789ab"})
    said = metadata(path)
    assert (said["protocol"], said["bits"], said["cell"], said["network"]) == ("lineage", "w2a8", "0123456789ab", "Tiny")
    assert json.loads(said["task"]) == student.task.as_dict()
    assert json.loads(said["rules"]) == student.protocol.fingerprint()
    assert set(json.loads(said[SESSION_OPTIONS])) == {"session.disable_quant_qdq", "session.qdq_matmulnbits_accuracy_level"}
    export_onnx(student_of(knowing, HARDWARE, Bits(8, 8)), tmp_path / "b.onnx")
    assert "session.x64quantprecision" in options_of(tmp_path / "b.onnx")
    run = runner(session(path))
    for count in (1, 2, 7):
        assert run(torch.zeros(count, 3, 16, 16)).shape == (count, 10)


def test_the_teacher_goes_through_the_same_exporter_as_floats(knowing: Teacher, tmp_path: Path) -> None:
    export_onnx(knowing, tmp_path / "t.onnx")
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(runner(session(tmp_path / "t.onnx"))(x), knowing(x), rtol=1e-5, atol=1e-4)
    student = student_of(knowing, HARDWARE, Bits(8, 8))
    export_onnx(student, tmp_path / "floats.onnx", quantized=False)
    with torch.no_grad(), student.full_precision():
        near = student(x)
    assert (runner(session(tmp_path / "floats.onnx"))(x) - near).abs().max() < 0.15 * near.abs().max()
    assert {n.op_type for n in onnx.load(tmp_path / "floats.onnx").graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    ratio, own, other = speed_ratio(tmp_path / "floats.onnx", tmp_path / "t.onnx", (3, 16, 16), pairs=5)
    assert ratio > 0 < own < 1e4 > other > 0


def test_the_twelve_lines_of_the_page_run_it(knowing: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "benchmark" / "export" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    assert sum(bool(line.strip()) for line in lines.splitlines()) == 12
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels).save("cat.png")
    for bits in (Bits(2, 4), Bits(8, 8)):
        student = student_of(knowing, HARDWARE, bits)
        export_onnx(student, Path("net.onnx"))
        exec(compile(lines, "page", "exec"), {})
        said = student(normalise(torch.from_numpy(pixels[None]), torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)))
        assert capsys.readouterr().out == f"[{int(said.argmax())}]\n"


# --- rejection --------------------------------------------------------------------------------------------------------


def test_agreement_on_logits_written_by_hand() -> None:
    student = torch.tensor([[3.0, 1.0], [2.0, 2.00005], [0.0, 5.0]])
    same = Agreement.of("x", student, student)
    assert same.holds
    assert same.passes
    near = student.clone()
    near[1] = near[1].flip(0)  # the two lie within 1e-4
    assert Agreement.of("x", student, near).holds
    far = student.clone()
    far[0] = far[0].flip(0)
    wrong = Agreement.of("x", student, far)
    assert not wrong.holds
    assert not wrong.passes
    assert "2 of 3 answers equal" in str(wrong)
    assert "2 apart" in str(wrong)
    assert not Agreement.of("x", student, student + 0.1).holds  # the same answers, but every image moved
    assert not Agreement.of("x", student, torch.full_like(student, torch.nan)).passes


@pytest.mark.parametrize("protocol", [LINEAGE, HARDWARE], ids=lambda p: p.name)
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
def test_a_grid_that_is_one_level_off_is_rejected(
    protocol: Protocol, bits: Bits, knowing: Teacher, digits: Callable[[], Iterator[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = onnx_ops.OPERATORS["dequantize_per_tensor"]

    def off(g: Any, x: Any, scale: float, zero: int, *rest: Any, **named: Any) -> Any:
        return right(g, x, scale, zero if isinstance(x, Tensor) else zero + 1, *rest, **named)

    monkeypatch.setitem(onnx_ops.OPERATORS, "dequantize_per_tensor", off)
    student = student_of(knowing, protocol, bits, next(digits()))
    with pytest.raises(Rejected, match=r"left as .*a\.onnx\.rejected"):
        export(student, tmp_path / "a.onnx", batches=digits)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx.rejected"]


def test_a_file_that_the_runtime_does_not_load_is_rejected(knowing: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: None)
    monkeypatch.setitem(onnx_ops.OPERATORS, "relu", onnx_ops.plain("Rectify"))
    with pytest.raises(Rejected, match=r"does not load the file: .*Rectify.* left as .*a\.onnx\.rejected"):
        export(student_of(knowing, HARDWARE, Bits(8, 8)), tmp_path / "a.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx.rejected"]


def test_noise_is_the_students_own_and_not_the_files(knowing: Teacher) -> None:
    student = student_of(knowing, HARDWARE, Bits(4, 4))
    found = agreements(student, {"shifted": lambda x: student(x) + torch.arange(10) * 0.05}, random_images(student.task, 32))
    assert found[0].noise is not None
    assert float(found[0].noise.median()) < 1e-4
    assert not found[0].passes


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(knowing: Teacher, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_student(student_of(knowing, HARDWARE, Bits(8, 8)), path, {"cell": "0123456789ab", "teacher": {"label": "tiny"}})
    return path


def test_the_command_writes_compares_and_times(stored: Path, dfqbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored.parent)
    code, out, err = dfqbench("export", stored, "--on", "digits", "--images", 120, "--time")
    assert (code, err) == (0, "")
    for said in (
        f"{OFF}: 120 of 120",
        f"{SHIPPED}: 1",
        "written to net.onnx",
        "VNNI",
        "session.x64quantprecision=1",
        "times as fast",
        "times as large",
    ):
        assert said in out
    assert sorted(p.name for p in stored.parent.iterdir()) == ["net.onnx", "net.safetensors"]
    assert metadata(stored.parent / "net.onnx")["cell"] == "0123456789ab"
    code, out, _ = dfqbench("export", stored, "--to", "torch", "--out", "b.pt2")
    assert code == 0
    assert "loaded again: 256 of 256" in out


def test_the_command_fails_where_the_answers_differ(stored: Path, dfqbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(onnx_ops.OPERATORS, "add", lambda g, a, b: g.name_of(a))
    code, _, err = dfqbench("export", stored, "--out", stored.parent / "a.onnx")
    assert code == 1
    assert "does not answer as the student does" in err
    assert not (stored.parent / "a.onnx").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "tflite"), "--to 'tflite': onnx or torch"),
        (("--to", "torch", "--time"), "--time is of --to onnx"),
        (("--images", 3), "--images is of --on"),
        (("--out", "nowhere/a.onnx"), "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(words: tuple[object, ...], said: str, stored: Path, dfqbench: Any) -> None:
    code, _, err = dfqbench("export", stored, *words)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_without_the_extra_it_is_said_in_one_line(stored: Path, dfqbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else found(name, *rest))
    assert dfqbench("export", stored) == (2, "", "dfqbench: dfqbench export needs the extra: pip install 'dfqbench[export]'\n")


def test_a_student_without_ranges_is_refused(knowing: Teacher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no range"):
        export(Student(knowing, LINEAGE, Bits(4, 4)), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


# --- zoos -------------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution, one norm and one activation, each used twice; a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for _ in range(2):
            x = self.act(self.norm(self.conv(x))) + x
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def option_a() -> nn.Module:
    return build(parse_teacher({"model": "cifar:resnet20", "weights": UNTRAINED})).network


ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "shared modules": (Shared, 16),
    "cifar:resnet20": (option_a, 32),
    "cv:mobilenetv2_wd4": (lambda: get_model("mobilenetv2_wd4"), 224),
    "cv:shufflenet_g1_wd4": (lambda: get_model("shufflenet_g1_wd4"), 224),
    "tv:resnet18": (lambda: torchvision.models.resnet18(), 32),
    "tv:mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 32),
    "tv:shufflenet_v2": (lambda: torchvision.models.shufflenet_v2_x0_5(), 32),
    "timm:mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 32),
    "timm:tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 32),
    "timm:densenet121": (lambda: timm.create_model("densenet121"), 32),
    "timm:convnext_atto": (lambda: timm.create_model("convnext_atto"), 32),
    "timm:deit_tiny": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32), 32),
}


@pytest.mark.thorough("shared modules", "resnet20", "mobilenetv3_small_050", "deit_tiny")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "shared modules" else pytest.mark.slow) for name in ZOO])
def test_networks_of_the_zoos_with_random_weights(name: str, tmp_path: Path) -> None:
    make, size = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = randomised(make())
    classes = network(torch.zeros(1, 3, size, size)).shape[1]
    teacher = Teacher(network, Task(classes, 3, size, (0.5,) * 3, (0.25,) * 3))
    for protocol, bits in ((LINEAGE, Bits(4, 4)), (HARDWARE, Bits(8, 8))):
        student = student_of(teacher, protocol, bits)
        found = export(student, tmp_path / "a.onnx", batches=random_images(teacher.task, 16))
        assert all(float(agreement.moved.median()) < 0.05 * agreement.largest for agreement in found)
    assert export(student, tmp_path / "a.pt2", "torch", random_images(teacher.task, 16))

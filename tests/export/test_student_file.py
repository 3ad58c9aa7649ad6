"""A student's file: what comes back, how large it is, and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from pytorchcv.model_provider import get_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import UserError, load_student
from dfqbench.export.graph_text import NotWritable, graph_of, module_of
from dfqbench.export.packing import pack, unpack
from dfqbench.export.student_file import StoredStudent, load_student_file, save_student
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, Protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.testing.trial import Trial, small_task, small_teacher

WIDTHS = ("w8a8", "w4a4", "w3a3", "w2a2")
METHODS = ("round", "squant", "dfq", "gdfq", "acq", "zaq", "lrq", "gznq", "zeroq", "qimera", "intraq", "ait", "squant", "dfq")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_whole_numbers_come_back_and_take_their_bits(bits: int, count: int) -> None:
    numbers = np.random.default_rng(count).integers(0, 2**bits, count, dtype=np.uint8)
    packed = pack(numbers, bits)
    assert packed.size == -(-count * bits // 8)
    assert (unpack(packed, bits, count) == numbers).all()
    with pytest.raises(ValueError, match="bytes"):
        unpack(packed, bits, count + 9)


def student_of(teacher: Teacher, protocol: Protocol, bits: str) -> Student:
    """A student with ranges, as the engine would have it."""
    student = Student(teacher, protocol, Bits.parse(bits)).to(memory_format=torch.channels_last)
    student.track_ranges(True)
    with torch.no_grad():
        student(images_of(teacher.task))
    student.track_ranges(False)
    return student


def images_of(task: Task, count: int = 8) -> Tensor:
    return torch.randn(count, *task.image_shape, generator=torch.Generator().manual_seed(3)).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def assert_same(student: Student, path: Path) -> StoredStudent:
    save_student(student, path)
    found, images = load_student_file(path), images_of(student.task)
    assert torch.equal(found(images), student(images))
    ours, theirs = found.observe(images), student.observe(images)
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.features) == len(theirs.features)
    assert all(map(torch.equal, ours.features, theirs.features))
    return found


@pytest.mark.slow
@pytest.mark.thorough("lineage", "hardware-round", "full-round", "hardware-squant", "full-gdfq")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_student_of_every_method_comes_back_to_the_bit(name: str, protocol: str, tmp_path: Path) -> None:
    method = find_method(name)
    try:
        PROTOCOLS[protocol].for_method(name, method.ranges, method.batch_norm)
    except UserError as error:
        pytest.skip(str(error))
    together = [WIDTHS] if method.info.shares_synthesis else [(width,) for width in WIDTHS]
    for trainee in (trainee for widths in together for trainee in Trial(method).end(bits=widths, protocol=protocol).trainees):
        found = assert_same(trainee.student, tmp_path / "student.safetensors")
        assert (found.bits, found.protocol, found.task) == (trainee.cell.bits, trainee.cell.protocol, trainee.student.task)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_student_comes_back_to_the_bit(protocol: str, bits: str, tmp_path: Path) -> None:
    found = assert_same(student_of(small_teacher(small_task()), PROTOCOLS[protocol], bits), tmp_path / "s.safetensors")
    assert list(found.quantizers) == list(student_of(small_teacher(small_task()), PROTOCOLS[protocol], bits).quantizers)
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_granularity": "per-tensor"},
        {"weight_symmetric": True, "activation_symmetric": True},
        {"first_bits": 8, "last_bits": 7, "input_bits": 5, "placement": "layer-inputs"},
    ],
    ids=str,
)
def test_a_student_under_a_protocol_of_ones_own_comes_back(changes: dict[str, Any], tmp_path: Path) -> None:
    found = assert_same(student_of(small_teacher(small_task()), Protocol(name="mine", **changes), "w3a5"), tmp_path / "s.safetensors")
    assert found.protocol == Protocol(name="mine", **changes)


def test_weights_of_one_sign_and_constant_ones_come_back(tmp_path: Path) -> None:
    teacher = small_teacher(small_task())
    weight = teacher.traced.get_parameter("conv1.weight").data
    weight[0], weight[1], weight[2], weight[3] = weight[0].abs() + 3e4, 0.0, 5.0, -weight[3].abs() - 1.0
    assert_same(student_of(teacher, PROTOCOLS["lineage"], "w4a4"), tmp_path / "s.safetensors")


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor, gain: float = 1.5) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * gain, self.bias, self.stride, self.padding)


class Own(nn.Module):
    """Modules of a user's own classes, shared ones, parameters and buffers of its own, a written item, a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 8, 3, padding=1), Standardised(8, 8, 3, padding=1), Gate()
        self.norm, self.head = nn.BatchNorm2d(8, affine=False), nn.Linear(8, 10)
        self.gain = nn.Parameter(torch.full((8, 1, 1), 1.5))
        self.register_buffer("shift", torch.arange(8.0).view(1, 8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 3, "three channels")
        x = self.act(self.norm(self.a(x)))
        y = self.act(self.b(x) * self.gain + self.shift)
        y[:, 0] = 1.0
        y = self.act(self.b(y))[:, :, ::2, ::2]
        y = F.pad(y, (0, 0, 0, 0, 0, 0)).to(torch.float32)
        head: Tensor = self.head(y.mean(dim=(2, 3)))
        return head


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_network_of_ones_own_needs_none_of_its_code(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Gate, Standardised, Own):
        monkeypatch.setattr(kind, "__module__", "my_nets")
    torch.manual_seed(0)
    assert_same(student_of(Teacher(Own(), small_task(size=16)), PROTOCOLS[protocol], "w4a4"), tmp_path / "s.safetensors")


class Rectified(nn.Module):
    """Two activations in one of many spellings."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.act(self.b(self.act(self.a(x)))).mean((2, 3)))
        return head


@pytest.mark.parametrize(
    "act",
    [F.relu_, torch.relu_, lambda x: x.clamp(min=0), lambda x: x.clamp_(0), lambda x: torch.clamp(x, min=0), lambda x: x.clamp_min(0)],
    ids=["F.relu_", "torch.relu_", "clamp", "clamp_", "torch.clamp", "clamp_min"],
)
def test_a_relu_is_one_however_it_is_written(act: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    students = []
    for spelling in (F.relu, act):
        torch.manual_seed(0)
        students.append(student_of(Teacher(Rectified(spelling), small_task(size=16)), PROTOCOLS["lineage"], "w4a3"))
    assert len(students[1].quantizers) == len(students[0].quantizers) == 2
    found = assert_same(students[1], tmp_path / "s.safetensors")
    images = images_of(students[0].task)
    assert torch.equal(found(images), students[0](images))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), 64, 1000),
    "torchvision mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 64, 1000),
    "torchvision efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 64, 1000),  # stochastic depth
    "torchvision shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(), 64, 1000),
    "timm tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 64, 1000),  # "same" padding
    "timm nf_regnet_b0": (lambda: timm.create_model("nf_regnet_b0"), 64, 1000),  # standardised weights
    "timm deit_tiny": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=64), 64, 1000),
    "pytorchcv resnet20_cifar10": (lambda: get_model("resnet20_cifar10"), 32, 10),
    "pytorchcv densenet40": (lambda: get_model("densenet40_k12_cifar10"), 32, 10),
    "pytorchcv mobilenetv3": (lambda: get_model("mobilenetv3_small_w7d20"), 224, 1000),  # swish and sigmoid of its own
}


@pytest.mark.slow
@pytest.mark.thorough("efficientnet_lite0", "nf_regnet", "deit_tiny", "densenet40")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_zoos_come_back_to_the_bit(name: str, tmp_path: Path) -> None:
    build, size, classes = NETWORKS[name]
    protocol = list(PROTOCOLS)[list(NETWORKS).index(name) % 2]  # in turn: each by one is enough
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build()
    assert_same(student_of(Teacher(network, small_task(classes=classes, size=size)), PROTOCOLS[protocol], "w4a4"), tmp_path / "s.safetensors")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_is_as_small_as_its_bits(protocol: str, bits: str, tmp_path: Path) -> None:
    student = student_of(Teacher(get_model("resnet20_cifar10"), small_task()), PROTOCOLS[protocol], bits)
    size = save_student(student, tmp_path / "s.safetensors")["bytes"]
    assert size == (tmp_path / "s.safetensors").stat().st_size
    in_bits = sum(layer.layer.weight.numel() * layer.bits for layer in student.layers.values())
    tensors = load_file(tmp_path / "s.safetensors")
    packed = sum(tensors[f"{name.removesuffix('.layer')}.weight"].numel() for name in student.layers)
    assert packed == pytest.approx(in_bits / 8, abs=len(student.layers))
    assert size - packed < 40_000  # scales, batch norms, the graph, names
    if bits == "w4a4":
        assert size < 175_000


def test_what_a_file_says_of_itself_can_be_read_without_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    kept = save_student(student_of(small_teacher(small_task()), PROTOCOLS["hardware"], "w4a4"), path, {"cell": "0123456789ab"})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]["dfqbench"]
    said = json.loads(header)
    assert (said["format"], said["bits"], said["protocol"]["placement"], said["about"]) == (1, "w4a4", "layer-inputs", {"cell": "0123456789ab"})
    assert said["sha256"] == kept["sha256"] == load_student_file(path).about["sha256"]


def test_the_same_student_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_student(student_of(small_teacher(small_task()), PROTOCOLS["lineage"], "w4a4"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_student_that_was_read_can_be_written_again(tmp_path: Path) -> None:
    student = student_of(small_teacher(small_task()), PROTOCOLS["lineage"], "w3a3")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    ours, theirs = save_student(student, first), save_student(load_student_file(first), second)
    assert first.stat().st_size == second.stat().st_size
    assert torch.equal(load_student_file(second)(images_of(student.task)), student(images_of(student.task)))
    assert ours["bytes"] == theirs["bytes"]


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    student = student_of(small_teacher(small_task()), PROTOCOLS["lineage"], "w4a4")
    student.layers["conv1"].layer.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        save_student(student, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "student.safetensors"
        save_student(student_of(small_teacher(small_task()), PROTOCOLS["lineage"], "w4a4"), path)
        return path

    def refused(self, path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_student(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_a_damaged_file(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        for place in (len(content) - 5, len(content) // 2, 60):
            damaged = bytearray(content)
            damaged[place] ^= 0x04
            path.write_bytes(damaged)
            assert "damaged" in self.refused(path)

    def test_a_truncated_file(self, path: Path) -> None:
        content = path.read_bytes()
        for length in (0, 4, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            assert "damaged, or not a student's file" in self.refused(path)

    def test_a_foreign_file(self, path: Path) -> None:
        save_file({"weight": torch.ones(3)}, path)
        assert "not a student's file" in self.refused(path)
        path.write_text("hello")
        assert "not a student's file" in self.refused(path)

    def test_a_file_of_a_later_format(self, path: Path) -> None:
        save_file({"graph.json": torch.zeros(1, dtype=torch.uint8)}, path, {"dfqbench": json.dumps({"format": 2, "sha256": "0"})})
        assert "format 2 of a later version" in self.refused(path)

    def test_a_file_that_is_absent_and_a_folder(self, path: Path) -> None:
        assert "does not exist" in self.refused(path.with_name("other.safetensors"))
        (path.parent / "empty").mkdir()
        with pytest.raises(UserError, match="no student"):
            load_student(path.parent / "empty")


FORBIDDEN_STEP = {"tuple": ["__getattribute__", {"tuple": ["x"]}, {"dict": {}}]}


@pytest.mark.parametrize(
    ("op", "target", "args"),
    [
        ("call_function", "os.system", ["true"]),
        ("call_function", "torch.load", ["x"]),
        ("call_function", "torch.hub.load", ["x"]),
        ("call_function", "builtins.eval", ["1"]),
        ("call_function", "builtins.getattr", {"tuple": [{"node": "x"}, "__class__"]}),
        ("call_method", "__reduce__", []),
        ("call_method", "no_such_method", []),
        ("call_function", "torchvision.io.write_file", ["x"]),
        ("call_function", "dfqbench.with_view", {"tuple": [{"node": "x"}, {"node": "x"}, {"tuple": [FORBIDDEN_STEP]}]}),
    ],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_a_graph_names_operations_on_tensors_only(op: str, target: str, args: Any) -> None:
    args = args if isinstance(args, dict) else {"tuple": args}
    text = [{"name": "x", "op": "placeholder", "target": "x"}, {"name": "y", "op": op, "target": target, "args": args}]
    with pytest.raises(NotWritable):
        graph_of(text)


@pytest.mark.parametrize("name", ["subprocess.Popen", "torch.Tensor", "os.PathLike", "torch.nn.functional.relu", "my_nets.Net"])
def test_a_text_names_layers_only(name: str) -> None:
    with pytest.raises(NotWritable):
        module_of({"class": name, "values": {}}, {}, "")


def test_a_student_runs_where_its_code_is_not(tmp_path: Path) -> None:
    """In another process, from another folder: only the file is there."""
    student = student_of(small_teacher(small_task()), PROTOCOLS["lineage"], "w4a4")
    save_student(student, tmp_path / "s.safetensors")
    torch.save(images_of(student.task), tmp_path / "x.pt")
    program = """
        import torch, dfqbench
        torch.set_num_threads(1)
        student = dfqbench.load_student("s.safetensors")
        torch.save(student(torch.load("x.pt").contiguous(memory_format=torch.channels_last)), "y.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), student(images_of(student.task)))

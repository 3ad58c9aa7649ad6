"""Bytes, average bits, MACs and BOPs of small networks, counted by hand; and of known networks as others count them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.export.size import Size, size_of
from dfqbench.export.student_file import GRAPH, load_student_file, save_student
from dfqbench.network import Teacher
from dfqbench.quantization import Bits, Protocol, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.teachers.cifar import cifar_resnet

LINEAGE, HARDWARE, W4A3 = find_protocol("lineage"), find_protocol("hardware"), Bits(4, 3)


def sizes(network: nn.Module, size: int, protocol: Protocol = LINEAGE, bits: Bits = W4A3, classes: int = 10) -> tuple[Size, Size]:
    """(the teacher's, the student's)"""
    teacher = Teacher(network, Task(classes, 3, size, (0.5,) * 3, (0.25,) * 3))
    return size_of(teacher), size_of(Student(teacher, protocol, bits))


def counted(size: Size) -> list[tuple[str, int, int, int]]:
    return [work[:4] for work in size.work]


class Plain(nn.Module):
    """On 8 x 8 images: 3 -> 4 channels (8 x 8), ReLU, pooled to 4 x 4, depthwise (2 x 2), ReLU, flattened to 16."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn = nn.Conv2d(3, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4)
        self.c2, self.fc = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.c1(x))), 2)
        return self.fc(F.relu(self.c2(x)).flatten(1))  # type: ignore[no-any-return]


MACS = [8 * 8 * 4 * 3 * 9, 2 * 2 * 4 * 9, 16 * 10]  # 6,912; 144; 160
WEIGHTS = [108, 36, 160]


def test_a_teacher_has_four_bytes_for_each_number_and_1024_bops_for_each_mac() -> None:
    teacher, _ = sizes(Plain(), 8)
    assert counted(teacher) == [("c1", MACS[0], 32, 32), ("c2", MACS[1], 32, 32), ("fc", MACS[2], 32, 32)]
    assert teacher.as_dict() == {
        "bytes": 4 * (108 + 16 + 36 + 4 + 160 + 10),
        "weight_bits": 32.0,
        "macs": 7216,
        "bops": 7216 * 1024,
        "quantized": {"weights": 0, "activations": 0},
    }


def test_under_lineage_the_image_is_float_and_everything_else_is_at_its_bits() -> None:
    """Packed weights; scale and zero point of each output channel and of each of the two activations; norms and biases as float."""
    _, student = sizes(Plain(), 8)
    assert counted(student) == [("c1", MACS[0], 4, 32), ("c2", MACS[1], 4, 3), ("fc", MACS[2], 4, 3)]
    weights, grids = 54 + 18 + 80, 8 * (4 + 4 + 10) + 8 * 2
    assert student.bytes == weights + grids + 4 * (16 + 4 + 10)
    assert (student.weight_bits, student.macs, student.bops) == (4.0, 7216, MACS[0] * 128 + (MACS[1] + MACS[2]) * 12)


def test_under_hardware_the_ends_have_8_bits_the_norm_is_folded_and_weights_need_no_zero_points() -> None:
    _, student = sizes(Plain(), 8, HARDWARE)
    assert counted(student) == [("c1", MACS[0], 8, 8), ("c2", MACS[1], 4, 3), ("fc", MACS[2], 8, 8)]
    weights, grids = 108 + 18 + 160, 4 * (4 + 4 + 10) + 8 * 3
    assert student.bytes == weights + grids + 4 * (4 + 4 + 10), "the norm became the first layer's bias"
    assert student.weight_bits == (108 * 8 + 36 * 4 + 160 * 8) / 304
    assert student.as_dict()["weight_bits"] == 7.5263


def test_bytes_of_odd_widths_are_packed_and_rounded_up_and_a_grid_per_tensor_is_one() -> None:
    protocol = find_protocol({"base": "lineage", "weight_granularity": "per-tensor", "activation_symmetric": True})
    _, student = sizes(Plain(), 8, protocol, Bits(3, 5))
    assert student.bytes == (41 + 14 + 60) + 8 * 3 + 4 * 2 + 4 * (16 + 4 + 10)  # 108 x 3 bits are 40.5 bytes, 36 x 3 are 13.5


class Shared(nn.Module):
    """One convolution twice, one of the times behind a concatenation of what was quantized and its pooling; tokens through a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.tokens = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.twice(x))
        y = self.twice(torch.cat([y[:, :2], F.relu(x[:, 2:] - 1)], 1))
        return self.tokens(F.relu(y).flatten(2).transpose(1, 2)).mean(1)  # type: ignore[no-any-return]


def test_a_shared_module_is_stored_once_and_works_at_every_call() -> None:
    teacher, student = sizes(Shared(), 4)
    assert teacher.bytes == 4 * (12 + 4 + 16 + 40)
    macs = [16 * 12, 16 * 16, 16 * 16, 16 * 40]  # of 16 pixels each
    assert counted(student) == [
        ("stem", macs[0], 4, 32),
        ("twice", macs[1], 4, 3),
        ("twice", macs[2], 4, 3),
        ("tokens", macs[3], 4, 3),
    ]
    assert student.bytes == (6 + 8 + 20) + 8 * (4 + 4 + 10) + 8 * 4 + 4 * 4


def test_a_sum_and_an_average_pooling_are_float_where_the_protocol_leaves_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.c1(x))
            return self.fc(F.adaptive_avg_pool2d(self.c2(x + x.mean()), 1).flatten(1))  # type: ignore[no-any-return]

    _, student = sizes(Net(), 4)
    assert [work.activation_bits for work in student.work] == [32, 32, 32]
    _, student = sizes(Net(), 4, HARDWARE)
    assert [work.activation_bits for work in student.work] == [8, 3, 8]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2, bias=False), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.up(x.transpose(1, 2).reshape(-1, 8, 2, 2))
        return self.head(F.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_what_no_quantizer_is_known_for_counts_as_float() -> None:
    """4 tokens of 8: three projections in and one out; 2 heads x (4 x 5) products of 4 numbers (one key is the module's own), scores and values."""
    teacher, student = sizes(Attention(), 8)
    attention, up = 4 * 4 * 8 * 8 + 2 * (2 * 20 * 4), 2 * 2 * 8 * 4 * 4
    assert [work.macs for work in teacher.work] == [4 * 8 * 48, attention, up, 40]
    assert counted(student)[1:3] == [("attention", attention, 32, 3), ("up", up, 4, 32)]
    assert student.quantized.weights == pytest.approx(1 - attention / teacher.macs)
    quantized, left = 8 * 48 + 40 + 8 * 4 * 4, 4 * 64 + 2 * 8
    assert student.weight_bits == pytest.approx((quantized * 4 + left * 32) / (quantized + left))


def test_a_product_of_activations_has_the_bits_of_both() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.c1(x)).flatten(2)
            return self.fc((x @ x.transpose(1, 2)).mean(2))  # type: ignore[no-any-return]

    _, student = sizes(Net(), 4)
    assert counted(student)[1] == ("matmul", 4 * 16 * 4, 3, 3)


@pytest.mark.parametrize("protocol", [LINEAGE, HARDWARE])
def test_resnet20_has_the_macs_that_its_shapes_give(protocol: Protocol) -> None:
    """He et al.: 3 x 3 x 3 x 16 at 32 x 32, six layers of 16 there, then 16 -> 32 and five of 32 at 16 x 16, 32 -> 64 and five of 64 at 8 x 8."""
    macs = 9 * (1024 * 16 * (3 + 6 * 16) + 256 * 32 * (16 + 5 * 32) + 64 * 64 * (32 + 5 * 64)) + 640
    teacher, student = sizes(cifar_resnet("resnet20"), 32, protocol, Bits(4, 4))
    assert teacher.macs == student.macs == macs == 40_551_040
    assert teacher.bops / student.bops > 50
    assert 7 < teacher.bytes / student.bytes < 8


@pytest.mark.slow
def test_resnet18_has_the_bops_and_megabytes_that_hawq_v3_prints() -> None:
    """1,858 G and 44.6 MB in float, 116 G and 11.1 MB with 8 bits everywhere (Yao et al., table 1)."""
    teacher, student = sizes(torchvision.models.resnet18(), 224, HARDWARE, Bits(8, 8), 1000)
    assert round(teacher.bops / 1e9) == 1858
    assert round(teacher.bytes / 2**20, 1) == 44.6
    assert round(student.bops / 1e9) == 116
    assert student.bytes / 2**20 == pytest.approx(11.1, abs=0.15)


def test_counting_leaves_the_student_as_it_is() -> None:
    student = Student(Teacher(Plain(), Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3)), LINEAGE, Bits(4, 4))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    assert size_of(student) == size_of(student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fused


@pytest.mark.parametrize("protocol", [LINEAGE, HARDWARE])
def test_bytes_are_those_of_the_tensors_in_a_students_file(protocol: Protocol, tmp_path: Path) -> None:
    """The file has the activations' grids in its text, and zero points also where they are always 0."""
    student = Student(Teacher(cifar_resnet("resnet20"), Task(10, 3, 32, (0.5,) * 3, (0.25,) * 3)), protocol, Bits(3, 5))
    for quantizer in student.quantizers.values():
        quantizer.set_range(0, 1)
    save_student(student, tmp_path / "student.safetensors")
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys() if name != GRAPH]  # noqa: SIM118, it is no mapping
    zero_points = sum(layer.layer.weight.shape[0] for layer in student.layers.values()) if protocol.weight_symmetric else 0
    assert sum(t.numel() * t.element_size() for t in tensors) == size_of(student).bytes - 8 * len(student.quantizers) + 4 * zero_points
    assert size_of(load_student_file(tmp_path / "student.safetensors")) == size_of(student)

"""Every kind of batch norm is one: folded, observed and trained like torch's own, or named in an error."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from pytorchcv.model_provider import get_model
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.errors import UserError
from dfqbench.network.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task

LINEAGE, HARDWARE = PROTOCOLS["lineage"], PROTOCOLS["hardware"]
W4A4 = Bits(4, 4)


def task_of(size: int, classes: int = 10) -> Task:
    return Task(classes, 3, size, (0.5,) * 3, (0.25,) * 3)


def images(size: int = 8, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(network: nn.Module) -> nn.Module:
    """Numbers as after training in everything that is a batch norm by its name."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            for name, low in (("running_mean", -0.5), ("running_var", 0.5), ("weight", 0.5), ("bias", -0.5)):
                value = getattr(module, name, None)
                if "BatchNorm" in type(module).__name__ and value is not None:
                    value.copy_(torch.rand(value.shape, generator=generator) + low)
    return network.eval()


def with_norm(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


class OldFrozenBatchNorm2d(nn.Module):
    """As the first detection code had it: no eps."""

    def __init__(self, features: int):
        super().__init__()
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((features,), start))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()  # type: ignore[operator]
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


OldFrozenBatchNorm2d.__name__ = "FrozenBatchNorm2d"


class Renamed(nn.BatchNorm2d):
    """A subclass that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4, eps=0.01),
    "FrozenBatchNorm2d": lambda: torchvision.ops.FrozenBatchNorm2d(4, eps=0.03),
    "FrozenBatchNorm2d without eps": lambda: OldFrozenBatchNorm2d(4),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "SyncBatchNorm without affine": lambda: nn.SyncBatchNorm(4, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "a subclass": lambda: Renamed(4),
}


@pytest.mark.parametrize("name", NORMS)
def test_every_kind_is_observed_and_folded(name: str) -> None:
    network, x = trained(with_norm(NORMS[name]())), images()
    state = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        expected = network(x)
        teacher = Teacher(network, task_of(8))
        torch.testing.assert_close(teacher(x), expected, rtol=1e-5, atol=1e-5)
        seen = teacher.observe(x)
        assert len(seen.statistics()) == len(seen.batch_norms) == 1
        assert torch.equal(seen.batch_norms[0].running_mean, network[1].running_mean)  # type: ignore[arg-type,index]
        folded = Student(teacher, HARDWARE, W4A4)
        assert folded.batch_norms == []
        assert not any("BatchNorm" in type(m).__name__ for m in folded.modules())
        assert folded.left_float == []
        for student in (folded, Student(teacher, LINEAGE, W4A4)):
            with student.full_precision():
                torch.testing.assert_close(student(x), expected, rtol=1e-4, atol=1e-4)
        folded.set_ranges_from_bn(6.0)
        folded.check_ranges()
    moving = Student(teacher, find_protocol({"batch_norm": "trained"}), W4A4)
    moving.track_ranges(True)
    moving.training_mode(True)
    before = moving.batch_norms[0].running_mean.clone()  # type: ignore[union-attr]
    moving(x)
    assert not torch.equal(moving.batch_norms[0].running_mean, before)  # type: ignore[arg-type]
    assert type(network[1]) is type(NORMS[name]()), "the network itself stays as it is"  # type: ignore[index]
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_a_converted_network_has_the_students_of_the_one_before() -> None:
    network, x = trained(get_model("resnet20_cifar10")), images(32)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
    for protocol in (LINEAGE, HARDWARE):
        answers = []
        for net in (network, converted):
            student = Student(Teacher(net, task_of(32)), protocol, W4A4)
            student.track_ranges(True)
            with torch.no_grad():
                answers.append(student(x))
        assert torch.equal(*answers)


@pytest.mark.slow
@pytest.mark.parametrize("convert", ["freeze_batch_norm_2d", "convert_sync_batchnorm"])
@pytest.mark.parametrize("name", ["regnetx_002", "resnet18"])
def test_timms_converted_networks_are_folded(name: str, convert: str) -> None:
    network, x = trained(timm.create_model(name)), images(32)
    folded = Student(Teacher(network, task_of(32, 1000)), HARDWARE, W4A4)
    converted = getattr(timm.layers, convert)(copy.deepcopy(network)).eval()
    teacher = Teacher(converted, task_of(32, 1000))
    assert len(teacher.batch_norms_used) == len(Teacher(network, task_of(32, 1000)).batch_norms_used) > 10
    student = Student(teacher, HARDWARE, W4A4)
    assert student.batch_norms == folded.batch_norms == []
    assert student.quantizers.keys() == folded.quantizers.keys()
    with torch.no_grad(), student.full_precision(), folded.full_precision():
        expected = network(x)
        torch.testing.assert_close(student(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


class OnVectors(nn.Module):
    """Linear layers: of N x C, of N x L x C with a norm over C, and of N x C x C with a norm over the other axis."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.l1, self.n1, self.relu = nn.Linear(192, 8), norm(8), nn.ReLU()
        self.l2, self.n2, self.l3 = nn.Linear(8, 8), norm(8), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.n1(self.l1(x.flatten(1))))
        x = self.relu(self.n2(self.l2(x[:, :, None] * x[:, None])))
        return self.l3(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_behind_a_linear_layer_a_norm_is_folded_only_where_its_channels_are_the_layers(norm: Callable[[int], nn.Module]) -> None:
    network, x = trained(OnVectors(norm)), images()
    student = Student(Teacher(network, task_of(8)), HARDWARE, W4A4)
    assert [type(m) for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [nn.BatchNorm1d]
    with torch.no_grad(), student.full_precision():
        torch.testing.assert_close(student(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_norm_without_running_statistics_is_never_folded_and_is_named(kind: Callable[..., nn.Module]) -> None:
    network, x = trained(with_norm(kind(4, track_running_stats=False))), images()
    teacher = Teacher(network, task_of(8))
    student = Student(teacher, HARDWARE, W4A4)
    assert student.left_float == ["1 (BatchNorm2d without running statistics)"]
    assert Student(teacher, LINEAGE, W4A4).left_float == []
    with torch.no_grad(), student.full_precision():
        torch.testing.assert_close(student(x), network(x), rtol=1e-4, atol=1e-4)


class NormRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Odd(OldFrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


Odd.__name__ = "FrozenBatchNormOdd"


def test_a_norm_that_does_more_is_named() -> None:
    said = r"1 \(NormRelu\) does more than a batch norm: write what it adds as a module of its own behind nn\.BatchNorm2d"
    with pytest.raises(UserError, match=said):
        Teacher(trained(with_norm(NormRelu(4))), task_of(8))
    with pytest.raises(UserError, match="FrozenBatchNormOdd does not compute the batch norm of its four buffers"):
        Teacher(trained(with_norm(Odd(4))), task_of(8))

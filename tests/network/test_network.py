"""Tracing a network and observing it: the same answer, stages, BN inputs and their statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.network.network import Teacher, channel_moments
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task


def teacher_of(network: nn.Module, size: int, classes: int = 10) -> Teacher:
    return Teacher(network, Task(classes, 3, size, (0.5,) * 3, (0.25,) * 3))


def images(size: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def vgg11_bn() -> nn.Module:
    """Its features, without the 120 million weights of its three linear layers."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(layers, nn.Flatten(), nn.Linear(512, 10))


STAGES = {
    "resnet20": (lambda: get_model("resnet20_cifar10"), 32, 10, [(16, 32), (32, 16), (64, 8)]),
    "resnet18": (torchvision.models.resnet18, 64, 1000, [(64, 16), (128, 8), (256, 4), (512, 2)]),
    # not the 1x1 layer at the start of the next stage, which still has the old resolution
    "resnet50": (torchvision.models.resnet50, 64, 1000, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
    "vgg11_bn": (vgg11_bn, 32, 10, [(256, 8), (512, 4), (512, 2)]),
    "squeezenet": (torchvision.models.squeezenet1_1, 64, 1000, [(128, 15), (256, 7), (1000, 3)]),
}


@pytest.mark.parametrize("name", STAGES)
def test_features_are_the_ends_of_the_stages(name: str) -> None:
    build, size, classes, expected = STAGES[name]
    teacher = teacher_of(build(), size, classes)
    with torch.no_grad():
        seen = teacher.observe(images(size, 2))
        assert torch.equal(seen.logits, teacher(images(size, 2)))
        assert [(f.shape[0], f.shape[1], f.shape[2]) for f in seen.features] == [(2, *e) for e in expected]
        assert teacher.stages == len(expected)
        for protocol in PROTOCOLS.values():
            student = Student(teacher, protocol, Bits(4, 4)).observe(images(size, 2))
            assert [f.shape for f in student.features] == [f.shape for f in seen.features]


def test_the_features_of_resnet18_are_the_outputs_of_its_stages() -> None:
    network = torchvision.models.resnet18().eval()
    outputs: list[Tensor] = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda _m, _x, output: outputs.append(output))
    teacher = teacher_of(torchvision.models.resnet18(), 64, 1000)
    teacher.traced.load_state_dict(network.state_dict())
    with torch.no_grad():
        features = teacher.observe(images(64)).features
        network(images(64))
    assert all(torch.equal(a, b) for a, b in zip(features, outputs, strict=True))


@pytest.mark.parametrize(
    ("build", "size", "classes"),
    [
        (lambda: get_model("resnet20_cifar10"), 32, 10),
        (lambda: timm.create_model("regnetx_002"), 32, 1000),
        (torchvision.models.mobilenet_v3_small, 64, 1000),
    ],
)
def test_bn_statistics_are_those_of_what_enters_each_bn_layer(build: Callable[[], nn.Module], size: int, classes: int) -> None:
    network = build().eval()
    teacher = teacher_of(network, size, classes)
    entered: list[tuple[nn.Module, Tensor]] = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, given: entered.append((m, given[0].double())))
    with torch.no_grad():
        network(images(size))
        seen = teacher.observe(images(size))
        statistics = seen.statistics()
    assert len(statistics) == len(entered) > 0
    for (mean, variance), (bn, x), ours in zip(statistics, entered, seen.batch_norms, strict=True):
        torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance.double(), x.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-6)
        assert torch.equal(bn.running_var, ours.running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3, 5)])
def test_the_gradient_of_the_moments_is_that_of_torch_var_mean(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 2).requires_grad_()
    about = torch.randn(4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: channel_moments(x, about), x)
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    dims = [d for d in range(len(shape)) if d != 1]
    variance, mean = torch.var_mean(x, dims, unbiased=False)
    ours_mean, ours_variance = channel_moments(x, about)
    (expected,) = torch.autograd.grad((weights[0] * mean + weights[1] * variance).sum(), x)
    (ours,) = torch.autograd.grad((weights[0] * ours_mean + weights[1] * ours_variance).sum(), x)
    torch.testing.assert_close(ours, expected)


def test_moments_of_bfloat16_inputs_far_from_zero_keep_their_gradient() -> None:
    """The two terms of the gradient nearly cancel there: they are added in float32."""
    x = (torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + 30).bfloat16().requires_grad_()
    mean, variance = channel_moments(x, torch.full((2,), 30.0))
    assert mean.dtype == variance.dtype == torch.float32
    variance.sum().backward()
    wide = x.detach().double()
    expected = 2 / (64 * 16) * (wide - wide.mean((0, 2, 3), keepdim=True))
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-2, atol=1e-5)


def test_the_teacher_is_frozen_and_the_image_is_not() -> None:
    network = get_model("resnet20_cifar10").train()
    teacher = teacher_of(network, 32)
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    assert all(m.training for m in network.modules())
    assert all(p.requires_grad for p in network.parameters())
    x = images(32).requires_grad_()
    seen = teacher.observe(x)
    (seen.logits.sum() + sum(m.sum() + v.sum() for m, v in seen.statistics()) + seen.features[0].sum()).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_statistics_of_bn_layers_do_not_move_while_observing() -> None:
    teacher = teacher_of(get_model("resnet20_cifar10"), 32)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.observe(images(32))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_network_moved_after_it_was_observed_is_observed_as_moved() -> None:
    class Turned(nn.Module):
        turn: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 64, 10)
            self.register_buffer("turn", torch.eye(3 * 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1) @ self.turn)  # type: ignore[no-any-return]

    teacher = teacher_of(Turned(), 8)
    teacher.observe(images(8))
    assert teacher.double().observe(images(8).double()).logits.dtype == torch.float64


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise AssertionError
        return x


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # an error without a message


@pytest.mark.parametrize("module", [Silent, Refuses])
def test_what_cannot_be_traced_is_named_by_its_path(module: type[nn.Module]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), module()))
    with pytest.raises(UserError, match=rf"cannot be traced by torch.fx in 1\.1 \({module.__name__}\): \w+") as error:
        teacher_of(network, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3)), r"does not run on images of shape \(3, 8, 8\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), r"with \(1, 7\), not with \(1, 10\) logits"),
        (nn.Sequential(nn.Conv2d(3, 10, 3)), r"with \(1, 10, 6, 6\), not"),
    ],
)
def test_a_network_that_does_not_fit_the_task_is_refused(network: nn.Module, said: str) -> None:
    with pytest.raises(UserError, match=said):
        teacher_of(network, 8)


def test_a_batch_norm_without_running_statistics_is_not_observed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    for protocol in PROTOCOLS.values():
        assert Student(teacher_of(network, 8), protocol, Bits(4, 4)).observe(images(8)).statistics() == []

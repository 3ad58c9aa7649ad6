"""How much of a student's work is quantized, by three counts: the suite's (along the graph), an audit of every operation that runs, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from pytorchcv.model_provider import get_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dfqbench.export.size import size_of
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.layers import ActivationQuantizer, Grid, QuantizedLayer, WeightGrid
from dfqbench.quantization.student import Student
from dfqbench.quantization.work import Share
from dfqbench.task import Task

aten = torch.ops.aten
_KEEPS = {aten.max_pool2d_with_indices, aten.constant_pad_nd, aten.cat, aten.clone, aten._to_copy, aten.relu, aten.stack, aten.copy_}


class Audit(TorchDispatchMode):
    """Follows, operation by operation, which memory holds values that lie on a grid, and counts the multiplications that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.on_grid = set[int]()
        self.alive: list[Any] = []  # so that no memory is given out a second time
        self.macs, self.weighed, self.weights, self.activations = 0, 0, 0, 0
        self.of_parameters = set[int]()

    def mark(self, tensor: Tensor) -> None:
        self.alive.append(tensor)
        self.on_grid.add(tensor.untyped_storage().data_ptr())

    def _is_on_grid(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.on_grid

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        tensors = [a for part in args for a in (part if isinstance(part, list | tuple) else [part]) if isinstance(a, Tensor)]
        given = [answer] if isinstance(answer, Tensor) else [a for a in answer if isinstance(a, Tensor)] if isinstance(answer, tuple | list) else []
        self.alive += [*tensors, *given]
        if packet in _KEEPS and tensors and all(map(self._is_on_grid, tensors)):
            self.mark(given[0])
        if any(t.untyped_storage().data_ptr() in self.of_parameters for t in tensors) and all(
            t.untyped_storage().data_ptr() in self.of_parameters for t in tensors
        ):
            self.of_parameters |= {t.untyped_storage().data_ptr() for t in given}
        if packet is aten.convolution:
            x, weight = args[0], args[1]
            self._count((answer if not args[6] else x).numel() * weight[0].numel(), x, weight)
        elif packet in (aten.mm, aten.bmm):
            self._count(answer.numel() * args[0].shape[-1], args[0], args[1])
        elif packet in (aten.addmm, aten.baddbmm):
            self._count(answer.numel() * args[1].shape[-1], args[1], args[2])
        return answer

    def _count(self, macs: int, x: Tensor, other: Tensor) -> None:
        is_weight = other.untyped_storage().data_ptr() in self.of_parameters
        self.macs += macs
        self.weighed += macs * is_weight
        self.weights += macs * (is_weight and self._is_on_grid(other))
        self.activations += macs * (self._is_on_grid(x) and (is_weight or self._is_on_grid(other)))

    @property
    def share(self) -> Share:
        return Share(self.weights / self.weighed, self.activations / self.macs)


@contextmanager
def watched(student: Student, audit: Audit) -> Iterator[None]:
    """Marks what quantizers give, and whatever is made of parameters."""

    def after(module: nn.Module, given: Any, answer: Tensor) -> None:
        audit.mark(answer)

    hooks = [m.register_forward_hook(after) for m in student.modules() if isinstance(m, ActivationQuantizer | WeightGrid)]
    layers = [m for m in student.modules() if isinstance(m, QuantizedLayer)]
    for layer in layers:

        def quantized_weight(found: Grid | None = None, before: Callable[..., Tensor] = layer.quantized_weight) -> Tensor:
            weight = before(found)
            audit.mark(weight)
            return weight

        layer.quantized_weight = quantized_weight  # type: ignore[method-assign]
    audit.of_parameters = {p.untyped_storage().data_ptr() for p in (*student.parameters(), *student.buffers())}
    yield
    for hook in hooks:
        hook.remove()
    for layer in layers:
        del layer.quantized_weight


def audited(student: Student) -> Share:
    audit = Audit()
    with watched(student, audit), torch.no_grad(), audit:
        student.traced(torch.randn(2, *student.task.image_shape))
    return audit.share


def student_of(network: nn.Module, protocol: str, size: int = 8, classes: int = 10) -> Student:
    student = Student(Teacher(network.eval(), Task(classes, 3, size, (0.5,) * 3, (0.25,) * 3)), PROTOCOLS[protocol], Bits(4, 4))
    for quantizer in student.quantizers.values():
        quantizer.set_range(-1.0, 1.0)
    return student


class Block(nn.Module):
    """first (3 -> 4 channels, 3 x 3, on 8 x 8), act, then `middle`, pooled, and a classifier (10)."""

    def __init__(self, middle: nn.Module, act: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.first, self.act, self.middle, self.head = nn.Conv2d(3, 4, 3, padding=1), act, middle, nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.act(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """MobileNetV2's: the sum behind it is no activation function, so `lineage` leaves what the next expansion reads as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep, self.narrow = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu6(self.deep(F.relu6(self.wide(x)))))  # type: ignore[no-any-return]


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, (8, 8))


FIRST, HEAD = 8 * 8 * 4 * 27, 40
DEEP = 64 * (4 * 8 + 8 * 9 + 8 * 4)
BY_HAND: list[tuple[str, Callable[[], nn.Module], dict[str, Share]]] = [
    ("a convolution", lambda: Block(nn.Conv2d(4, 4, 3, padding=1)), {
        "lineage": Share(1, 64 * 4 * 36 / (FIRST + 64 * 4 * 36 + HEAD)), "hardware": Share(1, 1), "full": Share(1, 1)}),
    ("two bottlenecks", lambda: Block(nn.Sequential(Bottleneck(), Bottleneck())), {
        "lineage": Share(1, (2 * DEEP - 64 * 4 * 8) / (FIRST + 2 * DEEP + HEAD)), "hardware": Share(1, 1), "full": Share(1, 1)}),
    ("a ReLU6 as a clamp", lambda: Block(nn.Conv2d(4, 4, 1), lambda x: x.clamp(0, 6)), {
        "lineage": Share(1, 64 * 16 / (FIRST + 64 * 16 + HEAD)), "hardware": Share(1, 1)}),
    ("squeeze and excitation", lambda: Block(Squeeze()), {
        "lineage": Share(1, 8 / (FIRST + 16 + HEAD)), "hardware": Share(1, 1), "full": Share(1, 1)}),
    ("attention", lambda: Block(Attention()), {
        "lineage": Share(1, 64 * 48 / (FIRST + 64 * 48 + 2 * 64 * 64 * 4 + HEAD)),
        "hardware": Share(1, (FIRST + 64 * 48 + HEAD) / (FIRST + 64 * 48 + 2 * 64 * 64 * 4 + HEAD)), "full": Share(1, 1)}),
]  # fmt: skip


@pytest.mark.parametrize(("build", "expected"), [pytest.param(*rest, id=name) for name, *rest in BY_HAND])
def test_three_counts_agree(build: Callable[[], nn.Module], expected: dict[str, Share]) -> None:
    for protocol, share in expected.items():
        student = student_of(build(), protocol)
        assert size_of(student).quantized == pytest.approx(share), protocol
        if "sdpa" not in repr(student.traced.graph) and "scaled_dot" not in str(student.traced.graph):  # the audit sees products, not fused kernels
            assert audited(student) == pytest.approx(share), protocol


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["lineage", "hardware", "full"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: get_model("resnet20_cifar10"),
        lambda: torchvision.models.mobilenet_v2(num_classes=10),
        lambda: torchvision.models.efficientnet_b0(num_classes=10),
        lambda: torchvision.models.densenet121(num_classes=10),
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10),
    ],
    ids=["resnet20", "mobilenet_v2", "efficientnet_b0", "densenet121", "vit"],
)
def test_the_audit_agrees_on_networks_of_zoos(build: Callable[[], nn.Module], protocol: str) -> None:
    student = student_of(build(), protocol, 32)
    found = size_of(student).quantized
    assert audited(student) == pytest.approx(found)
    assert found.weights == 1
    if protocol == "full":
        assert found.activations == 1

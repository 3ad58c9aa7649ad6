"""However its author wrote a weight, it is a layer's in the traced network, and quantized in the student; or it gets a grid of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.export.export import export
from dfqbench.export.size import size_of
from dfqbench.export.student_file import load_student_file, save_student
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task

TASK = Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    """A convolution and a ReLU, then `middle(self, x)` (batch x 4 x 8 x 8 in, batch x 4 x anything out), then a classifier."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 10)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self, F.relu(self.norm(self.first(x))))
        return self.head(x.flatten(2).mean(2))  # type: ignore[no-any-return]


def conv(x: Tensor, w: Tensor, **settings: Any) -> Tensor:
    return F.relu(F.conv2d(x, w, padding=1, **settings))


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # batch x 64 x 4


def conditional(x: Tensor, w: Tensor) -> Tensor:
    """A 1x1 convolution with weights of its own for each image."""
    return F.conv2d(x.reshape(1, -1, 8, 8), w.reshape(-1, 4, 1, 1), groups=x.shape[0]).view(-1, 4, 8, 8)


WRITTEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "F.conv2d": (lambda n, x: conv(x, n.w, bias=n.b), {"w": torch.randn(4, 4, 3, 3), "b": torch.randn(4)}),
    "F.conv2d, groups by keyword": (lambda n, x: F.relu(F.conv2d(input=x, weight=n.w, padding=(1, 1), groups=2)), {"w": torch.randn(4, 2, 3, 3)}),
    "a keyword": (lambda n, x: F.relu(n.c(input=x)), {"c": nn.Conv2d(4, 4, 3, padding=1)}),
    "F.linear": (lambda n, x: F.relu(F.linear(rows(x), n.w)).transpose(1, 2), {"w": torch.randn(4, 4)}),
    "a list": (lambda n, x: F.relu(F.linear(rows(x), n.p[0], n.p[1])).transpose(1, 2), {"p": nn.ParameterList([torch.randn(4, 4), torch.randn(4)])}),
    "@": (lambda n, x: F.relu(rows(x) @ n.w).transpose(1, 2), {"w": torch.randn(4, 4)}),
    "matmul": (lambda n, x: F.relu(rows(x).matmul(n.w)).transpose(1, 2), {"w": torch.randn(4, 4)}),
    "addmm": (lambda n, x: F.relu(torch.addmm(n.b, x.mean((2, 3)), n.w)).unsqueeze(2), {"w": torch.randn(4, 4), "b": torch.randn(4)}),
    "weighted pooling": (lambda n, x: (x * n.w).sum((2, 3)).unsqueeze(2), {"w": torch.randn(1, 4, 8, 8)}),
    "weighted pooling, kept": (lambda n, x: F.relu(torch.sum(n.w * x, dim=(-2, -1), keepdim=True)), {"w": torch.randn(4, 8, 8)}),
    "F.conv_transpose2d": (lambda n, x: F.relu(F.conv_transpose2d(x, n.w, stride=2, groups=2)), {"w": torch.randn(4, 2, 2, 2)}),
    "nn.ConvTranspose2d": (lambda n, x: F.relu(n.up(x)), {"up": nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=2)}),
    "nn.Conv1d": (lambda n, x: F.relu(n.c(x.flatten(2))), {"c": nn.Conv1d(4, 4, 3)}),
    "nn.Conv3d": (lambda n, x: F.relu(n.c(x.unsqueeze(2))).squeeze(2), {"c": nn.Conv3d(4, 4, (1, 3, 3))}),
    "nn.MultiheadAttention": (
        lambda n, x: F.relu(n.a(rows(x), rows(x), rows(x), need_weights=False)[0]).transpose(1, 2),
        {"a": nn.MultiheadAttention(4, 2, batch_first=True)},
    ),
    "nn.TransformerEncoder": (
        lambda n, x: n.t(rows(x)).transpose(1, 2),
        {"t": nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.1, "gelu", batch_first=True, norm_first=True), 2, None, False)},
    ),
}  # fmt: skip
COMPUTED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "standardised": (lambda n, x: conv(x, (n.w - n.w.mean()) / n.w.std()), {"w": torch.randn(4, 4, 3, 3)}),
    "turned": (lambda n, x: F.relu(F.linear(rows(x), n.w.t())).transpose(1, 2), {"w": torch.randn(4, 4)}),
    "einsum": (lambda n, x: F.relu(torch.einsum("nchw,cd->ndhw", x, n.w)), {"w": torch.randn(4, 4)}),
    "positions": (
        lambda n, x: F.relu(rows(x) @ n.w.transpose(-2, -1)).mean(2, keepdim=True).expand(-1, -1, 4).transpose(1, 2),
        {"w": torch.randn(1, 7, 4)},
    ),
    "by the image": (lambda n, x: F.relu(conditional(x, torch.matmul(x.mean((2, 3)).sigmoid(), n.w))),
        {"w": torch.randn(4, 16)},
    ),
}  # fmt: skip


def teacher(middle: Callable[[Any, Tensor], Tensor], parts: dict[str, Any]) -> tuple[nn.Module, Teacher]:
    torch.manual_seed(0)
    network = Net(middle, **parts).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return network, Teacher(network, TASK)


@pytest.mark.parametrize("name", [*WRITTEN, *COMPUTED])
@pytest.mark.parametrize("protocol", ["lineage", "hardware", "full"])
def test_however_a_weight_is_written_it_is_quantized(name: str, protocol: str, tmp_path: Any) -> None:
    network, traced = teacher(*(WRITTEN | COMPUTED)[name])
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(traced(images), network(images), rtol=1e-4, atol=1e-4)
    assert traced.traced.meta["form"] == (0 if name in ("nn.Conv1d", "nn.Conv3d", "a keyword") else 1)
    student = Student(traced, PROTOCOLS[protocol], Bits(3, 8)).to(memory_format=torch.channels_last)
    assert student.left_float == []
    share = size_of(student).quantized
    assert share.weights == 1
    assert (share.activations == 1) if protocol == "full" else (share.activations < 1 or protocol == "hardware")
    assert all(work.activation_bits < 32 for work in size_of(student).work if protocol != "lineage" and not work.of_images)
    with student.full_precision():
        torch.testing.assert_close(student(images), network(images), rtol=1e-4, atol=1e-4)
    student.track_ranges(True)
    student(images)
    student.track_ranges(False)
    assert not torch.allclose(student(images), network(images), rtol=1e-3, atol=1e-3)
    student(images).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    save_student(student, tmp_path / "a.safetensors")
    again = load_student_file(tmp_path / "a.safetensors")(images)
    assert torch.equal(again, student(images)), float((again - student(images)).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*WRITTEN, *COMPUTED) if name not in ("einsum", "by the image")])
def test_however_a_weight_is_written_it_goes_through_export(name: str, tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    _, traced = teacher(*(WRITTEN | COMPUTED)[name])
    student = Student(traced, PROTOCOLS["full"], Bits(4, 8)).to(memory_format=torch.channels_last)
    student.track_ranges(True)
    student(torch.randn(64, 3, 8, 8))
    student.track_ranges(False)
    assert all(agreement.holds for agreement in export(student.requires_grad_(False), tmp_path / "a.onnx"))


NUMBERS = torch.randn(64, 64)
HIDDEN = torch.ones(64, 64, dtype=torch.bool).triu(1)
MASKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "numbers": lambda n, x: n.a(x, x, x, attn_mask=NUMBERS)[0],
    "hidden, by position": lambda n, x: n.a(x, x, x, None, False, HIDDEN)[0],
    "hidden in each image": lambda n, x: n.a(x, x, x, key_padding_mask=x[:, :, 0] > 1e6)[0],
    "in an encoder": lambda n, x: n.t(x, mask=HIDDEN),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_with_masks_is_what_torch_computes(name: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True)
    parts = {"a": nn.MultiheadAttention(4, 2, batch_first=True), "t": nn.TransformerEncoder(layer, 1, None, False)}
    network, traced = teacher(lambda n, x: MASKS[name](n, rows(x)).transpose(1, 2), parts)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(traced(images), network(images), rtol=1e-4, atol=1e-4)
    assert Student(traced, PROTOCOLS["full"], Bits(3, 8)).left_float == []

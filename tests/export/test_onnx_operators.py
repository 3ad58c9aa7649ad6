"""Each operator that ONNX export knows, in a small network of floats: onnxruntime computes what torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.network.activations import _NAMES
from dfqbench.task import Task

onnx_file = pytest.importorskip("dfqbench.export.onnx_file", exc_type=ImportError)
onnx_run = pytest.importorskip("dfqbench.export.onnx_run", exc_type=ImportError)

TASK = Task(5, 3, 12, (0.5,) * 3, (0.25,) * 3)


class Around(nn.Module):
    """A convolution to 8 channels of 12 x 12, what is tested, and a linear layer on all that comes out."""

    def __init__(self, tested: Callable[[Tensor], Tensor]):
        super().__init__()
        self.conv, self.tested = nn.Conv2d(3, 8, 3, padding=1), tested
        with torch.no_grad():
            self.head = nn.Linear(self.tested(torch.zeros(1, 8, 12, 12)).flatten(1).shape[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tested(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Self-attention over the pixels, with a token of its own in front."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.qkv, self.norm = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)[:, 0]


class Shuffled(nn.Module):
    """Channels dealt out to two groups and back, as ShuffleNets write it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.size()
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)


def squeezed(x: Tensor) -> Tensor:
    return x * F.hardsigmoid(x.mean((2, 3), keepdim=True))


def normalised_weight(x: Tensor) -> Tensor:
    weight = torch.arange(8 * 8.0).sin().view(1, 8, 8)
    weight = F.batch_norm(weight, None, None, training=True, momentum=0.0).view(8, 8, 1, 1)
    return F.conv2d(x, weight)


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


def thirds(x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [2, 3, 3], dim=1)
    return torch.cat([b + c, a], 1)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name, getattr(torch, name, None)) for name in sorted(_NAMES) if not name.endswith("_") and name != "prelu"},
    "gelu, tanh": nn.GELU(approximate="tanh"),
    "prelu, a slope per channel": nn.PReLU(8, 0.3),
    "softplus, beta": nn.Softplus(beta=2.0),
    "clamp": lambda x: x.clamp(min=-0.3),
    "softmax": lambda x: x.softmax(1),
    "arithmetic": lambda x: 1 - (2 * x - x / 3) ** 2 + x.abs().add(1).sqrt(),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1),
    "maximum": lambda x: torch.maximum(x, 0.5 - x),
    "add, alpha": lambda x: torch.add(x, x.sigmoid(), alpha=0.5),
    "in place": lambda x: nn.functional.relu_(x + 0.1).mul_(2),
    "squeeze and excitation": squeezed,
    "depthwise convolution, stride, dilation": nn.Conv2d(8, 16, 3, stride=2, padding=2, dilation=2, groups=8),
    "padding same": nn.Conv2d(8, 8, (4, 3), padding="same"),
    "transposed convolution": nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1),
    "a weight that is normalised": normalised_weight,
    "batch norm without affine": nn.BatchNorm2d(8, affine=False),
    "batch norm without running statistics": nn.BatchNorm2d(8, track_running_stats=False),
    "group norm": nn.GroupNorm(2, 8),
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "attention": Positions(),
    "max pool": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "average pool": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average pool, ceiling": nn.AvgPool2d(2, 2, ceil_mode=True),
    "adaptive average pool": nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive max pool": nn.AdaptiveMaxPool2d(1),
    "mean over all": lambda x: x * x.mean(),
    "sum and extremes": lambda x: x.sum(1, keepdim=True) + x.amax((2, 3), keepdim=True) - x.amin(1, keepdim=True),
    "chunk": halves,
    "split": thirds,
    "stack": lambda x: torch.stack([x, x.relu()], 2),
    "option A": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)),
    "reflection": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "replication": nn.ReplicationPad2d(2),
    "zero padding, constant": nn.ConstantPad2d((1, 0, 2, 1), 0.5),
    "cropping": lambda x: F.pad(x, (-1, -2, 0, 1)),
    "channel shuffle": nn.ChannelShuffle(4),
    "channel shuffle by hand": Shuffled(),
    "pixel shuffle": nn.PixelShuffle(2),
    "upsample nearest": nn.Upsample(scale_factor=2),
    "interpolate to a size": lambda x: F.interpolate(x, size=(7, 9)),
    "interpolate bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "interpolate, corners": lambda x: F.interpolate(x, size=(5, 20), mode="bilinear", align_corners=True),
    "squeeze, unsqueeze, select": lambda x: x[:, 3].unsqueeze(1).squeeze(1),
    "dropout, identity": nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Dropout2d(0.5)),
}


def teacher_of(tested: Callable[[Tensor], Tensor]) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Teacher(Around(tested), TASK)


@pytest.mark.parametrize("name", OPERATORS)
def test_onnxruntime_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    teacher, path = teacher_of(OPERATORS[name]), tmp_path / "a.onnx"
    onnx_file.export_onnx(teacher, path)
    for optimized in (False, True):
        run = onnx_run.runner(onnx_run.session(path, optimized))
        for images in (1, 3):
            x = torch.randn(images, *TASK.image_shape, generator=torch.Generator().manual_seed(images))
            answer = teacher(x)
            torch.testing.assert_close(run(x), answer, rtol=1e-5, atol=2e-6 * max(1.0, float(answer.abs().max())))


UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "an operator": (lambda x: torch.fft.fft2(x).real, "aten.fft_fft2"),
    "an argument": (lambda x: torch.div(x, 2.0, rounding_mode="floor"), "rounding_mode"),
    "a size": (nn.AdaptiveAvgPool2d(5), "one must divide the other"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_one_line_and_no_file(name: str, tmp_path: Path) -> None:
    tested, said = UNKNOWN[name]
    with pytest.raises(UserError, match=said) as error:
        onnx_file.export_onnx(teacher_of(tested), tmp_path / "a.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())

"""Networks whose forward asks for shapes are traced by running along; what depends on the batch stays open, what depends on an image is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.errors import UserError
from dfqbench.export.size import size_of
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task


class Net(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.middle, self.head = nn.Conv2d(3, 4, 3, padding=1), middle, nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(F.relu(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]


def padded(x: Tensor) -> Tensor:
    """To a multiple of 3, where it is none."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % 3, 0, -height % 3)) if height % 3 or width % 3 else x


def in_windows(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    windows = x.reshape(batch * 4, channels, height // 2, width // 2) if batch * height > 0 else x
    return windows.view(batch, channels, height, width) if len(x.size()) == 4 else windows


def column_by_column(x: Tensor) -> Tensor:
    return torch.stack([x[..., i] for i in range(x.shape[3]) if x.dim() == 4], 3)


def unpacked(x: Tensor) -> Tensor:
    a, b, c, d = x.permute(1, 0, 2, 3)
    return torch.stack([a, b, c, d], 1) if x.dtype == torch.float32 else x


class Positions(nn.Module):
    """Makes its buffer for the size that it meets, and a copy for every image, as ConViT does; asks a layer's weight for its type."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.zeros(1, 1, 1), persistent=False)
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        if self.places.shape[1] != height:
            self.places = torch.arange(height * width, dtype=self.layer.weight.dtype).view(1, height, width)
        places = self.layer(self.places.expand(images, -1, -1).unsqueeze(3))
        return x + places.reshape(images, 1, height, width)


def batch_first(x: Tensor) -> Tensor:
    y = x.flatten(2).permute(2, 0, 1)
    positions, batch, channels = y.shape
    for _ in range(positions // 32):
        y = y + 1
    return y.reshape(positions * batch, channels).view(positions, batch, channels).permute(1, 2, 0).unflatten(2, (8, 8))


@pytest.mark.parametrize("middle", [padded, in_windows, column_by_column, unpacked, batch_first])
def test_what_shapes_decide_is_known_and_the_batch_stays_open(middle: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network = Net(middle).eval()
    teacher = Teacher(network, Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3))
    assert teacher.traced.meta["form"] == 1
    for images in (1, 2, 5):
        x = torch.randn(images, 3, 8, 8)
        torch.testing.assert_close(teacher(x), network(x))
    assert size_of(Student(teacher, PROTOCOLS["full"], Bits(4, 4))).quantized == (1, 1)


@pytest.mark.parametrize(
    "middle",
    [lambda x: x if x.sum() > 0 else -x, lambda x: x * float(x.max()), lambda x: x[: int(x.argmax())], lambda x: x if x.shape[0] > 2 else -x],
)
def test_what_images_or_their_number_decide_is_refused(middle: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UserError, match=r"Net cannot be traced by torch\.fx in its forward"):
        Teacher(Net(middle).eval(), Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3))


def test_buffers_may_be_made_for_a_size_and_expanded_by_the_number_of_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Positions(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()
    teacher = Teacher(network, Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3))
    for images in (1, 2, 5):
        x = torch.randn(images, 3, 8, 8)
        torch.testing.assert_close(teacher(x), network(x))
    student = Student(teacher, PROTOCOLS["full"], Bits(4, 4))
    assert student.left_float == []
    assert set(student.layers) == {"0", "1.layer", "5"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("mobilevit_xxs", 64), ("crossvit_tiny_240", 240), ("efficientvit_b0", 64), ("tf_efficientnet_b0", 64)])
def test_networks_of_timm_that_ask_for_shapes(name: str, size: int) -> None:
    network = timm.create_model(name, num_classes=10).eval()
    teacher = Teacher(network, Task(10, 3, size, (0.5,) * 3, (0.25,) * 3))
    assert size_of(Student(teacher, PROTOCOLS["full"], Bits(4, 4))).quantized == (1, 1)

"""In-place operations whose value nobody uses: later readers get the new value, and students are those of the same network written out of place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.errors import UserError
from dfqbench.network.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task

TASK = Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """conv, BN, `act`, conv, BN, `act`, pooling, linear."""

    def __init__(self, act: Callable[[Net, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.n1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.n2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)
        self.relu, self.plain, self.flat, self.act = nn.ReLU(inplace=True), nn.ReLU(), nn.Flatten(2), act
        for norm in (self.n1, self.n2):
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self, self.n1(self.c1(x)))
        x = self.act(self, self.n2(self.c2(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def as_statement(call: Callable[[Net, Tensor], object]) -> Callable[[Net, Tensor], Tensor]:
    def act(net: Net, x: Tensor) -> Tensor:
        call(net, x)
        return x

    return act


RELUS: dict[str, Callable[[Net, Tensor], object]] = {
    "F.relu_": lambda net, x: F.relu_(x),
    "torch.relu_": lambda net, x: torch.relu_(x),
    "by keyword": lambda net, x: F.relu(x, inplace=True),
    "by position": lambda net, x: F.relu(x, True),
    "method": lambda net, x: x.relu_(),
    "module": lambda net, x: net.relu(x),
    "copied": lambda net, x: x.copy_(torch.relu(x)),
    "through a reshape": lambda net, x: x.flatten(1).relu_(),
    "through a permutation": lambda net, x: x.permute(0, 2, 3, 1).relu_(),
    "through .data": lambda net, x: x.data.relu_(),
    "through detach": lambda net, x: F.relu_(x.detach()),
    "through nn.Flatten": lambda net, x: F.relu_(net.flat(x)),
}


def student_of(network: nn.Module, protocol: str) -> Student:
    student = Student(Teacher(network, TASK), PROTOCOLS[protocol], Bits(4, 2))
    student.track_ranges(True)
    with torch.no_grad():
        student(images())
    student.track_ranges(False)
    return student


@pytest.mark.parametrize("protocol", ["lineage", "hardware"])
@pytest.mark.parametrize("name", RELUS)
def test_a_relu_as_a_statement_gives_the_student_of_the_same_network_with_a_value(name: str, protocol: str) -> None:
    network, twin = Net(as_statement(RELUS[name])), Net(lambda net, x: net.plain(x))
    with torch.no_grad():
        expected = twin(images())
        assert torch.equal(network(images()), expected), "the same function"
        assert torch.equal(Teacher(network, TASK).observe(images()).logits, expected)
        student, other = student_of(network, protocol), student_of(twin, protocol)
        assert len(student.quantizers) == len(other.quantizers)
        assert torch.equal(student(images()), other(images()))
        assert not torch.equal(student(images()), expected)


def last_channels(net: Net, x: Tensor) -> Tensor:
    F.relu_(x[:, 2:])
    return x


def two_halves(net: Net, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    a.relu_()
    return torch.cat([b, a], 1) + x


def item_set(net: Net, x: Tensor) -> Tensor:
    x[:, :2] = 0
    x[:, 2:] += 1
    return F.relu(x)


def masked(net: Net, x: Tensor) -> Tensor:
    y = x.relu()
    x[x < 0] = 0.5
    return x + y


def shortcut(net: Net, x: Tensor) -> Tensor:
    """The shortcut is the tensor that the sum is written into."""
    identity = x
    x += net.plain(x)
    return x * identity


def view_of_before(net: Net, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    rows = flat.transpose(1, 2)
    x.relu_()
    x.mul_(2)
    flat.add_(1)
    return x + rows.transpose(1, 2).view(x.shape)


def read_before_and_after(net: Net, x: Tensor) -> Tensor:
    y = net.c2(x)
    net.relu(x)
    return x + y


def reshaped_in_place(net: Net, x: Tensor) -> Tensor:
    y = x.mean(1)
    y.unsqueeze_(1)
    x.relu_()
    return x + y


def written_out(net: Net, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 2, out=y)
    torch.add(y, x, out=y[:, :])
    return F.relu(y)


def several_steps(net: Net, x: Tensor) -> Tensor:
    x.view(x.size(0), 2, 2, -1)[:, 1, :, ::2].relu_()
    x.clamp_(-1, 3).sub_(0.5)
    return x


def from_one_view_to_another(net: Net, x: Tensor) -> Tensor:
    a, b = x[:, :2], x[:, 2:]
    torch.sub(a, 0.5, out=b)
    a += b
    b.copy_(a.relu())
    a[:, 0] = b[:, 1]
    return x


def in_a_shared_module(net: Net, x: Tensor) -> Tensor:
    y = x + 1
    net.relu(x)
    net.relu(y)
    return x - 0.5 * y


CASES = [
    last_channels, two_halves, item_set, masked, shortcut, view_of_before, read_before_and_after, reshaped_in_place, written_out, several_steps,
    in_a_shared_module, from_one_view_to_another,
]  # fmt: skip


@pytest.mark.parametrize("act", CASES, ids=lambda act: act.__name__)
def test_views_and_their_bases_are_followed(act: Callable[[Net, Tensor], Tensor]) -> None:
    network = Net(act)
    x = images()
    with torch.no_grad():
        expected = network(images())
        teacher = Teacher(network, TASK)
        assert torch.equal(teacher.traced(x), expected)
        torch.testing.assert_close(teacher(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(x, images()), "images are nobody's to write into"
        for protocol in PROTOCOLS.values():
            with Student(teacher, protocol, Bits(4, 4)).full_precision():
                pass
            student = Student(copy.deepcopy(teacher), protocol, Bits(4, 4))
            with student.full_precision():
                torch.testing.assert_close(student(x), expected, rtol=1e-4, atol=1e-4)
    student.track_ranges(True)
    student(x).square().sum().backward()
    assert student.layers["c1"].layer.weight.grad is not None, "and it trains"


def test_a_batch_norms_input_is_observed_as_it_was() -> None:
    """Also where the tensor is changed in place behind the batch norm."""

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = self.norm(x)
            x.relu_()
            return self.fc((x + y).mean((2, 3)))  # type: ignore[no-any-return]

    teacher = Teacher(network := Before(), TASK)
    with torch.no_grad():
        assert torch.equal(teacher.observe(images()).bn_inputs[0], network.conv(images()))


def test_images_normalised_in_place_stay_as_they_are() -> None:
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            x.sub_(0.5)
            x /= 0.25
            return self.fc(x.flatten(1))  # type: ignore[no-any-return]

    teacher, x = Teacher(network := Normalises(), TASK), images()
    with torch.no_grad():
        assert torch.equal(teacher(x), teacher(x))
        assert torch.equal(x, images())
        assert torch.equal(teacher(x), network(images()))


class Writes(nn.Linear):
    """A layer of torch's kind that fills its input with zeros, and gives something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.zero_()
        return y


def test_what_cannot_be_followed_is_named_with_module_and_line() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Writes(192, 192)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1) * 2
            y = self.inner(x)
            return x + y  # type: ignore[no-any-return]

    network = nn.Sequential(Holder(), nn.Linear(192, 10))
    with pytest.raises(
        UserError, match=r"Sequential: '0\.inner' in 0\.inner \(test_inplace\.py:\d+\) changes a tensor in place .*: write it out of place"
    ):
        Teacher(network, TASK)


def test_a_network_whose_graph_computes_something_else_is_refused() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x.flatten(1))
            return x * 2 if isinstance(x, Tensor) else x

    with pytest.raises(UserError, match=r"Asks traced by torch.fx computes something else than the network itself"):
        Teacher(Asks(), TASK)


def test_a_network_that_draws_random_numbers_is_not_taken_for_a_wrong_graph() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(x.flatten(1), 0.5, training=True))  # type: ignore[no-any-return]

    network, before = Noise(), torch.get_rng_state()
    Teacher(network, TASK)
    assert torch.equal(torch.get_rng_state(), before)

"""Frozen batch norms, and rectified quantizers: the same function as the modules that they stand for, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfqbench.network.frozen_batch_norm import BatchNorm, FrozenNorm, with_frozen_norms
from dfqbench.network.network import Teacher, trace
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.fake_quantize import fake_quantize, rectify_and_quantize
from dfqbench.quantization.student import Student
from dfqbench.quantization.tune_mode import NormalisedLayer, RectifiedQuantizer, tuned
from dfqbench.task import Task
from dfqbench.teachers.cifar import cifar_resnet


def norm_of(channels: int, affine: bool = True, one_dimensional: bool = False) -> nn.BatchNorm2d | nn.BatchNorm1d:
    generator = torch.Generator().manual_seed(0)
    made = (nn.BatchNorm1d if one_dimensional else nn.BatchNorm2d)(channels, affine=affine).double().eval().requires_grad_(False)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1)
    return made


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [None, nn.ReLU()])
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (6, 4)])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("of", ["y", "moments", "both"])
def test_a_frozen_norm_is_the_norm(affine: bool, relu: nn.ReLU | None, shape: tuple[int, ...], with_shortcut: bool, of: str) -> None:
    norm, x, shortcut, weight = norm_of(4, affine, len(shape) == 2), numbers(*shape), numbers(*shape), numbers(*shape)
    given = (x, shortcut) if with_shortcut else (x,)
    total = norm(x) + shortcut if with_shortcut else norm(x)
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], unbiased=False)
    expected = (total if relu is None else relu(total), mean, variance)
    found = FrozenNorm(norm, relu, moments=True)(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(FrozenNorm(norm, relu)(*given), expected[0], rtol=1e-12, atol=1e-12)

    def loss(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        parts = {"y": (y * weight).sum(), "moments": (mean.square() - variance.square()).sum()}
        return sum(parts.values()) if of == "both" else parts[of]

    reached = given if of != "moments" else (x,)
    slopes = [torch.autograd.grad(loss(*answer), reached, retain_graph=True) for answer in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)


def test_each_moments_gradient_is_right_alone() -> None:
    norm, x = FrozenNorm(norm_of(4), moments=True), numbers(3, 4, 5, 2)
    for part in (1, 2):
        assert torch.autograd.gradcheck(lambda x, part=part: norm(x)[part], x)


class Sums(nn.Module):
    """Sums behind norms, some of which another tensor's reader would notice."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norms[0](x) + x)  # one operation
        kept = self.norms[1](x)
        kept += x  # one operation
        moved = self.norms[2](kept)
        shared = kept * 1
        shared.add_(moved)  # in the place of another tensor, which is read below
        doubled = self.norms[3](shared)
        doubled = doubled + doubled
        scaled = torch.add(self.norms[4](doubled), shared, alpha=2)
        broadcast = self.norms[5](scaled) + scaled.mean((2, 3), keepdim=True)
        return self.head((broadcast + shared).mean((2, 3)))


def test_only_sums_that_nobody_else_reads_are_taken_in() -> None:
    torch.manual_seed(0)
    network = Sums()
    for norm in network.norms:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    teacher = Teacher(network, Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3)).double()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = network.double().eval()(images.clone())
    torch.testing.assert_close(teacher(images), expected)
    seen = teacher.observe(images)
    torch.testing.assert_close(seen.logits, expected)
    assert all(mean is not None for mean, _ in seen.moments)
    for (mean, variance), x in zip(seen.statistics(), seen.bn_inputs, strict=True):
        torch.testing.assert_close((variance, mean), torch.var_mean(x, (0, 2, 3), unbiased=False))
    calls = [n for n in teacher._observing.graph.nodes if n.op == "call_module" and str(n.target).startswith("frozen_")]
    assert [len(n.args) for n in calls] == [2, 2, 1, 1, 1, 1]


def test_a_norm_or_relu_that_somebody_listens_to_is_called() -> None:
    for which in (0, 1):
        norm, relu, heard = norm_of(4), nn.ReLU(), list[Tensor]()
        (norm, relu)[which].register_forward_hook(lambda module, given, output, heard=heard: heard.append(output))
        x = numbers(3, 4, 2, 2)
        FrozenNorm(norm, relu)(x)
        assert len(heard) == 1
        assert torch.equal(heard[0], norm(x) if which == 0 else relu(norm(x)))


def test_inside_batch_statistics_the_batchs_own_count() -> None:
    teacher = Teacher(cifar_resnet("resnet20"), Task(10, 3, 16, (0.5,) * 3, (0.25,) * 3))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    running = teacher(images)
    with teacher.batch_statistics():
        inside, expected = teacher(images), teacher.traced(images)
        assert torch.equal(teacher.observe(images).logits, expected)
    assert torch.equal(inside, expected)
    assert not torch.allclose(inside, running)
    torch.testing.assert_close(running, teacher.traced(images), rtol=1e-4, atol=1e-5)


def test_the_weights_of_a_teacher_may_be_replaced_after_it_was_asked() -> None:
    teacher = Teacher(cifar_resnet("resnet20"), Task(10, 3, 16, (0.5,) * 3, (0.25,) * 3))
    images = torch.randn(4, 3, 16, 16)
    before = teacher(images)
    with torch.no_grad():
        for norm in teacher.batch_norms:
            norm.bias.add_(0.3)
    after = teacher(images)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, teacher.traced(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rectifying_within_the_quantizer_changes_no_bit(bits: int, dtype: torch.dtype) -> None:
    x, weight = numbers(4, 3, 8, 8).detach().to(dtype).requires_grad_(), numbers(4, 3, 8, 8).detach().to(dtype)
    scale, zero = torch.tensor(0.11), torch.tensor(0.0)
    expected, found = fake_quantize(x.relu(), scale, zero, bits, from_zero=True), rectify_and_quantize(x, scale, bits)
    assert torch.equal(found, expected)
    slopes = [torch.autograd.grad((result * weight).sum(), x)[0] for result in (found, expected)]
    assert torch.equal(*slopes)
    assert slopes[0].count_nonzero() > 0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_called_student_is_an_observed_one(name: str) -> None:
    """Whatever the protocol: symmetric grids and clipped gradients are not rectified within the quantizer."""
    torch.manual_seed(0)
    teacher = Teacher(cifar_resnet("resnet20"), Task(10, 3, 16, (0.5,) * 3, (0.25,) * 3)).double()
    # a shift: without one, sums of whole steps are often exactly 0, where rounding decides on the gradient
    for norm in teacher.batch_norms:
        norm.bias.normal_()
    student = Student(teacher, PROTOCOLS[name], Bits(4, 4)).double()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    student.track_ranges(True)
    student(images)
    student.track_ranges(False)
    called, observed = student(images), student.observe(images).logits
    torch.testing.assert_close(called, observed, rtol=1e-9, atol=1e-9)
    slopes = [torch.autograd.grad(logits.square().sum(), images)[0] for logits in (called, observed)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


def test_a_resnet_takes_the_short_way_everywhere() -> None:
    """19 norms, each with its ReLU and in a block's second half with the sum between, and 19 quantizers behind a ReLU."""
    task = Task(10, 3, 16, (0.5,) * 3, (0.25,) * 3)
    graph = with_frozen_norms(trace(cifar_resnet("resnet20"), task))
    called = [graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    frozen = [module for module in called if isinstance(module, FrozenNorm)]
    assert (len(frozen), sum(module.relu is not None for module in frozen)) == (19, 19)
    assert not any(isinstance(module, BatchNorm) for module in called)
    student = tuned(Student(Teacher(cifar_resnet("resnet20"), task), PROTOCOLS["lineage"], Bits(4, 4)).traced)
    kinds = [type(student.get_submodule(str(node.target))) for node in student.graph.nodes if node.op == "call_module"]
    assert (kinds.count(NormalisedLayer), kinds.count(RectifiedQuantizer), kinds.count(nn.ReLU)) == (19, 19, 0)

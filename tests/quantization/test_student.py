"""Students of real and of hand-made networks: where quantizers go, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from pytorchcv.model_provider import get_model
from random_networks import randomised
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, find_protocol
from dfqbench.quantization.fake_quantize import grid
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer, grids_of
from dfqbench.quantization.student import Student
from dfqbench.quantization.tune_mode import NormalisedLayer
from dfqbench.quantization.work import share_of, work_of
from dfqbench.task import Task

LINEAGE, HARDWARE = PROTOCOLS["lineage"], PROTOCOLS["hardware"]
W4A4 = Bits(4, 4)


def task_of(size: int, classes: int = 10) -> Task:
    return Task(classes, 3, size, (0.5,) * 3, (0.25,) * 3)


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def calibrated(network: nn.Module, size: int, protocol: object = LINEAGE, bits: Bits = W4A4, classes: int = 10) -> Student:
    student = Student(Teacher(network, task_of(size, classes)), protocol, bits)  # type: ignore[arg-type]
    student.track_ranges(True)
    with torch.no_grad():
        student(images(size, 8))
    student.track_ranges(False)
    student.check_ranges()
    return student


ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cv:resnet20_cifar10": (lambda: get_model("resnet20_cifar10"), 32),
    "cv:mobilenet_wd4": (lambda: get_model("mobilenet_wd4"), 224),
    "cv:mobilenetv2_wd4": (lambda: get_model("mobilenetv2_wd4"), 224),
    "cv:shufflenet_g1_wd4": (lambda: get_model("shufflenet_g1_wd4"), 224),
    "tv:resnet18": (lambda: torchvision.models.resnet18(), 32),
    "tv:mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 32),
    "tv:shufflenet_v2": (lambda: torchvision.models.shufflenet_v2_x0_5(), 32),
    "tv:squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(), 32),
    "tv:googlenet": (lambda: torchvision.models.googlenet(init_weights=False, transform_input=True), 32),
    "timm:regnetx_002": (lambda: timm.create_model("regnetx_002"), 32),
    "timm:densenet121": (lambda: timm.create_model("densenet121"), 32),
    "timm:repvgg_a0": (lambda: timm.create_model("repvgg_a0"), 32),
    "timm:mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 32),
    "timm:efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 32),
    "timm:tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 32),  # convolutions with "same" padding
    "timm:convnext_atto": (lambda: timm.create_model("convnext_atto"), 32),
    "timm:deit_tiny": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32), 32),
}


@pytest.mark.slow
@pytest.mark.thorough("resnet", "mobilenet", "deit")
@pytest.mark.parametrize("name", ZOO)
def test_with_quantizers_off_a_zoo_network_computes_what_it_did(name: str) -> None:
    build, size = ZOO[name]
    network, x = randomised(build()), images(size)
    state, training = copy.deepcopy(network.state_dict()), {n: m.training for n, m in network.named_modules()}
    attributes = {n: set(m.__dict__) for n, m in network.named_modules()}
    with torch.no_grad():
        answer = network(x)
        teacher = Teacher(network, task_of(size, answer.shape[1]))
        assert torch.equal(teacher(x), answer)
        for protocol in (LINEAGE, HARDWARE):
            student = Student(teacher, protocol, W4A4)
            with student.full_precision():
                same = student(x)
            if protocol is LINEAGE:
                assert torch.equal(same, answer)
            torch.testing.assert_close(same, answer, rtol=1e-3, atol=1e-4 * float(answer.abs().max()))
            for layer in student.layers.values():  # one-signed channels among them
                weight, on_grid = layer.layer.weight.flatten(1), layer.quantized_weight().flatten(1)
                spread = weight.abs().amax(1) * 2 if protocol.weight_symmetric else weight.amax(1) - weight.amin(1)
                assert ((weight - on_grid).abs().amax(1) <= spread / (2**layer.bits - 2) + 1e-7).all()
                assert all(len(channel.unique()) <= 2**layer.bits for channel in on_grid[:4])
            assert student.left_float == []
            student.track_ranges(True)
            assert student(x).isfinite().all()
            student.check_ranges()
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert training == {n: m.training for n, m in network.named_modules()}
    assert attributes == {n: set(m.__dict__) for n, m in network.named_modules()}


def conv(inputs: int = 3, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Small(nn.Module):
    """conv, activation, conv, activation, sum, activation, pool, linear; what differs is how a user writes it."""

    def __init__(self, activation: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a + b):
        super().__init__()
        self.activation, self.add = activation, add
        self.conv1, self.bn1, self.conv2, self.bn2, self.fc = conv(), nn.BatchNorm2d(4), conv(4), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(x)))
        y = self.activation(self.bn2(self.conv2(x)))
        z = self.activation(self.add(y, x))
        return self.fc(z.mean((2, 3)))  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one shared module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "torch.relu": torch.relu,
    "functional in place": lambda x: F.relu(x, inplace=True),
    "by keyword": lambda x: F.relu(input=x),
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "relu6": F.relu6,
    "SiLU": nn.SiLU(),
    "silu": F.silu,
    "Hardswish": nn.Hardswish(inplace=True),
    "hardswish": F.hardswish,
    "GELU": nn.GELU(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "PReLU": nn.PReLU(),
    "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "sigmoid(x) * x": lambda x: x.sigmoid() * x,
    "x.mul_(x.sigmoid())": lambda x: x.mul_(x.sigmoid()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_however_a_user_writes_an_activation_it_is_quantized_once_per_use(name: str) -> None:
    network, x = randomised(Small(ACTIVATIONS[name])), images(8)
    with torch.no_grad():
        answer = network(x)
    for protocol, count in ((LINEAGE, 3), (HARDWARE, None)):
        student = calibrated(network, 8, protocol)
        if count:
            assert len(student.quantizers) == count
        with torch.no_grad():
            with student.full_precision():
                torch.testing.assert_close(student(x), answer, rtol=0 if count else 1e-4, atol=0 if count else 1e-5)
            assert 0 < float((student(x) - answer).abs().max()) < 1


def iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


@pytest.mark.parametrize("add", [lambda a, b: a + b, iadd, torch.add, lambda a, b: a.add(b), lambda a, b: a.add_(b)])
def test_however_a_user_writes_a_sum_it_is_quantized_behind_its_activation(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    network = randomised(Small(nn.ReLU(), add))
    student = calibrated(network, 8, HARDWARE)
    # input, the first activation (enters conv2), the sum's activation, the pooled features; the second activation only enters the sum
    assert [q.bits for q in student.quantizers.values()] == [8, 4, 4, 8]
    with torch.no_grad(), student.full_precision():
        torch.testing.assert_close(student(images(8)), network(images(8)), rtol=1e-4, atol=1e-5)


def distinct_inputs(student: Student, x: Tensor) -> dict[str, int]:
    """How many distinct values enter each layer."""
    counts: dict[str, int] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, given, name=name: counts.__setitem__(name, given[0].unique().numel()))
        for name, m in student.layers.items()
    ]
    with torch.no_grad():
        student(x)
    for hook in hooks:
        hook.remove()
    return counts


def test_lineage_places_in_resnet20() -> None:
    student = calibrated(randomised(get_model("resnet20_cifar10")), 32)
    assert len(student.quantizers) == 19
    assert all(q.bits == 4 for q in student.quantizers.values())
    graph = student.traced.graph
    followed = [student.traced.get_submodule(str(n.args[0].target)) for n in graph.nodes if str(n.target).startswith("quantizers.")]
    assert all(isinstance(m, nn.ReLU) for m in followed)
    assert len(student.layers) == 22
    assert {layer.bits for layer in student.layers.values()} == {4}
    counts = distinct_inputs(student, images(32, 8))
    names = list(counts)
    assert counts[names[0]] > 1000  # the image stays float, and so do the pooled features
    assert counts[names[-1]] > 16
    assert max(counts[n] for n in names[1:-1]) <= 16


def test_hardware_puts_every_layer_input_and_every_sum_of_resnet20_on_a_grid() -> None:
    student = calibrated(randomised(get_model("resnet20_cifar10")), 32, HARDWARE)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in student.modules())
    layers = list(student.layers.values())
    assert [layer.bits for layer in layers] == [8, *[4] * 20, 8]
    # image, stem, 9 blocks of an inner activation and a sum; pooled features. The last sum is no input of the last layer
    assert [q.bits for q in student.quantizers.values()] == [8, *[4] * 19, 8]
    counts = list(distinct_inputs(student, images(32, 8)).values())
    assert 16 < counts[0] <= 256
    assert 16 < counts[-1] <= 256
    assert max(counts[1:-1]) <= 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tv:googlenet", "timm:densenet121", "tv:shufflenet_v2", "timm:efficientnet_b0"])
def test_hardware_layers_read_only_grids(name: str) -> None:
    build, size = ZOO[name]
    student = calibrated(randomised(build()), size, HARDWARE, classes=1000)
    counts = distinct_inputs(student, images(size, 8))
    first, *inner, last = counts
    assert counts[first] <= 256
    assert counts[last] <= 256
    assert max(counts[n] for n in inner) <= 16


def test_a_layer_that_takes_two_tensors_is_named() -> None:
    class Octave(nn.Conv2d):
        def forward(self, high: Tensor, low: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(high + low)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.octave, self.head = Octave(3, 4, 1), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.octave(x, x)).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(UserError, match=r"Net: octave \(Octave\) is called with 2 arguments, a layer has one"):
        Student(Teacher(Net().eval(), task_of(8)), LINEAGE, W4A4)


def test_what_is_added_to_every_image_makes_no_residual_sum() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.places, self.head = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(1, 4, 8, 8)), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(F.layer_norm(x + self.places + x, (8, 8)).mean((2, 3)))  # type: ignore[no-any-return]

    teacher = Teacher(Net().eval(), task_of(8))
    assert teacher.traced.meta["form"] == 1, "of what it was before, it is another network"
    assert list(Student(teacher, HARDWARE, W4A4).quantizers) == ["x", "add_1", "mean"]


def test_an_image_normalised_inside_the_network_has_the_image_bits() -> None:
    student = calibrated(randomised(ZOO["tv:googlenet"][0]()), 32, HARDWARE, classes=1000)
    assert next(iter(student.quantizers.values())).bits == 8


@pytest.mark.parametrize("base", ["lineage", "hardware"])
@pytest.mark.parametrize(("setting", "bits"), [({"input_bits": 8}, [8]), ({"input_bits": None}, [])])
def test_input_bits_mean_the_same_in_every_placement(base: str, setting: dict[str, int | None], bits: list[int]) -> None:
    student = calibrated(Small(nn.ReLU()), 8, find_protocol({"base": base, **setting}))
    assert [q.bits for name, q in student.quantizers.items() if name == "x"] == bits


@pytest.mark.parametrize("setting", [{}, {"weight_granularity": "per-tensor"}, {"weight_symmetric": True}])
def test_grids_of_all_layers_are_those_of_each_alone(setting: dict[str, Any]) -> None:
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 1, 1),
        nn.Linear(7, 5),
        nn.Conv2d(6, 5, (3, 1)).double(),
        nn.Conv1d(2, 3, 5),
    ]
    for layer in layers[:3]:
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    protocol = LINEAGE.model_copy(update=setting)
    quantized = [QuantizedLayer(layer, bits, protocol) for layer, bits in zip(layers, (8, 4, 4, 3, 4, 4), strict=True)]  # type: ignore[arg-type]
    for layer, (scale, zero_point) in zip(quantized, grids_of(quantized), strict=True):
        weight = layer.layer.weight.detach().reshape(len(layer.layer.weight), -1)
        low, high = (weight.min(), weight.max()) if protocol.weight_granularity == "per-tensor" else (weight.min(1)[0], weight.max(1)[0])
        alone = grid(low, high, layer.bits, protocol.weight_symmetric)
        assert torch.equal(scale, alone[0])
        assert torch.equal(zero_point, alone[1])
        assert torch.equal(layer.quantized_weight((scale, zero_point)), layer.quantized_weight())


def test_per_tensor_weights_share_one_grid() -> None:
    student = calibrated(Small(nn.ReLU()), 8, find_protocol({"weight_granularity": "per-tensor"}), Bits(2, 4))
    assert all(layer.quantized_weight().unique().numel() <= 4 for layer in student.layers.values())


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


def test_batch_norm_is_not_folded_into_a_layer_that_standardises_its_weight() -> None:
    network = randomised(nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)))
    network(images(8))
    student = calibrated(network, 8, HARDWARE)
    with torch.no_grad(), student.full_precision():
        torch.testing.assert_close(student(images(8)), network(images(8)), rtol=1e-4, atol=1e-5)


def test_what_stays_float_is_listed() -> None:
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=10)
    assert Student(Teacher(vit, task_of(32)), LINEAGE, W4A4).left_float == []
    attention = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)  # with a key of its own: torch's module stays whole
    vit.encoder.layers[1].self_attention = attention
    names = ["encoder.layers.encoder_layer_1.self_attention (MultiheadAttention)"]
    assert Student(Teacher(vit, task_of(32)), LINEAGE, W4A4).left_float == names
    swin = torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=10)  # its attention is a function that torch.fx keeps whole
    student = Student(Teacher(swin, task_of(32)), PROTOCOLS["full"], W4A4)
    assert student.left_float == []
    assert share_of(work_of(student)) == (1, 1)


def test_a_layer_that_reads_one_of_several_outputs_is_quantized_there() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8 * 24, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1, 2)
            return self.fc(self.attention(x, x, x)[0].flatten(1))  # type: ignore[no-any-return]

    assert len(calibrated(Attends().eval(), 8, HARDWARE).quantizers) == 3, "the image; what the attention joins; what the classifier reads"


def test_a_deep_copy_is_independent_and_a_state_restores_every_bit() -> None:
    network = randomised(Small(nn.SiLU()))
    student, x = calibrated(network, 8, HARDWARE), images(8)
    student.observe(x)
    twin = copy.deepcopy(student)
    fresh = Student(Teacher(network, task_of(8)), HARDWARE, W4A4)
    fresh.load_state_dict(student.state_dict())
    with torch.no_grad():
        before = student(x)
        for parameter in twin.parameters():
            parameter.add_(0.1)
        assert not torch.equal(twin(x), before)
        assert torch.equal(twin(x), twin.observe(x).logits)
        assert torch.equal(student(x), before)
        assert torch.equal(fresh(x), before)
    fresh.check_ranges()


def test_training_moves_weights_and_no_range() -> None:
    student = calibrated(randomised(Small(nn.ReLU())), 8)
    ranges = {k: v.clone() for k, v in student.state_dict().items() if "quantizers" in k}
    student.training_mode(True)
    student(images(8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in student.named_parameters() if n.endswith("weight"))
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in ranges.items())


@pytest.mark.parametrize(("mode", "moves"), [("fixed", False), ("trained", True)])
def test_bn_statistics_move_only_where_the_protocol_trains_them(mode: str, moves: bool) -> None:
    student = calibrated(Small(nn.ReLU()), 8, find_protocol({"batch_norm": mode}))
    before = student.batch_norms[0].running_mean.clone()  # type: ignore[union-attr]
    student.training_mode(True)
    student(images(8))
    student.training_mode(False)
    after = student.batch_norms[0].running_mean.clone()  # type: ignore[union-attr]
    assert torch.equal(before, after) is not moves
    student(images(8))
    assert torch.equal(after, student.batch_norms[0].running_mean)  # type: ignore[arg-type]


def test_quantizers_without_a_range_are_named() -> None:
    student = Student(Teacher(Small(nn.ReLU()), task_of(8)), LINEAGE, W4A4)
    with pytest.raises(UserError, match=r"3 activation quantizers have no range \(activation, activation_1, activation_2\)"):
        student.check_ranges()


def test_full_precision_switches_back_even_after_an_error() -> None:
    student = calibrated(Small(nn.ReLU()), 8)
    parts = [m for m in student.modules() if isinstance(m, ActivationQuantizer | QuantizedLayer)]
    with student.full_precision():
        assert not any(m.enabled for m in parts)
    with pytest.raises(RuntimeError), student.full_precision():
        student(torch.zeros(1, 5, 8, 8))
    assert all(m.enabled for m in parts)


def joined_layers(student: Student) -> int:
    student(images(student.task.size))
    return sum(isinstance(m, NormalisedLayer) for m in student.__dict__["_tuned_graph"].modules())


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["lineage", {"gradient": "clipped", "weight_granularity": "per-tensor"}])
@pytest.mark.parametrize("name", ["cv:resnet20_cifar10", "tv:mobilenet_v3_small", "tv:googlenet"])
def test_layers_joined_with_their_batch_norms_give_the_values_and_gradients_of_two(name: str, protocol: object) -> None:
    build, size = ZOO[name]
    network = randomised(build()).double()
    torch.set_default_dtype(torch.float64)
    try:
        student = calibrated(network, size, find_protocol(protocol), classes=10 if "cifar" in name else 1000)  # type: ignore[arg-type]
        x = images(size)
        assert joined_layers(student) > 15
        apart = student.observe(x).logits  # layer after layer
        torch.testing.assert_close(student(x), apart, rtol=1e-9, atol=1e-9)
        given = {}
        for way in (student, student.traced):
            student.zero_grad()
            way(x).square().sum().backward()
            given[way] = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        assert given[student].keys() == given[student.traced].keys() == dict(student.named_parameters()).keys()
        for key, gradient in given[student].items():
            torch.testing.assert_close(gradient, given[student.traced][key], rtol=1e-7, atol=1e-9, msg=key)
    finally:
        torch.set_default_dtype(torch.float32)


def test_layers_are_joined_only_where_nothing_can_be_told_from_two() -> None:
    student, x = calibrated(randomised(get_model("resnet20_cifar10")), 32), images(32)
    assert joined_layers(student) == 21, "every convolution of this network"
    layer = next(iter(student.layers.values()))
    heard: list[Tensor] = []
    layer.register_forward_hook(lambda module, given, output: heard.append(output))
    student(x)
    assert len(heard) == 1, "who listens between layer and norm hears the layer"
    student = calibrated(randomised(get_model("resnet20_cifar10")), 32, find_protocol({"batch_norm": "trained"}))
    student.training_mode(True)
    before = student.batch_norms[0].running_mean.clone()  # type: ignore[union-attr]
    student(x)
    assert not torch.equal(student.batch_norms[0].running_mean, before)  # type: ignore[arg-type]
    student.training_mode(False)
    with torch.no_grad(), student.full_precision():
        assert torch.equal(student(x), student.observe(x).logits)
    with torch.no_grad(), student.batch_statistics():
        assert torch.equal(student(x), student.observe(x).logits)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), "where"),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), "maximum"),
        (lambda x: F.threshold(x, 0.0, 0.0), "threshold"),
        (lambda x: x * (x > 0), "gt"),
        (lambda x: x.clamp(min=-0.1), "clamp"),
        (F.relu, ""),
        (lambda x: x.clamp(min=0), ""),
    ],
)
def test_what_may_be_an_activation_and_stays_float_beside_a_known_one_is_named(act: Callable[[Tensor], Tensor], name: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            head: Tensor = self.head(act(self.b(F.relu(self.a(x)))).mean((2, 3)))
            return head

    teacher = Teacher(Own(), task_of(16))
    left = Student(teacher, LINEAGE, W4A4).left_float
    assert any(name in each and each.endswith("an activation function?)") for each in left) if name else left == []
    assert Student(teacher, HARDWARE, W4A4).left_float == []

"""Weights as people have them: names of wrappers, normalised and pruned weights. The teacher has plain ones, and gives the same answer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.teachers import describe, load, parse_teacher
from dfqbench.teachers.cifar import cifar_resnet

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    classes, size, mean, std = 10, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.up = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2)
        self.module = nn.Sequential(nn.Flatten(), nn.Linear(196, 10))

    def forward(self, x):
        return self.module(self.up(self.relu(self.conv(x))))

plain = Net
"""
NORMED = """
from plain import Net
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

def make():
    net = Net().train()
    for layer in (net.conv, net.up, net.module[1]):
        {apply}
    return net
"""
KINDS = {
    "weight_norm": "weight_norm(layer)",
    "weight_norm over all": "weight_norm(layer, dim=None)",
    "spectral_norm": "spectral_norm(layer)",
    "parametrized weight_norm": "parametrizations.weight_norm(layer)",
    "parametrized spectral_norm": "parametrizations.spectral_norm(layer)",
    "orthogonal": "parametrizations.orthogonal(layer)",
    "pruned": "prune.l1_unstructured(layer, 'weight', 0.5)",
    "pruned twice, with its bias": "[prune.l1_unstructured(layer, n, amount) for n, amount in (('weight', 0.3), ('bias', 0.5), ('weight', 0.2))]",
    "pruned by channels": "prune.ln_structured(layer, 'weight', 0.5, 2, 0)",
    "normalised, and pruned biases": "parametrizations.spectral_norm(layer), prune.l1_unstructured(layer, 'bias', 0.5)",
}
SAVED = [kind for kind in KINDS if kind != "orthogonal"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "plain.py").write_text(FACTORY)
    return tmp_path


def apply(kind: str, network: nn.Module) -> nn.Module:
    """What the factory of `kind` does, with numbers as after training."""
    names = {"parametrizations": parametrizations, "prune": prune, "spectral_norm": spectral_norm, "weight_norm": weight_norm}
    for layer in (network.conv, network.up, network.module[1]):  # type: ignore[index]
        exec(KINDS[kind], {**names, "layer": layer})
    network.train()
    for _ in range(5):  # power iterations
        network(images())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.25)
    return network.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _old_ways_are_deprecated() -> None:
    warnings.simplefilter("ignore", FutureWarning)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_normalised_or_pruned_network_has_plain_weights_and_the_same_answer(kind: str, suffix: str, folder: Path) -> None:
    (folder / "normed.py").write_text(NORMED.format(apply=KINDS[kind]))
    torch.manual_seed(0)
    network = apply(kind, load(parse_teacher({"model": f"{folder}/plain.py:plain"})).requires_grad_(True))
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in network.state_dict().items()}
    path = folder / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    spec = parse_teacher({"model": f"{folder}/normed.py:make", "weights": str(path)})
    card, loaded = describe(spec), load(spec)
    plain = load(parse_teacher({"model": f"{folder}/plain.py:plain"}))
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert card.parameters == sum(p.numel() for p in plain.parameters())
    with torch.no_grad():
        expected = network(images())
        torch.testing.assert_close(loaded(images()), expected, rtol=1e-5, atol=1e-6)
        teacher = Teacher(loaded, card.task)
        torch.testing.assert_close(teacher(images()), expected, rtol=1e-5, atol=1e-5)
    student = Student(teacher, PROTOCOLS["lineage"], Bits(4, 4))
    assert {n.rpartition(".")[2] for n, _ in student.named_parameters()} == {"weight", "bias"}
    student.track_ranges(True)
    student(images()).square().sum().backward()
    layer = student.layers["conv"].layer
    before = student(images())
    with torch.no_grad():
        layer.weight.add_(layer.weight.grad, alpha=0.1)  # type: ignore[arg-type]
    assert not torch.equal(student(images()), before), "what trains is what computes"


@pytest.mark.parametrize("kind", SAVED)
def test_a_plain_network_takes_what_a_normalised_or_pruned_one_saved(kind: str, folder: Path) -> None:
    spec = {"model": f"{folder}/plain.py:plain"}
    network = apply(kind, load(parse_teacher(spec)).requires_grad_(True))
    save_file({f"_orig_mod.{name}": value.clone() for name, value in network.state_dict().items()}, folder / "w.safetensors")
    loaded = load(parse_teacher({**spec, "weights": str(folder / "w.safetensors")}))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images()), network(images()), rtol=1e-5, atol=1e-5)


def test_a_factorys_own_normalised_weights_are_baked(folder: Path) -> None:
    text = NORMED.format(apply=KINDS["weight_norm"]).replace("    net = Net", "    import torch\n    torch.manual_seed(3)\n    net = Net")
    (folder / "normed.py").write_text(text)
    card = describe(parse_teacher(f"{folder}/normed.py:make"))
    assert card.weights == "factory"
    network = load(parse_teacher(f"{folder}/normed.py:make"))
    assert not any("weight_g" in name for name in network.state_dict())


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "_orig_mod.module._orig_mod."]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(prefix: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = cifar_resnet("resnet20", 10, 1).state_dict()
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    path = tmp_path / f"w{suffix}"
    save_file(wrapped, path) if suffix == ".safetensors" else torch.save({"state_dict": wrapped}, path)
    network = load(parse_teacher({"model": "cifar:resnet20", "weights": str(path)}))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_wrapped_parts_fit_and_a_part_that_is_called_module_keeps_its_name(suffix: str, folder: Path) -> None:
    spec = {"model": f"{folder}/plain.py:plain"}
    state = load(parse_teacher(spec)).state_dict()
    within = {name.replace("conv.", "conv.module.").replace("module.1.", "module._orig_mod.1."): v for name, v in state.items()}
    for number, given in enumerate((state, within, {f"module.{name}": v for name, v in within.items()})):
        path = folder / f"{number}{suffix}"
        save_file(given, path) if suffix == ".safetensors" else torch.save(given, path)
        network = load(parse_teacher({**spec, "weights": str(path)}))
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_what_does_not_fit_is_still_named_by_its_own_name(folder: Path) -> None:
    spec = {"model": f"{folder}/plain.py:plain"}
    state = copy.copy(load(parse_teacher(spec)).state_dict())
    state["head.weight_g"] = state.pop("conv.weight")
    save_file(state, folder / "w.safetensors")
    with pytest.raises(UserError, match=r"does not fit the network: missing conv\.weight; unexpected head\.weight_g"):
        load(parse_teacher({**spec, "weights": str(folder / "w.safetensors")}))

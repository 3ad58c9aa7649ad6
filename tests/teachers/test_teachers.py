"""Teachers: what is asked of a network, which weights are let in, and what is said where something is wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfqbench.errors import UserError, UserErrors
from dfqbench.task import Task
from dfqbench.teachers import TeacherCard, build, describe, list_models, load, parse_teacher
from dfqbench.teachers.cifar import BLOCKS_PER_STAGE, cifar_resnet

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 4)
        nn.init.constant_(self.linear.weight, 0.01)
        nn.init.constant_(self.linear.bias, 0.0)

    def forward(self, x):
        return self.linear(x.flatten(1))

def make():
    return Net()

def complete():
    net = Net()
    net.classes, net.size, net.mean, net.std = 4, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return net

def random_weights():
    net = complete()
    nn.init.normal_(net.linear.weight)
    return net

def broken():
    raise RuntimeError("no such luck")

def number():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "r20.safetensors"
    torch.manual_seed(0)
    save_file(cifar_resnet("resnet20", 7, 1).state_dict(), path)
    return path


def refusal(given: str | dict[str, Any]) -> str:
    """What describe says; one line."""
    with pytest.raises(UserError) as caught:
        describe(parse_teacher(given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the CIFAR ResNets


@pytest.mark.parametrize(("name", "published"), [("resnet20", 0.27e6), ("resnet32", 0.46e6), ("resnet44", 0.66e6), ("resnet56", 0.85e6)])
def test_cifar_resnets_have_the_depth_and_the_size_of_the_paper(name: str, published: float) -> None:
    network = cifar_resnet(name)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    assert layers == int(name.removeprefix("resnet"))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(published, rel=0.02)


def test_shortcuts_take_every_second_pixel_and_pad_with_zero_channels() -> None:
    block = cifar_resnet("resnet20").layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    x = torch.rand(2, 16, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("name", BLOCKS_PER_STAGE)
def test_traced_cifar_resnets_give_the_same_answer(name: str) -> None:
    network = cifar_resnet(name, classes=5, in_channels=1).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), network(x))


# --- parsing


def test_a_name_and_a_mapping_are_the_same_teacher() -> None:
    assert parse_teacher("timm:resnet18") == parse_teacher({"model": "timm:resnet18"})
    assert parse_teacher("timm:resnet18").label == "resnet18"
    assert parse_teacher({"model": "a/b.py:make", "name": "mine"}).label == "mine"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("resnet18", "write ZOO:NAME with a zoo of torchvision, timm, pytorchcv, cifar"),
        ("torchvison:resnet18", "unknown zoo 'torchvison': did you mean 'torchvision'?"),
        ({"model": "cifar:resnet20", "wieghts": "x"}, "unknown setting 'wieghts': did you mean 'weights'?"),
        ({"weights": "x"}, "one under 'model'"),
        ({"model": "cifar:resnet20", "size": 0}, "size: Value error, a whole number of pixels is expected, at least 1, or [height, width], not 0"),
        ({"model": "cifar:resnet20", "crop_ratio": 1.5}, "crop_ratio"),
        ({"model": "cifar:resnet20", "interpolation": "cubic"}, "'bicubic'"),
        ({"model": "cifar:resnet20", "mean": [0.5], "std": [0.1, 0.1]}, "mean has 1 channels, std has 2"),
        ({"model": "cifar:resnet20", "std": [0.0]}, "std must be above 0"),
    ],
)
def test_a_wrong_setting_is_named(given: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_teacher(given)
    assert said in str(caught.value)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        parse_teacher({"model": "cifar:resnet20", "wieghts": "x", "clases": 3})
    assert len(caught.value.messages) == 2


# --- names


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("torchvision:resnet19", "torchvision has no network 'resnet19': did you mean 'resnet18'?"),
        ("timm:resnett18", "timm has no network 'resnett18': did you mean 'resnet18'?"),
        ("timm:resnet18.nobody", "timm has no network 'resnet18.nobody'"),
        ("pytorchcv:resnet20_cifar11", "did you mean 'resnet20_cifar10'?"),
        ("cifar:resnet21", "known: resnet20, resnet20_exits, resnet20_weighted, resnet32"),
        ("cifar:resnet20", "train it with `dfqbench pretrain`"),
        ("torchvision:vit_h_14", "torchvision has no IMAGENET1K_V1 weights for it"),
    ],
)
def test_an_unknown_network_is_answered_with_the_nearest(model: str, said: str) -> None:
    assert said in refusal(model)


def test_models_are_listed_by_wildcard_with_and_without_their_zoo() -> None:
    assert {"torchvision:resnet18", "timm:resnet18", "pytorchcv:resnet18"} <= set(list_models("resnet18"))
    assert list_models("cifar:*resnet*") == sorted(f"cifar:{name}{kind}" for name in BLOCKS_PER_STAGE for kind in ("", "_exits", "_weighted"))
    assert "timm:resnet18.a1_in1k" in list_models("timm:resnet18*")
    assert not list_models("nothing_like_this*")


def test_a_zoo_that_is_not_installed_is_said_and_the_others_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.warns(UserWarning, match="pip install timm"):
        assert list_models("resnet18") == ["torchvision:resnet18", "pytorchcv:resnet18"]
    assert "pip install timm" in refusal("timm:resnet18")


@pytest.mark.parametrize("model", ["torchvision:resnet18", "pytorchcv:resnet20_cifar10", "timm:resnet18"])
def test_a_failed_download_asks_for_a_file(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("Name or service not known\nand a page of advice")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr("pytorchcv.models.common.model_store.get_model_file", fail)
    if model.startswith("timm:"):
        monkeypatch.setattr("timm.create_model", fail)
    said = refusal(model)
    assert said == f"{model}: the zoo's weights could not be had (OSError: Name or service not known); give `weights: FILE`"


# --- weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {f"module.{name}": value for name, value in s.items()}}]
)
def test_weights_arrive_in_the_network_from_every_kind_of_file(suffix: str, wrap: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = cifar_resnet("resnet20", 10, 3).state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(wrap(state), path)
    network = load(parse_teacher({"model": "cifar:resnet20", "weights": str(path)}))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_classes_and_channels_are_read_off_the_weights(weights: Path) -> None:
    card = describe(parse_teacher({"model": "cifar:resnet20", "weights": str(weights)}))
    assert (card.task.classes, card.task.channels, card.task.size, card.task.crop_ratio) == (7, 1, 32, 1.0)
    assert card.task.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3, abs=1e-6),)
    assert card.parameters == sum(p.numel() for p in cifar_resnet("resnet20", 7, 1).parameters())


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(how: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": {"conv1.weight": Evil(marker)}}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    said = refusal({"model": "cifar:resnet20", "weights": str(path)})
    assert f"{path}: refused" in said
    assert "system" in said or how == "pickle"
    assert not marker.exists()
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert marker.exists()  # so the file was dangerous indeed


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_named(suffix: str, tmp_path: Path) -> None:
    state = cifar_resnet("resnet20").state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    said = refusal({"model": "cifar:resnet20", "weights": str(path)})
    assert str(path) in said
    assert "truncated or damaged" in said


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>404</html>"])
def test_a_file_of_something_else_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    assert str(path) in refusal({"model": "cifar:resnet20", "weights": str(path)})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"classes": 100}, "other shape: linear.weight (7, 64) where the network has (100, 64)"),
        ({"model": "cifar:resnet32"}, "missing layer1.3.conv1.weight, layer1.3.bn1.weight, layer1.3.bn1.bias and 57 more"),
        ({"model": "torchvision:resnet18"}, "unexpected"),
        ({"weights": "nowhere.safetensors"}, "there is no weights file nowhere.safetensors"),
        ({"weights": "r20.onnx"}, "must be a file that ends with .safetensors, .pth or .pt"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean has 3 values, the network takes 1 channels"),
    ],
)
def test_weights_that_do_not_fit_are_named(settings: dict[str, Any], said: str, weights: Path) -> None:
    assert said in refusal({"model": "cifar:resnet20", "weights": str(weights), **settings})


def test_an_unexpected_a_missing_and_a_nan_entry_are_never_ignored(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for change, said in (
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.pop("bn1.weight"), "missing bn1.weight"),
        (lambda s: s["bn1.weight"].fill_(float("nan")), "not finite: bn1.weight"),
        (lambda s: s.update({"bn1.weight": torch.ones(16, dtype=torch.int64)}), "other kind: bn1.weight torch.int64"),
    ):
        state = cifar_resnet("resnet20").state_dict()
        change(state)
        save_file(state, path)
        assert said in refusal({"model": "cifar:resnet20", "weights": str(path)})


def test_the_zoo_is_given_as_many_classes_as_the_config_says(tmp_path: Path) -> None:
    import torchvision

    path = tmp_path / "w.pth"
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    assert "`classes: N` builds the network for N classes" in refusal({"model": "torchvision:resnet18", "weights": str(path)})
    assert describe(parse_teacher({"model": "torchvision:resnet18", "weights": str(path), "classes": 10})).task.classes == 10


# --- what a network expects of an image


@pytest.mark.slow
def test_each_zoo_says_what_its_networks_expect(tmp_path: Path) -> None:
    import timm
    import torchvision
    from pytorchcv.model_provider import get_model

    path = str(tmp_path / "w.pth")
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for model, network, task in (
        ("torchvision:mobilenet_v3_small", torchvision.models.mobilenet_v3_small(), Task(1000, 3, 224, *imagenet, 0.875, "bilinear")),
        ("timm:resnet18", timm.create_model("resnet18"), Task(1000, 3, 224, *imagenet, 0.95, "bicubic")),
        ("pytorchcv:mobilenet_wd4", get_model("mobilenet_wd4"), Task(1000, 3, 224, *imagenet, 0.875, "bilinear")),
        (
            "pytorchcv:resnet20_cifar100",
            get_model("resnet20_cifar100"),
            Task(100, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 1.0, "bilinear"),
        ),
    ):
        torch.save(network.state_dict(), path)
        assert describe(parse_teacher({"model": model, "weights": path})).task == task


def test_the_config_wins_over_the_zoo(weights: Path) -> None:
    changes = {"size": 16, "mean": [0.1], "std": [0.2], "crop_ratio": 0.5, "interpolation": "nearest"}
    card = describe(parse_teacher({"model": "cifar:resnet20", "weights": str(weights), **changes}))
    assert card.task == Task(7, 1, 16, (0.1,), (0.2,), 0.5, "nearest")


def test_torchvisions_old_densenet_names_fit(tmp_path: Path) -> None:
    import re

    import torchvision

    state = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value for name, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "w.pth")
    network = load(parse_teacher({"model": "torchvision:densenet121", "weights": str(tmp_path / "w.pth")}))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


# --- a user's file


def test_a_factory_in_a_file_is_a_teacher(factory: Path) -> None:
    card = describe(parse_teacher(f"{factory}:complete"))
    assert (card.label, card.model, card.weights) == ("complete", "net.py:complete", "factory")
    assert card.task == Task(4, 3, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert card.source_sha256 is not None
    assert card.parameters == 4 * 192 + 4


def test_the_config_can_say_what_a_factory_does_not(factory: Path) -> None:
    settings = {"classes": 4, "size": 8, "mean": [0.5] * 3, "std": [0.2] * 3}
    assert describe(parse_teacher({"model": f"{factory}:make", **settings})).task.std == (0.2, 0.2, 0.2)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("make", {"classes": 4, "mean": [0.5] * 3}, "size, std missing: give them in the config, or as attributes"),
        ("mke", {}, "has no factory 'mke': did you mean 'make'?"),
        ("broken", {}, "the factory failed: RuntimeError: no such luck"),
        ("number", {}, "returns int, not a torch.nn.Module"),
        ("random_weights", {}, "returns other weights each time"),
        ("complete", {"classes": 5}, "answers one image with (1, 4), not with (1, 5) logits"),
        ("complete", {"size": 9}, "cannot take an image of 3 x 9 x 9"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(name: str, settings: dict[str, Any], said: str, factory: Path) -> None:
    assert said in refusal({"model": f"{factory}:{name}", **settings})


def test_a_missing_and_a_broken_file_are_named(tmp_path: Path) -> None:
    assert f"there is no file {tmp_path / 'no.py'}" in refusal(f"{tmp_path / 'no.py'}:make")
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in refusal(f"{tmp_path / 'bad.py'}:make")


# --- identity and memory


def test_the_identity_is_that_of_the_file_and_not_of_its_place(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes())
    one, two = (describe(parse_teacher({"model": "cifar:resnet20", "weights": str(path)})) for path in (weights, other))
    assert one.weights_sha256 == two.weights_sha256
    state = cifar_resnet("resnet20", 7, 1).state_dict()
    save_file(state, other)
    assert describe(parse_teacher({"model": "cifar:resnet20", "weights": str(other)})).weights_sha256 != one.weights_sha256


def test_building_takes_nothing_from_the_global_random_stream(weights: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(parse_teacher({"model": "cifar:resnet20", "weights": str(weights)}))
    assert torch.equal(torch.rand(4), expected)


def test_a_card_survives_json(weights: Path) -> None:
    card = describe(parse_teacher({"model": "cifar:resnet20", "weights": str(weights)}))
    assert TeacherCard.from_dict(json.loads(json.dumps(card.as_dict()))) == card


def test_a_remembered_card_is_used_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "w.safetensors", tmp_path / "cache"
    save_file(cifar_resnet("resnet20", 3).state_dict(), path)
    spec = parse_teacher({"model": "cifar:resnet20", "weights": str(path)})
    first = describe(spec, cache)
    built: list[str] = []
    real = build.build
    monkeypatch.setattr(build, "build", lambda spec: built.append(spec.model) or real(spec))
    assert describe(spec, cache) == first
    assert not built
    save_file(cifar_resnet("resnet20", 4).state_dict(), path)
    assert describe(spec, cache).task.classes == 4
    assert built
    next(cache.iterdir()).write_text("{ damaged")
    for file in cache.iterdir():
        file.write_text("{ damaged")
    assert describe(spec, cache).task.classes == 4


def test_a_remembered_card_needs_no_torch(weights: Path, tmp_path: Path) -> None:
    spec = {"model": "cifar:resnet20", "weights": str(weights)}
    describe(parse_teacher(spec), tmp_path)
    program = (
        "import sys, pathlib; from dfqbench.teachers import describe, parse_teacher\n"
        f"card = describe(parse_teacher({spec!r}), pathlib.Path({str(tmp_path)!r}))\n"
        "assert card.task.classes == 7 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=60)


def test_the_identity_of_a_state_ignores_layout_and_sees_every_bit() -> None:
    from dfqbench.teachers.weights import hash_tensors

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 4, 4)))
    same = hash_tensors([("x", x)])
    assert hash_tensors([("x", x.to(memory_format=torch.channels_last))]) == same
    assert hash_tensors([("y", x)]) != same
    assert hash_tensors([("x", x.view(3, 2, 4, 4))]) != same
    x[0, 0, 0, 0] = torch.nextafter(x[0, 0, 0, 0], torch.tensor(9.0, dtype=x.dtype))
    assert hash_tensors([("x", x)]) != same

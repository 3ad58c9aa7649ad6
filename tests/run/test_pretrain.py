"""Pretraining: learns, is reproducible to the byte, writes whole files or none, and says what keeps it from starting."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dfqbench.data import Images
from dfqbench.errors import UserError
from dfqbench.run import pretrain as module
from dfqbench.run.pretrain import Recipe, pretrain, train
from dfqbench.task import Task
from dfqbench.teachers import describe, load, parse_teacher
from dfqbench.teachers.cifar import CifarResNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 32 x 32 images that differ in colour, 40 each."""
    root, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (root / name).mkdir()
        for index in range(40):
            pixels = draw.integers(0, 100, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root


@pytest.mark.slow
def test_a_trained_network_is_a_teacher_that_knows_its_classes(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "new" / "r20.safetensors"
    result = pretrain("cifar:resnet20", f"imagefolder:{folder}", out, epochs=12, progress=said.append, test=f"imagefolder:{folder}")
    assert [line.split(":")[0] for line in said[:-1]] == [f"epoch {epoch}/12" for epoch in range(1, 13)]
    assert result.accuracy is not None
    assert result.accuracy >= 95
    assert f"{result.accuracy:.2f} % of 80 images of imagefolder:{folder.name}" in said[-1]
    task = describe(parse_teacher({"model": "cifar:resnet20", "weights": str(out)})).task
    assert (task.classes, task.channels, task.size) == (2, 3, 32)
    assert not load(parse_teacher({"model": "cifar:resnet20", "weights": str(out)})).training
    assert [path.name for path in out.parent.iterdir()] == ["r20.safetensors"]


def test_the_file_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    pretrain("cifar:resnet20", f"imagefolder:{folder}", tmp_path / "w.safetensors", epochs=1, seed=4, progress=lambda line: None)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["dfqbench"])
    assert (facts["seed"], facts["recipe"]["epochs"], facts["source"]) == (4, 1, f"imagefolder:{folder.name}")
    assert facts["accuracy"] is None
    assert facts["recipe"]["flip"] is True


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    contents = []
    for index, seed in enumerate((0, 0, 1)):
        torch.manual_seed(index)  # what happened before must not matter
        out = tmp_path / f"{index}.safetensors"
        pretrain("cifar:resnet20", f"imagefolder:{folder}", out, epochs=1, seed=seed, progress=lambda line: None)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@pytest.mark.slow
def test_digits_are_learnt_by_one_channel_without_flips(tmp_path: Path) -> None:
    """Two epochs only: that twelve reach 97 % is measured, and stands in the module's docstring."""
    said: list[str] = []
    pretrain("cifar:resnet20", "digits", tmp_path / "w.safetensors", epochs=2, progress=said.append)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["dfqbench"])
        assert file.get_tensor("conv1.weight").shape == (16, 1, 3, 3)
    assert facts["recipe"]["flip"] is False
    assert facts["test_set"] == "digits"
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said[:2]]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("model", "source", "out", "more", "said"),
    [
        ("torchvision:resnet18", "digits", "w.safetensors", {}, "only cifar: networks can be trained on digits, not 'torchvision:resnet18'"),
        ("cifar:resnet21", "digits", "w.safetensors", {}, "unknown network 'cifar:resnet21': did you mean"),
        ("cifar:resnet20", "digit", "w.safetensors", {}, "did you mean 'digits'?"),
        ("cifar:resnet20", "digits", "w.pth", {}, "weights are written as .safetensors, not as 'w.pth'"),
        ("cifar:resnet20", "digits", "w.safetensors", {"epochs": 0}, "0 epochs: at least one is needed"),
        ("cifar:resnet20", "digits", "there.safetensors", {}, "there.safetensors exists already"),
    ],
)
def test_what_is_wrong_is_said_before_training(model: str, source: str, out: str, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(UserError) as caught:
        pretrain(model, source, tmp_path / out, progress=lambda line: pytest.fail("training began"), **more)
    assert said in str(caught.value)
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_an_interrupted_write_leaves_the_old_file_and_no_other(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "w.safetensors"
    out.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        pretrain("cifar:resnet20", f"imagefolder:{folder}", out, epochs=1, progress=lambda line: None, overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_training_that_diverges_writes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Recipe", lambda epochs, flip: Recipe(epochs, peak_lr=1e20, flip=flip))
    with pytest.raises(UserError, match=r"training diverged in epoch \d \(loss (nan|inf)\); nothing is written"):
        pretrain("cifar:resnet20", f"imagefolder:{folder}", tmp_path / "w.safetensors", epochs=3, progress=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_shifted_image_is_the_image_moved_and_a_flipped_one_mirrored() -> None:
    pixels = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4, 1)
    padded = torch.nn.functional.pad(pixels, (0, 0, 1, 1, 1, 1))
    possible = set()
    for flip in (False, True):
        source = padded.flip(2) if flip else padded
        possible |= {source[0, top : top + 4, left : left + 4, 0].numpy().tobytes() for top in range(3) for left in range(3)}
    stream = torch.Generator().manual_seed(0)
    moved = module._moved(padded, torch.zeros(400, dtype=torch.int64), 4, Recipe(1, shift=1), stream)
    assert {image.numpy().tobytes() for image in moved[..., 0]} == possible
    still = module._moved(padded, torch.zeros(3, dtype=torch.int64), 4, Recipe(1, shift=1, flip=False), stream)
    assert still.shape == (3, 4, 4, 1)


def test_weight_decay_spares_batch_norm_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    real = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda given, **more: groups.extend(given) or real(given, **more))
    network = CifarResNet(1, 2, 1)
    images = Images(lambda i: np.zeros((32, 32, 1), np.uint8), np.array([0, 1, 0]), (32, 32, 1), 2, in_memory=True)
    train(network, images, Task(2, 1, 32, (0.5,), (0.5,)), Recipe(1), 0, torch.device("cpu"), progress=lambda line: None)
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    names = {id(p): name for name, p in network.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "bn" not in names[id(p)] for p in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(names)

"""Evaluation: equal to a plain loop, without a trace in the network, and equal to what the real teachers are known to reach."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfqbench.data import Images, find_set
from dfqbench.engine.evaluate import evaluate, state_hash
from dfqbench.errors import UserError
from dfqbench.task import Task
from dfqbench.teachers import describe, load, parse_teacher
from dfqbench.teachers.cifar import cifar_resnet

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not (REAL / "unpack.py").is_file(), reason="the real images and weights of ../shared/data are not here")


def random_images(count: int = 53, classes: int = 10, channels: int = 3, in_memory: bool = True) -> Images:
    draw = np.random.default_rng(5)
    pixels = draw.integers(0, 256, (count, 32, 32, channels), dtype=np.uint8)
    return Images(lambda i: pixels[i], draw.integers(0, classes, count), (32, 32, channels), classes, in_memory)


def lively(classes: int = 10, channels: int = 3) -> nn.Module:
    """A network whose answers differ from image to image."""
    torch.manual_seed(2)
    network = cifar_resnet("resnet20", classes, channels)
    network.train()
    for _ in range(3):  # sets the running statistics
        network(torch.randn(32, channels, 32, 32))
    return network


TASK = Task(10, 3, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("batch_size", [10, 500])
def test_evaluation_equals_a_plain_loop_image_for_image(batch_size: int, in_memory: bool) -> None:
    network, images = lively(), random_images(in_memory=in_memory)
    found = evaluate(network, images, TASK, batch_size=batch_size)
    correct, in_five, losses = [], [], []
    network.eval()
    for [pixels], [label] in images.batches(1):
        x = (pixels.astype(np.float64) / 255 - TASK.mean) / TASK.std
        with torch.no_grad():
            logits = network(torch.from_numpy(x.transpose(2, 0, 1)[None].astype(np.float32)))[0].double().numpy()
        correct.append(int(logits.argmax()) == label)
        in_five.append(label in np.argsort(-logits)[:5])
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    assert 0 < sum(correct) < len(correct)  # else equality would say little
    assert sum(correct) < sum(in_five) < len(in_five)
    assert found.correct.tolist() == correct
    assert found.correct.dtype == np.bool_
    assert found.top1 == pytest.approx(100 * np.mean(correct))
    assert found.top5 == pytest.approx(100 * np.mean(in_five))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_evaluation_leaves_the_network_and_every_training_flag_as_they_were() -> None:
    network = lively()
    network.train()
    network.layer2.eval()
    flags, before = [module.training for module in network.modules()], state_hash(network)
    evaluate(network, random_images(), TASK)
    assert [module.training for module in network.modules()] == flags
    assert state_hash(network) == before
    assert all(p.requires_grad and not p.is_inference() for p in network.parameters())


def test_the_training_flags_come_back_after_an_error_too() -> None:
    network = lively(classes=9)
    with pytest.raises(UserError, match=r"answers 53 images with \(53, 9\), the evaluation set needs \(53, 10\)"):
        evaluate(network, random_images(), TASK)
    assert all(module.training for module in network.modules())


def test_below_six_classes_there_is_no_top5() -> None:
    task = Task(4, 1, 32, (0.5,), (0.5,))
    assert evaluate(lively(4, 1), random_images(classes=4, channels=1), task).top5 is None


class Broken(nn.Module):
    """Answers nan for every second image, and otherwise the right class of `random_images`."""

    def __init__(self, labels: np.ndarray):
        super().__init__()
        self.labels = torch.from_numpy(labels)

    def forward(self, x: Tensor) -> Tensor:
        logits = nn.functional.one_hot(self.labels, 10).float()
        logits[::2] = float("nan")
        return logits


def test_an_answer_that_is_not_finite_is_wrong() -> None:
    images = random_images()
    found = evaluate(Broken(images.labels), images, TASK)
    assert found.correct.tolist() == [index % 2 == 1 for index in range(53)]
    assert found.top5 == found.top1
    assert np.isnan(found.loss)


def test_bf16_is_autocast_and_comes_close() -> None:
    network, images = lively(), random_images()
    seen: list[torch.dtype] = []
    network.linear.register_forward_hook(lambda module, given, answer: seen.append(answer.dtype))
    exact, rough = evaluate(network, images, TASK), evaluate(network, images, TASK, precision="bf16")
    assert seen == [torch.float32, torch.bfloat16]
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)


def test_the_state_hash_sees_every_parameter_and_every_buffer() -> None:
    network = lively()
    network.register_buffer("hidden", torch.zeros(2), persistent=False)
    seen = {state_hash(network)}
    for change in (
        lambda: network.conv1.weight.data.view(-1)[3:4].mul_(1.0000002),
        lambda: network.bn1.running_mean.add_(1e-3),
        lambda: network.bn1.num_batches_tracked.add_(1),
        lambda: network.hidden.add_(1),
    ):
        change()
        seen.add(state_hash(network))
    assert len(seen) == 5
    network.to(memory_format=torch.channels_last).eval()
    assert state_hash(network) in seen


@pytest.fixture(scope="module")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(REAL / "unpack.py"), str(folder)], check=True, capture_output=True, timeout=60)
    return folder


@pytest.mark.slow
@needs_real_data
@pytest.mark.parametrize(
    ("weights", "images", "measured"),
    [
        ("resnet20_cifar10_jpeg", "lossless", 92.25),
        ("resnet20_cifar10", "lossless", 91.72),
        ("resnet20_cifar10_jpeg", "test", 87.44),  # all 10,000: the slow one
    ],
)
def test_a_real_teacher_has_the_accuracy_that_it_is_known_for(weights: str, images: str, measured: float, real_images: Path) -> None:
    spec = parse_teacher({"model": "cifar:resnet20", "weights": str(REAL / "weights" / f"{weights}.safetensors")})
    task = describe(spec).task
    found = evaluate(load(spec), find_set(f"imagefolder:{real_images / images}").decode(task), task)
    assert round(found.top1, 2) == pytest.approx(measured, abs=0.011 if images == "test" else 1e-9)  # one image of 10,000

"""GDFQ: losses against float64 re-computation, the generator's shapes, and data-freeness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfqbench import Observation, Task
from dfqbench.engine.evaluate import Evaluation, state_hash
from dfqbench.engine.lockstep import Lockstep
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Bundle
from dfqbench.sweep.load import load_sweep
from dfqbench.teachers import load
from dfqbench.testing import StopAfter
from dfqbench_methods.parts.generators import ClassConditionalBatchNorm, LabelledGenerator, UpsampleConv
from dfqbench_methods.parts.losses import batch_norm_loss, distillation_loss

SweepFile = Callable[..., Path]
CIFAR = Task(10, 3, 32, (0.5,) * 3, (0.25,) * 3)


def test_the_batch_norm_loss_is_the_formula_in_float64() -> None:
    generator = np.random.default_rng(0)
    layers, inputs, expected = [], [], 0.0
    for channels, side in ((3, 8), (5, 4), (7, 2)):
        bn = nn.BatchNorm2d(channels)
        x = generator.normal(1.5, 2.0, (6, channels, side, side))
        mu, v = generator.normal(size=channels), generator.uniform(0.5, 2, channels)
        bn.running_mean, bn.running_var = torch.tensor(mu, dtype=torch.float32), torch.tensor(v, dtype=torch.float32)
        layers.append(bn)
        inputs.append(torch.tensor(x, dtype=torch.float32))
        m, s = x.mean((0, 2, 3)), x.var((0, 2, 3))
        expected += (((m - mu) ** 2).mean() + ((s - v) ** 2).mean()) / 3
    loss = batch_norm_loss(Observation(torch.zeros(6, 10), [], inputs, layers))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [10, 100])
def test_the_distillation_loss_averages_the_divergence_over_all_elements(classes: int) -> None:
    generator = np.random.default_rng(1)
    q, p, y = generator.normal(0, 3, (8, classes)), generator.normal(0, 3, (8, classes)), generator.integers(0, classes, 8)
    temperature, weight = 20.0, 0.7

    def log_softmax(z: np.ndarray) -> np.ndarray:
        shifted = z - z.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    log_p, log_q = log_softmax(p / temperature), log_softmax(q / temperature)
    kl = (np.exp(log_p) * (log_p - log_q)).sum() / (8 * classes)
    expected = -log_softmax(q)[np.arange(8), y].mean() + weight * temperature**2 * kl
    loss = distillation_loss(torch.tensor(q), torch.tensor(y), torch.tensor(p), temperature, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_upsample_conv_is_upsampling_then_convolving_with_gradients_too() -> None:
    layer = UpsampleConv(4, 3).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)

    assert torch.allclose(layer(x), plain(x), atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]),
        torch.autograd.grad(plain(x).square().sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-9)


@pytest.mark.parametrize("conditioning", ["embedding", "batch-norm"])
@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 32), (3, 1000, 64), (3, 10, 30)])
def test_generated_batches_are_normalised_images_of_the_tasks_shape(conditioning: str, channels: int, classes: int, size: int) -> None:
    task = Task(classes, channels, size, (0.5,) * channels, (0.25,) * channels)
    generator = LabelledGenerator(task, 100, conditioning)
    images = generator(torch.randn(8, 100), torch.randint(classes, (8,)))
    assert images.shape == (8, channels, size, size)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4)
    assert torch.allclose(images.var((0, 2, 3), unbiased=False), torch.ones(channels), atol=1e-2)


def test_the_cifar_generator_has_the_papers_layers() -> None:
    """Parameter count from the layer list of spec section 1.3, and the eps of 0.8 in the two later norms only."""
    generator = LabelledGenerator(CIFAR, 100, "embedding")
    expected = 10 * 100 + (100 + 1) * 128 * 64 + 2 * 128 + (128 * 9 + 1) * 128 + 2 * 128 + (128 * 9 + 1) * 64 + 2 * 64 + (64 * 9 + 1) * 3
    assert sum(p.numel() for p in generator.parameters()) == expected
    assert [m.eps for m in generator.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, 0.8, 0.8, 1e-5]


def test_the_class_enters_a_conditional_norm() -> None:
    norm = ClassConditionalBatchNorm(4, 3)
    x = torch.randn(6, 4, 2, 2)
    plain = F.batch_norm(x, None, None, training=True)
    assert torch.allclose(norm(x, torch.zeros(6, dtype=torch.long)), plain, atol=1e-6)
    with torch.no_grad():
        norm.gamma.weight[2], norm.beta.weight[2] = 3.0, 1.0
    labels = torch.tensor([0, 2, 1, 2, 0, 0])
    out = norm(x, labels)
    assert torch.allclose(out[labels == 2], 3 * plain[labels == 2] + 1, atol=1e-5)
    assert torch.allclose(out[labels != 2], plain[labels != 2], atol=1e-6)


def test_ranges_are_tracked_for_the_calibration_epochs_whatever_the_warmup() -> None:
    method = find_method("gdfq")

    def plan(**settings: int) -> list[tuple[str, int, bool, int]]:
        teacher = Teacher(nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), CIFAR)
        return [(p.name, p.epochs, p.distill, p.calibration_epochs) for p in method(teacher, method.Config(**settings), 0).phases()]

    assert plan() == [("warm-up", 4, False, 4), ("train", 396, True, 0)]
    assert plan(**method.Config.presets["imagenet"] | {"conditioning": "embedding"}) == [("warm-up", 50, False, 4), ("train", 350, True, 0)]
    assert plan(warmup_epochs=1, epochs=10) == [("warm-up", 1, False, 4), ("train", 9, True, 3)]


@pytest.mark.slow
def test_the_generator_learns_to_be_classified_and_to_match_the_statistics(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4"], methods=["gdfq"], budget={"epochs": 4, "iterations": 25, "batch_size": 32}), cache_folder())
    (cell,) = loaded.cells
    lockstep = Lockstep(
        Bundle((cell,)),
        Teacher(load(loaded.teachers[cell.teacher]), cell.teacher.task),
        torch.device("cpu"),
        lambda s: Evaluation(np.array([True]), 0.0, None, 0.0),
    )

    lockstep.run(StopAfter())
    first, last = lockstep.trainees[0].history[0], lockstep.trainees[0].history[-1]
    assert last["generator_ce"] < first["generator_ce"]
    assert last["generator_bns"] < 0.95 * first["generator_bns"]


def test_a_poisoned_evaluation_set_changes_no_student(sweep_file: SweepFile) -> None:
    """Evaluation runs every epoch, once on real images and once on noise with wrong labels: the students end with the same bits."""
    from dfqbench.data import Images
    from dfqbench.engine.evaluate import evaluate

    loaded = load_sweep(sweep_file(bits=["w4a4"]), cache_folder())
    (cell,) = loaded.cells
    real = loaded.evaluation.decode(cell.teacher.task)
    random = np.random.default_rng(3)
    noise = random.integers(0, 256, (len(real), 16, 16, 3), dtype=np.uint8)
    poisoned = Images(lambda i: noise[i], (real.labels + 3) % 10, (16, 16, 3), 10)
    ends = []
    for images in (real, poisoned):
        teacher = Teacher(load(loaded.teachers[cell.teacher]), cell.teacher.task)
        lockstep = Lockstep(
            Bundle((cell,)), teacher, torch.device("cpu"), lambda s, images=images: evaluate(s, images, cell.teacher.task), evaluate_every=1
        )

        lockstep.run(StopAfter())
        ends.append((state_hash(lockstep.trainees[0].student), lockstep.trainees[0].evaluation))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1].correct.tolist() != ends[1][1].correct.tolist()  # type: ignore[union-attr]

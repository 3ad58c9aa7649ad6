"""Qimera: latents, soft labels, class-conditional norms on mixtures, and the losses against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dfqbench import Task, Teacher
from dfqbench.method.registry import find_method
from dfqbench.testing import Trial, small_task, small_teacher
from dfqbench_methods.parts.attention import classifier_weight
from dfqbench_methods.parts.generators import ClassConditionalBatchNorm
from dfqbench_methods.qimera import Qimera, SoftBatch, normalised


def method(**settings: object) -> Qimera:
    cls = find_method("qimera")
    assert cls is Qimera
    made = Qimera(small_teacher(small_task()), Qimera.Config(**{"batch_size": 64, **settings}), seed=0)
    torch.manual_seed(0)
    made.setup()
    return made


def test_plain_latents_are_normalised_image_by_image() -> None:
    latents, targets, labels = method().plain()
    assert latents.shape == (64, 16), "as wide as the classifier's input"
    assert torch.allclose(latents.mean(1), torch.zeros(64), atol=1e-6)
    assert torch.allclose(latents.var(1, correction=0), torch.ones(64), atol=1e-3)
    assert torch.equal(targets.argmax(1), labels)
    assert torch.equal(targets.sum(1), torch.ones(64))


def test_slots_of_mixed_latents_are_normalised_over_the_batch_and_rows_are_not() -> None:
    latents = torch.randn(64, 3, 16) * 4 + torch.arange(3)[None, :, None]
    slots = normalised(latents, (0, 2))
    assert torch.allclose(slots.mean((0, 2)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(slots.var((0, 2), correction=0), torch.ones(3), atol=1e-4)
    assert slots.mean(2).abs().max() > 0.2
    x = np.random.default_rng(0).normal(2, 3, (5, 4))
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert normalised(torch.tensor(x), (1,)).numpy() == pytest.approx(expected)


def test_soft_labels_add_up_and_equal_classes_make_a_hard_one() -> None:
    _, targets, classes = method(mixed_classes=3, norm_mixing="sum").mixed()
    assert torch.allclose(targets.sum(1), torch.ones(64), atol=1e-6)
    assert (targets > 0).sum(1).max() <= 3
    assert ((targets > 0).sum(1) > 1).any()
    assert torch.equal(classes, targets)
    single = method(mixed_classes=1)
    _, targets, _ = single.mixed()
    assert torch.equal(targets.max(1).values, torch.ones(64)), "one class alone is a one-hot label"


def test_the_authors_norms_take_the_mean_over_the_classes() -> None:
    _, targets, classes = method(mixed_classes=4).mixed()
    assert torch.allclose(classes, targets / 4)


def test_a_norm_on_a_mixture_adds_up_scales_and_shifts() -> None:
    torch.manual_seed(0)
    norm = ClassConditionalBatchNorm(4, 3)
    with torch.no_grad():
        norm.gamma.weight.normal_()
        norm.beta.weight.normal_()
    x, labels = torch.randn(5, 4, 6, 6), torch.tensor([0, 2, 1, 1, 0])
    hard = norm(x, labels)
    assert torch.allclose(norm(x, nn.functional.one_hot(labels, 3).float()), hard, atol=1e-6)
    shares = torch.rand(5, 3).softmax(1)
    mixed = norm(x, shares)
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    gamma, beta = shares.double() @ norm.gamma.weight.double(), shares.double() @ norm.beta.weight.double()
    expected = plain.double() * gamma[:, :, None, None] + beta[:, :, None, None]
    assert torch.allclose(mixed.double(), expected, atol=1e-5)


def test_the_student_learns_from_soft_labels_and_the_teacher_in_float64() -> None:
    random = np.random.default_rng(1)
    q, p = random.normal(0, 3, (8, 10)), random.normal(0, 3, (8, 10))
    t = random.dirichlet(np.ones(10), 8)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))

    log_p, log_q = log_softmax(p / 20), log_softmax(q / 20)
    expected = -(t * log_softmax(q)).sum(1).mean() + 400 * (np.exp(log_p) * (log_p - log_q)).sum() / 80
    batch = SoftBatch(torch.tensor(q), torch.tensor(t).argmax(1), torch.tensor(p), torch.tensor(t))
    loss = method().distill(lambda images: images, batch)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_embeddings_start_as_the_classifier_and_learn() -> None:
    lockstep = Trial(Qimera, {"embedding": "teacher", "mixing": 1.0}).start()
    embedding = lockstep.method.embedding.weight  # type: ignore[attr-defined]
    assert torch.equal(embedding, classifier_weight(lockstep.teacher))
    before = embedding.detach().clone()
    lockstep.method.before_step(lockstep.phases[0])
    batch = lockstep.method.synthesize()
    assert isinstance(batch, SoftBatch)
    assert not torch.equal(embedding, before)
    assert batch.labels is not None
    assert torch.equal(batch.labels, batch.targets.argmax(1))


def test_a_convolution_can_be_the_classifier() -> None:
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 7, 1), nn.Flatten())
    weight = classifier_weight(Teacher(network, Task(7, 3, 8, (0.5,) * 3, (0.25,) * 3)))
    assert torch.equal(weight, network[3].weight.detach().flatten(1))


@pytest.mark.parametrize(("mixing", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_so_many_batches_are_mixed(mixing: float, share: float) -> None:
    made = method(mixing=mixing, batch_size=4)
    mixed = []
    for _ in range(3):
        made.before_step(made.phases()[0])
        mixed.append(bool((made.synthesize().targets.max(1).values < 1).any()))
    assert sum(mixed) / 3 == share

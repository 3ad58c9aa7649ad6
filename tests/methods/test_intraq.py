"""IntraQ: its losses against float64, its calibration batch, and what it shares with LRQ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfqbench import Batch
from dfqbench.method.registry import find_method
from dfqbench.testing import Trial, small_task, small_teacher
from dfqbench_methods.intraq import IntraQ
from dfqbench_methods.parts.centers import ClassCenters


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


def test_the_students_loss_weighs_the_divergence_8000_times_per_image() -> None:
    random = np.random.default_rng(0)
    q, p, y = random.normal(0, 3, (8, 10)), random.normal(0, 3, (8, 10)), random.integers(0, 10, 8)
    log_p, log_q = log_softmax(p / 20), log_softmax(q / 20)
    expected = -log_softmax(q)[np.arange(8), y].mean() + 8000 * (np.exp(log_p) * (log_p - log_q)).sum() / 8
    method = IntraQ(small_teacher(small_task()), IntraQ.Config(), seed=0)
    loss = method.distill(lambda images: images, Batch(torch.tensor(q), torch.tensor(y), torch.tensor(p)))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_without_a_centre_nothing_is_bounded_and_imagenets_bounds_are_off() -> None:
    features = torch.randn(6, 16)
    empty = ClassCenters(10, 16)
    assert empty.bound_loss(features, torch.arange(6), 0.05, 0.8).item() == 0
    empty.add(torch.randn(6, 16), torch.arange(6))
    assert empty.bound_loss(features, torch.arange(6), 0.05, 0.8).item() > 0
    off = IntraQ.Config.presets["imagenet"]
    assert empty.bound_loss(features, torch.arange(6), off["closest"], off["farthest"]).item() == 0


def test_distances_are_one_minus_the_cosine_in_float64() -> None:
    random = np.random.default_rng(2)
    centers, features = random.normal(size=(3, 5)), random.normal(size=(4, 5))
    known = ClassCenters(3, 5)
    known.add(torch.tensor(centers, dtype=torch.float32), torch.arange(3))
    labels = np.array([0, 2, 1, 1])
    d = 1 - (features * centers[labels]).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(centers[labels], axis=1)
    expected = (np.maximum(0.9 - d, 0) + np.maximum(d - 1.1, 0)).mean()
    found = known.bound_loss(torch.tensor(features, dtype=torch.float32), torch.tensor(labels), 0.9, 1.1)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_soft_targets_lie_between_eps_and_one_and_half_of_them_are_one() -> None:
    method = IntraQ(small_teacher(small_task()), IntraQ.Config(synthesis_batch=1000, target_low=0.6), seed=0)
    method.setup()
    method.begin_batch()
    assert 400 < (method.targets == 1).sum() < 600
    others = method.targets[method.targets < 1]
    assert others.min() >= 0.6
    assert others.min() < 0.62
    off = IntraQ(small_teacher(small_task()), IntraQ.Config(**IntraQ.Config.presets["imagenet"]), seed=0)
    off.setup()
    off.begin_batch()
    assert (off.targets == 1).all()


def test_the_generator_makes_batches_of_its_own_size_and_no_student_trains_on_them() -> None:
    lockstep = Trial(find_method("intraq"), {"calibration_batch": 6, "batch_size": 4}).start()
    lockstep.method.phases()
    batch = lockstep.method.calibrate()  # type: ignore[attr-defined]
    assert len(batch.images) == 6
    assert [(p.name, p.distill, p.calibration_epochs) for p in lockstep.phases] == [
        ("images", False, 0),
        ("calibration", False, 1),
        ("train", True, 0),
    ]

"""ZeroQ: its loss in float64, and that its images come to have the statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfqbench import Observation
from dfqbench.engine.evaluate import state_hash
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.method.registry import find_method
from dfqbench.testing import StopAfter, Trial
from dfqbench_methods.zeroq import image_statistics_loss

SweepFile = Callable[..., Path]


def start() -> Lockstep:
    return Trial(find_method("zeroq"), {"images": 4, "synthesis_iterations": 60}).start(bits=("w4a4", "w3a3"))


def test_the_loss_is_the_formula_in_float64() -> None:
    random = np.random.default_rng(0)
    images = random.normal(0.3, 1.2, (3, 2, 6, 6))
    expected = sum((i.mean() ** 2 + (np.sqrt(i.var(ddof=1) + 1e-6) - 1) ** 2) for n in images for i in n) / 3
    inputs, layers = [], []
    for channels, side in ((4, 5), (3, 1), (5, 0)):
        x, bn = random.normal(size=(3, channels, side or 1, side or 1)), nn.BatchNorm2d(channels)
        mu, v = random.normal(size=channels), random.uniform(0.5, 2, channels)
        bn.running_mean, bn.running_var = torch.tensor(mu, dtype=torch.float32), torch.tensor(v, dtype=torch.float32)
        inputs.append(torch.tensor(x if side else x[:, :, 0, 0], dtype=torch.float32))  # 0: behind a linear layer, without positions
        layers.append(bn)
        for n in x:
            for c in range(channels):
                expected += (n[c].mean() - mu[c]) ** 2 / 3
                if side > 1:
                    expected += (np.sqrt(n[c].var(ddof=1) + 1e-6) - np.sqrt(v[c] + 1e-6)) ** 2 / 3
    loss = image_statistics_loss(Observation(torch.zeros(3, 10), [], inputs, layers), torch.tensor(images, dtype=torch.float32))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_images_come_to_have_the_statistics_and_set_the_ranges() -> None:
    lockstep = start()
    method = lockstep.method
    before = image_statistics_loss(method.teacher.observe(method.images), method.images).item()  # type: ignore[attr-defined]
    weights = [state_hash(t.student.traced.stem) for t in lockstep.trainees]  # type: ignore[arg-type]
    lockstep.run(StopAfter())
    after = image_statistics_loss(method.teacher.observe(method.images), method.images).item()  # type: ignore[attr-defined]
    assert after < 0.3 * before
    assert all(q.has_range for t in lockstep.trainees for q in t.student.quantizers.values())
    assert [state_hash(t.student.traced.stem) for t in lockstep.trainees] == weights, "nothing is trained"  # type: ignore[arg-type]
    assert lockstep.student_steps == 0


def test_interrupted_in_the_synthesis_equals_uninterrupted() -> None:
    whole, first, second = (start() for _ in range(3))
    whole.run(StopAfter())
    with pytest.raises(Interrupted):
        first.run(StopAfter(25))
    second.restore(first.state())
    second.run(StopAfter())
    assert torch.equal(second.method.images, whole.method.images)  # type: ignore[attr-defined]
    assert [state_hash(t.student) for t in second.trainees] == [state_hash(t.student) for t in whole.trainees]

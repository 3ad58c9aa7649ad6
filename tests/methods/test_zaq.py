"""ZAQ: the relation terms equal their naive forms, and generator and student play against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dfqbench.engine.evaluate import state_hash
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.method.registry import find_method
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import bundles
from dfqbench.sweep.load import load_sweep
from dfqbench.testing import StopAfter, Trial
from dfqbench_methods.parts.relations import channel_normalised, channel_relation, relation_loss, spatial_relation

SweepFile = Callable[..., Path]


def start(**settings: object) -> Lockstep:
    return Trial(find_method("zaq"), {"student_steps": 5, "student_lr": 0.01, **settings}).start()


def naive_spatial(x: torch.Tensor, gamma: float) -> torch.Tensor:
    attention = torch.softmax(torch.einsum("ncp,ncq->npq", x, x), -1)
    return gamma * torch.einsum("ncq,npq->ncp", x, attention) + x


def naive_channel(x: torch.Tensor, gamma: float) -> torch.Tensor:
    energy = torch.einsum("ncp,ndp->ncd", x, x)
    attention = torch.softmax(energy.max(-1, keepdim=True).values - energy, -1)
    return gamma * torch.einsum("ncd,ndp->ncp", attention, x) + x


@pytest.mark.parametrize(("relation", "naive"), [(spatial_relation, naive_spatial), (channel_relation, naive_channel)])
def test_a_relation_equals_its_naive_form_with_its_gradient(relation: Callable[..., torch.Tensor], naive: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    assert torch.allclose(relation(x, 0.3), naive(x, 0.3), atol=1e-12)
    mine, theirs = (torch.autograd.grad((f(x, 0.3) * weight).sum(), x)[0] for f in (relation, naive))
    assert torch.allclose(mine, theirs, atol=1e-12)


def test_the_relation_loss_is_summed_over_stages_of_channel_normalised_features() -> None:
    stages = [(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)), (torch.randn(2, 6, 2, 2), torch.randn(2, 6, 2, 2))]
    expected = 0.0
    for q, p in stages:
        q, p = (F.normalize(f, dim=1).flatten(2) for f in (q, p))
        for naive in (naive_spatial, naive_channel):
            expected += (naive(q, 0.1) - naive(p, 0.1)).abs().mean().item()
    assert relation_loss([q for q, _ in stages], [p for _, p in stages]).item() == pytest.approx(expected, rel=1e-5)
    assert relation_loss([q for q, _ in stages], [3 * q for q, _ in stages]).item() == pytest.approx(0.0, abs=1e-6)


def test_vectors_of_zeros_get_no_gradient_and_others_get_the_usual_one() -> None:
    features = torch.randn(2, 4, 3, 3)
    features[0, :, 1, 1] = 0.0
    mine, usual = features.clone().requires_grad_(), features.clone().requires_grad_()
    weight = torch.randn_like(features)
    assert torch.allclose(channel_normalised(mine), F.normalize(usual, dim=1), atol=1e-6)
    (channel_normalised(mine) * weight).sum().backward()
    (F.normalize(usual, dim=1) * weight).sum().backward()
    assert mine.grad is not None
    assert usual.grad is not None
    assert torch.equal(mine.grad[0, :, 1, 1], torch.zeros(4))
    usual.grad[0, :, 1, 1] = 0.0
    assert torch.allclose(mine.grad, usual.grad, atol=1e-5)


@pytest.mark.slow
def test_one_generator_step_to_five_student_steps() -> None:
    lockstep = start()
    generator = lockstep.method.generator  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        lockstep.run(StopAfter(4))
    weights = [p.clone() for p in generator.parameters()]
    with pytest.raises(Interrupted):
        lockstep.run(StopAfter(5))
    assert not all(torch.equal(a, b) for a, b in zip(weights, generator.parameters(), strict=True))
    weights = [p.clone() for p in generator.parameters()]
    with pytest.raises(Interrupted):
        lockstep.run(StopAfter(9))
    assert all(torch.equal(a, b) for a, b in zip(weights, generator.parameters(), strict=True))


@pytest.mark.slow
def test_the_generators_step_raises_the_disagreement_and_leaves_the_student_its_weights() -> None:
    lockstep = start(student_steps=1, generator_lr=0.01)
    with pytest.raises(Interrupted):
        lockstep.run(StopAfter(2))
    method, student = lockstep.method, lockstep.trainees[0].student
    student.track_ranges(True)

    def disagreement() -> float:
        method.random("noise").manual_seed(5)
        return method.distill(student, method.synthesize()).item()

    before, weights = disagreement(), [p.clone() for p in student.parameters()]
    for _ in range(10):
        method.random("noise").manual_seed(5)
        method.adversary(student)
    assert disagreement() > before
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True))
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.slow
def test_it_trains_bn_statistics_and_tracks_extremes_as_it_declares() -> None:
    lockstep = start()
    student = lockstep.trainees[0].student
    assert (student.protocol.batch_norm, student.protocol.ranges) == ("trained", "minmax")
    before = student.state_dict()["traced.norm1.running_mean"].clone()
    lockstep.run(StopAfter())
    assert not torch.equal(before, student.state_dict()["traced.norm1.running_mean"])
    assert not any(m.training for m in student.modules())
    ended = state_hash(student)
    student(torch.randn(4, 3, 16, 16) * 50)
    assert state_hash(student) == ended, "ranges and statistics stand still in evaluation"


def test_bit_widths_never_share_a_generator(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(methods=["zaq"]), cache_folder())
    assert [len(b.cells) for b in bundles(loaded.cells)] == [1, 1]


@pytest.mark.slow
def test_interrupted_between_generator_steps_equals_uninterrupted() -> None:
    whole, first, second = (start() for _ in range(3))
    whole.run(StopAfter())
    with pytest.raises(Interrupted):
        first.run(StopAfter(7))
    second.restore(first.state())
    second.run(StopAfter())
    assert state_hash(second.trainees[0].student) == state_hash(whole.trainees[0].student)

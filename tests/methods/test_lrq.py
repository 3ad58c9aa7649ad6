"""LRQ and its parts: large kernels, crops, decoupled distillation, margins, and stored images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dfqbench.method.image_set import ImageSet
from dfqbench.method.registry import find_method
from dfqbench.testing import StopAfter, Trial, ends_of, small_task, small_teacher
from dfqbench_methods.lrq import LRQ
from dfqbench_methods.parts.augment import crop_and_flip
from dfqbench_methods.parts.centers import ClassCenters
from dfqbench_methods.parts.generators import Generator
from dfqbench_methods.parts.large_kernel import LargeKernelAttention, LongRangeGenerator
from dfqbench_methods.parts.losses import decoupled_loss


def trial(**settings: object) -> Trial:
    return Trial(find_method("lrq"), dict(settings))


def test_decoupled_distillation_is_the_formula_in_float64() -> None:
    random = np.random.default_rng(0)
    p, q, y = random.normal(0, 3, (6, 10)), random.normal(0, 3, (6, 10)), random.integers(0, 10, 6)

    def softmax(z: np.ndarray) -> np.ndarray:
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    expected = 0.0
    for n in range(6):
        pn, qn = softmax(p[n]), softmax(q[n])
        two_p, two_q = np.array([pn[y[n]], 1 - pn[y[n]]]), np.array([qn[y[n]], 1 - qn[y[n]]])
        others_p, others_q = softmax(np.delete(p[n], y[n])), softmax(np.delete(q[n], y[n]))
        expected += 0.7 * (two_p * np.log(two_p / two_q)).sum() + 8 * (others_p * np.log(others_p / others_q)).sum()
    loss = decoupled_loss(torch.tensor(q), torch.tensor(y), torch.tensor(p), 0.7, 8.0)
    assert loss.item() == pytest.approx(expected / 6)


def test_decoupled_distillation_is_finite_where_the_teacher_is_certain() -> None:
    sure = torch.tensor([[80.0, 0.0, 0.0]])
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = decoupled_loss(logits, torch.tensor([0]), sure, 1.0, 8.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_large_kernel_attention_sees_23_positions_and_no_more() -> None:
    torch.manual_seed(0)
    block = LargeKernelAttention(2).double()
    x = torch.randn(1, 2, 41, 41, dtype=torch.float64, requires_grad=True)
    block(x)[0, :, 20, 20].sum().backward()
    reached = (x.grad[0].abs().sum(0) > 0).nonzero()  # type: ignore[index]
    assert (reached.max(0).values - reached.min(0).values + 1).tolist() == [23, 23]


@pytest.mark.parametrize("place", ["before", "after"])
def test_without_its_attention_the_long_range_generator_is_gdfqs(place: str) -> None:
    task = small_task()
    longer = LongRangeGenerator(task, 20, False, place)  # type: ignore[arg-type]
    plain = Generator(task, 20)
    plain.load_state_dict({k: v for k, v in longer.state_dict().items() if not k.startswith("attention")})
    for parameter in longer.attention.leave.parameters():
        torch.nn.init.zeros_(parameter)
    latent = torch.randn(4, 20)
    assert torch.allclose(longer(latent), plain(latent), atol=1e-4)


def test_crops_stay_inside_have_the_areas_asked_for_and_repeat_with_their_stream() -> None:
    ramp = torch.linspace(0, 1, 64).expand(500, 1, 64, 64)
    stream = torch.Generator().manual_seed(0)
    cropped = crop_and_flip(ramp, stream, 0.5)
    assert torch.equal(cropped, crop_and_flip(ramp, torch.Generator().manual_seed(0), 0.5))
    assert cropped.min() >= 0
    assert cropped.max() <= 1
    slopes = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    assert 0.4 < (slopes < 0).float().mean() < 0.6, "about half are flipped"
    widths = slopes.abs()
    assert widths.max() <= 1.0
    assert widths.min() > math.sqrt(0.5 * 3 / 4) - 0.05
    assert torch.equal(crop_and_flip(ramp, stream, 1.0, flip=False)[:, :, :1, :1].isfinite().all(), torch.tensor(True))


def test_a_crop_of_everything_without_flip_changes_nothing_but_the_aspect() -> None:
    images = torch.full((8, 3, 16, 16), 0.7)
    assert torch.allclose(crop_and_flip(images, torch.Generator().manual_seed(1), 0.5), images, atol=1e-6)


def test_the_margin_is_added_to_the_angle_and_the_bounds_are_hinges() -> None:
    """Centre along the first axis; features at 0, 60 and 90 degrees; m = 0.5 rad, bounds 0.3 and 0.8."""
    centers = ClassCenters(10, 16)
    center = torch.zeros(16)
    center[0] = 2.0
    centers.add(center.expand(4, -1), torch.full((4,), 3))
    features = torch.zeros(4, 16)
    for n, degrees in enumerate((0.0, 60.0, 90.0, 45.0)):
        features[n, 0], features[n, 1] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    d = [1 - math.cos(math.radians(a) + 0.5) for a in (0.0, 60.0, 90.0)]
    expected = sum(max(0.3 - x, 0) + max(x - 0.8, 0) for x in d) / 3
    found = centers.bound_loss(features, torch.tensor([3, 3, 3, 5]), closest=0.3, farthest=0.8, margin=0.5)
    assert found.item() == pytest.approx(expected, rel=1e-3), "the class without a centre costs nothing"


def test_images_are_stored_in_batches_and_centres_are_their_classes_means() -> None:
    lockstep = trial(images=10, synthesis_batch=4).start()
    lockstep.run(StopAfter())
    method = lockstep.method
    assert len(method.stored) == 12, "whole batches, at least as many as asked for"  # type: ignore[attr-defined]
    with torch.no_grad():
        features = method.features(method.stored.images)  # type: ignore[attr-defined]
    labels = method.stored.labels  # type: ignore[attr-defined]
    for label in labels.unique():
        mean = method.centers.sums[label] / method.centers.counts[label]  # type: ignore[attr-defined]
        assert torch.allclose(mean, features[labels == label].mean(0), atol=1e-5)


@pytest.mark.slow
def test_optimised_images_match_the_statistics_better_than_noise() -> None:
    from dfqbench_methods.parts.losses import batch_norm_loss

    lockstep = trial(images=8, synthesis_batch=8, synthesis_iterations=80, epochs=1).start()
    lockstep.run(StopAfter())
    method = lockstep.method
    noise = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = batch_norm_loss(method.teacher.observe(method.stored.images)).item()  # type: ignore[attr-defined]
        assert found < 0.7 * batch_norm_loss(method.teacher.observe(noise)).item()


def test_training_on_the_generator_too_gives_another_student() -> None:
    plain, more = trial().end(), trial(train_on_generator=True).end()
    assert ends_of(plain) != ends_of(more)
    assert more.last_batch is not None
    assert plain.last_batch is not None
    assert len(more.last_batch.images) == len(plain.last_batch.images) + 8


def test_the_learning_rate_schedule_does_not_count_the_making_of_images() -> None:
    lockstep = trial(images=12, synthesis_batch=4, epochs=4, milestones=[2], student_lr=0.01).start()
    lockstep.run(StopAfter())
    rows = [(row["phase"], row.get("student_lr")) for row in lockstep.trainees[0].history]
    assert rows == [("images", None)] * 3 + [("calibration", None), ("train", 0.01), ("train", 0.001), ("train", 0.001)]


def test_an_image_set_gives_every_image_once_before_any_comes_again() -> None:
    stored = ImageSet("images", None, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="empty"):
        stored.next(1)
    with pytest.raises(RuntimeError, match="nothing was picked"):
        _ = stored.picked
    stored.add(torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5))
    assert [stored.next(3)[1].tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    stream = torch.Generator().manual_seed(0)
    twice = ImageSet("images", None, torch.device("cpu"))
    twice.add(torch.arange(4.0).view(4, 1, 1, 1), torch.arange(4))
    first, second = twice.next(2, stream), twice.next(2, stream)
    lies = [t.data_ptr() for t in (twice._order, twice._picked)]
    twice.pick(2, stream)
    assert [t.data_ptr() for t in (twice._order, twice._picked)] == lies, "drawn anew where it lies: a replayed step may read it"
    assert sorted(first[1].tolist() + second[1].tolist()) == [0, 1, 2, 3]
    again = ImageSet("images", None, torch.device("cpu"))
    again.load_state_dict(twice.state_dict())
    same = torch.Generator()
    same.set_state(stream.get_state())
    assert again.next(3, same)[1].tolist() == twice.next(3, stream)[1].tolist()
    assert len(twice.next(99, stream)[1]) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_set_keeps_what_it_was_given_whatever_becomes_of_that(channels: int) -> None:
    """Grey images in channels_last are contiguous as well: they were kept without a copy once, and overwritten by the next batch."""
    stored = ImageSet("images", None, torch.device("cpu"))
    images, labels = torch.ones(4, channels, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_(), torch.ones(4, dtype=torch.long)
    stored.add(images, labels)
    with torch.no_grad():
        images.zero_()
        labels.zero_()
    assert bool((stored.images == 1).all())
    assert stored.labels.tolist() == [1] * 4


def test_an_image_set_is_written_once_and_its_state_is_names_and_hashes(tmp_path: Path) -> None:
    first = ImageSet("images", tmp_path, torch.device("cpu"))
    parts = [(torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 3])), (torch.randn(2, 1, 4, 4), torch.tensor([4, 5]))]
    for images, labels in parts:
        first.add(images, labels)
    assert len(first.images) == 5
    first.add(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long))
    state = first.state_dict()
    assert [name for name, _ in state["files"]] == ["images-0000.safetensors", "images-0001.safetensors", "images-0002.safetensors"]
    again = ImageSet("images", tmp_path, torch.device("cpu"))
    again.load_state_dict(state)
    assert torch.equal(again.images, torch.cat([p[0] for p in parts]))
    assert again.labels.tolist() == [1, 2, 3, 4, 5]
    (tmp_path / "images-0001.safetensors").write_bytes((tmp_path / "images-0000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="images-0001"):
        again.load_state_dict(state)


def test_features_are_the_pooled_last_stage() -> None:
    teacher = small_teacher(small_task())
    method = find_method("lrq")(teacher, find_method("lrq").Config(), 0)
    images = torch.randn(2, 3, 32, 32)
    expected = F.adaptive_avg_pool2d(teacher.observe(images).features[-1], 1).flatten(1)
    assert torch.allclose(method.features(images), expected, atol=1e-6)  # type: ignore[attr-defined]


def test_the_run_keeps_image_files_beside_the_checkpoint_and_resumes_from_them(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    from rich.console import Console

    from dfqbench.run.options import Options, StopFlag
    from dfqbench.run.progress import Progress
    from dfqbench.run.runner import run_sweep
    from dfqbench.store import Store
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.load import load_sweep

    settings = {"images": 8, "synthesis_batch": 4, "synthesis_iterations": 5, "calibration_epochs": 1}
    loaded = load_sweep(sweep_file(methods=[{"lrq": settings}], bits=["w4a4"]), cache_folder())

    class Stopping(Progress):
        def __init__(self, stop: StopFlag, after: int):
            super().__init__(Console(quiet=True))
            self.stop_flag, self.after = stop, after

        def step(self, phase: str) -> None:
            super().step(phase)
            if self.step_number == self.after:
                self.stop_flag.signal = 15

    whole = Store(tmp_path / "whole", writable=True)
    run_sweep(loaded, whole, Options(), Progress(Console(quiet=True)), StopFlag())
    store = Store(tmp_path / "r", writable=True)
    for after in (7, 12, 10**9):
        stop = StopFlag()
        run_sweep(loaded, store, Options(), Stopping(stop, after), stop)
        files = sorted(p.name for p in (tmp_path / "r" / "bundles").glob("*/*"))
        if after == 7:
            assert files == ["checkpoint.pt", "images-0000.safetensors"]
    (one,), (other,) = store.results()[0], whole.results()[0]
    assert one["student_state"] == other["student_state"]
    assert not list((tmp_path / "r" / "bundles").glob("*"))


@pytest.mark.parametrize("preset", ["", "cifar100"])
def test_the_lower_bound_never_acts_on_cifar(preset: str) -> None:
    """With the margin, what lies in the centre itself is 0.122 away; the bound is nearer."""
    config = LRQ.Config(**LRQ.Config.presets.get(preset, {}))
    centers = ClassCenters(1, 3)
    feature, label = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0])
    centers.add(feature, label)
    nearest = 1 - math.cos(config.margin)
    assert nearest == pytest.approx(0.122, abs=1e-3)
    assert config.closest < nearest
    assert centers.bound_loss(feature, label, config.closest, 2.0, config.margin).item() == 0.0
    assert centers.bound_loss(feature, label, 0.3, 2.0, config.margin).item() == pytest.approx(0.3 - nearest, abs=1e-2), "as on ImageNet"

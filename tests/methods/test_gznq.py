"""GZNQ: its priors by hand, what it stores, and both of its results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.testing import StopAfter, Trial, ends_of, small_task, small_teacher
from dfqbench_methods.parts.losses import batch_norm_loss
from dfqbench_methods.parts.pixels import clip_to_pixels, jitter, roughness, same_class_similarity


def trial(**settings: object) -> Trial:
    return Trial(find_method("gznq"), dict(settings))


def test_roughness_by_hand() -> None:
    images = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]], [[[5.0, 5.0], [5.0, 5.0]]]])
    assert roughness(images).item() == pytest.approx((1 + 0 + 9 + 4) / 2)


def test_similarity_counts_pairs_of_one_class_only() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-3.0, 0.0]])
    assert same_class_similarity(features, torch.tensor([0, 0, 1, 0])).item() == pytest.approx((2 * 0.5**0.5 + 2 * -1 + 2 * -(0.5**0.5)) / 6)
    assert same_class_similarity(features, torch.arange(4)).item() == 0.0


def test_pixels_are_clipped_to_what_a_real_image_can_have() -> None:
    images = torch.tensor([-9.0, 0.1, 9.0]).view(1, 1, 1, 3).repeat(1, 2, 3, 1)
    clip_to_pixels(images, Task(10, 2, 3, (0.5, 0.0), (0.25, 0.5)))
    assert images[0, 0, 0].tolist() == pytest.approx([-2.0, 0.1, 2.0])
    assert images[0, 1, 0].tolist() == pytest.approx([0.0, 0.1, 2.0])


def test_jitter_shifts_and_flips_but_keeps_every_pixel() -> None:
    images, stream = torch.randn(2, 3, 8, 8), torch.Generator().manual_seed(0)
    for _ in range(10):
        moved = jitter(images, 2, stream)
        assert torch.equal(moved.flatten(2).sort().values, images.flatten(2).sort().values)
    assert any(not torch.equal(jitter(images, 2, stream), images) for _ in range(5))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["image", "generator"])
def test_made_images_match_the_statistics_better_than_noise(mode: str) -> None:
    lockstep = trial(mode=mode, synthesis_iterations=60, images=8, synthesis_batch=8, batch_size=8).start(task=small_task(size=32))
    lockstep.run(StopAfter())
    method = lockstep.method
    noise = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made, plain = (batch_norm_loss(method.teacher.observe(x)).item() for x in (method.stored.images, noise))  # type: ignore[attr-defined]
    assert made < 0.8 * plain


def test_images_that_the_teacher_doubts_are_dropped() -> None:
    def stored(confidence: float) -> tuple[torch.Tensor, torch.Tensor]:
        lockstep = trial(confidence=confidence, images=16, synthesis_batch=16).end()
        images, labels = lockstep.method.stored.images, lockstep.method.stored.labels  # type: ignore[attr-defined]
        return images, lockstep.teacher(images).softmax(1).gather(1, labels[:, None])[:, 0]

    everything, probability = stored(0.0)
    middle = float(probability.median()) + 1e-6
    kept, sure = stored(middle)
    assert len(everything) == 16
    assert torch.equal(kept, everything[probability >= middle])
    assert 0 < len(kept) < 16
    assert (sure >= middle).all()


def test_no_image_left_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match="the teacher is sure of none"):
        trial(confidence=1.0).end()


def test_labels_are_balanced() -> None:
    lockstep = trial(images=40, synthesis_batch=20).start()
    lockstep.run(StopAfter())
    assert lockstep.method.stored.labels.bincount().tolist() == [4] * 10  # type: ignore[attr-defined]


def test_post_training_and_fine_tuning_are_two_results() -> None:
    post, tuned = trial().end(), trial(finetune=True).end()
    assert post.student_steps == 0
    assert tuned.student_steps == 9
    assert ends_of(post) != ends_of(tuned)


def test_the_earlier_batches_take_part_in_the_compared_statistics() -> None:
    method = trial(statistics_momentum=0.25).start().method
    now = [torch.tensor([1.0]), torch.tensor([2.0])]
    assert method.mixed(now) == now  # type: ignore[attr-defined]
    method.past = [torch.tensor([5.0]), torch.tensor([6.0])]  # type: ignore[attr-defined]
    assert [t.item() for t in method.mixed(now)] == [2.0, 3.0]  # type: ignore[attr-defined]


def test_bias_correction_takes_the_mean_error_out_of_every_layer() -> None:
    """On the very images it measured, each layer's mean output is that of its float weight, per channel."""
    student = Student(small_teacher(small_task()), PROTOCOLS["lineage"], Bits(3, 8))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student.track_ranges(True)
    student(images)
    student.track_ranges(False)
    biases = {name: (layer.layer.bias.detach().clone() if layer.layer.bias is not None else 0.0) for name, layer in student.layers.items()}
    student.correct_biases(images)
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in student.layers.items():
        layer.register_forward_pre_hook(lambda module, given, name=name: inputs.__setitem__(name, given[0]))
    with torch.no_grad():
        student(images)
        for name, layer in student.layers.items():
            shifted = layer(inputs[name])
            layer.layer.bias = nn.Parameter(torch.zeros_like(layer.layer.bias) + biases[name])
            wanted, uncorrected = layer.layer(inputs[name]), layer(inputs[name])
            dims = [0, 2, 3] if shifted.dim() == 4 else [0]
            assert torch.allclose(shifted.mean(dims), wanted.mean(dims), atol=1e-4), name
            assert not torch.allclose(uncorrected.mean(dims), wanted.mean(dims), atol=1e-3), name


def test_a_students_teacher_keeps_its_biases() -> None:
    teacher: Teacher = small_teacher(small_task())
    student = Student(teacher, PROTOCOLS["lineage"], Bits(3, 8))
    student.correct_biases(torch.randn(4, 3, 32, 32))
    assert teacher.traced.stem.bias is None  # type: ignore[union-attr]
    assert student.layers["stem"].layer.bias is not None


def test_what_a_generator_makes_in_bf16_corrects_biases_in_full_precision() -> None:
    """`finish` runs outside autocast."""
    trial = Trial(find_method("gznq"), {"mode": "generator"})
    lockstep = trial.start()
    lockstep.autocast = torch.autocast("cpu", torch.bfloat16)
    lockstep.run(StopAfter())
    assert lockstep.method.stored.images.dtype == torch.float32
    assert lockstep.trainees[0].evaluation is not None

"""Conformance checks of what a method does. Each takes a Trial and raises AssertionError with what to mend."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from pydantic import ValidationError

from dfqbench.engine.checkpoint import load_checkpoint, save_checkpoint
from dfqbench.engine.evaluate import state_hash
from dfqbench.engine.lockstep import Interrupted
from dfqbench.export.student_file import load_student_file, save_student
from dfqbench.method.contract import Method, Phase
from dfqbench.testing.trial import StopAfter, Trial, ends_of, small_task, small_teacher

LARGEST_PIXEL = 50.0  # in standard deviations: beyond it an image is no normalised image any more


def defaults_are_valid(trial: Trial) -> None:
    """The defaults of the settings are valid, and the plan is made of phases.

    Mend: give every setting a default that its own rules allow, or none; return a list of Phase from phases().
    """
    method = trial.method(small_teacher(trial.task), trial.method.Config(**trial.required), seed=0)
    torch.manual_seed(0)
    method.setup()
    assert all(isinstance(phase, Phase) for phase in method.phases()), "phases() must return a list of Phase"


def unknown_settings_fail(trial: Trial) -> None:
    """A misspelt setting is an error.

    Mend: derive Config from MethodConfig or TrainingConfig, without model_config of its own.
    """
    try:
        trial.method.Config(**trial.required, no_such_setting=1)  # type: ignore[call-arg]
    except ValidationError:
        return
    raise AssertionError("Config accepts unknown settings: derive it from MethodConfig or TrainingConfig")


def students_end_evaluated_with_finite_weights(trial: Trial) -> None:
    """Every quantizer has a range, weights are finite, what trains has moved, and the student's file answers as the student does.

    Mend: a phase with calibration_epochs, or finish(), must give every quantizer a range; distill() must return a loss in
    which every weight takes part; try a smaller learning rate where weights explode; change the student's weights, biases
    and ranges, and not its modules.
    """
    lockstep, before = trial.ended, dict(trial.start().trainees[0].student.named_parameters())
    student = lockstep.trainees[0].student
    assert lockstep.trainees[0].failed is None, lockstep.trainees[0].failed
    assert lockstep.trainees[0].evaluation is not None, "the student was never evaluated"
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter).all(), f"{name} is not finite"
    if lockstep.student_steps:
        still = {name: p for name, p in student.named_parameters() if torch.equal(p, before[name])}
        assert len(still) < len(before), "no parameter of the student ever moved"
        # a small step may be lost in float32's rounding; a weight that the last loss depends on has a gradient all the same
        unused = [name for name, p in still.items() if p.grad is None or not p.grad.any()]
        assert not unused, f"these parameters of the student never moved: {', '.join(unused)}"
    noise = torch.randn(4, *trial.task.image_shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_student(student, Path(folder) / "student.safetensors")
        answers = [network(noise) for network in (student, load_student_file(Path(folder) / "student.safetensors"))]
    assert torch.equal(*answers), "the student's file does not answer as the student does"


def the_teacher_is_untouched(trial: Trial) -> None:
    """No parameter or buffer of the teacher moves, and none gets a gradient.

    Mend: never call train(), requires_grad_() or in-place functions on self.teacher; detach what you keep of its answers.
    """
    lockstep = trial.start()
    before = state_hash(lockstep.teacher)
    lockstep.run(StopAfter())
    assert state_hash(lockstep.teacher) == before, "the teacher's parameters or buffers changed"
    assert all(p.grad is None and not p.requires_grad for p in lockstep.teacher.parameters()), "the teacher's parameters got gradients"
    assert not any(m.training for m in lockstep.teacher.modules()), "the teacher was left in training mode"


def images_are_normalised_images(trial: Trial) -> None:
    """Batches have the task's shape, are finite, not constant, and carry no autograd history.

    Mend: return Batch(images.detach(), labels or None, logits.detach()) with images of shape self.task.image_shape, normalised.
    """
    lockstep = trial.ended
    batch = lockstep.last_batch
    if batch is None:
        assert not lockstep.epochs or all(phase.step for phase, _ in lockstep.epochs), "a phase ran, but no batch was made"
        return
    images = batch.images
    assert tuple(images.shape[1:]) == lockstep.method.task.image_shape, f"images of shape {tuple(images.shape)}"
    assert torch.isfinite(images).all(), "images are not finite"
    assert images.std() > 0, "all pixels are equal"
    assert images.abs().max() < LARGEST_PIXEL, f"pixels reach {images.abs().max():.0f} standard deviations"
    assert not images.requires_grad, "detach the images: they must not carry autograd history"
    assert not batch.teacher_logits.requires_grad, "detach the teacher's logits"
    wanted = lockstep.teacher(images).shape
    assert batch.teacher_logits.shape == wanted, f"teacher_logits must be what the teacher answers, {tuple(wanted)}"
    if batch.labels is not None:
        assert batch.labels.shape[0] == len(images), "one label per image"


def one_seed_repeats_and_two_differ(trial: Trial) -> None:
    """All randomness comes from the seed, and only a method with uses_seed=False gives equal students for two.

    Mend: draw from self.draw_noise, self.draw_labels or generator=self.random(NAME), not from torch's, NumPy's or Python's global
    generators; set uses_seed = False where nothing is random.
    """
    first, again, other = trial.ended, trial.end(), trial.end(seed=1)
    assert ends_of(first) == ends_of(again), "the same seed gave other students: draw random numbers with generator=self.random(...)"
    if not trial.method.uses_seed:
        assert ends_of(first) == ends_of(other), "uses_seed is False, but two seeds gave different students"
    elif first.epochs:
        assert ends_of(first) != ends_of(other), "two seeds gave the same student: the seed is not used"


def interrupted_equals_uninterrupted(trial: Trial) -> None:
    """Stopped after any step and resumed from the file, the students end with the same bits.

    Mend: keep everything that later steps depend on in attributes of self (not in globals, closures or class attributes), and
    make modules, optimizers and image sets in setup().
    """
    whole = trial.ended
    for stop_after in sorted({1, whole.steps // 2, whole.steps} - {0}):
        if stop_after > whole.steps:
            continue
        first = trial.start()
        try:
            first.run(StopAfter(stop_after))
        except Interrupted:
            pass
        else:
            raise AssertionError(f"step {stop_after} of {whole.steps} was never reached")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            save_checkpoint(path, first.state())
            state, why = load_checkpoint(path, [t.cell.id for t in first.trainees])
        assert state is not None, why
        torch.manual_seed(12345)
        second = trial.start()
        second.restore(state)
        second.run(StopAfter())
        assert ends_of(second) == ends_of(whole), f"interrupted after step {stop_after}, the students end with other bits"


def a_poisoned_evaluation_set_changes_nothing(trial: Trial) -> None:
    """Weights and ranges are bit-identical whatever the evaluation set holds.

    Mend: a method may look at nothing but the teacher and its own random streams.
    """
    assert ends_of(trial.ended) == ends_of(trial.end(poisoned=True)), "the students depend on the evaluation set"


def shared_synthesis_is_true_to_its_word(trial: Trial) -> None:
    """With shares_synthesis, a student in lockstep has the bits that it has alone.

    Mend: synthesize() and what it uses must not depend on a student; draw nothing shared in distill(); or register with
    shares_synthesis=False.
    """
    if not trial.method.info.shares_synthesis:
        return
    assert trial.method.adversary is Method.adversary, "adversary() is never called with shares_synthesis=True"
    together = ends_of(trial.end(bits=("w8a8", "w4a4", "w3a3")))
    assert ends_of(trial.ended)["w4a4"] == together["w4a4"], "alone, the student ends with other bits than in lockstep"


def any_task_works(trial: Trial) -> None:
    """1 and 3 channels, 10 and 1000 classes, 32 and 64 pixels.

    Mend: take channels, classes and size from self.task, never as constants.
    """
    fields = trial.method.Config.model_fields
    short = Trial(
        trial.method, trial.settings | {k: v for k, v in {"epochs": 2, "iterations": 2, "batch_size": 4}.items() if k in fields}, trial.kind
    )
    for channels, classes, size in ((1, 10, 32), (3, 1000, 32), (3, 10, 64)) if trial.kind == "classify" else ((1, 2, 18),):
        try:
            short.end(task=small_task(channels, classes, size, trial.kind))
        except Exception as error:
            raise AssertionError(f"{channels} channels, {classes} classes, {size} pixels: {type(error).__name__}: {error}") from error

"""Conformance checks for methods: what the engine and every table rely on. A plug-in's own test is one line:

    def test_conformance(): method_checks(MyMethod)

Everything runs on a small random network and random images; nothing is downloaded and no real image is seen.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from benchmark.checkpoint import load_checkpoint, save_checkpoint
from benchmark.difference import difference
from benchmark.engine import Interrupted
from benchmark.errors import nearest
from benchmark.evaluate import state_hash
from benchmark.made_images import made_since, state_before
from benchmark.method import Method, Phase
from benchmark.network import Observation, Teacher
from benchmark.operations import ComparedParts
from benchmark.rates import is_fused
from benchmark.step_graph import WARM_UP
from benchmark.student import Student
from benchmark.task import Task
from benchmark.trial import BUDGET as BUDGET
from benchmark.trial import StopAfter as StopAfter
from benchmark.trial import Trial as Trial
from benchmark.trial import ends_of as ends_of
from benchmark.trial import small_images as small_images
from benchmark.trial import small_task as small_task
from benchmark.trial import small_teacher as small_teacher

LARGEST_PIXEL = 50.0  # in standard deviations: beyond it an image is no normalised image any more

# --- the checks: each takes a Trial and raises AssertionError with what to mend ---------------------------------------


def defaults_are_valid(trial: Trial) -> None:
    """The settings have defaults, and the plan is made of phases.

    Mend: give every setting a default that its own rules allow; return a list of Phase from phases().
    """
    method = trial.method(small_teacher(small_task()), trial.method.Config(), seed=0)
    torch.manual_seed(0)
    method.setup()
    assert all(isinstance(phase, Phase) for phase in method.phases()), "phases() must return a list of Phase"


def unknown_settings_fail(trial: Trial) -> None:
    """A misspelt setting is an error.

    Mend: derive Config from MethodConfig or TrainingConfig, without model_config of its own.
    """
    try:
        trial.method.Config(no_such_setting=1)  # type: ignore[call-arg]
    except ValidationError:
        return
    raise AssertionError("Config accepts unknown settings: derive it from MethodConfig or TrainingConfig")


def students_end_evaluated_with_finite_weights(trial: Trial) -> None:
    """Every quantizer has a range, weights are finite, and what trains has moved.

    Mend: a phase with calibration_epochs, or finish(), must give every quantizer a range; distill() must return a loss in
    which every weight takes part; try a smaller learning rate where weights explode.
    """
    lockstep = trial.start()
    student = lockstep.trainees[0].student
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    lockstep.run(StopAfter())
    assert lockstep.trainees[0].failed is None, lockstep.trainees[0].failed
    assert lockstep.trainees[0].evaluation is not None, "the student was never evaluated"
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter).all(), f"{name} is not finite"
    if lockstep.student_steps:
        still = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
        assert not still, f"these parameters of the student never moved: {', '.join(still)}"


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
    lockstep = trial.end()
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
    assert tuple(batch.teacher_logits.shape) == (len(images), lockstep.method.task.classes), "teacher_logits must be N x classes"
    if batch.labels is not None:
        assert batch.labels.shape[0] == len(images), "one label per image"


def one_seed_repeats_and_two_differ(trial: Trial) -> None:
    """All randomness comes from the seed, and only a method with uses_seed=False gives equal students for two.

    Mend: draw from self.draw_noise, self.draw_labels or generator=self.random(NAME), not from torch's, NumPy's or Python's global
    generators; set uses_seed = False where nothing is random.
    """
    first, again, other = (trial.end(seed=seed) for seed in (0, 0, 1))
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
    whole = trial.end()
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
    assert ends_of(trial.end()) == ends_of(trial.end(poisoned=True)), "the students depend on the evaluation set"


def shared_synthesis_is_true_to_its_word(trial: Trial) -> None:
    """With shares_synthesis, a student in lockstep has the bits that it has alone.

    Mend: synthesize() and what it uses must not depend on a student; draw nothing shared in distill(); or register with
    shares_synthesis=False.
    """
    if not trial.method.info.shares_synthesis:
        return
    assert trial.method.adversary is Method.adversary, "adversary() is never called with shares_synthesis=True"
    together = ends_of(trial.end(bits=("w8a8", "w4a4", "w3a3")))
    assert ends_of(trial.end(bits=("w4a4",)))["w4a4"] == together["w4a4"], "alone, the student ends with other bits than in lockstep"


def images_do_not_depend_on_what_comes_after(trial: Trial) -> None:
    """What the phases that only make images leave behind is the same to the bit, whatever the settings in `after_images` are.

    Mend: take the setting that is told here out of Config.after_images: cells that differ in it would take over wrong images.
    """
    named = sorted(trial.config.after_images)
    tried = {name: list(_other_values(trial, name)) for name in named}
    untried = [name for name, changes in tried.items() if not changes]
    assert not untried, f"after_images names {', '.join(untried)}, of which no second valid value was found to try it with"
    together = {name: value for changes in tried.values() for name, value in changes[0].items()}
    for choice in [{}, *_choices(trial, named)]:  # what one choice leaves aside, another may use
        made = _made(trial, choice, named)
        for change in [*([] if choice else (change for changes in tried.values() for change in changes)), together] if made else []:
            if _valid(trial, choice | change):
                same = difference(made, _made(trial, choice | change, named)) is None
                assert same, f"with {', '.join(f'{k} = {v!r}' for k, v in (choice | change).items())} other images are made"


def _choices(trial: Trial, named: list[str]) -> Iterator[dict[str, Any]]:
    """Every other value of every setting that is a choice among words, or yes or no, and does not come after the images."""
    for name in sorted(trial.method.Config.model_fields.keys() - set(named)):
        if isinstance(getattr(trial.config, name), bool | str):
            yield from _other_values(trial, name)


def _made(trial: Trial, change: dict[str, Any], named: list[str]) -> dict[str, Any] | None:
    """The plan of the making phases with all that they change; None where a method has no such phases."""
    lockstep = Trial(trial.method, trial.settings | change).start()
    plan = [(phase.name, lockstep.iterations_of(phase)) for phase, _ in lockstep.epochs[: lockstep.making_epochs]]
    steps = sum(iterations for _, iterations in plan)
    if not steps:
        return None
    before = state_before(lockstep)
    lockstep.method.config = _Unread(lockstep.method.config, named)
    with contextlib.suppress(Interrupted):
        lockstep.run(StopAfter(steps))
    return {"plan": plan, "made": made_since(before, lockstep)}


class _Unread:
    """Settings of which some must not be read while images are made."""

    def __init__(self, config: Any, named: list[str]):
        self._config, self._named = config, named

    def __getattr__(self, name: str) -> Any:
        assert name not in self._named, f"the making of images reads {name}, which after_images names"
        return getattr(self._config, name)


def _other_values(trial: Trial, name: str) -> Iterator[dict[str, Any]]:
    """Some other valid values of one setting, each as a change of the settings."""
    now, annotation = getattr(trial.config, name), trial.method.Config.model_fields[name].annotation
    if isinstance(now, bool):
        values: list[Any] = [not now]
    elif isinstance(now, int | float):
        values = [2 * now + 1, now - 1] if isinstance(now, int) else [2 * now + 0.5, now / 2]
    elif isinstance(now, list):
        values = [[0, 1], []]
    else:
        values = list(get_args(annotation))
    yield from ({name: value} for value in values if value != now and _valid(trial, {name: value}))


def _valid(trial: Trial, change: dict[str, Any]) -> bool:
    try:
        Trial(trial.method, trial.settings | change)
    except ValidationError:
        return False
    return True


def any_task_works(trial: Trial) -> None:
    """1 and 3 channels, 10 and 1000 classes, 32 and 64 pixels.

    Mend: take channels, classes and size from self.task, never as constants.
    """
    fields = trial.method.Config.model_fields
    short = Trial(trial.method, trial.settings | {k: v for k, v in {"epochs": 2, "iterations": 2}.items() if k in fields})
    for channels, classes, size in ((1, 10, 32), (3, 1000, 32), (3, 10, 64)):
        try:
            short.end(task=small_task(channels, classes, size))
        except Exception as error:
            raise AssertionError(f"{channels} channels, {classes} classes, {size} pixels: {type(error).__name__}: {error}") from error


class WatchedObservation(Observation):
    """Notes what is read of it."""

    USES = {"features": "features", "bn_inputs": "statistics", "batch_norms": "statistics", "statistics": "statistics"}

    def __getattribute__(self, name: str) -> Any:
        if name in WatchedObservation.USES and "used" in object.__getattribute__(self, "__dict__"):
            object.__getattribute__(self, "used").add(WatchedObservation.USES[name])
        return super().__getattribute__(name)


class WatchedTeacher(Teacher):
    """A teacher that notes what it is asked for."""

    def __init__(self, network: nn.Module, task: Task):
        super().__init__(network, task)
        self.used: set[str] = set()

    def observe(self, images: Tensor) -> Observation:
        plain = super().observe(images)
        watched = WatchedObservation(plain.logits, plain.features, plain.bn_inputs, plain.batch_norms, plain.moments)
        watched.__dict__["used"] = self.used
        return watched

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        self.used.add("statistics")
        with super().batch_statistics():
            yield


def what_it_needs_is_declared(trial: Trial) -> None:
    """`needs` names what the method asks the teacher for beside its logits: BN statistics, stage features; and class labels.

    Mend: set `needs` to the set that is told here, so that `dfqbench methods` says for which networks the method will do.
    """
    teacher = small_teacher(small_task(), WatchedTeacher)
    assert isinstance(teacher, WatchedTeacher)
    used = teacher.used

    def noting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            used.add(what)
            return function(*given)

        return call

    with (
        patch.object(Method, "draw_labels", noting("labels", Method.draw_labels)),
        patch.object(Student, "set_ranges_from_bn", noting("statistics", Student.set_ranges_from_bn)),
    ):
        batch = trial.end(teacher=teacher).last_batch
    used |= {"labels"} if batch is not None and batch.labels is not None else set()
    undeclared = used - set(trial.method.needs)
    wanted = ", ".join(f'"{need}"' for need in sorted(used | set(trial.method.needs)))
    assert not undeclared, f"it uses {', '.join(sorted(undeclared))}, which is not declared: needs = {{{wanted}}}"


def static_steps_are_the_same_every_time(trial: Trial) -> None:
    """With static_step, every step of a phase is the same operations on the same tensors, whatever the seed.

    Mend: what the message names; or leave static_step as it is, False: the steps are then never replayed, and right all the same.
    """
    if not trial.start().method.static_step:
        return
    fields = trial.method.Config.model_fields
    longer = Trial(trial.method, trial.settings | {k: v for k, v in {"epochs": 2, "iterations": WARM_UP + 3}.items() if k in fields})
    steps = []
    for seed in (0, 1):
        lockstep = longer.start(seed=seed)
        assert all(map(is_fused, lockstep.optimizers)), "its optimizers must be torch's fused ones (fused=True)"
        lockstep.parts = compared = ComparedParts(lockstep)
        lockstep.run(StopAfter())
        steps.append(compared.steps)
    assert steps[0] == steps[1], "with another seed, steps are other operations"


CHECKS: tuple[Callable[[Trial], None], ...] = (
    defaults_are_valid,
    unknown_settings_fail,
    students_end_evaluated_with_finite_weights,
    the_teacher_is_untouched,
    images_are_normalised_images,
    what_it_needs_is_declared,
    one_seed_repeats_and_two_differ,
    interrupted_equals_uninterrupted,
    a_poisoned_evaluation_set_changes_nothing,
    shared_synthesis_is_true_to_its_word,
    static_steps_are_the_same_every_time,
    images_do_not_depend_on_what_comes_after,
    any_task_works,
)
NO_EXCUSE = tuple(
    check.__name__ for check in (the_teacher_is_untouched, a_poisoned_evaluation_set_changes_nothing, images_do_not_depend_on_what_comes_after)
)  # a number would mean nothing
Verdict = Literal["held", "failed", "expected", "outdated"]


@dataclass(frozen=True)
class Outcome:
    """What one check said: held, or why not (with the last line of a traceback where the method raised), and how to mend it.

    excuse: the reason that the method's `expected_failures` gives for this check.
    """

    check: str
    meaning: str
    failure: str | None
    mend: str = ""
    excuse: str | None = None

    @property
    def verdict(self) -> Verdict:
        """ "expected": failed as declared. "outdated": declared to fail, and holds."""
        if self.excuse is None:
            return "held" if self.failure is None else "failed"
        return "outdated" if self.failure is None else "expected"

    @property
    def good(self) -> bool:
        return self.verdict in ("held", "expected")

    def __str__(self) -> str:
        said = "declared in expected_failures, but it holds" if self.verdict == "outdated" else self.failure
        return f"{self.check}: {said}"


def outcomes(method: type[Method], settings: dict[str, Any] | None = None) -> Iterator[Outcome]:
    """Runs the checks on a registered method, one after the other."""
    names = [check.__name__ for check in CHECKS]
    for name, reason in method.expected_failures.items():
        wrong = {
            f"there is no such check: {nearest(name, names)}": name not in names,
            "this check has to hold: without it no number of the method means anything": name in NO_EXCUSE,
            "give the reason": not reason.strip(),
        }
        for what in (what for what, holds in wrong.items() if holds):
            yield Outcome("expected_failures", "What is declared to fail is a check that may.", f"{name!r}: {what}", "Change the class attribute.")
    trial: Trial | None = None
    for check in CHECKS:
        failure = None
        try:
            trial = trial or Trial(method, settings)
            check(trial)
        except AssertionError as error:
            failure = str(error) or _place(error)
        except Exception as error:
            failure = f"{type(error).__name__}: {error} ({_place(error)})"
        meaning, _, mend = (inspect.getdoc(check) or "").partition("\n\nMend: ")
        excuse = method.expected_failures.get(check.__name__) if check.__name__ not in NO_EXCUSE else None
        yield Outcome(check.__name__, meaning, failure, " ".join(mend.split()), excuse)


def _place(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(place.filename).name}, line {place.lineno}"


def check_method(method: type[Method], settings: dict[str, Any] | None = None) -> list[Outcome]:
    """Runs every check on a registered method."""
    return list(outcomes(method, settings))


def method_checks(method: type[Method], **settings: Any) -> None:
    """Raises AssertionError with a line for every check that did not hold. What the method declares in `expected_failures` must fail."""
    failed = [str(outcome) for outcome in check_method(method, settings) if not outcome.good]
    assert not failed, f"{method.info.name} fails {len(failed)} of {len(CHECKS)} checks:\n" + "\n".join(failed)

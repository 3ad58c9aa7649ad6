"""Conformance checks of what a method declares: `needs`, `after_images`, `static_step`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args
from unittest.mock import patch

from pydantic import ValidationError
from torch import Tensor, nn

from dfqbench.engine.lockstep import Interrupted
from dfqbench.engine.state_difference import difference
from dfqbench.engine.step_graph import WARM_UP
from dfqbench.engine.synthesis_cache import made_since, state_before
from dfqbench.method.contract import Method
from dfqbench.method.hosting import needs_of
from dfqbench.method.learning_rate import is_fused
from dfqbench.network import Observation, Teacher
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.testing.static_steps import ComparedParts
from dfqbench.testing.trial import StopAfter, Trial, small_teacher


def images_do_not_depend_on_what_comes_after(trial: Trial) -> None:
    """What the phases that only make images leave behind is the same to the bit, whatever the settings in `after_images` are.

    Mend: take the setting that is told here out of Config.after_images: cells that differ in it would take over wrong images.
    """
    named = sorted(trial.config.after_images)
    tried = {name: list(_other_values(trial, name)) for name in named}
    moved = {name for changes in tried.values() for change in changes for name in _moved(trial, change)}  # what is filled in moves with others
    untried = [name for name, changes in tried.items() if not changes and name not in moved]
    assert not untried, f"after_images names {', '.join(untried)}, of which no second valid value was found to try it with"
    together = {name: value for changes in tried.values() for name, value in (changes[0].items() if changes else ())}
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
    lockstep = Trial(trial.method, trial.settings | change, trial.kind).start()
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


def _moved(trial: Trial, change: dict[str, Any]) -> set[str]:
    """The settings that are others with this change."""
    changed = Trial(trial.method, trial.settings | change, trial.kind).config
    return {name for name in trial.method.Config.model_fields if getattr(changed, name) != getattr(trial.config, name)}


def _valid(trial: Trial, change: dict[str, Any]) -> bool:
    try:
        Trial(trial.method, trial.settings | change, trial.kind)
    except ValidationError:
        return False
    return True


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
    teacher = small_teacher(trial.task, WatchedTeacher)
    assert isinstance(teacher, WatchedTeacher)
    used = teacher.used

    def noting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            used.add(what)
            return function(*given)

        return call

    with (
        patch.object(Method, "draw_labels", noting("labels", Method.draw_labels)),
        patch.object(Student, "set_ranges_from_bn", noting("ranges", Student.set_ranges_from_bn)),
    ):
        batch = trial.end(teacher=teacher).last_batch
    used |= {"labels"} if batch is not None and batch.labels is not None else set()
    declared = needs_of(trial.method, trial.config)
    undeclared = used - declared
    wanted = ", ".join(f'"{need}"' for need in sorted(used | declared))
    assert not undeclared, f"it uses {', '.join(sorted(undeclared))}, which is not declared: needs = {{{wanted}}}"


def static_steps_are_the_same_every_time(trial: Trial) -> None:
    """With static_step, every step of one kind is the same operations on the same tensors, whatever the seed.

    Mend: what the message names; or leave static_step as it is, False: the steps are then never replayed, and right all the same.
    """
    if not trial.start().method.static_step:
        return
    for times in (1, 2, 4):  # where several kinds take turns
        iterations = times * (WARM_UP + 3)
        first = _compared(trial, iterations, seed=0)
        if None not in first.values():
            break
    second = _compared(trial, iterations, seed=1)
    alike = all(first[place] == second[place] for place in first.keys() & second.keys() if first[place] and second[place])
    assert alike, "with another seed, steps are other operations"


def _compared(trial: Trial, iterations: int, seed: int) -> dict[Any, Any]:
    """The operations of each kind of step, as `ComparedParts` has them."""
    longer = {k: v for k, v in {"epochs": 2, "iterations": iterations}.items() if k in trial.method.Config.model_fields}
    lockstep = Trial(trial.method, trial.settings | longer, trial.kind).start(seed=seed)
    assert all(map(is_fused, lockstep.optimizers)), "its optimizers must be torch's fused ones (fused=True)"
    lockstep.parts = compared = ComparedParts(lockstep)
    lockstep.run(StopAfter())
    return compared.operations

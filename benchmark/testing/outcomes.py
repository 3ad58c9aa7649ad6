"""All conformance checks of a method, and how each ended. A plug-in's own test is one line:

    def test_conformance(): method_checks(MyMethod)

Everything runs on a small random network and random images; nothing is downloaded and no real image is seen.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dfqbench.errors import UserError, nearest
from dfqbench.method.contract import Method
from dfqbench.method.hosting import tasks_of
from dfqbench.method.settings import without_default
from dfqbench.task import Kind
from dfqbench.testing import checks, declarations
from dfqbench.testing.trial import Trial

CHECKS: tuple[Callable[[Trial], None], ...] = (
    checks.defaults_are_valid,
    checks.unknown_settings_fail,
    checks.students_end_evaluated_with_finite_weights,
    checks.the_teacher_is_untouched,
    checks.images_are_normalised_images,
    declarations.what_it_needs_is_declared,
    checks.one_seed_repeats_and_two_differ,
    checks.interrupted_equals_uninterrupted,
    checks.a_poisoned_evaluation_set_changes_nothing,
    checks.shared_synthesis_is_true_to_its_word,
    declarations.static_steps_are_the_same_every_time,
    declarations.images_do_not_depend_on_what_comes_after,
    checks.any_task_works,
)
DENSE_CHECKS = tuple(  # what a method does may be another thing there; what it declares of its settings is not
    check
    for check in CHECKS
    if check
    not in (
        checks.defaults_are_valid,
        checks.unknown_settings_fail,
        declarations.static_steps_are_the_same_every_time,  # a GPU looks for itself, with the network that it has
        declarations.images_do_not_depend_on_what_comes_after,
    )
)
NO_EXCUSE = tuple(
    check.__name__
    for check in (
        checks.the_teacher_is_untouched,
        checks.a_poisoned_evaluation_set_changes_nothing,
        declarations.images_do_not_depend_on_what_comes_after,
    )
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
    """Runs the checks on a registered method, one after the other, for each kind of task that it is defined for with these settings.

    Raises UserError where a setting without a default is not given.
    """
    needed = [name for name in without_default(method.Config) if name not in {**method.quick, **(settings or {})}]
    if needed:
        raise UserError(f"{method.info.name} cannot be checked without its settings {', '.join(needed)}: they have no defaults")
    names = [check.__name__ for check in CHECKS]
    for name, reason in method.expected_failures.items():
        wrong = {
            f"there is no such check: {nearest(name, names)}": name not in names,
            "this check has to hold: without it no number of the method means anything": name in NO_EXCUSE,
            "give the reason": not reason.strip(),
        }
        for what in (what for what, holds in wrong.items() if holds):
            yield Outcome("expected_failures", "What is declared to fail is a check that may.", f"{name!r}: {what}", "Change the class attribute.")
    kinds: list[Kind] = list(method.info.tasks)
    for kind in kinds:
        first = kind == kinds[0]
        yield from _of_kind(method, settings, kind, CHECKS if first else DENSE_CHECKS, "" if first else f" ({kind})")


def _of_kind(
    method: type[Method], settings: dict[str, Any] | None, kind: Kind, some: Sequence[Callable[[Trial], None]], suffix: str
) -> Iterator[Outcome]:
    trial: Trial | None = None
    for check in some:
        failure = None
        try:
            trial = trial or Trial(method, settings, kind)
            if kind not in tasks_of(method, trial.config):
                return
            check(trial)
        except Exception as error:
            failure = in_words(error)
        excuse = method.expected_failures.get(check.__name__) if check.__name__ not in NO_EXCUSE else None
        yield outcome_of(check, failure, excuse, suffix)


def outcome_of(check: Callable[[Any], None], failure: str | None, excuse: str | None = None, suffix: str = "") -> Outcome:
    """With what the check's docstring says of it; suffix: behind its name."""
    meaning, _, mend = (inspect.getdoc(check) or "").partition("\n\nMend: ")
    return Outcome(check.__name__ + suffix, meaning, failure, " ".join(mend.split()), excuse)


def in_words(error: Exception) -> str:
    """Why a check did not hold."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}, line {last.lineno}"
    return str(error) or place if isinstance(error, AssertionError) else f"{type(error).__name__}: {error} ({place})"


def check_method(method: type[Method], settings: dict[str, Any] | None = None) -> list[Outcome]:
    """Runs every check on a registered method."""
    return list(outcomes(method, settings))


def method_checks(method: type[Method], **settings: Any) -> None:
    """Raises AssertionError with a line for every check that did not hold. What the method declares in `expected_failures` must fail."""
    failed = [str(outcome) for outcome in check_method(method, settings) if not outcome.good]
    assert not failed, f"{method.info.name} fails {len(failed)} of {len(CHECKS)} checks:\n" + "\n".join(failed)

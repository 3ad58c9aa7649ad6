"""Conformance checks of an allocator. A plug-in's own test is one line:

def test_conformance(): allocator_checks(MyAllocator)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import ValidationError

from dfqbench.method.allocation import AllocationProblem, Vector
from dfqbench.method.allocator import Allocator, allocate
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.task import Kind
from dfqbench.teachers.weights import hash_tensors
from dfqbench.testing.outcomes import Outcome, in_words, outcome_of
from dfqbench.testing.trial import small_task_of, small_teacher


class Choice:
    """Lets one allocator choose for a small teacher, on eight random images. `settings` come on top of its own `quick` ones."""

    def __init__(self, allocator: type[Allocator], settings: dict[str, Any] | None = None):
        self.allocator, self.given = allocator, {**allocator.quick, **(settings or {})}
        self.config = allocator.Config(**self.given)
        self.first: Kind = "classify" if "classify" in allocator.tasks else min(allocator.tasks)

    def problem(self, kind: Kind | None = None, average: float = 3, protocol: str = "lineage", activations: bool = False) -> AllocationProblem:
        task = small_task_of(kind or self.first)
        images = torch.randn(8, *task.image_shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)
        return AllocationProblem(small_teacher(task), PROTOCOLS[protocol], Bits(average, 4), images, self.config.seed, activations)

    def widths(self, problem: AllocationProblem) -> Vector:
        """Raises RuntimeError where they are not within the budget."""
        return allocate(self.allocator(problem, self.config))


def unknown_settings_fail(choice: Choice) -> None:
    """A misspelt setting is an error.

    Mend: derive Config from AllocatorConfig, without model_config of its own.
    """
    try:
        choice.allocator.Config(**choice.given, no_such_setting=1)  # type: ignore[call-arg]
    except ValidationError:
        return
    raise AssertionError("Config accepts unknown settings: derive it from AllocatorConfig")


def every_budget_is_kept(choice: Choice) -> None:
    """A width for each tensor, within the budget, from the least average to the widest, whatever the protocol leaves to choose.

    Mend: return self.problem.project(widths), which brings any choice of self.problem.widths onto the budget.
    """
    for average in (2, 3.5, 8):
        for protocol in ("lineage", "hardware"):
            choice.widths(choice.problem(average=average, protocol=protocol))


def activations_have_a_budget_of_their_own(choice: Choice) -> None:
    """Where activations have widths too, both budgets are kept.

    Mend: keep each of self.problem.groups within its budget, or set of_activations = False: it then chooses for weights only.
    """
    if choice.allocator.of_activations:
        choice.widths(choice.problem(activations=True))


def the_same_problem_has_the_same_answer(choice: Choice) -> None:
    """Asked again, it chooses the same widths: they are kept once for all cells that share them.

    Mend: draw from self.problem.random(name) only, which depends on the setting `seed`, never from torch's or numpy's own random numbers.
    """
    answers = []
    for state in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            answers.append(choice.widths(choice.problem()))
    assert answers[0] == answers[1], f"it chose {answers[0]}, and asked again {answers[1]}"


def the_networks_are_untouched(choice: Choice) -> None:
    """Weights of teacher and student are what they were, and no gradient stays on.

    Mend: change copies of weights only; after self.problem.float_weights were asked for gradients, set requires_grad_(False) again.
    """
    problem = choice.problem()
    networks = {"teacher": problem.teacher, "student": problem.student}
    before = {name: hash_tensors(network.named_parameters()) for name, network in networks.items()}
    choice.widths(problem)
    for name, network in networks.items():
        assert hash_tensors(network.named_parameters()) == before[name], f"weights of the {name} changed"
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters()), f"gradients of the {name} were left on"


def every_task_of_its_is_chosen_for(choice: Choice) -> None:
    """It chooses for a small network of each kind that `tasks` names.

    Mend: ask self.problem what choices cost, which knows every kind of task; or name in `tasks` only the kinds that it is for.
    """
    for kind in choice.allocator.tasks:
        try:
            choice.widths(choice.problem(kind))
        except Exception as error:
            raise AssertionError(f"a network to {kind}: {type(error).__name__}: {error}") from error


CHECKS: tuple[Callable[[Choice], None], ...] = (
    unknown_settings_fail,
    every_budget_is_kept,
    activations_have_a_budget_of_their_own,
    the_same_problem_has_the_same_answer,
    the_networks_are_untouched,
    every_task_of_its_is_chosen_for,
)


def allocator_outcomes(allocator: type[Allocator], settings: dict[str, Any] | None = None) -> Iterator[Outcome]:
    """Runs the checks on a registered allocator, one after the other."""
    choice = Choice(allocator, settings)
    for check in CHECKS:
        try:
            check(choice)
        except Exception as error:
            yield outcome_of(check, in_words(error))
        else:
            yield outcome_of(check, None)


def allocator_checks(allocator: type[Allocator], **settings: Any) -> None:
    """Raises AssertionError with a line for every check that did not hold."""
    failed = [str(outcome) for outcome in allocator_outcomes(allocator, settings) if not outcome.good]
    assert not failed, f"{allocator.info.name} fails {len(failed)} of {len(CHECKS)} checks:\n" + "\n".join(failed)

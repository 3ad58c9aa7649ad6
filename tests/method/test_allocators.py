"""Bits per layer: the exact programme, the projection onto a budget, every allocator, and a sweep with budgets from plan to file."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dfqbench.export.find import load_student
from dfqbench.method import allocator as allocators
from dfqbench.method.allocation import AllocationProblem
from dfqbench.method.allocator import allocate, list_allocators
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.teachers.scenes import NETWORKS
from dfqbench.testing import allocator_checks
from dfqbench.testing.allocators import CHECKS
from dfqbench.testing.networks import SmallNetwork
from dfqbench.testing.trial import small_task
from dfqbench_methods.allocators.pareto import cheapest

Run = Callable[..., tuple[int, str, str]]


@cache
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(SmallNetwork(small_task()).eval(), small_task())


def problem(average: float = 4, protocol: str = "lineage", seed: int = 0, activations: bool = False) -> AllocationProblem:
    images = torch.randn(12, *small_task().image_shape, generator=torch.Generator().manual_seed(1))
    return AllocationProblem(teacher(), PROTOCOLS[protocol], Bits(average, 4), images, seed, activations)


@pytest.mark.parametrize("seed", range(5))
def test_the_dynamic_programme_is_exact_on_eight_tensors(seed: int) -> None:
    draw, widths = np.random.default_rng(seed), (2, 4, 8)
    costs, entries = np.sort(draw.random((8, 3)), 1)[:, ::-1].copy(), draw.integers(1, 50, 8).tolist()
    budget = int(sum(entries) * draw.uniform(2.5, 7))
    feasible = [
        (sum(costs[i, k] for i, k in enumerate(ks)), ks)
        for ks in itertools.product(range(3), repeat=8)
        if sum(n * widths[k] for n, k in zip(entries, ks, strict=True)) <= budget
    ]
    chosen = cheapest(costs, entries, widths, budget)
    assert sum(n * width for n, width in zip(entries, chosen, strict=True)) <= budget
    assert sum(costs[i, widths.index(width)] for i, width in enumerate(chosen)) == pytest.approx(min(feasible)[0], abs=1e-12)


@pytest.mark.parametrize("average", [2, 3, 3.5, 4, 6, 8])
def test_projection_meets_the_budget_to_the_last_weight_and_stays(average: float) -> None:
    its = problem(average)
    for vector in ([2] * len(its.tensors), [8] * len(its.tensors), its.uniform):
        projected = its.project(vector)
        bits = [tensor.entries * width for tensor, width in zip(its.tensors, projected, strict=True)]
        assert sum(bits) <= its.budget
        for tensor, width in zip(its.tensors, projected, strict=True):  # nothing is left that one more step could use
            more = [w for w in its.widths if w > width]
            assert not more or sum(bits) + tensor.entries * (more[0] - width) > its.budget
        assert its.project(projected) == projected
    assert its.uniform == tuple([average] * len(its.tensors)) or average == 3.5


def test_equal_widths_are_the_plain_width_to_the_bit() -> None:
    images = torch.randn(4, *small_task().image_shape, generator=torch.Generator().manual_seed(2))
    plain = Student(teacher(), PROTOCOLS["lineage"], Bits(4, 4))
    own = Student(teacher(), PROTOCOLS["lineage"], Bits(4, 4), {tensor.name: 4 for tensor in problem(4).tensors})
    for student in (plain, own):
        student.set_ranges_from_bn(3.0)
    assert torch.equal(plain(images), own(images))


def test_what_a_protocol_fixes_is_not_chosen() -> None:
    free, student = {tensor.name for tensor in problem(4, "hardware").tensors}, Student(teacher(), PROTOCOLS["hardware"], Bits(4, 4))
    first, *_, last = student.layers
    assert free == set(student.layers) - {first, last}


@pytest.mark.parametrize("allocator", list_allocators(), ids=lambda allocator: allocator.info.name)
@pytest.mark.parametrize("activations", [False, True])
def test_every_allocator_keeps_its_budget_and_repeats_itself(allocator: Any, activations: bool) -> None:
    if activations and not allocator.of_activations:
        pytest.skip("for weights only")
    config = allocator.Config(**allocator.quick)
    its = [problem(3, seed=0, activations=activations) for _ in range(2)]
    first, again = (allocate(allocator(one, config)) for one in its)
    assert first == again
    assert its[0].is_feasible(first)
    assert len(first) == len(its[0].tensors)


def test_at_eight_bits_there_is_nothing_to_gain() -> None:
    [dnq] = [allocator for allocator in list_allocators() if allocator.info.name == "dnq"]
    its = problem(8)
    assert abs(its.reward(allocate(dnq(its, dnq.Config(**dnq.quick))))) < 1e-9  # all at 8 bits is all that is feasible, or better


def test_a_search_is_not_worse_than_equal_widths() -> None:
    for allocator in list_allocators():
        if allocator.info.name in ("dnq", "random"):
            its = problem(3)
            assert its.cost(allocate(allocator(its, allocator.Config(**allocator.quick)))) <= its.cost(its.uniform)


@pytest.mark.slow
@pytest.mark.parametrize("allocator", list_allocators(), ids=lambda allocator: allocator.info.name)
def test_every_allocator_passes_the_checks(allocator: Any) -> None:
    allocator_checks(allocator)


BAD = """
import torch
from dfqbench import Allocator, AllocatorConfig, register_allocator

CALLS = []


@register_allocator("{name}", paper="none", fidelity="paper")
class Bad(Allocator):
    class Config(AllocatorConfig):
        {config}

    def allocate(self):
        problem, count = self.problem, len(self.problem.tensors)
        {body}
"""
FINE = "return problem.uniform"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "body", "found"),
    [
        ("model_config = {'extra': 'ignore'}", FINE, {"unknown_settings_fail"}),
        (
            "pass",
            "CALLS.append(0); return problem.project([2 + (len(CALLS) + i) % 5 for i in range(count)])",
            {"the_same_problem_has_the_same_answer"},
        ),
        ("pass", f"problem.float_weights[0].data.add_(1.0); {FINE}", {"the_networks_are_untouched"}),
        ("pass", f"problem.float_weights[0].requires_grad_(True); {FINE}", {"the_networks_are_untouched"}),
        ("pass", f"assert problem.teacher.task.kind != 'detect'; {FINE}", {"every_task_of_its_is_chosen_for"}),
        ("pass", "return [8 if t.is_weight else 2 for t in problem.tensors]", {check.__name__ for check in CHECKS} - {"unknown_settings_fail"}),
        (
            "pass",
            f"if problem.groups[1:]: return [8 if i in problem.groups[1][0] else 2 for i in range(count)]\n        {FINE}",
            {"activations_have_a_budget_of_their_own"},
        ),
    ],
)
def test_the_checks_find_what_is_wrong(config: str, body: str, found: set[str], tmp_path: Path, dfqbench: Run) -> None:
    (tmp_path / "bad.py").write_text(BAD.format(name="bad", config=config, body=body))
    try:
        code, out, err = dfqbench("methods", "check", "--allocator", "bad", "--plugin", tmp_path / "bad.py")
    finally:
        del allocators._allocators["bad"]
    assert (code, err) == (1, "")
    assert {line.split()[1].rstrip(":") for line in out.splitlines() if line.startswith("  FAILED")} == found
    assert out.count("            mend  ") == len(found)


@pytest.mark.slow
def test_a_name_that_is_built_in_is_taken_whichever_is_asked_for_first(tmp_path: Path) -> None:
    assert {file.stem for file in allocators._built_in().values()} == {each.info.name for each in list_allocators() if each.info.source.package}
    (tmp_path / "mine.py").write_text(BAD.format(name="pareto", config="pass", body=FINE))
    code = f"from dfqbench.method.registry import load_plugin; load_plugin({str(tmp_path / 'mine.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "two allocators are called 'pareto'" in done.stderr


def test_an_allocator_that_is_not_defined_for_a_task_is_told_in_plan(tmp_path: Path, sweep_file: Callable[..., Path], dfqbench: Run) -> None:
    budget = {"average_weight_bits": 4, "activations": 4, "allocate": "hawq"}
    save_file(NETWORKS["segment"]().state_dict(), tmp_path / "w.safetensors")
    teacher = {"model": "scenes:segment", "weights": str(tmp_path / "w.safetensors")}
    config = sweep_file(teachers=[teacher], evaluate="digit-scenes-segment", methods=["round"], bits=[budget], budget=None)
    code, _, err = dfqbench("plan", config, "--results", tmp_path / "r")
    assert (code, "is there to segment, for which allocator hawq is not defined" in err) == (2, True), err


@pytest.mark.slow
def test_a_sweep_with_budgets(tmp_path: Path, sweep_file: Callable[..., Path], dfqbench: Run) -> None:
    budget = {"average_weight_bits": 4, "activations": 4, "allocate": {"random": {}}}
    pool = {"images": {"zeroq": {"images": 8, "synthesis_iterations": 2}}, "seed": 77, "count": 8}
    config = sweep_file(methods=["round"], bits=["w4a4", budget | {"allocate": "pareto"}], allocation=pool)
    code, out, err = dfqbench("run", config, "--results", tmp_path / "r")
    assert code == 0, out + err
    results = [json.loads(path.read_text()) for path in (tmp_path / "r").glob("runs/*/result.json")]
    [chosen] = [result for result in results if "allocation" in result]
    [plain] = [result for result in results if "allocation" not in result]
    assert "widths" in chosen["cell"]["identity"]
    assert "widths" not in plain["cell"]["identity"]
    assert chosen["allocation"]["average_weight_bits"] <= 4
    student = load_student(chosen["id"], tmp_path / "r")
    kept = {name: layer.bits for name, layer in student.layers.items()}
    assert kept == {name: bits for name, bits in chosen["allocation"]["bits"].items() if name in kept}
    assert chosen["size"]["student"]["weight_bits"] <= 4.001
    code, out, _ = dfqbench("table", "--results", tmp_path / "r")
    assert (code, "pareto" in out) == (0, True)
    assert f"{chosen['id']}  w4a4 pareto  done" in dfqbench("plan", config, "--results", tmp_path / "r")[1]
    code, out, _ = dfqbench("run", config, "--results", tmp_path / "r")
    assert code == 0
    wrong = sweep_file(methods=["round"], bits=[budget | {"allocate": "parato"}])
    code, _, err = dfqbench("plan", wrong, "--results", tmp_path / "r")
    assert (code, "unknown allocator 'parato': did you mean 'pareto'?" in err) == (2, True)

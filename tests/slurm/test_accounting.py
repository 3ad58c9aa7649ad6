"""On a real Slurm with accounting, small job arrays and a partition whose jobs take the node from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from place import Place, numbers, runs_through

Reference = Callable[[str], tuple[dict[Any, Any], str]]


def test_a_sweep_larger_than_the_array_limit_is_split_with_accounting(accounting_place: Place, reference: Reference) -> None:
    runs_through(accounting_place, reference, jobs=3, arrays=2)
    assert "COMPLETED" in accounting_place.ask("sacct", "-n", "-X", "-o", "State")


def test_a_preempted_job_saves_and_goes_on_when_the_node_is_free_again(accounting_place: Place, reference: Reference) -> None:
    place = accounting_place
    expected, _ = reference("slow")
    config = place.slow_sweep("preempted", seeds=[1])
    profile = place.profile("preempted", sbatch={"exclusive": True})
    assert place.dfqbench("submit", config, "--profile", profile, PAUSE="0.3").code == 0
    place.wait("it is in the middle", lambda: "/60, " in place.dfqbench("status", config).out)
    urgent = place.ask("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 2").strip()
    seen = place.wait("it is pre-empted", lambda: " pre-empted " in (shown := place.dfqbench("status", config).out) and shown)
    assert "goes on at step" in seen
    place.wait("it is through", lambda: not place.left())
    assert place.ask("sacct", "-n", "-X", "-P", "-o", "State", "-j", urgent).strip() == "COMPLETED"
    assert numbers(place.results()) == {key: value for key, value in expected.items() if key[0] == 1}, place.logs()
    log = next(place.folder.glob("results/runs/*/log.txt")).read_text()
    assert (log.count("stopped by SIG"), log.count("resumed at step"), log.count("started")) == (1, 1, 1), place.logs()

"""Code from an installed package reaches the workers of a real Slurm."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from dfqbench.cli.app import app

if TYPE_CHECKING:
    from conftest import Example

PATIENCE_S = 240.0


@pytest.mark.xdist_group("slurm")
def test_a_packages_method_set_and_network_run_in_jobs(example: Example, request: pytest.FixtureRequest) -> None:
    if not any(command.callback is not None and command.callback.__name__ == "submit" for command in app.registered_commands):
        pytest.skip("dfqbench submit is not there yet")
    cluster: dict[str, str] = request.getfixturevalue("cluster")  # skips, or fails where Slurm is required, with its own reason
    words = ("example.yaml", "--results", "results-slurm")
    done = example.dfqbench("submit", *words, "--profile", "test-cluster", **cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    end = time.monotonic() + PATIENCE_S
    while len(found := list(example.folder.glob("results-slurm/runs/*/result.json"))) < 4 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(found) == 4, example.dfqbench("status", *words, **cluster).stdout
    results = [json.loads(path.read_text()) for path in found]
    assert {result["cell"]["source"]["package"] for result in results} == {"dfqbench", "dfqbench-example"}
    assert all(result["provenance"]["slurm_job"] for result in results)

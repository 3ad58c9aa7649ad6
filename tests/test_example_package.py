"""A package that somebody else wrote, installed beside the suite: its method, its evaluation set, its network and its protocol just work."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from dfqbench.testing.outcomes import CHECKS

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from conftest import Example


def test_what_the_package_brings_is_listed_with_its_version(example: Example) -> None:
    methods = example.dfqbench("methods", "list", "rip*")
    assert methods.returncode == 0, methods.stderr
    assert " ".join(methods.stdout.splitlines()[1].split()) == "ripples none paper classify logits only yes dfqbench-example 1.2.3"
    shown = example.dfqbench("methods", "show", "ripples")
    assert "dfqbench-example 1.2.3, ripples.py, sha256 " in shown.stdout
    assert "waves per image" in shown.stdout
    assert "blobs  dfqbench-example 1.2.3  200 grey images" in example.dfqbench("sets", "blobs").stdout
    assert example.dfqbench("models", "dfq_example.nets:*").stdout.split() == ["dfq_example.nets:Quarters", "dfq_example.nets:quarters"]
    assert "whole-numbers" in example.dfqbench("protocols", "whole-numbers.yaml").stdout


def test_its_method_passes_the_checks(example: Example) -> None:
    checked = example.dfqbench("methods", "check", "ripples")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(CHECKS)} checks: {len(CHECKS)} held" in checked.stdout


def test_it_runs_and_is_tabulated_and_its_cells_say_where_the_code_came_from(example: Example) -> None:
    done = example.dfqbench("run", "example.yaml", "--threads", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 done" in done.stdout
    table = example.dfqbench("table", "example.yaml", "--format", "csv")
    rows = [line for line in table.stdout.splitlines() if ",ripples," in line]
    assert len(rows) == 2
    assert all("blobs" in row and "whole-numbers" in row for row in rows)
    cells = [json.loads(path.read_text()) for path in example.folder.glob("results/runs/*/cell.json")]
    (source,) = {json.dumps(cell["source"]) for cell in cells if cell["method"] == "ripples"}
    assert {key: value for key, value in json.loads(source).items() if key != "sha256"} == {
        "package": "dfqbench-example",
        "version": "1.2.3",
        "file": "ripples.py",
    }
    (teacher,) = {json.dumps([c["teacher"]["model"], c["teacher"]["label"]]) for c in cells}
    assert json.loads(teacher) == ["dfq_example.nets:quarters", "quarters"]
    results = [json.loads(path.read_text()) for path in example.folder.glob("results/runs/*/result.json")]
    assert {result["teacher"]["top1"] for result in results} == {100.0}, "the network knows its blobs"

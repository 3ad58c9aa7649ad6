"""results/speed/on_a_gpu.sh: two parts that fit ten minutes each, of commands that there are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "results" / "speed" / "on_a_gpu.sh"


def said(*words: str, **environment: str) -> str:
    given = {**os.environ, "COLUMNS": "150", "OMP_NUM_THREADS": "1", "BIN": str(Path(sys.executable).parent), **environment}
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=600, env=given)
    assert done.returncode == (0 if words else 2), done.stderr
    return done.stdout


@pytest.mark.parametrize("part", ["1", "2"])
def test_a_part_takes_ten_minutes_at_most_and_what_it_runs_is_there(part: str) -> None:
    planned = said(part, LIST="1")
    seconds = [int(found) for found in re.findall(r"^(\d+) s: ", planned, re.MULTILINE)]
    assert len(seconds) >= 2
    assert sum(seconds) <= 600
    for file, chosen in re.findall(r"(tests/\S+\.py) -k (\S+)", planned):
        assert f"_{chosen}" in (ROOT / file).read_text(encoding="utf-8"), f"no test of {file} is chosen by {chosen}"
    assert ("real_gpu" in planned) == (part == "1")


def test_without_a_part_it_says_what_there_is() -> None:
    assert "on_a_gpu.sh 2    GDFQ and ACQ" in said()


@pytest.mark.slow
def test_in_small_on_a_cpu_the_cells_are_run_and_shown() -> None:
    shown = said("2", DRY="1")
    assert re.search("^cells: done after", shown, re.MULTILINE)
    assert re.search("^table: done after", shown, re.MULTILINE)
    assert re.search(r"^gdfq +code +2 x 4", shown, re.MULTILINE)

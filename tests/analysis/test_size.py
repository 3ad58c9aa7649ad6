"""Size and work in tables, plots and the report; `-` where results have none; and a student's file that nothing of this opens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_store import make_store

COMMANDS = {
    "table": "table",
    "csv": "table --format csv",
    "means": "table --format csv-means",
    "wide": "table --layout wide",
    "plot": "plot --kind accuracy --format png",
    "report": "report",
    "merge": "merge OTHER",
    "results": "results",
}
WATCHED = """
import sys

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ("open", "os.open") else None)
import dfqbench
from dfqbench.cli import app
try:
    dfqbench.results(sys.argv[-1]) if sys.argv[1] == "results" else app.main()
finally:
    assert any(name.endswith("result.json") for name in opened), "the hook sees what is opened"
    assert not [name for name in opened if name.endswith("student.safetensors")], "a student was opened"
    assert "torch" not in sys.modules and "safetensors" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_reading_a_store_opens_no_student(tmp_path: Path, command: str) -> None:
    store = make_store(tmp_path / "r", 6)
    students = [store.folder(cell_id) / "student.safetensors" for cell_id in store.ids()]
    for student in students:
        student.write_bytes(b"\xff" * 1000)
    words = command.replace("OTHER", str(make_store(tmp_path / "other", 8).root)).split()
    call = [sys.executable, "-c", WATCHED, *words, "--results", str(store.root)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {student.read_bytes() for student in students} == {b"\xff" * 1000}

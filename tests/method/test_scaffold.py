"""`methods new` and `methods check`: what is written passes and runs untouched, and the report says what failed and how to mend it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dfqbench import Batch, Method, Phase, Student, TrainingConfig
from dfqbench.method import allocator as allocators
from dfqbench.method import registry
from dfqbench.method.registry import find_method, load_plugin, register
from dfqbench.testing import check_method, method_checks
from dfqbench.testing.outcomes import CHECKS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _empty_folder_and_no_method_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    registry.discover()
    allocators.list_allocators()
    tables = [(table, dict(table)) for table in (registry._methods, allocators._allocators)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_new_file_passes_all_checks_untouched(dfqbench: Run, tmp_path: Path) -> None:
    code, out, err = dfqbench("methods", "new", "spark-two")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spark_two.py", "spark_two.yaml"]
    assert "dfqbench methods check spark-two --plugin spark_two.py" in out
    assert "dfqbench run spark_two.yaml" in out
    load_plugin("spark_two.py")
    method = find_method("spark-two")
    assert method.__name__ == "SparkTwo"
    method_checks(method)


def untrained_teacher(folder: Path) -> None:
    """The teacher of the sweeps that are written, its training left out."""
    from dfqbench.teachers.cifar import cifar_resnet

    teacher = folder / "results" / "weights" / "digits-resnet20.safetensors"
    teacher.parent.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(cifar_resnet("resnet20", 10, 1).state_dict(), teacher)


@pytest.mark.slow
def test_a_new_allocator_passes_its_checks_and_its_sweep_runs(dfqbench: Run, tmp_path: Path) -> None:
    """The budget of the images is cut, and that of the allocator; nothing else is touched."""
    code, out, err = dfqbench("methods", "new", "--allocator", "spark-two")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spark_two.py", "spark_two.yaml"]
    assert "dfqbench methods check --allocator spark-two --plugin spark_two.py" in out
    code, out, err = dfqbench("methods", "check", "--allocator", "spark-two", "--plugin", "spark_two.py")
    assert (code, err) == (0, "")
    assert out.startswith("spark-two (spark_two.py)\n  held      unknown_settings_fail")
    listed = dfqbench("allocators", "--plugin", "spark_two.py")[1]
    assert "spark-two  unpublished         paper     classify segment detect  too          spark_two.py" in listed
    untrained_teacher(tmp_path)
    text = (tmp_path / "spark_two.yaml").read_text()
    for full, cut in (("iterations: 100", "iterations: 2"), ("64", "8"), ("allocate: spark-two", "allocate: {spark-two: {tries: 4}}")):
        assert full in text
        text = text.replace(full, cut)
    (tmp_path / "spark_two.yaml").write_text(text)
    code, out, err = dfqbench("run", "spark_two.yaml")
    assert (code, "3 done" in out) == (0, True), out + err
    results = [json.loads(path.read_text()) for path in tmp_path.glob("results/runs/*/result.json")]
    records = {result["allocation"]["allocator"]: result for result in results if "allocation" in result}
    assert records.keys() == {"pareto", "spark-two"}
    assert records["spark-two"]["allocation"]["average_weight_bits"] <= 3
    source = json.loads((tmp_path / "results" / "runs" / records["spark-two"]["id"] / "cell.json").read_text())["allocation"]["source"]
    assert (source["file"], len(source["sha256"])) == ("spark_two.py", 64)
    assert "round(allocate=spark-two(tries=4))" in dfqbench("table", "spark_two.yaml", "--format", "csv")[1]


@pytest.mark.slow
def test_a_new_package_of_an_allocator_is_found_checked_and_takes_no_name_twice(dfqbench: Run, tmp_path: Path) -> None:
    assert dfqbench("methods", "new", "my-spark", "--allocator", "--package")[0] == 0
    place = tmp_path / "my-spark"
    project = tomllib.loads((place / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"dfqbench.allocators": {"my-spark": "my_spark"}}
    assert "plugins:" not in (place / "digits.yaml").read_text(), "the entry point makes it known"
    for path in place.rglob("*"):
        assert path.is_dir() or not any(word in path.read_text() for word in ("my-allocator", "my_allocator", "MyAllocator", "$", "method,")), path
    installed = place / "src" / "dfqbench_my_spark-0.1.0.dist-info"  # as pip leaves it
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dfqbench-my-spark\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text("[dfqbench.allocators]\nmy-spark = my_spark\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place / "src"), *sys.path]), "COLUMNS": "200"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True, cwd=place)

    done = run("pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "dfqbench-my-spark 0.1.0" in run("dfqbench.cli", "allocators").stdout
    again = run("dfqbench.cli", "methods", "new", "--allocator", "my-spark")
    assert (again.returncode, "Python knows a module or keyword of that name" in again.stderr) == (2, True)


@pytest.mark.slow
def test_its_sweep_runs_on_the_digits(dfqbench: Run, tmp_path: Path) -> None:
    """The teacher is one whose training was left out, and the budget is cut; nothing else is touched."""
    dfqbench("methods", "new", "spark")
    assert dfqbench("plan", "spark.yaml")[2].count("there is no weights file results/weights/digits-resnet20.safetensors") == 1
    untrained_teacher(tmp_path)
    text = (tmp_path / "spark.yaml").read_text()
    assert "epochs: 8, iterations: 30" in text
    (tmp_path / "spark.yaml").write_text(text.replace("epochs: 8, iterations: 30", "epochs: 5, iterations: 1"))
    code, out, _ = dfqbench("run", "spark.yaml")
    assert (code, "4 done" in out) == (0, True)
    assert "spark" in dfqbench("table", "spark.yaml")[1]


@pytest.mark.slow
def test_a_new_package_is_complete(dfqbench: Run, tmp_path: Path) -> None:
    code, out, _ = dfqbench("methods", "new", "my-spark", "--package")
    assert code == 0
    place = tmp_path / "my-spark"
    project = tomllib.loads((place / "pyproject.toml").read_text())
    assert project["project"]["entry-points"] == {"dfqbench.methods": {"my-spark": "my_spark"}}
    assert project["project"]["name"] == "dfqbench-my-spark"
    assert (place / project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"][0] / "__init__.py").is_file()
    assert (place / "tests" / "test_my_spark.py").is_file()
    assert "plugins:" not in (place / "digits.yaml").read_text(), "the entry point makes it known"
    for path in place.rglob("*"):
        assert path.is_dir() or not any(word in path.read_text() for word in ("my-method", "my_method", "MyMethod")), path
    assert "pip install --no-deps --editable ." in out
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place / "src"), *sys.path])}
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", str(place)], env=environment, capture_output=True, text=True, cwd=place
    )
    assert "test_my_spark.py::test_conformance" in collected.stdout, collected.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Spark", "is no name for a method: lower-case letters"),
        ("a/b", "is no name for a method"),
        ("two--hyphens", "is no name for a method"),
        ("torch", "Python knows a module or keyword of that name"),
        ("class", "Python knows a module or keyword of that name"),
        ("gdfq", "there is a method of that name: dfqbench methods show gdfq"),
    ],
)
def test_a_name_that_cannot_be_is_told_and_nothing_written(dfqbench: Run, tmp_path: Path, name: str, said: str) -> None:
    for more in ([], ["--package"]):
        code, out, err = dfqbench("methods", "new", name, *more)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert said in err
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_an_allocator_is_an_allocators_own(dfqbench: Run, tmp_path: Path) -> None:
    for name, said in (("pareto", "there is an allocator of that name: dfqbench allocators"), ("A", "is no name for an allocator: lower-case")):
        code, out, err = dfqbench("methods", "new", "--allocator", name)
        assert (code, out, said in err) == (2, "", True)
    assert list(tmp_path.iterdir()) == []
    assert dfqbench("methods", "new", "--allocator", "gdfq")[0] == 0, "a method of that name is another thing"


def test_nothing_is_overwritten(dfqbench: Run, tmp_path: Path) -> None:
    (tmp_path / "spark.yaml").write_text("mine")
    (tmp_path / "glow").mkdir()
    for words, said in ((("spark",), "spark.yaml is there already: nothing was written"), (("glow", "--package"), "glow is there already")):
        code, _, err = dfqbench("methods", "new", *words)
        assert (code, said in err) == (2, True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["glow", "spark.yaml"]
    assert (tmp_path / "spark.yaml").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_line(dfqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    code, _, err = dfqbench("methods", "new", "spark")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "Traceback" not in err


# --- the report, and failures that are declared


class Three(Method):
    """Makes images of three channels, whatever the task."""

    quick = {"epochs": 2, "iterations": 1, "batch_size": 4, "student_lr": 0.01}

    class Config(TrainingConfig):
        pass

    def phases(self) -> list[Phase]:
        return [Phase("train", self.config.epochs, distill=True, calibration_epochs=1)]

    def synthesize(self) -> Batch:
        labels = self.draw_labels(self.config.batch_size)
        images = self.draw_noise(len(labels), 3, self.task.size, self.task.size)
        return Batch(images, labels, self.teacher(images).detach())

    def distill(self, student: Student, batch: Batch) -> Any:
        return (student(batch.images) - batch.teacher_logits).square().mean()


def declared(name: str, **attributes: Any) -> type[Method]:
    cls = type(name, (Three,), {"__module__": __name__, "__doc__": "Three.", "needs": {"labels"}, **attributes})
    return register(name.lower(), paper="none", fidelity="paper", shares_synthesis=True)(cls)


@pytest.mark.slow
def test_a_failed_check_is_reported_with_what_and_how_to_mend(dfqbench: Run) -> None:
    declared("Undeclared", needs=set())
    code, out, _ = dfqbench("methods", "check", "undeclared")
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == "undeclared (test_scaffold.py)"
    assert lines[-1].startswith(f"{len(CHECKS)} checks: {len(CHECKS) - 2} held, 2 failed (")
    (at,) = [i for i, line in enumerate(lines) if line.startswith("  FAILED    any_task_works: 1 and 3 channels")]
    assert lines[at + 1].startswith("            what  1 channels, 10 classes, 32 pixels: RuntimeError: ")
    assert lines[at + 2] == "            mend  Take channels, classes and size from self.task, never as constants."
    assert '            what  it uses labels, which is not declared: needs = {"labels"}' in lines


@pytest.mark.slow
def test_a_failure_can_be_declared_with_its_reason(dfqbench: Run) -> None:
    method = declared("Excused", expected_failures={"any_task_works": "the paper's generator makes three channels"})
    method_checks(method)
    code, out, _ = dfqbench("methods", "check", "excused")
    assert code == 0
    assert "  expected  any_task_works:" in out
    assert "            why   the paper's generator makes three channels" in out
    assert f"{len(CHECKS)} checks: {len(CHECKS) - 1} held, 1 failed as declared (" in out
    assert "fails      any_task_works: the paper's generator" in dfqbench("methods", "show", "excused")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ({"any_task": "because"}, "there is no such check: did you mean 'any_task_works'?"),
        ({"the_teacher_is_untouched": "because"}, "this check has to hold"),
        ({"any_task_works": "three channels", "unknown_settings_fail": " "}, "'unknown_settings_fail': give the reason"),
        ({"any_task_works": "three channels", "unknown_settings_fail": "no reason"}, "declared in expected_failures, but it holds"),
    ],
)
def test_a_declaration_that_does_not_hold_is_a_failure(failures: dict[str, str], said: str) -> None:
    method = declared("Wrong", expected_failures=failures)
    with pytest.raises(AssertionError, match="fails") as caught:
        method_checks(method)
    assert said in str(caught.value)


@pytest.mark.slow
def test_every_check_says_what_it_holds_and_how_to_mend_it() -> None:
    method = declared("Meaning")
    outcomes = check_method(method)
    assert [o.check for o in outcomes] == [check.__name__ for check in CHECKS]
    assert all(o.meaning and "\n\n" not in o.meaning and o.mend for o in outcomes)


def test_an_unknown_method_is_answered_with_the_nearest(dfqbench: Run) -> None:
    for command in ("check", "show"):
        code, out, err = dfqbench("methods", command, "gdqf")
        assert (code, out) == (2, "")
        assert "did you mean 'gdfq'?" in err
    code, _, err = dfqbench("methods", "list", "nothing*")
    assert (code, "no method matches 'nothing*'" in err) == (2, True)
    code, _, err = dfqbench("sets", "cifar11")
    assert (code, "did you mean 'cifar10'?" in err) == (2, True)
    code, _, err = dfqbench("protocols", "linage")
    assert (code, "did you mean 'lineage'?" in err) == (2, True)

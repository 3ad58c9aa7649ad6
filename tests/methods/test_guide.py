"""What the guide (methods/README.md) shows works as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from dfqbench.data import find_set, own
from dfqbench.method import registry
from dfqbench.method.registry import find_method, load_plugin
from dfqbench.quantization import find_protocol
from dfqbench.sweep.load import Sweep
from dfqbench.testing import Trial, method_checks, small_task, small_teacher
from dfqbench.testing.checks import interrupted_equals_uninterrupted
from dfqbench.testing.declarations import what_it_needs_is_declared

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "methods" / "README.md").read_text(encoding="utf-8")


def blocks(language: str, holding: str = "") -> list[str]:
    return [block for block in re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL) if holding in block]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> object:
    registry.discover()
    before = [(table, dict(table)) for table in (registry._methods, own._sets)]
    yield
    for table, old in before:
        table.clear()
        table.update(old)


def loaded(tmp_path: Path, code: str, name: str = "my_idea.py") -> None:
    (tmp_path / name).write_text(code)
    load_plugin(tmp_path / name)


def my_idea(*more: str) -> str:
    """The example method, followed by other blocks of the guide."""
    return "\n\n".join([*blocks("python", '@register("my-idea"'), *more])


def test_the_example_method_runs_and_declares_what_it_needs(tmp_path: Path) -> None:
    loaded(tmp_path, my_idea())
    trial = Trial(find_method("my-idea"), {"epochs": 2})
    what_it_needs_is_declared(trial)
    assert {"loss", "generator_loss"} <= {key for row in trial.end().trainees[0].history for key in row}


@pytest.mark.slow
def test_the_example_of_two_stages_stores_its_images_and_trains_on_them(tmp_path: Path) -> None:
    (change,) = blocks("python", "self.image_set(")
    loaded(tmp_path, my_idea(change))
    lockstep = Trial(find_method("my-two-stages"), {"epochs": 1}).end()
    assert len(lockstep.method.stored) == 256  # type: ignore[attr-defined]
    assert lockstep.trainees[0].evaluation is not None


@pytest.mark.slow
def test_the_example_of_state_of_each_student_can_be_interrupted(tmp_path: Path) -> None:
    (change,) = blocks("python", "self.average")
    loaded(tmp_path, my_idea(change.replace("class WithAverage", '@register("averaged", paper="none", fidelity="paper")\nclass WithAverage')))
    trial = Trial(find_method("averaged"), {"epochs": 2, "student_lr": 0.01})
    interrupted_equals_uninterrupted(trial)
    method = trial.end(bits=("w4a4", "w3a3")).method
    assert [str(bits) for bits in method.average] == ["w4a4", "w3a3"]  # type: ignore[attr-defined]


def test_the_example_of_pictures_makes_one(tmp_path: Path) -> None:
    (change,) = blocks("python", "def pictures")
    loaded(tmp_path, my_idea(change))
    cls = sys.modules[find_method("my-idea").__module__].WithPictures
    method = cls(small_teacher(small_task(1)), cls.Config(batch_size=4), 0)
    method.setup()
    (picture,) = method.pictures().values()
    assert picture.shape == (3, 32, 32)
    assert 0 <= picture.min() <= picture.max() <= 1


def test_the_example_without_training_passes_every_check(tmp_path: Path) -> None:
    (code,) = blocks("python", "wide-round")
    loaded(tmp_path, code, "wide.py")
    method_checks(find_method("wide-round"))


@pytest.mark.slow
def test_the_example_test_is_valid_python(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python", "def test_conformance")
    module = ModuleType("my_idea")
    module.MyIdea = find_method("round")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_idea", module)
    names: dict[str, Callable[[], None]] = {}
    exec(code, names)
    names["test_conformance"]()


def test_the_example_set_is_one(tmp_path: Path) -> None:
    (code,) = blocks("python", "register_set")
    loaded(tmp_path, code, "sets.py")
    np.savez(tmp_path / "content.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 1]))
    assert len(find_set(f"my-set:{tmp_path / 'content.npz'}")) == 2
    from dfqbench.errors import UserError

    with pytest.raises(UserError, match=r"my-set: .*No such file.*absent.npz"):
        len(find_set("my-set:absent.npz"))


def test_its_yaml_is_valid(tmp_path: Path) -> None:
    (protocol,) = blocks("yaml", "base: lineage")
    (tmp_path / "gentle.yaml").write_text(protocol)
    assert find_protocol(str(tmp_path / "gentle.yaml")).first_bits == 8
    (sweep,) = blocks("yaml", "name: comparison")
    assert Sweep(**yaml.safe_load(sweep)).seeds == [0, 1, 2]
    (hosted,) = blocks("yaml", "host: qimera")
    ((name, settings),) = yaml.safe_load(hosted)["methods"][0].items()
    assert find_method(name).Config(**settings).host_identity["mixing"] == 0.7


@pytest.mark.slow
def test_committed_results_stand_in_a_table_of_ones_own(tmp_path: Path, dfqbench: Callable[..., tuple[int, str, str]]) -> None:
    """The guide's sweep asks for the cells of the reference: what is in its store is done, and an own method's row comes into its table."""
    (text,) = blocks("yaml", "name: comparison")
    reference, content = ROOT / "results" / "reference" / "digits", yaml.safe_load(text)
    content["teachers"][0]["weights"] = str(ROOT / content["teachers"][0]["weights"])
    (tmp_path / "wide.py").write_text(blocks("python", "wide-round")[0])
    content |= {"methods": ["wide-round", "round", "gdfq"], "plugins": [str(tmp_path / "wide.py")]}
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(content))
    assert dfqbench("merge", reference, "--results", tmp_path / "my-results")[0] == 0
    there = set((tmp_path / "my-results" / "runs").iterdir())
    code, said, _ = dfqbench("run", tmp_path / "comparison.yaml", "--results", tmp_path / "my-results")
    assert (code, "2 cells to run, 8 already done" in said) == (0, True), said
    assert len(set((tmp_path / "my-results" / "runs").iterdir()) - there) == 2
    code, said, _ = dfqbench("table", "--results", tmp_path / "my-results")
    assert code == 0
    assert said.count(" on digits (599 images)") == 1, "one table"
    assert "wide-round" in said

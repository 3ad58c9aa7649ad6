"""Plug-ins: broken ones are told and disturb nobody, a name has one owner, and every cell says where its method's code came from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dfqbench.errors import UserError
from dfqbench.method import plugins, registry
from dfqbench.method.registry import find_method, list_methods, load_plugin, register
from dfqbench.method.settings import settings_of
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Cell
from dfqbench.sweep.load import load_sweep

SweepFile = Callable[..., Path]
METHOD = 'from dfqbench import Method, register\n\n\n@register("{name}", paper="none", fidelity="paper")\nclass Mine(Method):\n    """Mine."""\n'


def package(folder: Path, name: str, code: str, entry: str | None = None) -> None:
    """An installed distribution `name` 1.2 with one module, whose entry point is called as `entry` says."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[dfqbench.methods]\n{entry or name} = {name}\n")


def dfqbench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "dfqbench.cli", *words], env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_broken_packages_are_told_and_the_others_work(tmp_path: Path) -> None:
    package(tmp_path, "good", METHOD.format(name="good"))
    package(tmp_path, "raises", METHOD.format(name="half") + "\n\nundefined_name\n")
    package(tmp_path, "leaves", "import sys\n\nsys.exit(3)\n")
    package(tmp_path, "garbled", "def (\n")
    package(tmp_path, "clashes", METHOD.format(name="gdfq"))
    listed = dfqbench(tmp_path, "methods")
    assert listed.returncode == 0
    assert "good none paper classify logits only no good 1.2" in [" ".join(line.split()) for line in listed.stdout.splitlines()]
    assert "half" not in listed.stdout, "what fails half-way leaves nothing behind"
    told = sorted(listed.stderr.splitlines())
    assert [line.split(":")[0] for line in told] == [f"broken plug-in {name} ({name})" for name in ("clashes", "garbled", "leaves", "raises")]
    assert "two methods are called 'gdfq'" in told[0]
    assert "SyntaxError: invalid syntax (garbled.py, line 1)" in told[1]
    assert "SystemExit: 3 (leaves.py, line 3)" in told[2]
    assert "NameError: name 'undefined_name' is not defined (raises.py, line 9)" in told[3]

    clash = dfqbench(tmp_path, "methods", "show", "gdfq")
    assert clash.returncode == 2
    (line,) = [line for line in clash.stderr.splitlines() if line.startswith("dfqbench: ")]
    assert "methods/gdfq.py" in line
    assert str(tmp_path / "clashes.py") in line
    assert "rename one of them" in line
    assert dfqbench(tmp_path, "methods", "show", "zaq").returncode == 0


@pytest.mark.slow
def test_a_file_that_takes_a_built_in_name_is_refused_though_it_came_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD.format(name="gdfq"))
    shown = dfqbench(tmp_path, "methods", "show", "gdfq", "--plugin", "mine.py")
    assert shown.returncode == 2
    assert "methods/gdfq.py" in shown.stderr
    assert "mine.py" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name' (mine.py, line 1)"),
        ("x = 1\n\n\nraise ValueError('out of luck')\n", "ValueError: out of luck (mine.py, line 4)"),
        ("import sys\nsys.exit('bye')\n", "SystemExit: bye (mine.py, line 2)"),
        ("def f(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
        (METHOD.format(name="half-way") + "\n\n1 / 0\n", "ZeroDivisionError: division by zero (mine.py, line 9)"),
        (METHOD.format(name="x").replace('"paper")', '"guess")'), "fidelity 'guess' is none of code, paper, abstract, released"),
        (
            METHOD.format(name="x") + '    needs = {"labels", "attention"}\n',
            "method x: needs 'attention': known: boxes, classifier, features, labels, ranges, statistics",
        ),
    ],
)
def test_a_broken_file_is_one_line_and_leaves_nothing_behind(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    before = [method.info.name for method in list_methods()]
    with pytest.raises(UserError) as caught:
        load_plugin(tmp_path / "mine.py")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [method.info.name for method in list_methods()] == before


def test_a_clash_with_a_file_leaves_the_method_that_had_the_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD.format(name="round"))
    with pytest.raises(UserError, match="two methods are called 'round'"):
        load_plugin(tmp_path / "mine.py")
    assert find_method("round").info.origin == "built in"


def test_a_cell_records_the_file_and_its_hash_and_is_the_same_cell_whatever_they_are(sweep_file: SweepFile, tmp_path: Path) -> None:
    plugin = tmp_path / "recorded.py"
    plugin.write_text(METHOD.format(name="recorded"))
    (cell, _) = load_sweep(sweep_file(methods=["recorded"], plugins=[str(plugin)]), cache_folder()).cells
    digest = hashlib.sha256(plugin.read_bytes()).hexdigest()
    assert cell.record()["source"] == {"package": "", "version": "", "file": "recorded.py", "sha256": digest}
    assert cell.record()["plugin"] == f"recorded.py {digest[:12]}"
    other = replace(cell, source={"package": "other", "version": "2", "file": "x.py", "sha256": "0"}, plugin="other 2")
    assert (other.id, other.coordinates, other.bundle_key) == (cell.id, cell.coordinates, cell.bundle_key)
    built_in: Cell = load_sweep(sweep_file(methods=["round"]), cache_folder()).cells[0]
    assert built_in.source["package"] == "dfqbench"
    assert built_in.plugin.startswith("built in ")


def test_cells_of_finished_studies_keep_their_ids() -> None:
    """The ids that the committed results have are the ones that their identities give."""
    from dfqbench.sweep.cell import fingerprint

    folders = list((Path(__file__).parents[2] / "results" / "reference").glob("*/runs/*"))
    assert folders
    for folder in folders:
        assert fingerprint(json.loads((folder / "cell.json").read_text())["identity"]) == folder.name


@pytest.mark.slow
def test_a_package_is_hashed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "hashed_whole"
    place.mkdir()
    (place / "__init__.py").write_text("")
    (place / "method.py").write_text("class Thing:\n    pass\n")
    (place / "helper.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import hashed_whole.method  # type: ignore[import-not-found]

    def digest() -> str:
        return plugins.origin(hashed_whole.method.Thing, place / "method.py").sha256

    before = digest()
    assert digest() == before
    (place / "helper.py").write_text("x = 2\n")
    assert digest() != before


def test_registering_a_class_again_replaces_it_and_another_of_its_file_clashes() -> None:
    def made(name: str) -> type[Any]:
        cls = type(name, (find_method("round"),), {"__module__": __name__, "__doc__": "Twice."})
        return register("twice", paper="none", fidelity="paper")(cls)

    made("Twice")
    second = made("Twice")
    assert find_method("twice") is second
    with pytest.raises(UserError, match=r"two methods are called 'twice': Twice and Other in .*test_plugins.py"):
        made("Other")
    del registry._methods["twice"], registry._clashes["twice"]


@pytest.mark.parametrize("name", [method.info.name for method in list_methods() if method.info.origin == "built in"])
def test_every_setting_has_a_meaning_and_a_source(name: str) -> None:
    without = [s.name for s in settings_of(find_method(name).Config) if not s.meaning or s.source == "not given"]
    assert without == []


def test_a_changed_default_keeps_meaning_and_unit_and_takes_the_nearer_source() -> None:
    settings = {s.name: s for s in settings_of(find_method("zaq").Config)}
    assert (settings["epochs"].default, settings["epochs"].unit, settings["epochs"].source) == ("300", "epochs", "the authors' code")
    assert settings["epochs"].meaning == "training in all, warm-up included"
    assert settings["lr_decay"].source == "GDFQ's code, CIFAR"

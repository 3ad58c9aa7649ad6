"""`dfqbench methods`, `models` and `plan` answer from memory without torch, and never with what is not so any more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from test_plugins import METHOD, package

from dfqbench.files import PACKAGE
from dfqbench.method.registry import built_in_folders
from dfqbench.teachers import card, list_models, zoo

CODE = """
import sys
from dfqbench.cli.app import main
try:
    main()
finally:
    print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
"""


def dfqbench(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "COLUMNS": "200", "DFQBENCH_CACHE": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, "-c", CODE, *words], env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_methods_are_remembered_until_anything_changes(tmp_path: Path) -> None:
    package(tmp_path, "good", METHOD.format(name="good"))
    first, second = dfqbench(tmp_path, "methods"), dfqbench(tmp_path, "methods")
    assert (first.stderr, second.stderr) == ("torch\n", "no torch\n")
    assert first.stdout == second.stdout
    assert "good" in second.stdout
    shown = dfqbench(tmp_path, "methods", "show", "gznq")
    assert shown.stderr == "no torch\n"
    assert "preset" in shown.stdout

    (tmp_path / "good.py").write_text(METHOD.format(name="good").replace('"""Mine."""', '"""Edited."""'))
    assert "Edited." in dfqbench(tmp_path, "methods").stdout
    package(tmp_path, "worse", "undefined_name\n")
    for _ in range(2):
        assert "broken plug-in worse (worse): NameError" in dfqbench(tmp_path, "methods", "list", "z*").stderr
    (tmp_path / "worse.py").write_text(METHOD.format(name="mended"))
    assert "mended" in dfqbench(tmp_path, "methods").stdout
    assert dfqbench(tmp_path, "methods", "show", "mended").stderr == "no torch\n"


@pytest.mark.slow
def test_names_of_zoos_are_remembered_until_their_package_changes(tmp_path: Path) -> None:
    first, second = (dfqbench(tmp_path, "models", "*resnet20*") for _ in range(2))
    assert (first.stderr, second.stderr) == ("torch\n", "no torch\n")
    assert first.stdout == second.stdout
    assert "pytorchcv:resnet20_cifar10" in second.stdout


def test_a_pattern_with_a_zoo_asks_that_zoo_alone_and_a_new_version_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(zoo, "zoo_names", lambda name: asked.append(name) or [f"net{len(asked)}"])
    assert [list_models("timm:*", tmp_path) for _ in range(2)] == [["timm:net1"]] * 2
    assert asked == ["timm"]
    monkeypatch.setattr(card.importlib.metadata, "version", lambda package: "0.0")
    assert list_models("tim?:net*", tmp_path) == ["timm:net2"]
    assert list_models("timm:*") == ["timm:net3"], "without a folder nothing is remembered"


SWEEP = """
name: small
teachers: [{model: "tiny.py:tiny", weights: tiny.safetensors}]
evaluate: imagefolder:images
methods: [{gdfq: {epochs: "${EPOCHS}"}}, {ait: {host: intraq}}]
bits: [w4a4]
protocol: rules.yaml
"""


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A folder with a copy of the suite, which is imported from there, and a sweep with all its parts."""
    for name, folder in (("dfqbench", PACKAGE), ("dfqbench_methods", *built_in_folders())):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tiny.py").write_text(TINY)
    subprocess.run(
        [sys.executable, "-c", "import tiny; from safetensors.torch import save_file; save_file(tiny.tiny().state_dict(), 'tiny.safetensors')"],
        cwd=tmp_path,
        check=True,
    )
    for label in range(10):
        picture(tmp_path, label, 1)
    (tmp_path / "rules.yaml").write_text("base: lineage\nfirst_bits: 8\n")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


def picture(folder: Path, label: int, number: int) -> None:
    path = folder / "images" / str(label) / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)


def plan(folder: Path, **variables: str) -> tuple[int, str, str, str]:
    """Exit code, output, errors, and whether torch was imported."""
    done = dfqbench(folder, "plan", "sweep.yaml", **{"EPOCHS": "30", **variables})
    *errors, torch = done.stderr.splitlines() or [""]
    return done.returncode, done.stdout, "\n".join(errors), torch


def edited(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) >= 1
    file.write_text(text.replace(old, new, 1))


def other_weights(folder: Path) -> None:
    state = load_file(folder / "tiny.safetensors")
    save_file({name: value + 1 if name == "head.bias" else value for name, value in state.items()}, folder / "tiny.safetensors")


# file, what stands in it, what is to stand there, and whether methods are asked again
EDITS = [
    ("sweep.yaml", "[w4a4]", "[w4a4]\nseeds: [1]", False),
    ("sweep.yaml", "w4a4", "w3a3", True),
    ("sweep.yaml", "host: intraq", "host: intraq, student_lr: 0.5", True),
    ("rules.yaml", "8", "7", True),
    ("dfqbench_methods/gdfq.py", "class Config", "version = 9\n\n    class Config", True),
    ("dfqbench/method/settings.py", "Field(200, ge=1", "Field(201, ge=1", True),
    ("tiny.py", "quick enough", "quick", True),
]


@pytest.mark.slow
def test_a_plan_is_remembered_until_anything_that_it_says_changes(planned: Path) -> None:
    code, said, _, torch = plan(planned)
    assert (code, torch) == (0, "torch")
    assert plan(planned) == (0, said, "", "no torch")
    changes = [(partial(edited, planned / file, old, new), asks) for file, old, new, asks in EDITS]
    for change, asks in [*changes, (partial(other_weights, planned), True), (partial(picture, planned, 3, 2), False)]:
        change()
        code, now, errors, torch = plan(planned)
        assert (code, errors, torch) == (0, "", "torch" if asks else "no torch"), change
        assert now != said, change
        said = now
    assert plan(planned) == (0, said, "", "no torch")
    assert plan(planned, DFQBENCH_CACHE=str(planned / "empty")) == (0, said, "", "torch"), "as it is without memory"
    code, _, errors, _ = plan(planned, EPOCHS="none")
    assert (code, errors.startswith("dfqbench: ")) == (2, True)
    assert "sweep.yaml: methods[0].gdfq.epochs: 'none': " in errors
    assert plan(planned, IMAGENET="x", DFQBENCH_DATA="x") == (0, said, "", "no torch")


@pytest.mark.slow
def test_a_plan_asks_again_where_packages_change_and_always_where_other_peoples_code_has_a_say(planned: Path) -> None:
    said = plan(planned)[1]
    package(planned, "unrelated", "", entry="x")
    (planned / "unrelated-1.2.dist-info" / "entry_points.txt").unlink()
    assert plan(planned) == (0, said, "", "torch"), "the first time with another package"
    assert plan(planned) == (0, said, "", "no torch")

    (planned / "mine.py").write_text(METHOD.format(name="mine"))
    with (planned / "sweep.yaml").open("a") as file:
        file.write("plugins: [mine.py]\n")
    assert plan(planned) == (0, said, "", "torch")
    edited(planned / "mine.py", '"mine"', '"zaq"')
    assert "two methods are called 'zaq'" in plan(planned)[2]
    edited(planned / "sweep.yaml", "plugins: [mine.py]\n", "")
    assert plan(planned) == (0, said, "", "no torch")

    package(planned, "mended", "undefined_name\n")
    assert [plan(planned) for _ in range(2)] == [(0, said, "", "torch")] * 2
    (planned / "mended.py").write_text(METHOD.format(name="zaq"))
    assert plan(planned) == (0, said, "", "torch"), "names clash, but none of these"

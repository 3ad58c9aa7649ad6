"""`dfqbench methods` and `models` answer from memory without torch, and never with what is not so any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_plugins import METHOD, package

from dfqbench.teachers import card, list_models, zoo

CODE = """
import sys
from dfqbench.cli.app import app
try:
    app(sys.argv[1:])
finally:
    print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
"""


def dfqbench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "COLUMNS": "200", "DFQBENCH_CACHE": str(folder / "cache")}
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

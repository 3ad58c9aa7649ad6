"""The wheel: complete, and at home in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]  # an sdist, and from it the wheel
    subprocess.run(words, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_packages_and_configs_and_nothing_else_at_the_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dfqbench", "dfqbench_methods", "dfqbench_slurm", f"{wheel.name.split('-')[0]}-0.1.0.dist-info"}
    shipped = "dfqbench/configs/quickstart.yaml dfqbench/configs/imagenet.yaml dfqbench_methods/gdfq.py dfqbench/quantization/fake_quantize.py"
    templates = "dfqbench/method/templates"
    written = f"{templates}/method.py {templates}/allocator.yaml {templates}/package/pyproject.toml dfqbench_methods/README.md"
    read = "dfqbench/results/published.csv dfqbench/analysis/report/page/page.js"
    for name in (*shipped.split(), *written.split(), *read.split()):
        assert name in names


NEIGHBOURS = ("methods.py", "benchmark/__init__.py", "slurm.py")  # what people call files of their own: the names of our folders
NET = """import benchmark, methods, slurm
from tiny import tiny


def net():
    assert (benchmark.MINE, methods.MINE, slurm.MINE) == ("benchmark", "methods", "slurm")
    return tiny()
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_files_of_a_user_that_are_called_as_our_folders_never_meet_ours(how: str, installed: Path, tiny_teacher: str, tmp_path: Path) -> None:
    """They are beside his network file, in the folder where he works, and on PYTHONPATH."""
    for name in NEIGHBOURS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"MINE = {name.partition('.')[0].partition('/')[0]!r}\n")
    shutil.copy(tiny_teacher.rpartition(":")[0], tmp_path / "tiny.py")
    (tmp_path / "net.py").write_text(NET)
    config = {"name": "his", "teachers": ["net.py:net"], "evaluate": "digits", "methods": ["round"], "bits": ["w4a4"]}
    (tmp_path / "his.yaml").write_text(yaml.safe_dump(config))
    paths, command = [str(tmp_path)], [sys.executable, "-m", "dfqbench.cli"]
    if how == "wheel":
        paths, command = [str(tmp_path), str(installed)], [str(installed / "bin" / "dfqbench")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import dfqbench, dfqbench_methods, dfqbench_slurm; print(dfqbench.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(installed)) == (how == "wheel")
    assert "gdfq" in run("methods")
    assert "1 done" in run("run", "his.yaml")
    assert "1 done" in run("status", "his.yaml")
    assert "round" in run("table", "his.yaml", "--format", "csv")


def test_our_folders_names_are_nobodys_modules(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for name in ("benchmark", "methods", "slurm"):
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert f"No module named '{name}'" in done.stderr


def test_the_installed_command_finds_what_is_shipped(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    planned = subprocess.run([installed / "bin" / "dfqbench", "plan", "quickstart"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert planned.returncode == 2
    assert "digits-resnet20.safetensors" in planned.stderr, "the shipped config is found, its teacher is not trained yet"
    assert "configs/quickstart.yaml: teachers[0]" in planned.stderr

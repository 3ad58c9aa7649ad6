"""The wheel: complete, and at home in any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True, text=True
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_packages_and_configs_and_nothing_else_at_the_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dfqbench", "dfqbench_methods", "dfqbench_slurm", f"{wheel.name.split('-')[0]}-0.1.0.dist-info"}
    shipped = "dfqbench/configs/quickstart.yaml dfqbench/configs/imagenet.yaml dfqbench_methods/gdfq.py dfqbench/quantization/fake_quantize.py"
    templates = "dfqbench/method/templates"
    written = f"{templates}/method.py {templates}/digits.yaml {templates}/package/pyproject.toml dfqbench_methods/README.md"
    read = "dfqbench/results/published.csv dfqbench/analysis/report/page/page.js"
    for name in (*shipped.split(), *written.split(), *read.split()):
        assert name in names


def test_the_installed_command_works_beside_a_folder_called_benchmark(wheel: Path, tmp_path: Path) -> None:
    """Run outside the checkout, in a folder whose own `benchmark` and `methods` must not be picked up."""
    installed, place = tmp_path / "installed", tmp_path / "place"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    for package in ("benchmark", "methods"):
        (place / package).mkdir(parents=True)
        (place / package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}

    def dfqbench(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(installed / "bin" / "dfqbench"), *words], cwd=place, env=environment, capture_output=True, text=True)

    listed = dfqbench("methods")
    assert listed.returncode == 0, listed.stderr
    assert "gdfq" in listed.stdout
    planned = dfqbench("plan", "quickstart")
    assert planned.returncode == 2
    assert "digits-resnet20.safetensors" in planned.stderr, "the shipped config is found, its teacher is not trained yet"
    assert "configs/quickstart.yaml: teachers[0]" in planned.stderr

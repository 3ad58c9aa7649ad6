"""What `plan` says of presets: which method runs under which, and that none was named where the teacher's classes suggest one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep

SweepFile = Callable[..., Path]
METHODS = ["round", "gdfq", "qimera", "intraq"]


def said(sweep_file: SweepFile, tiny_teacher: str, tmp_path: Path, classes: int, **keys: Any) -> list[str]:
    path = tmp_path / "many.py"
    network = Path(tiny_teacher.rpartition(":")[0]).read_text()
    path.write_text(network.replace("= 10, 16", f"= {classes}, 16").replace("(16, 10)", f"(16, {classes})"))
    config = sweep_file(**{"teachers": [f"{path}:tiny"], "evaluate": "none", "selection": {"images": "gdfq", "seed": 9}, "methods": METHODS, **keys})
    return [line for line in load_sweep(config, cache_folder()).remarks if "preset" in line]


def test_where_nothing_has_a_preset_nothing_is_said(sweep_file: SweepFile, tiny_teacher: str, tmp_path: Path) -> None:
    assert said(sweep_file, tiny_teacher, tmp_path, 10) == []


def test_every_method_is_named_with_its_preset(sweep_file: SweepFile, tiny_teacher: str, tmp_path: Path) -> None:
    (line,) = said(
        sweep_file, tiny_teacher, tmp_path, 100, preset="cifar100", methods=[*METHODS, {"gdfq": {"preset": "imagenet"}}], bits=["w5a5", "w4a4"]
    )
    assert line == "tiny: preset cifar100: qimera, intraq; preset cifar100-w5: qimera; preset imagenet: gdfq; no preset: round, gdfq"


def test_a_preset_that_the_classes_suggest_and_nobody_named_is_told(sweep_file: SweepFile, tiny_teacher: str, tmp_path: Path) -> None:
    (line,) = said(sweep_file, tiny_teacher, tmp_path, 100)
    assert line == "tiny: no preset is named for 100 classes: `preset: cifar100` is known to qimera, intraq"
    (line,) = said(sweep_file, tiny_teacher, tmp_path, 1000)
    assert line == "tiny: no preset is named for 1000 classes: `preset: imagenet` is known to gdfq, qimera, intraq"
    lines = said(sweep_file, tiny_teacher, tmp_path, 1000, methods=["gdfq", {"qimera": {"preset": "imagenet"}}])
    assert lines[1] == "tiny: no preset is named for 1000 classes: `preset: imagenet` is known to gdfq"

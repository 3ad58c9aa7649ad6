"""Class folders whose names are numbers, and a teacher that learned its classes in another order than the set has them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dfqbench.data import find_set
from dfqbench.data.sets import content_digest
from dfqbench.errors import Notice

TEN_AND_TWO = [str(i) for i in range(12)]
PADDED = [f"{i:02}" for i in range(12)]
NET = """
import torch
from torch import nn


class Net(nn.Module):
    \"\"\"Answers an image of grey level 20 k with class k.\"\"\"

    classes, size, mean, std = 12, 8, (0.0,) * 3, (1.0,) * 3

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 12)
        nn.init.zeros_(self.conv.bias)
        nn.init.constant_(self.conv.weight, 255 / 20 / 3)
        k = torch.arange(12.0)
        self.head.weight.data, self.head.bias.data = (2 * k / 4)[:, None].repeat(1, 4), -k * k

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def make():
    return Net()
"""


def folder(root: Path, names: list[str], order: list[str]) -> Path:
    """One image per class, whose grey level says the class's place in `order`."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (20 * order.index(name),) * 3).save(root / name / "1.png")
    return root


def notices(place: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        find_set(f"imagefolder:{place}")
    return [str(warning.message) for warning in caught if issubclass(warning.category, Notice)]


@pytest.mark.parametrize(
    ("names", "order", "told"),
    [
        (TEN_AND_TWO, TEN_AND_TWO, "(2 before 10)"),
        (["9", "10", "0011"], ["9", "10", "0011"], "(9 before 0011)"),
        (PADDED, PADDED, ""),
        (["3", "1", "2"], ["1", "2", "3"], ""),
        (["1", "2", "10", "cat"], ["1", "10", "2", "cat"], ""),
        (["c2", "c10"], ["c10", "c2"], ""),
    ],
)
def test_folders_that_are_all_numbers_are_sorted_as_numbers_and_it_is_said(names: list[str], order: list[str], told: str, tmp_path: Path) -> None:
    place = folder(tmp_path / "set", names, names)
    said = notices(place)
    assert len(said) == bool(told)
    assert not told or (told in said[0] and "sorted as numbers" in said[0] and str(place) in said[0])
    assert find_set(f"imagefolder:{place}").class_names == order


def test_the_digest_changes_only_where_the_two_orders_differ(tmp_path: Path) -> None:
    def by_text(place: Path) -> str:
        files = [(place / name / "1.png").read_bytes() for name in sorted(path.name for path in place.iterdir())]
        return content_digest(12, [(i, hashlib.sha256(content).digest()) for i, content in enumerate(files)])

    padded, plain = (folder(tmp_path / str(i), names, names) for i, names in enumerate((PADDED, TEN_AND_TWO)))
    assert find_set(f"imagefolder:{padded}").digest() == by_text(padded)
    assert find_set(f"imagefolder:{plain}").digest() == by_text(padded), "the same images, the same labels"
    assert find_set(f"imagefolder:{plain}").digest() != by_text(plain)


@pytest.mark.parametrize(
    ("names", "learned", "top1", "said"),
    [
        (TEN_AND_TWO, TEN_AND_TWO, 100.0, ""),
        (TEN_AND_TWO, sorted(TEN_AND_TWO), 16.67, "near chance, with class 2 before class 10; the other way round it is 100.00 %: rename"),
        (TEN_AND_TWO, TEN_AND_TWO[::-1], 0.0, "near chance, with class 2 before class 10; the other way round it is "),
        ([f"c{i}" for i in range(12)], [f"c{i}" for i in range(12)], 16.67, "with class c10 before class c2; the other way round it is 100.00 %"),
        (PADDED, PADDED[::-1], 0.0, ""),
    ],
)
def test_a_teacher_near_chance_is_told_of_the_other_order(
    names: list[str], learned: list[str], top1: float, said: str, tmp_path: Path, sweep_file: Callable[..., Path], dfqbench: Callable[..., Any]
) -> None:
    place = folder(tmp_path / "set", names, learned)
    (tmp_path / "net.py").write_text(NET)
    config = sweep_file(
        teachers=[f"{tmp_path / 'net.py'}:make"], methods=["round"], evaluate=f"imagefolder:{place}", bits=["w8a8"], budget={}, seeds=[0, 1]
    )
    code, out, err = dfqbench("run", config, "--results", tmp_path / "results", "--device", "cpu")
    assert code == 0, err
    assert f"(teacher {top1:.2f} %)" in out
    assert ("near chance" in out) == bool(said)
    assert said in out
    (log,) = (path.read_text() for path in (tmp_path / "results" / "runs").glob("*/log.txt"))
    assert said in log


@pytest.mark.slow
def test_plan_says_the_order_in_one_line_on_standard_error(tmp_path: Path, sweep_file: Callable[..., Path]) -> None:
    (tmp_path / "net.py").write_text(NET)
    place = folder(tmp_path / "set", TEN_AND_TWO, TEN_AND_TWO)
    config = sweep_file(teachers=[f"{tmp_path / 'net.py'}:make"], methods=["round"], evaluate=f"imagefolder:{place}", bits=["w8a8"], budget={})
    command = [sys.executable, "-m", "dfqbench.cli", "plan", str(config), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"dfqbench: image folder {place}: class folders are sorted as numbers (2 before 10), not as text"]

"""Network files that import files from beside them: each has its own, and a change of one of them is a change of the network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfqbench.network import Teacher
from dfqbench.teachers import TeacherCard, describe, load, parse_teacher

NET = """
import torch
from torch import nn
{imports}


class Net(nn.Module):
    classes, size, mean, std = 10, 8, (0.5,) * 3, (0.25,) * 3

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 10)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)
        self.head.weight.data = torch.linspace(0, 1, 40).reshape(10, 4)

    def forward(self, x):
{forward}
        return self.head(act(self.norm(self.conv(x))).mean((2, 3)) * SCALE)


def make():
{factory}
    return Net()
"""
# how a file may come to its neighbours: what it says, and which files stand beside it, with {scale} in one of them
AT_THE_TOP = "from blocks import SCALE, act"
LAYOUTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "a module": ({"imports": AT_THE_TOP}, {"blocks.py": "SCALE = {scale}\nfrom torch.nn.functional import relu as act\n"}),
    "through another": (
        {"imports": "from outer import *"},
        {"outer.py": AT_THE_TOP, "blocks.py": "SCALE = {scale}\nfrom torch.nn.functional import relu as act\n"},
    ),
    "a package": (
        {"imports": "from models import SCALE\nfrom models.parts import act"},
        {
            "models/__init__.py": "from .deep.value import SCALE\n",
            "models/parts.py": "from . import deep\nfrom torch.nn.functional import relu as act\n",
            "models/deep/__init__.py": "",
            "models/deep/value.py": "SCALE = {scale}\n",
        },
    ),
    "a folder without __init__": (
        {"imports": "from models import parts\nfrom models.parts import SCALE, act"},
        {"models/parts.py": "SCALE = {scale}\nfrom torch.nn.functional import relu as act\n"},
    ),
    "in the factory": (
        {"factory": "    import importlib\n    blocks = importlib.import_module('blocks')\n    globals().update(vars(blocks))"},
        {"blocks.py": "SCALE = {scale}\nfrom torch.nn.functional import relu as act\n"},
    ),
    "in the forward": ({"forward": f"        {AT_THE_TOP}"}, {"blocks.py": "SCALE = {scale}\nfrom torch.nn.functional import relu as act\n"}),
    "in a neighbour's function": (
        {"imports": "from outer import act\nSCALE = 1"},
        {"outer.py": "def act(x):\n    from blocks import SCALE\n    return x * SCALE\n", "blocks.py": "SCALE = {scale}\n"},
    ),
    "from a folder that it adds to sys.path": (
        {"imports": "import os, sys\nsys.path.insert(0, os.path.join(os.path.dirname(__file__), 'lib'))\nfrom blocks import SCALE, act"},
        {"lib/blocks.py": "SCALE = {scale}\nfrom torch.nn.functional import relu as act\n"},
    ),
    "called as an installed package": (
        {"imports": "from yaml import SCALE, act"},
        {"yaml.py": "SCALE = {scale}\nfrom torch.nn.functional import relu as act\n"},
    ),
}


def written(folder: Path, scale: float, imports: str = "", forward: str = "", factory: str = "", files: dict[str, str] | None = None) -> str:
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.replace("{scale}", str(scale)))
    (folder / "net.py").write_text(NET.format(imports=imports, forward=forward, factory=factory))
    return f"{folder / 'net.py'}:make"


@pytest.fixture(params=LAYOUTS)
def two(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    says, files = LAYOUTS[request.param]
    return {name: written(tmp_path / name, scale, **says, files=files) for name, scale in (("a", 1.0), ("b", 3.0)) if not (tmp_path / name).mkdir()}


def answer(model: str) -> Tensor:
    network = load(parse_teacher(model))
    return network(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_each_file_has_its_own_neighbours_in_both_orders(two: dict[str, str], order: str, tmp_path: Path) -> None:
    modules, path = dict(sys.modules), list(sys.path)
    cards = {name: describe(parse_teacher(two[name]), tmp_path / "cache") for name in order}
    networks = {name: load(parse_teacher(two[name])) for name in order}
    x = torch.ones(1, 3, 8, 8)
    bias = 0.1
    assert torch.allclose(networks["b"](x) - bias, 3 * (networks["a"](x) - bias))
    assert cards["a"].source_sha256 != cards["b"].source_sha256
    for name, network in networks.items():
        traced = Teacher(network, cards[name].task)
        assert torch.allclose(traced(x), network(x))
    ours = [name for name in sys.modules if not name.startswith("dfqbench_teacher_") and name not in modules]
    assert not [name for name in ours if str(tmp_path) in str(getattr(sys.modules[name], "__file__", ""))], "neighbours left behind"
    assert all(sys.modules[name] is module for name, module in modules.items())
    assert sys.path == path


def test_the_identity_follows_every_neighbour_and_not_the_place(two: dict[str, str], tmp_path: Path) -> None:
    says = describe(parse_teacher(two["a"])).source_sha256
    (tmp_path / "a").rename(tmp_path / "moved")
    assert describe(parse_teacher(two["a"].replace("/a/", "/moved/"))).source_sha256 == says


def test_a_changed_neighbour_gives_a_new_card_at_once(two: dict[str, str], tmp_path: Path) -> None:
    spec, cache = parse_teacher(two["a"]), tmp_path / "cache"
    first = describe(spec, cache)
    assert describe(spec, cache) == first
    (changed,) = (path for path in (tmp_path / "a").rglob("*.py") if "SCALE = 1.0" in path.read_text())
    before = answer(two["a"])
    changed.write_text(changed.read_text().replace("SCALE = 1.0", "SCALE = 5.0"))  # as long as before, and within the same second
    assert torch.allclose(answer(two["a"]) - 0.1, 5 * (before - 0.1))
    second = describe(spec, cache)
    assert second.source_sha256 != first.source_sha256
    assert describe(spec, cache) == second
    changed.unlink()
    with pytest.raises(Exception, match=r"No module named|cannot import"):
        describe(spec, cache)


def test_nothing_is_written_beside_a_network_file(two: dict[str, str], tmp_path: Path) -> None:
    describe(parse_teacher(two["a"]))
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_file_without_neighbours_is_known_by_its_own_hash(tiny_teacher: str) -> None:
    content = Path(tiny_teacher.rpartition(":")[0]).read_bytes()
    assert describe(parse_teacher(tiny_teacher)).source_sha256 == hashlib.sha256(content).hexdigest()


def test_installed_packages_that_are_first_imported_here_stay_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env" / "site-packages").mkdir(parents=True)
    (tmp_path / "env" / "site-packages" / "installed_once.py").write_text("LOADED = []\n")
    monkeypatch.syspath_prepend(str(tmp_path / "env" / "site-packages"))
    model = written(tmp_path, 1.0, imports="import installed_once\nSCALE, act = 1, torch.relu")
    card = describe(parse_teacher(model))
    assert "installed_once" in sys.modules
    del sys.modules["installed_once"]
    assert card.source_sha256 == hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()


CLASSES = """
from __future__ import annotations
import dataclasses, typing

@dataclasses.dataclass
class Settings:
    width: int = {scale}
    rest: typing.ClassVar[list[Settings]] = []

SCALE = 1
from torch import relu as act
"""


def test_classes_of_neighbours_can_be_pickled_and_looked_up(tmp_path: Path) -> None:
    networks: list[Any] = []
    for name, scale in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        imports = "from blocks import SCALE, Settings, act"
        model = written(tmp_path / name, scale, imports=imports, factory="    Net.settings = Settings()", files={"blocks.py": CLASSES})
        networks.append(load(parse_teacher(model)))
    for scale, network in enumerate(networks, 1):
        settings = pickle.loads(pickle.dumps(network.settings))
        assert type(settings) is type(network.settings)
        assert settings.width == scale
        assert pickle.loads(pickle.dumps(network)).conv.out_channels == 4
        assert typing.get_type_hints(type(settings))["width"] is int
        assert dataclasses.replace(settings, width=7).width == 7


def test_a_file_that_exits_when_it_is_imported_is_one_line(tmp_path: Path) -> None:
    model = written(tmp_path, 1.0, imports="raise SystemExit('usage: train.py')")
    with pytest.raises(Exception, match=r"importing .*net\.py failed: SystemExit: usage: train\.py"):
        describe(parse_teacher(model))


@pytest.mark.slow
def test_two_teachers_of_one_sweep_are_two_in_the_workers_of_a_submission(tmp_path: Path) -> None:
    models = []
    for name, scale in (("a", 1.0), ("b", -3.0)):
        (tmp_path / name).mkdir()
        says, files = LAYOUTS["a module"]
        models.append({"model": written(tmp_path / name, scale, **says, files=files), "name": name})
    config = {"name": "two", "teachers": models, "evaluate": "digits", "methods": ["round"], "bits": ["w8a8"]}
    (tmp_path / "two.yaml").write_text(json.dumps(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "dfqbench.cli", "submit", "two.yaml", "--profile", "cpu", "--local", "--results", "results"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {r["teacher"]["label"]: r for r in (json.loads(path.read_text()) for path in (tmp_path / "results" / "teachers").glob("*.json"))}
    assert set(records) == {"a", "b"}
    assert records["a"]["loss"] != records["b"]["loss"]


def test_a_record_holds_what_it_held(tiny_teacher: str) -> None:
    keys = ["label", "model", "weights", "weights_sha256", "source_sha256", "task", "parameters"]
    card = describe(parse_teacher(tiny_teacher))
    assert list(card.as_dict()) == keys
    assert TeacherCard.from_dict(card.as_dict()) == card

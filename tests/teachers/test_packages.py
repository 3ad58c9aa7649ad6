"""Networks of `package.module:factory`: an edit anywhere in the user's own code is a change of the network."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dfqbench.errors import UserError
from dfqbench.teachers import TeacherCard, describe, load, parse_teacher
from dfqbench.teachers.packages import package_files

NET = """
import torch
from torch import nn
{imports}


class Net(nn.Module):
    classes, size, mean, std = 10, 8, (0.5,) * 3, (0.25,) * 3

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)) * SCALE)


def make():
    return Net()
"""
# where the number stands that an edit changes: what the network's file says, and which files there are; P is the package
LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "beside it": ("from P.parts import SCALE", {"P/__init__.py": "", "P/parts.py": "SCALE = {scale}\n"}),
    "in the package above": ("from P import SCALE", {"P/__init__.py": "SCALE = {scale}\n"}),
    "in a package below": ("from .deep.value import SCALE", {"P/__init__.py": "", "P/deep/__init__.py": "", "P/deep/value.py": "SCALE = {scale}\n"}),
    "in a package without __init__": ("from .parts import SCALE", {"P/parts.py": "SCALE = {scale}\n"}),
    "in a file that is found by its name": (
        "import importlib\nname = 'par' + 'ts'\nSCALE = importlib.import_module('P.' + name).SCALE",
        {"P/__init__.py": "", "P/parts.py": "SCALE = {scale}\n"},
    ),
    "in another package": (
        "def late():\n    from P_other.a import SCALE\n    return SCALE\nSCALE = late()",
        {"P/__init__.py": "", "P_other/a.py": "SCALE = {scale}\n"},
    ),
    "in a module": ("from P_scale import SCALE", {"P/__init__.py": "", "P_scale.py": "SCALE = {scale}\n"}),
    "behind another module": (
        "from P_a import SCALE",
        {"P/__init__.py": "", "P_a.py": "import importlib\nSCALE = importlib.import_module('P_b').SCALE\n", "P_b.py": "SCALE = {scale}\n"},
    ),
}
_names = (f"own_nets_{i}" for i in itertools.count())  # a module is imported once in a process


class Place:
    """A folder on sys.path with a package of networks."""

    def __init__(self, root: Path):
        self.root, self.package = root, next(_names)
        self.model = f"{self.package}.nets:make"

    def write(self, layout: str, scale: float) -> None:
        imports, files = LAYOUTS[layout]
        for name, content in {**files, "P/nets.py": NET.format(imports=imports)}.items():
            path = self.root / name.replace("P", self.package)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.replace("{scale}", str(scale)).replace("'P", f"'{self.package}").replace(" P", f" {self.package}"))

    def card(self, cache: Path | None = None) -> TeacherCard:
        """As a new process describes it."""
        self.forget()
        return describe(parse_teacher(self.model), cache)

    def forget(self) -> None:
        for name in [name for name in sys.modules if name.startswith(self.package)]:
            del sys.modules[name]
        importlib.invalidate_caches()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second are one to __pycache__
    (tmp_path / "src").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    return Place(tmp_path / "src")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_of_a_module_that_the_network_imports_is_another_network(layout: str, place: Place, tmp_path: Path) -> None:
    place.write(layout, 1.0)
    first = place.card(tmp_path / "cache")
    assert place.card(tmp_path / "cache") == first
    place.write(layout, 5.0)
    second = place.card(tmp_path / "cache")
    assert second.source_sha256 != first.source_sha256
    assert second.weights_sha256 == first.weights_sha256, "nothing else says that it is another one"
    place.write(layout, 1.0)
    assert place.card(tmp_path / "cache") == first


def test_the_identity_is_not_of_the_place(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("in another package", 1.0)
    first = place.card()
    (tmp_path / "src").rename(tmp_path / "moved")
    monkeypatch.syspath_prepend(str(tmp_path / "moved"))
    assert place.card() == first


def test_a_new_file_in_the_package_is_seen(place: Place, tmp_path: Path) -> None:
    place.write("beside it", 1.0)
    first = place.card(tmp_path / "cache")
    (place.root / place.package / "more.py").write_text("MORE = 1\n")
    assert place.card(tmp_path / "cache").source_sha256 != first.source_sha256


def test_a_module_alone_is_known_by_its_own_hash(place: Place) -> None:
    (place.root / f"{place.package}.py").write_text(NET.format(imports="SCALE = 1"))
    place.model = f"{place.package}:make"
    assert place.card().source_sha256 == hashlib.sha256((place.root / f"{place.package}.py").read_bytes()).hexdigest()


def test_installed_packages_are_not_followed_and_folders_of_data_not_entered(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    (site / f"{place.package}_installed").mkdir(parents=True)
    (site / f"{place.package}_installed" / "__init__.py").write_text("import yaml\nSCALE = 1\n")
    (site / f"{place.package}_installed" / "more.py").write_text("")
    monkeypatch.syspath_prepend(str(site))
    place.write("beside it", 1.0)
    root = place.root / place.package
    for name in ("data/train/n01440764/x.py", "data/a.jpg", "__pycache__/nets.py", ".git/hook.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    (root / "parts.py").write_text(f"from {place.package}_installed import SCALE\nimport yaml, torch\n")
    assert set(package_files(f"{place.package}.nets")) == {f"{place.package}/{name}.py" for name in ("__init__", "nets", "parts")}
    assert set(package_files(f"{place.package}_installed")) == {f"{place.package}_installed/{name}.py" for name in ("__init__", "more")}
    assert package_files("torchvision.models") == {}


def edit_package(place: Place, _: Path) -> None:
    (place.root / place.package / "parts.py").write_text("SCALE = 7.0\n")


def edit_weights(place: Place, weights: Path) -> None:
    state = {name: value + 1 for name, value in load(parse_teacher(place.model)).state_dict().items()}
    torch.save(state, weights)


@pytest.mark.parametrize("edit", [edit_package, edit_weights])
def test_a_network_that_changes_while_a_sweep_runs_is_not_taken_for_the_one_that_was_described(
    edit: Callable[[Place, Path], None], place: Place, tmp_path: Path
) -> None:
    place.write("beside it", 1.0)
    weights = tmp_path / "w.pth"
    torch.save(load(parse_teacher(place.model)).state_dict(), weights)
    spec = parse_teacher({"model": place.model, "weights": str(weights)})
    card = describe(spec)
    load(spec, card)
    edit(place, weights)
    with pytest.raises(UserError, match="has changed since the sweep was read: start the command again"):
        load(spec, card)

"""What researchers bring beside methods: evaluation sets, networks of packages, protocols; and what is said where one is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfqbench.data import OwnSet, find_set, list_sets, own, register_set
from dfqbench.errors import UserError, UserErrors
from dfqbench.method.registry import load_plugin
from dfqbench.quantization import PROTOCOLS, find_protocol
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.task import Task
from dfqbench.teachers import describe, list_models, parse_teacher

SweepFile = Callable[..., Path]
TASK = Task(3, 1, 8, (0.5,), (0.5,))


@pytest.fixture(autouse=True)
def _no_set_is_left_behind() -> Any:
    before = dict(own._sets)
    yield
    own._sets.clear()
    own._sets.update(before)


def a_set(name: str = "mine", images: Any = None, labels: Any = None) -> type[OwnSet]:
    class Mine(OwnSet):
        """Three shades of grey."""

        class_names = ["dark", "grey", "bright"]

        def load(self) -> Any:
            default = np.repeat(np.array([10, 120, 240], np.uint8), 64).reshape(3, 8, 8)
            return default if images is None else images, np.arange(3) if labels is None else labels

    return register_set(name)(Mine)


# --- evaluation sets


def test_a_small_class_is_an_evaluation_set() -> None:
    a_set()
    found = find_set("mine:/somewhere")
    assert (found.name, found.classes, len(found), found.class_names) == ("mine", 3, 3, ["dark", "grey", "bright"])
    assert found.place == "/somewhere"  # type: ignore[attr-defined]
    images = found.decode(TASK)
    assert images.pixels is not None
    assert images.pixels[:, 0, 0, 0].tolist() == [10, 120, 240]
    assert images.labels.tolist() == [0, 1, 2]
    assert find_set("mine").digest() == found.digest(), "the place is no part of it"
    with pytest.raises(UserError, match="has no split 'train'"):
        found.decode(TASK, "train")


def test_its_digest_sees_every_pixel_label_and_shape() -> None:
    base = np.zeros((4, 4, 4), np.uint8)
    other = base.copy()
    other[3, 3, 3] = 1
    digests = set()
    for images, labels in ((base, [0, 1, 2, 0]), (other, [0, 1, 2, 0]), (base, [0, 1, 2, 1]), (base.reshape(4, 2, 8), [0, 1, 2, 0])):
        a_set(images=images, labels=np.array(labels))
        digests.add(find_set("mine").digest())
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.zeros((3, 8, 8)), None, "images must be uint8, N x H x W or N x H x W x 3, not float64, 3 x 8 x 8"),
        (np.zeros((3, 8), np.uint8), None, "not uint8, 3 x 8"),
        (np.zeros((3, 8, 8, 4), np.uint8), None, "not uint8, 3 x 8 x 8 x 4"),
        (None, np.arange(2), "3 images need as many labels, whole numbers, not int64 of shape (2,)"),
        (None, np.array([0.0, 1.0, 2.0]), "not float64 of shape (3,)"),
        (None, np.array([0, 1, 3]), "labels reach from 0 to 3, but class_names has 3 entries"),
        (None, np.array([0, -1, 2]), "labels reach from -1 to 2"),
    ],
)
def test_what_is_wrong_with_a_set_is_one_line(images: Any, labels: Any, said: str) -> None:
    a_set(images=images, labels=labels)
    with pytest.raises(UserError) as caught:
        len(find_set("mine"))
    assert str(caught.value).startswith("evaluation set 'mine'")
    assert said in str(caught.value)


def test_a_set_whose_loading_fails_is_one_line_with_the_place() -> None:
    class Failing(OwnSet):
        """Fails."""

        class_names = ["a", "b"]

        def load(self) -> Any:
            return 1 / 0

    register_set("failing")(Failing)
    with pytest.raises(UserError, match=r"could not be loaded: ZeroDivisionError: division by zero \(test_own_parts.py, line \d+\)"):
        len(find_set("failing"))


def test_names_have_one_owner_and_unknown_ones_the_nearest(tmp_path: Path) -> None:
    a_set("shades")
    with pytest.raises(UserError, match="two evaluation sets are called 'digits': the built-in one"):
        a_set("digits")
    plugin = tmp_path / "sets.py"
    plugin.write_text(
        "from dfqbench.data import OwnSet, register_set\n\n\n@register_set('shades')\nclass Shades(OwnSet):\n    class_names = ['a', 'b']\n"
    )
    with pytest.raises(UserError, match=r"two evaluation sets are called 'shades': .*test_own_parts.py and .*sets.py"):
        load_plugin(plugin)
    with pytest.raises(UserError, match="did you mean 'shades'"):
        find_set("shade")
    with pytest.raises(UserError, match="class_names is empty"):
        register_set("empty")(type("Empty", (OwnSet,), {"__module__": __name__}))
    assert ("shades", "Three shades of grey.") in [(name, about) for name, _, about in list_sets("sh*")]


def test_a_set_of_a_plugin_file_is_a_sweeps(sweep_file: SweepFile, tmp_path: Path) -> None:
    plugin = tmp_path / "noise_set.py"
    plugin.write_text(
        "import numpy as np\n\nfrom dfqbench.data import OwnSet, register_set\n\n\n"
        "@register_set('noise')\nclass Noise(OwnSet):\n    '''Noise.'''\n\n    class_names = [str(i) for i in range(10)]\n\n"
        "    def load(self):\n        random = np.random.default_rng(0)\n"
        "        return random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8), random.integers(0, 10, 20)\n"
    )
    (cell,) = load_sweep(sweep_file(evaluate="noise", bits=["w4a4"], plugins=[str(plugin)]), cache_folder()).cells
    assert (cell.evaluation.name, cell.evaluation.images, cell.evaluation.classes) == ("noise", 20, 10)


# --- networks of packages

NETS = """
from torch import nn

from {package}.parts import width


class Net(nn.Module):
    classes, size, mean, std = 4, 8, (0.5,), (0.25,)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, width)
        nn.init.constant_(self.linear.weight, 0.01)
        nn.init.constant_(self.linear.bias, 0.0)

    def forward(self, x):
        return self.linear(x.flatten(1))


def make():
    return Net()


def _hidden():
    return Net()


number = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    name = f"nets_{abs(hash(request.node.name)) % 10**8}"  # a module is imported once in a process
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "parts.py").write_text("width = 4\n")
    (tmp_path / name / "zoo.py").write_text(NETS.format(package=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}.zoo"


@pytest.mark.slow
def test_a_factory_of_an_installed_module_is_a_teacher(nets: str, tmp_path: Path) -> None:
    card = describe(parse_teacher(f"{nets}:make"), tmp_path / "cache")
    assert (card.label, card.model, card.weights, card.task.classes) == ("make", f"{nets}:make", "factory", 4)
    assert card.source_sha256 is not None
    assert describe(parse_teacher(f"{nets}:Net"), tmp_path / "cache").weights_sha256 == card.weights_sha256
    assert list_models(f"{nets}:*") == [f"{nets}:Net", f"{nets}:make"]
    assert list_models(f"{nets}:m*") == [f"{nets}:make"]
    file = tmp_path / nets.split(".")[0] / "zoo.py"
    with pytest.raises(UserError, match=r"has no factory 'mak': did you mean 'make'"):
        describe(parse_teacher(f"{nets}:mak"))
    file.write_text("raise OSError('no weights here')\n")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no_such_package.nets:make", "unknown zoo 'no_such_package.nets'"),
        ("tim:resnet18", "unknown zoo 'tim': did you mean 'timm'?"),
        ("torchvision.models:resnet18", "classes, size, mean, std missing: give them in the config"),
    ],
)
def test_a_module_that_is_none_is_told(model: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        describe(parse_teacher(model))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# --- protocols


def test_a_file_is_a_protocol_called_as_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "gentle.yaml"
    path.write_text("base: hardware\nfirst_bits: null\n")
    found = find_protocol(str(path))
    assert (found.name, found.first_bits, found.last_bits) == ("gentle", None, 8)
    assert found.fingerprint() == find_protocol({"base": "hardware", "first_bits": None}).fingerprint(), "the name and the file are no part of it"
    path.write_text("name: other\nfirst_bits: 8\n")
    assert find_protocol(str(path)).name == "other"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("first_bit: 8\n", ["unknown protocol setting 'first_bit': did you mean 'first_bits'?"]),
        ("first_bits: 9\ngradient: none\n", ["first_bits: 9", "gradient: 'none'"]),
        ("base: linage\n", ["unknown protocol 'linage': did you mean 'lineage'?"]),
        ("base: other.yaml\n", ["base 'other.yaml'"]),
        ("- 1\n", ["a mapping is expected"]),
        ("a: [1\n", ["line 2: not valid YAML"]),
        ("name: lineage\nfirst_bits: 8\n", ["a built-in protocol with other rules is called 'lineage'"]),
    ],
)
def test_what_is_wrong_with_a_protocols_file_is_told_at_once(text: str, said: list[str], tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        find_protocol(str(path))
    messages = caught.value.messages if isinstance(caught.value, UserErrors) else [str(caught.value)]
    assert len(messages) == len(said)
    assert all(str(path) in message and wanted in message for message, wanted in zip(messages, said, strict=True))
    with pytest.raises(UserError, match=r"nowhere.yaml: No such file"):
        find_protocol(str(tmp_path / "nowhere.yaml"))


def test_every_rule_of_a_protocol_has_a_meaning() -> None:
    for protocol in PROTOCOLS.values():
        assert all(field.description for field in type(protocol).model_fields.values())

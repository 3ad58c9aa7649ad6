"""What a network makes impossible is found when a sweep is loaded, before any cell runs; what is only wrapped is unwrapped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from dfqbench.errors import UserError
from dfqbench.method.registry import list_methods
from dfqbench.network import Teacher
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.teachers import describe, load, parse_teacher

SweepFile = Callable[..., Path]
NETS = """
import torch
from torch import nn


class Net(nn.Module):
    classes, size, mean, std = 10, 8, (0.5,) * 3, (0.25,) * 3

    def __init__(self, norm, layers=2):
        super().__init__()
        self.body = nn.Sequential(*(part for i in range(layers) for part in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), norm(8), nn.ReLU())))
        self.head = nn.Linear(8, 10)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def plain():
    return Net(nn.BatchNorm2d)


def group_norm():
    return Net(lambda width: nn.GroupNorm(2, width))


def batch_statistics():
    return Net(lambda width: nn.BatchNorm2d(width, track_running_stats=False))


def no_stage():
    return Net(nn.BatchNorm2d, layers=1)


def branching():
    return Branching(nn.BatchNorm2d)


def bare():
    net = plain()
    net.body[2] = net.body[5] = nn.Identity()
    return net


def weightless():
    return Weightless(nn.BatchNorm2d)


def late_norm():
    net = plain()
    net.body[1] = nn.Identity()
    return net


def split_head():
    net = plain()
    net.head = Split()
    return net


def by_hand():
    return ByHand(nn.BatchNorm2d)


class ByHand(Net):
    def forward(self, x):
        return torch.nn.functional.linear(self.body(x).mean((2, 3)), self.head.weight * 1.0, self.head.bias)


class Weightless(Net):
    def forward(self, x):
        return torch.relu(x - 0.1).flatten(1)[:, :10] * 2


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 6)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], 1)


def scripted():
    return torch.jit.script(plain())


def partly_scripted():
    net = plain()
    net.body = torch.jit.script(net.body)
    return net


def parallel():
    return with_facts(nn.DataParallel(plain()))


def parallel_inside():
    net = plain()
    net.body = nn.DataParallel(net.body)
    return net


def compiled():
    return torch.compile(nn.DataParallel(plain()))


def compiled_inside():
    net = plain()
    net.body[0] = torch.compile(net.body[0])
    return net


def with_facts(wrapped):
    wrapped.size = 16
    return wrapped
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def lines(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_sweep(path, cache_folder())
    return str(caught.value).splitlines()


LACKING = {"statistics": ["group_norm", "batch_statistics"], "features": ["no_stage"], "classifier": ["split_head"], "ranges": ["late_norm"]}
WITH = {need: [m.info.name for m in list_methods() if need in m.needs] for need in LACKING}


@pytest.mark.parametrize(("need", "name"), [(need, name) for need in LACKING for name in WITH[need] if name != "tszsq"])
def test_what_a_method_needs_and_a_network_lacks_is_told_before_anything_runs(need: str, name: str, nets: Path, sweep_file: SweepFile) -> None:
    config = sweep_file(teachers=[f"{nets}:{net}" for net in LACKING[need]], methods=[name], budget={})
    told = lines(config)
    for i, net in enumerate(LACKING[need]):
        (line,) = (line for line in told if line.startswith(f"{config}: teachers[{i}]: ") and f": {need} (" in line)
        assert f"{net} does not have what method {name} needs" in line
    assert load_sweep(sweep_file(teachers=[f"{nets}:plain"], methods=[name], budget={}), cache_folder()).cells


def test_what_a_wrapped_method_needs_counts(nets: Path, sweep_file: SweepFile) -> None:
    told = lines(sweep_file(teachers=[f"{nets}:no_stage"], methods=[{"ait": {"host": "intraq"}}], budget={}))
    assert any("no_stage does not have what method ait needs: features" in line for line in told)


def test_a_method_that_needs_none_of_it_runs_on_such_a_network(nets: Path, sweep_file: SweepFile) -> None:
    assert load_sweep(sweep_file(teachers=[f"{nets}:group_norm"], methods=["zaq"], budget={}), cache_folder()).cells


@pytest.mark.parametrize("protocol", ["lineage", {"base": "lineage", "input_bits": 8}, "own.yaml"])
def test_a_network_that_a_protocol_finds_nothing_in_is_told_once_and_for_all(
    protocol: object, nets: Path, sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text("base: hardware\nplacement: activations\n")
    monkeypatch.chdir(tmp_path)
    config = sweep_file(teachers=[f"{nets}:bare", f"{nets}:plain", f"{nets}:weightless"], methods=["zaq", "round"], budget={}, protocol=protocol)
    if protocol == "own.yaml":
        config = sweep_file(teachers=[f"{nets}:bare", f"{nets}:plain", f"{nets}:weightless"], methods=["round"], budget={}, protocol=protocol)
    said = [line for line in lines(config) if "does not have" not in line]
    assert [line.split(": ")[1:4] for line in said] == [["teachers[0]", "bare", "Net"], ["teachers[2]", "weightless", "Weightless"]]
    assert "finds no activation to quantize: it has no activation function that is known" in said[0]
    assert "no weight to quantize: it has no convolution, no linear layer and no product with a parameter" in said[1]

    def forbidden(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("dfqbench.teachers.build.build", forbidden)
    assert [line for line in lines(config) if "does not have" not in line] == said, "the answers are remembered"
    if protocol != "own.yaml":
        with pytest.raises(AssertionError, match="built again"):  # another protocol is another question
            lines(sweep_file(teachers=[f"{nets}:bare"], methods=["round"], budget={}, protocol={"base": "lineage", "input_bits": 7}))


@pytest.mark.parametrize("name", sorted({m.info.name for m in list_methods()} - {"round", "squant", "dfq", "zeroq", "gznq", "checkpoint"}))
def test_a_plan_without_an_epoch_in_which_ranges_could_be_found_is_told(name: str, nets: Path, sweep_file: SweepFile) -> None:
    (line,) = lines(sweep_file(teachers=[f"{nets}:plain"], methods=[name], budget={"epochs": 0}))
    assert f"methods[0].{name}" in line
    assert "greater than or equal to 1" in line


def test_what_one_protocol_cannot_quantize_another_can(nets: Path, sweep_file: SweepFile) -> None:
    config = sweep_file(teachers=[f"{nets}:bare"], methods=["round"], budget={}, protocol="hardware")
    assert load_sweep(config, cache_folder()).cells


@pytest.mark.slow
@pytest.mark.parametrize(("net", "method", "need"), [("group_norm", "gdfq", "statistics"), ("no_stage", "zaq", "features")])
def test_a_speed_measurement_is_refused_as_well(net: str, method: str, need: str, nets: Path, dfqbench: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = dfqbench("speed", "--methods", method, "--network", f"{nets}:{net}", "--rounds", 1, "--seconds", 0, "--device", "cpu")
    assert code == 2
    assert f"{net} does not have what method {method} needs: {need} (" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ("branching", "cannot be traced by torch.fx in its forward"),
        ("scripted", "the network is TorchScript"),
        ("partly_scripted", "its part 'body' is TorchScript"),
    ],
)
def test_a_network_that_cannot_be_taken_apart_is_one_line(net: str, said: str, nets: Path, sweep_file: SweepFile) -> None:
    (line,) = lines(sweep_file(teachers=[f"{nets}:{net}"], methods=["zaq"], budget={}))
    assert f"teacher '{nets}:{net}'" in line
    assert said in line


@pytest.mark.parametrize("net", ["parallel", "parallel_inside", pytest.param("compiled", marks=pytest.mark.slow), "compiled_inside"])
def test_wrapped_networks_are_the_network_inside(net: str, nets: Path, tmp_path: Path) -> None:
    torch.save(load(parse_teacher(f"{nets}:plain")).state_dict(), tmp_path / "w.pth")
    for weights in ({}, {"weights": str(tmp_path / "w.pth")} if net in ("parallel", "compiled") else {}):
        spec = parse_teacher({"model": f"{nets}:{net}", **weights})
        network, plain = load(spec), load(parse_teacher(f"{nets}:plain"))
        assert str(network) == str(plain)
        assert describe(spec).task.size == (16 if net == "parallel" else 8)
        x = torch.rand(2, 3, 8, 8)
        assert torch.equal(Teacher(network, describe(spec).task)(x), Teacher(plain, describe(spec).task)(x))


def test_weights_of_a_network_with_a_wrapped_part_keep_their_names(nets: Path, tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("nets_for_weights", nets)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.parallel_inside()
    assert any(".module." in name for name in network.state_dict())
    torch.save(network.state_dict(), tmp_path / "w.pth")
    loaded = load(parse_teacher({"model": f"{nets}:parallel_inside", "weights": str(tmp_path / "w.pth")}))
    assert not any(".module." in name for name in loaded.state_dict())


@pytest.mark.parametrize(
    ("mode", "channels", "said"),
    [("I;16", 3, "evaluate: .* more than 8 bits per value"), ("RGB", 4, r"teachers\[0\]: .* 1 or 3 channels, the teacher takes 4")],
)
def test_a_set_that_the_teacher_cannot_be_shown_is_told(
    mode: str, channels: int, said: str, nets: Path, sweep_file: SweepFile, tmp_path: Path
) -> None:
    for label in range(10):
        (tmp_path / "set" / str(label)).mkdir(parents=True)
        Image.new(mode, (8, 8), 1).save(tmp_path / "set" / str(label) / "1.png")
    text = (
        nets.read_text()
        .replace("if i else 3", f"if i else {channels}")
        .replace("(0.5,) * 3, (0.25,) * 3", f"(0.5,) * {channels}, (0.25,) * {channels}")
    )
    (tmp_path / "net.py").write_text(text)
    (line,) = lines(sweep_file(teachers=[f"{tmp_path / 'net.py'}:plain"], methods=["zaq"], evaluate=f"imagefolder:{tmp_path / 'set'}", budget={}))
    assert re.search(said, line), line


def test_how_much_is_quantized_is_told_and_a_network_that_was_rewritten_is_another_one(nets: Path, sweep_file: SweepFile) -> None:
    config = sweep_file(teachers=[f"{nets}:{net}" for net in ("plain", "by_hand")], methods=["round"], budget={})
    loaded = load_sweep(config, cache_folder())
    first, second, head = 64 * 8 * 27, 64 * 8 * 72, 80
    share = f"{100 * second / (first + second + head):.4g} %"
    told = f"under lineage, 100 % of the multiplications by a weight have a quantized one, {share} of all multiply quantized activations"
    assert [line for line in loaded.remarks if "multiplications" in line] == [f"plain: {told}", f"by_hand: {told}"]
    forms = [cell.identity()["teacher"].get("form") for cell in loaded.cells]
    assert set(forms[: len(forms) // 2]) == {None}
    assert set(forms[len(forms) // 2 :]) == {1}
    all_of_it = load_sweep(sweep_file(teachers=[f"{nets}:plain"], methods=["gdfq"], budget={}, protocol="hardware"), cache_folder())
    assert not any("multiplications" in line for line in all_of_it.remarks)

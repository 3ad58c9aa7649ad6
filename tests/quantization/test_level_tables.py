"""Weight grids that are not uniform: each against a search of its own in float64, their identity, and whatever a student goes through."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.export.size import size_of
from dfqbench.export.student_file import load_student_file, save_student
from dfqbench.quantization import PROTOCOLS, Bits, Protocol, find_protocol
from dfqbench.quantization.fake_quantize import fake_quantize, grid
from dfqbench.quantization.layers import QuantizedLayer, WeightGrid, grids_of
from dfqbench.quantization.level_tables import codebook, fixed_levels, uniform_start
from dfqbench.quantization.student import Student
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.testing.trial import small_task, small_teacher

GRIDS = [*(("pow2", k) for k in range(2, 7)), *(("apot", k) for k in range(2, 6)), *(("kmeans", k) for k in (2, 3, 4, 6, 8)), ("ternary", 2)]


def protocol_of(kind: str, granularity: str = "per-channel", **changes: Any) -> Protocol:
    return find_protocol({"weight_grid": kind, "weight_granularity": "per-tensor" if kind == "kmeans" else granularity, **changes})


def layer_of(kind: str, bits: int, granularity: str = "per-channel", **changes: Any) -> QuantizedLayer:
    torch.manual_seed(bits)
    layer = nn.Conv2d(5, 7, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 1, 7)[:, None, None, None]).add_(0.001)
    return QuantizedLayer(layer.to(memory_format=torch.channels_last), bits, protocol_of(kind, granularity, **changes))


def scale_and_levels(rows: Tensor, kind: str, bits: int) -> tuple[Tensor, Tensor]:
    """What the grid of each row is by its definition, in float64 and in plain loops: rows -> rows x levels."""
    if kind == "pow2":
        magnitudes = [2.0**-j for j in range(2 ** (bits - 1) - 1)]
        tops = torch.tensor([max(2.0**e for e in range(-60, 60) if 2.0**e <= 4 * float(row.abs().max()) / 3) for row in rows], dtype=torch.float64)
    else:
        sums = {
            2: [1],
            3: [1 / 4, 1 / 2, 1],
            4: [(a + b) / 0.625 for a in (0, 1 / 2, 1 / 4, 1 / 16) for b in (0, 1 / 8)],
            5: [(a + b) / 0.75 for a in (0, 1 / 2, 1 / 8, 1 / 32) for b in (0, 1 / 4, 1 / 16, 1 / 64)],
        }
        magnitudes = [value for value in sums[bits] if value]
        tops = rows.abs().amax(1)
    table = torch.tensor([0.0, *magnitudes, *(-m for m in magnitudes)], dtype=torch.float64)
    return tops, tops[:, None] * table


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
@pytest.mark.parametrize(("kind", "bits"), [pair for pair in GRIDS if pair[0] in ("pow2", "apot")])
def test_each_weight_gets_the_nearest_of_all_levels(kind: str, bits: int, granularity: str) -> None:
    layer = layer_of(kind, bits, granularity)
    weight, found = layer.layer.weight.detach().double(), layer.quantized_weight().detach().double()
    rows, made = (t.flatten(1) if granularity == "per-channel" else t.reshape(1, -1) for t in (weight, found))
    _, levels = scale_and_levels(rows, kind, bits)
    assert levels.shape[1] == 2**bits - 1 == len({*levels[0].tolist()})
    for row, got, own in zip(rows, made, levels, strict=True):
        distance = (row[:, None] - own).abs().amin(1)
        torch.testing.assert_close((row - got).abs(), distance, rtol=1e-6, atol=1e-7 * float(own.max()))
        assert float((got[:, None] - own).abs().amin(1).max()) <= 1e-7 * float(own.max()), "all are levels"


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_each_weight_gets_the_nearest_codeword(bits: int) -> None:
    layer = layer_of("kmeans", bits)
    weight, found = layer.layer.weight.detach().double(), layer.quantized_weight().detach().double()
    codes = layer.codes()
    assert codes.table is not None
    assert len(codes.table) == 2**bits
    assert {*found.flatten().tolist()} <= {*codes.table.double().tolist()}
    torch.testing.assert_close((weight - found).abs(), (weight[..., None] - codes.table.double()).abs().amin(-1), rtol=0, atol=0)


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
def test_ternary_is_twn(granularity: str) -> None:
    layer = layer_of("ternary", 2, granularity)
    weight, found = layer.layer.weight.detach().double(), layer.quantized_weight().detach()
    rows, made = (t.flatten(1) if granularity == "per-channel" else t.reshape(1, -1) for t in (weight, found))
    for row, got in zip(rows, made, strict=True):
        beyond = row.abs() > 0.7 * row.abs().mean()
        wanted = torch.where(beyond, row.sign() * row.abs()[beyond].mean(), 0.0)
        torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=0)
    assert len({*made[-1].tolist()}) == 3


def squared_error(values: Tensor, words: Tensor) -> float:
    return float((values.double()[:, None] - words.double()).square().amin(1).sum())


@pytest.mark.parametrize("start", ["normal", "uniform", "worst"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_distortion_never_rises(bits: int, start: str) -> None:
    values = torch.cat([torch.randn(3000, generator=torch.Generator().manual_seed(bits)).pow(3), torch.tensor([40.0, -1.0, -1.0])])
    first = {"normal": None, "uniform": uniform_start(values, bits), "worst": torch.linspace(39, 41, 2**bits)}[start]
    errors = [squared_error(values, codebook(values, bits, count, first)) for count in range(40)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors)), errors  # of codewords in float32
    assert errors[-1] < 0.9 * errors[0]
    assert torch.equal(codebook(values, bits, 10, first), codebook(values.flip(0), bits, 10, first)), "the order has no part in it"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kmeans_frozen_to_a_uniform_grid_is_the_uniform_grid_to_the_bit(bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(values: Tensor, bits: int) -> Tensor:
        return codebook(values, bits, 0, uniform_start(values, bits, symmetric))

    monkeypatch.setattr("dfqbench.quantization.level_tables.codebook", frozen)
    layer = layer_of("kmeans", bits)
    weight = layer.layer.weight
    scale, zero_point = grid(weight.amin(), weight.amax(), bits, symmetric)
    assert torch.equal(layer.quantized_weight(), fake_quantize(weight, scale, zero_point, bits, symmetric=symmetric))
    x = torch.randn(2, 5, 6, 6)
    assert torch.equal(layer(x), QuantizedLayer(layer.layer, bits, protocol_of("uniform", "per-tensor", weight_symmetric=symmetric))(x))


@pytest.mark.parametrize("gradient", ["identity", "clipped"])
@pytest.mark.parametrize(("kind", "bits"), GRIDS)
def test_the_gradient_passes_straight_through(kind: str, bits: int, gradient: str) -> None:
    layer = layer_of(kind, bits, gradient=gradient)
    coming = torch.randn_like(layer.layer.weight)
    (got,) = torch.autograd.grad(layer.quantized_weight(), layer.layer.weight, coming)
    assert torch.equal(got, coming)


@pytest.mark.parametrize(("kind", "bits"), GRIDS)
def test_a_layer_alone_and_all_at_once_and_a_weight_of_no_layer_agree(kind: str, bits: int) -> None:
    layer, other, even = layer_of(kind, bits), layer_of(kind, bits, batch_norm="trained"), layer_of("uniform", 4)
    wanted = layer.quantized_weight()
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    found = grids_of([even, layer, other])
    assert torch.equal(layer.quantized_weight(found[1]), wanted)
    assert torch.equal(even.quantized_weight(found[0]), even.quantized_weight())
    codes = layer.codes()
    assert torch.equal(codes.weight(), wanted)
    assert torch.equal(codes.levels, layer.weight_levels(layer.layer.weight))
    assert 0 == codes.lowest <= codes.levels.min() < codes.levels.max() <= codes.highest < 2**bits
    turned = layer.layer.weight.transpose(0, 1)
    assert torch.equal(WeightGrid(bits, layer.protocol, 1)(turned).transpose(0, 1), wanted)
    with pytest.raises(ValueError, match="uniform grids only"):
        layer.set_levels(codes.levels)


def test_weights_of_zeros_stay_zeros() -> None:
    for kind, bits in GRIDS:
        layer = layer_of(kind, bits)
        with torch.no_grad():
            layer.layer.weight.zero_()
        assert float(layer.quantized_weight().detach().abs().max()) < 1e-7, kind


@pytest.mark.parametrize("base", PROTOCOLS)
@pytest.mark.parametrize(("kind", "bits"), [("pow2", 4), ("apot", 3), ("kmeans", 4), ("ternary", 2)])
def test_a_student_comes_back_from_its_file_to_the_bit(kind: str, bits: int, base: str, tmp_path: Path) -> None:
    teacher = small_teacher(small_task())
    student = Student(teacher, protocol_of(kind, base=base), Bits(bits, 4)).to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3)).contiguous(memory_format=torch.channels_last)
    student.track_ranges(True)
    with torch.no_grad():
        student(images)
        student.track_ranges(False)
        save_student(student, tmp_path / "s.safetensors")
        loaded = load_student_file(tmp_path / "s.safetensors")
        assert torch.equal(loaded(images), student(images))
    assert size_of(loaded) == size_of(student)
    assert loaded.protocol == student.protocol
    pinned = [name for name, layer in student.layers.items() if layer.protocol.weight_grid == "uniform"]
    assert len(pinned) == (2 if base == "hardware" else 0)
    save_student(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def test_a_codebook_counts_with_the_size() -> None:
    teacher = small_teacher(small_task())
    sizes = {kind: size_of(Student(teacher, protocol_of(kind, "per-tensor"), Bits(4, 4))).bytes for kind in ("uniform", "pow2", "apot", "kmeans")}
    layers = len(Student(teacher, PROTOCOLS["lineage"], Bits(4, 4)).layers)
    assert sizes["pow2"] == sizes["apot"] == sizes["uniform"] - 4 * layers, "a scale, and no zero point"
    assert sizes["kmeans"] == sizes["uniform"] - 8 * layers + 4 * 16 * layers


def test_bit_widths_are_those_that_a_grid_has() -> None:
    assert [len(fixed_levels("pow2", k)) for k in (2, 3, 6)] == [3, 7, 63]
    for kind, width, said in (
        ("ternary", Bits(3, 4), "uniform or pow2 or apot or kmeans"),
        ("apot", Bits(6, 4), "2 to 5 bits"),
        ("pow2", Bits(7, 4), "2 to 6"),
    ):
        with pytest.raises(UserError, match=said):
            Student(small_teacher(small_task()), protocol_of(kind), width)
    with pytest.raises(UserError, match="weight_granularity: per-tensor"):
        find_protocol({"weight_grid": "kmeans"})
    protocol_of("kmeans").check_bits(Bits(3.5, 4), allocated=True)
    with pytest.raises(UserError, match="use uniform or kmeans"):
        protocol_of("pow2").check_bits(Bits(4, 4), allocated=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": ["w2a4", "w3a4"], "protocol": {"weight_grid": "ternary"}}, "bits[1]: w3a4: weight_grid 'ternary' has 2 bits"),
        (
            {"methods": ["squant"], "protocol": {"weight_grid": "pow2"}},
            "methods[0].squant: method squant, as it is set, does not work with weight_grid 'pow2': take uniform",
        ),
        ({"protocol": {"weight_grid": "kmeans"}}, "protocol: weight_grid 'kmeans' has one codebook"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(changes: dict[str, Any], said: str, sweep_file: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as error:
        load_sweep(sweep_file(**{"methods": ["round"], "bits": ["w4a4"], "budget": {}, **changes}), cache_folder())
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_identities_of_uniform_grids_are_what_they_were() -> None:
    digests = {n: hashlib.sha256(json.dumps(p.fingerprint(), sort_keys=True).encode()).hexdigest()[:12] for n, p in PROTOCOLS.items()}
    assert digests == {"lineage": "c13698a6732e", "hardware": "ed16b656dcc4", "full": "02ec52948b5d"}
    assert "weight_grid" not in PROTOCOLS["lineage"].model_dump(mode="json"), "so that files of students are the same bytes"
    assert find_protocol({"weight_grid": "uniform"}).fingerprint() == PROTOCOLS["lineage"].fingerprint()
    apart = find_protocol({"weight_grid": "pow2"})
    assert apart.name == "lineage+weight_grid=pow2"
    assert apart.fingerprint() == PROTOCOLS["lineage"].fingerprint() | {"weight_grid": "pow2"}
    assert Protocol(**apart.model_dump()) == apart

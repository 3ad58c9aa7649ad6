"""The rules of quantization as a value: reading them, their identity, their errors."""

from __future__ import annotations

from typing import Any

import pytest

from dfqbench.errors import UserError, UserErrors
from dfqbench.quantization import PROTOCOLS, Bits, Protocol, find_protocol


@pytest.mark.parametrize(("text", "bits"), [("w4a4", (4, 4)), ("w2a8", (2, 8)), ("w8a3", (8, 3))])
def test_bits_are_read_and_written_back(text: str, bits: tuple[int, int]) -> None:
    assert Bits.parse(text) == bits
    assert str(Bits.parse(text)) == f"{Bits.parse(text)}" == text


@pytest.mark.parametrize("text", ["w4", "1", "w9a4", "w1a4", 4, None, "W4A4", "w4a4 ", "w4a4\n", "w44a4", ""])
def test_bits_written_otherwise_are_refused_with_an_example(text: object) -> None:
    with pytest.raises(UserError, match="like 'w4a4'") as error:
        Bits.parse(text)
    assert repr(text) in str(error.value)


def test_a_protocol_is_found_by_name() -> None:
    assert find_protocol("lineage") == Protocol(name="lineage")
    assert find_protocol("hardware").batch_norm == "folded"


def test_a_mapping_starts_from_a_protocol_and_is_called_after_its_changes() -> None:
    found = find_protocol({"base": "hardware", "first_bits": 4})
    assert found.fingerprint() == PROTOCOLS["hardware"].fingerprint() | {"first_bits": 4}
    assert found.name == "hardware+first_bits=4"
    assert find_protocol({"first_bits": 8, "name": "mine"}).name == "mine"
    assert find_protocol({}).fingerprint() == PROTOCOLS["lineage"].fingerprint()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("linage", ["'linage'", "did you mean 'lineage'"]),
        ({"base": "hardwear"}, ["'hardwear'", "did you mean 'hardware'"]),
        ({"frist_bits": 8}, ["'frist_bits'", "did you mean 'first_bits'"]),
        ({"first_bits": 9}, ["protocol.first_bits: 9", "less than or equal to 8"]),
        ({"last_bits": 1}, ["protocol.last_bits: 1"]),
        ({"gradient": "none"}, ["protocol.gradient: 'none'", "'identity' or 'clipped'"]),
        ({4: 8}, ["unknown protocol setting 4"]),
        (7, ["not 7", "hardware, lineage"]),
        (None, ["not None"]),
        (["lineage"], ["a name or a mapping"]),
    ],
)
def test_a_wrong_protocol_says_what_would_be_right(given: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        find_protocol(given)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserErrors) as error:
        find_protocol({"frist_bits": 8, "lst_bits": 8, "gradient": "none", "input_bits": 99})
    said = error.value.messages
    assert len(said) == 4
    assert [sum(word in line for line in said) for word in ("frist_bits", "lst_bits", "protocol.gradient", "protocol.input_bits")] == [1] * 4


OTHER: dict[str, Any] = {
    "placement": "layer-inputs", "input_bits": 8, "first_bits": 8, "last_bits": 8, "weight_granularity": "per-tensor", "weight_symmetric": True,
    "activation_symmetric": True, "zero_in_range": True, "gradient": "clipped", "ranges": "minmax", "batch_norm": "trained",
    "weight_grid": "pow2",
}  # fmt: skip


def test_the_name_is_no_part_of_the_fingerprint() -> None:
    assert Protocol(name="a").fingerprint() == Protocol(name="b").fingerprint()
    assert set(OTHER) | {"name"} == set(Protocol.model_fields)


@pytest.mark.parametrize("field", OTHER)
def test_every_other_field_changes_the_fingerprint(field: str) -> None:
    assert Protocol(**{field: OTHER[field]}).fingerprint() != Protocol().fingerprint()


def test_a_protocol_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PROTOCOLS["lineage"].first_bits = 8


def test_what_a_method_declares_replaces_the_protocols_default() -> None:
    found = PROTOCOLS["lineage"].for_method("zaq", "minmax", "trained")
    assert (found.ranges, found.batch_norm) == ("minmax", "trained")
    assert PROTOCOLS["lineage"].for_method("gdfq", None, None) == PROTOCOLS["lineage"]
    assert PROTOCOLS["hardware"].for_method("x", "mse", "folded").batch_norm == "folded"


@pytest.mark.parametrize(("protocol", "wanted"), [("hardware", "trained"), ("hardware", "fixed"), ("lineage", "folded")])
def test_folded_batch_norm_does_not_go_with_any_other(protocol: str, wanted: Any) -> None:
    with pytest.raises(UserError, match="take another protocol") as error:
        PROTOCOLS[protocol].for_method("zaq", None, wanted)
    assert "zaq" in str(error.value)
    assert protocol in str(error.value)

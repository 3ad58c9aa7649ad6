"""YAML that reads as it looks, wherever a user writes some: sweeps, profiles, protocols."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfqbench.errors import UserError, UserErrors
from dfqbench.quantization import find_protocol
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.config_file import sweep_name
from dfqbench.sweep.load import load_sweep
from dfqbench.yaml_file import read_yaml, write_yaml
from dfqbench_slurm.profile import find_profile

ROOT = Path(__file__).parents[1]
SHIPPED = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "slurm").rglob("*.yaml"), *(ROOT / "benchmark/method").rglob("*.yaml")]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "some.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "some.yaml"

    return write


Written = Callable[[str], Path]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:00:00", "12:00:00"),
        ("4:30", "4:30"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("on", "on"),
        ("No", "No"),
        ("2026-01-01", "2026-01-01"),
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("0x1f", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ('"1"', "1"),
        ("größe", "größe"),
    ],
)
def test_a_value_is_what_it_looks_like(written: Written, text: str, value: object) -> None:
    found = read_yaml(written(f"key: {text}\n"))["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "outer:\n  a: 1\n  a: 1\n", "{b: {a: 1},\n\n'a': 2, a: 3}"])
def test_a_key_given_twice_is_an_error_with_both_lines(written: Written, text: str) -> None:
    with pytest.raises(UserError, match=r"line 3: not valid YAML: 'a' is given twice, first in line [123]"):
        read_yaml(written(text))


def test_mappings_are_still_merged(written: Written) -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n"
    assert read_yaml(written(text)) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["[1, 2", "a: \x00", "a: &a [*b]", "[" * 5000, "a: !!python/name:os.system"])
def test_what_is_no_yaml_is_one_line(written: Written, text: str) -> None:
    with pytest.raises(UserError, match=r"some\.yaml: .*not valid YAML") as error:
        read_yaml(written(text))
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_told_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: 1\nname: größe\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: line 2: not UTF-8 text"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_mean_what_a_yaml_1_1_reader_finds_in_them(file: Path) -> None:
    assert repr(read_yaml(file)) == repr(yaml.safe_load(file.read_text(encoding="utf-8")))


def test_what_is_written_is_read_as_the_same(written: Written) -> None:
    texts = ["1e3", "010", "off", "12:00", "0o17", "1_0", "<<", "~", "", "=", "2026-01-01", "größe", "null", "a: b"]
    value = {"texts": texts, "others": [1e-5, 1e20, float("inf"), None, True, 0, -7]}
    assert read_yaml(written(write_yaml(value))) == value
    assert yaml.safe_load(write_yaml(value)) == value


# --- where users write YAML -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "minutes"), [("12:00:00", 720), ("4:30", 5), ("1-12:00:00", 2160), ("90", 90), ("090", 90), ("4h", 240)])
def test_a_profiles_time_is_what_slurm_would_read(written: Written, time: str, minutes: int) -> None:
    assert find_profile(str(written(f"time: {time}\n")))[1].time == minutes


def test_a_profiles_other_values_reach_sbatch_as_they_are_written(written: Written) -> None:
    text = "account: 007\npartition: on\nsbatch: {begin: 16:00, reservation: 2026-01-01, gres: 1:30, licenses: 1e3, nice: 010, exclusive: true}\n"
    profile = find_profile(str(written(text)))[1]
    assert (profile.account, profile.partition) == ("007", "on")
    assert profile.sbatch == {
        "begin": "16:00",
        "reservation": "2026-01-01",
        "gres": "1:30",
        "licenses": "1e3",
        "nice": "010",
        "exclusive": True,
    }


def test_a_profiles_key_given_twice_is_refused(written: Written) -> None:
    with pytest.raises(UserError, match=r"profile .*some\.yaml: line 3: .*'time' is given twice, first in line 1"):
        find_profile(str(written("time: 4h\ngpus: 1\ntime: 8h\n")))


def test_a_protocol_of_a_file_is_what_it_looks_like(written: Written) -> None:
    protocol = find_protocol(str(written("name: 2026-01-01\nfirst_bits: 08\nweight_symmetric: on\n")))
    assert (protocol.name, protocol.first_bits, protocol.weight_symmetric) == ("2026-01-01", 8, True)
    with pytest.raises(UserError, match=r"protocol .*: line 2: .*'first_bits' is given twice"):
        find_protocol(str(written("first_bits: 8\nfirst_bits: 4\n")))


def test_a_protocol_is_called_after_what_its_changes_mean() -> None:
    assert find_protocol({"first_bits": "08", "weight_symmetric": "on"}) == find_protocol({"first_bits": 8, "weight_symmetric": True})
    assert find_protocol({"first_bits": "08"}).name == "lineage+first_bits=8"


SWEEP = """\
name: 12-00
teachers: [{{model: {teacher}, name: 1:30}}]
evaluate: digits
methods: [{{gdfq: {{student_lr: [1e-4, 1e-5], milestones: [010, 1_000]}}}}]
bits: [w4a4]
seeds: [08, 12]
budget: {{epochs: 1e1, iterations: 010}}
"""


def test_a_sweeps_values_are_what_they_look_like(written: Written, tiny_teacher: str) -> None:
    path = written(SWEEP.format(teacher=tiny_teacher))
    loaded = load_sweep(path, cache_folder())
    assert loaded.sweep.seeds == [8, 12]
    first = loaded.cells[0]
    assert first.teacher.label == "1:30"
    assert (first.config["epochs"], first.config["iterations"], first.config["milestones"]) == (10, 10, [10, 1000])
    assert sorted({cell.config["student_lr"] for cell in loaded.cells}) == [1e-5, 1e-4]
    assert sweep_name(path) == "12-00"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seeds: [1:30]", "seeds[0]: '1:30'"),
        ("seeds: [on]", "seeds[0]: 'on'"),
        ("evaluate_every: 2026-01-01", "evaluate_every: '2026-01-01'"),
        ("tracking: {wandb: off}", "tracking.wandb: 'off'"),
    ],
)
def test_a_sweeps_value_that_its_key_cannot_hold_is_named_as_it_is_written(written: Written, tiny_teacher: str, line: str, said: str) -> None:
    text = f"name: x\nteachers: [{tiny_teacher}]\nevaluate: digits\nmethods: [round]\nbits: [w4a4]\n{line}\n"
    with pytest.raises(UserErrors, match=r"some\.yaml") as error:
        load_sweep(written(text), cache_folder())
    assert said in str(error.value)


def test_a_sweeps_key_given_twice_is_refused_by_every_reader(written: Written) -> None:
    path = written("name: a\nbits: [w4a4]\nname: b\n")
    readers: list[Callable[[], Any]] = [lambda: load_sweep(path, cache_folder()), lambda: sweep_name(path)]
    for reader in readers:
        with pytest.raises(UserError, match=r"some\.yaml: line 3: .*'name' is given twice, first in line 1"):
            reader()

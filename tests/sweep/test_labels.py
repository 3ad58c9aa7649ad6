"""Labels and groups of a sweep's methods: what tables call a row. They never enter an identity."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dfqbench.errors import UserErrors
from dfqbench.sweep.load import load_sweep

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def named(sweep_file: SweepFile, tmp_path: Path, *methods: Any) -> list[tuple[str, str]]:
    loaded = load_sweep(sweep_file(methods=list(methods), bits=["w4a4"]), tmp_path / "cache")
    return [(cell.name, cell.group) for cell in loaded.cells]


def test_an_entry_may_have_a_label_and_a_group(sweep_file: SweepFile, tmp_path: Path) -> None:
    assert named(sweep_file, tmp_path, "round", {"gdfq": None, "label": "GDFQ"}, {"gdfq": {"bn_weight": 2.0}, "group": "ablation"}) == [
        ("", ""),
        ("GDFQ", ""),
        ("", "ablation"),
    ]


def test_a_label_names_settings_in_braces(sweep_file: SweepFile, tmp_path: Path) -> None:
    found = named(sweep_file, tmp_path, {"gdfq": {"bn_weight": [0.5, 2.0]}, "label": "GDFQ, BN x {bn_weight:g}"})
    assert [name for name, _ in found] == ["GDFQ, BN x 0.5", "GDFQ, BN x 2"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"gdfq": {"bn_weight": [0.5, 2.0]}, "label": "GDFQ"}, "methods[0].gdfq.label: 'GDFQ': 2 variants would have it"),
        ({"gdfq": None, "label": "{no_such}"}, "methods[0].gdfq.label: '{no_such}': braces name settings"),
        ({"gdfq": None, "label": "{epochs.__class__}"}, "methods[0].gdfq.label: '{epochs.__class__}': braces name settings"),
        ({"gdfq": None, "label": "{"}, "methods[0].gdfq.label: '{': braces name settings"),
        ({"gdfq": None, "label": ""}, "one method with its settings is expected"),
        ({"label": "GDFQ"}, "one method with its settings is expected"),
        ({"gdfq": "x"}, "one method with its settings is expected"),
        ({"gdfq": None, "round": None}, "one method with its settings is expected"),
    ],
    ids=str,
)
def test_what_is_no_label_is_told(sweep_file: SweepFile, tmp_path: Path, entry: Any, said: str) -> None:
    with pytest.raises(UserErrors, match=re.escape(said)):
        named(sweep_file, tmp_path, entry)


def test_a_label_changes_no_identity_and_is_kept_beside_it(sweep_file: SweepFile, tmp_path: Path, dfqbench: Run) -> None:
    plain = load_sweep(sweep_file(methods=["gdfq"]), tmp_path / "cache").cells
    entry = {"gdfq": None, "label": "GDFQ", "group": "generators"}
    labelled = load_sweep(sweep_file(methods=[entry]), tmp_path / "cache").cells
    assert [cell.id for cell in plain] == [cell.id for cell in labelled]
    assert plain == labelled
    config = sweep_file(methods=[entry])
    assert dfqbench("run", config, "--results", tmp_path / "r")[0] == 0
    for path in (tmp_path / "r").glob("runs/*/cell.json"):
        record = json.loads(path.read_text())
        assert (record["name"], record["group"], record["label"].partition("(")[0]) == ("GDFQ", "generators", "gdfq")
    (noted,) = (tmp_path / "r" / "sweeps").glob("*.json")
    assert set(json.loads(noted.read_text())["names"]) == {cell.id for cell in labelled}


def test_tables_call_rows_as_the_config_does_now(sweep_file: SweepFile, tmp_path: Path, dfqbench: Run) -> None:
    def config(*entries: Any) -> Path:
        return sweep_file(methods=list(entries), bits=["w4a4"])

    def table(*words: Any) -> str:
        code, out, err = dfqbench("table", *words, "--results", tmp_path / "r")
        assert (code, err) == (0, "")
        return out

    path = config({"round": None, "label": "plain"}, {"round": {"n": 4.0}, "label": "wide", "group": "ranges"})
    assert dfqbench("run", path, "--results", tmp_path / "r")[0] == 0
    for out in (table(path), table(), table(path, "--format", "markdown"), table(path, "--layout", "wide")):
        assert "plain" in out
        assert "wide" in out
        assert "round(n=4)" not in out
    out = table(path, "--group", "ranges")
    assert "plain" not in out
    assert "wide" in out
    assert "round(n=4)" in table(path, "--format", "csv")
    code, _, err = dfqbench("table", path, "--group", "none", "--results", tmp_path / "r")
    assert (code, err.strip()) == (2, "dfqbench: --group 'none': no cell is of that group; there are ranges")
    path = config("round", {"round": {"n": 4.0}, "label": "broad"})
    out = table(path)
    assert "broad" in out
    assert "plain" not in out
    path = config({"round": None, "label": "same"}, {"round": {"n": 4.0}, "label": "same"})
    assert len([line for line in table(path).splitlines() if line.startswith("same")]) == 2  # two settings stay two rows

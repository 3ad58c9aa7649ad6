"""Labels and groups of a sweep's methods: what tables call a row. They never enter an identity."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dfqbench.analysis.names import name_rows, read_names, unknown_in
from dfqbench.analysis.records import read_store
from dfqbench.errors import UserErrors
from dfqbench.quantization import find_protocol
from dfqbench.store import Store
from dfqbench.sweep.cell import Cell
from dfqbench.sweep.load import _validate, load_sweep
from dfqbench.sweep.problems import Problems
from dfqbench.sweep.variants import find_variants
from dfqbench.yaml_file import read_yaml

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


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


LABELS = {"round": {"label": "plain", "group": "reference"}, "round(n=4)": "wide"}


def test_a_section_of_labels_names_rows_and_can_be_changed_after_the_run(
    sweep_file: SweepFile, tmp_path: Path, dfqbench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without loading the sweep, which would need the teacher."""

    def rows(labels: Any) -> list[str]:
        path = sweep_file(methods=["round", {"round": {"n": 4.0}}], bits=["w4a4"], labels=labels)
        code, out, err = dfqbench("table", path, "--results", tmp_path / "r", "--columns", "w4a4", "--sort", "method")
        assert (code, err) == (0, "")
        return [re.split("  +", line)[0] for line in out.splitlines()[3:5]]

    path = sweep_file(methods=["round", {"round": {"n": 4.0}}], bits=["w4a4"], labels=LABELS)
    loaded = load_sweep(path, tmp_path / "cache")
    assert [(cell.name, cell.group) for cell in loaded.cells] == [("plain", "reference"), ("wide", "")]
    assert [cell.id for cell in loaded.cells] == [
        cell.id for cell in load_sweep(sweep_file(methods=["round", {"round": {"n": 4.0}}], bits=["w4a4"]), tmp_path / "cache").cells
    ]
    path = sweep_file(methods=["round", {"round": {"n": 4.0}}], bits=["w4a4"], labels=LABELS)
    assert dfqbench("run", path, "--results", tmp_path / "r")[0] == 0
    monkeypatch.delattr("dfqbench.sweep.load.load_sweep")
    assert rows(LABELS) == ["plain", "wide"]
    assert rows({"round": {"label": "zero"}, "round(n=4)": {"label": "wide"}}) == ["wide", "zero"]
    assert rows({"round(n=4)": {"label": "again", "group": "reference"}}) == ["again", "round"]
    assert rows({}) == ["round", "round(n=4)"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"rond": "x"}, "labels: 'rond': no row is called that; did you mean 'round'? known: gdfq, round"),
        ({"gdfq": "x"}, "labels: 'gdfq': it has a label among `methods` already"),
        ({"round": {"lable": "x"}}, "labels.round.lable"),
    ],
    ids=str,
)
def test_a_section_that_fits_no_row_is_told(sweep_file: SweepFile, tmp_path: Path, labels: Any, said: str) -> None:
    with pytest.raises(UserErrors, match=re.escape(said)):
        load_sweep(sweep_file(methods=["round", {"gdfq": None, "label": "GDFQ"}], labels=labels), tmp_path / "cache")


def test_a_file_names_rows_and_unknown_ones_are_told(sweep_file: SweepFile, tmp_path: Path, dfqbench: Run) -> None:
    path = sweep_file(methods=["round", {"round": {"n": 4.0}, "label": "wide"}], bits=["w4a4"])
    assert dfqbench("run", path, "--results", tmp_path / "r")[0] == 0
    (wide,) = (cell.id for cell in load_sweep(path, tmp_path / "cache").cells if cell.name)
    names, where = tmp_path / "names.csv", ("--results", tmp_path / "r")
    names.write_text(f'row,label,group\n{wide},"mine, wide",own\nround,plain,\nno such,x,\n')
    for words in ((path, "--names-from", names), ("--names-from", names)):
        code, out, err = dfqbench("table", *words, *where)
        assert (code, "mine, wide" in out, "plain" in out) == (0, True, True)
        assert err.strip() == f"{names}: no cell or row is called 'no such'"
    assert "plain" not in dfqbench("table", path, "--names-from", names, "--group", "own", *where)[1]
    (tmp_path / "r" / "names.csv").write_text("row,label\nwide,broad\n")
    assert "broad" in dfqbench("table", *where)[1], "the store's own names"
    assert "broad" not in dfqbench("table", path, *where)[1], "the sweep's count before them"
    for text, said in (("a,b\n", "the columns are a, b; row and label are expected"), ("row,label\nx\n", ":2: a row of its own and 2 values")):
        names.write_text(text)
        code, _, err = dfqbench("table", "--names-from", names, *where)
        assert (code, said in err) == (2, True)
    assert dfqbench("table", "--names-from", tmp_path / "none.csv", *where)[2].strip().endswith("none.csv: No such file or directory")


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


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_a_shipped_config_has_a_label(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in re.findall(r"\$\{(\w+)\}", config.read_text()):
        monkeypatch.setenv(variable, str(tmp_path))
    problems = Problems(config)
    sweep = _validate(read_yaml(config), problems)
    assert sweep is not None
    cards = {name: {"digest": "0" * 64, "count": given.count} for name, given in sweep.yardsticks.items()}
    variants, _ = find_variants(sweep, find_protocol(sweep.protocol), set(), {""}, problems, tmp_path, cards)
    assert problems.lines == []
    rows = {Cell.label.fget(variant) for variant in variants}  # type: ignore[attr-defined]
    assert sweep.labels.keys() <= rows, "no label without a row"
    labels = [variant.name or sweep.labels[Cell.label.fget(variant)].label for variant in variants]  # type: ignore[attr-defined]
    assert all(labels)
    assert len(set(labels)) == len(rows)


@pytest.mark.parametrize("names", sorted((ROOT / "results" / "reference").glob("*/names.csv")), ids=lambda path: path.parent.name)
def test_every_row_of_a_reference_store_has_a_label(names: Path) -> None:
    reading = read_store(Store(names.parent))
    assert unknown_in(read_names(names), reading) == ""
    own = {record["id"]: record["cell"]["label"] for record in (*reading.results, *reading.failures)}
    labels = {own[record["id"]]: record["cell"]["label"] for record in name_rows(reading, over=[read_names(names)]).results}
    assert all(label != itself for itself, label in labels.items())
    assert len(set(labels.values())) == len(labels)

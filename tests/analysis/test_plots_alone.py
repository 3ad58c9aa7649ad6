"""Plots are the same whatever the user has told matplotlib, and names are drawn as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from matplotlib.text import Text
from synthetic_store import cells, write_cell

from dfqbench.analysis.plots.figures import files, prepare
from dfqbench.analysis.plots.kinds import draw
from dfqbench.analysis.plots.style import rendered, settings
from dfqbench.analysis.records import read_store
from dfqbench.store import Store

UGLY = "font.size: 30\nfont.family: serif\naxes.grid: False\nfigure.facecolor: red\ntext.usetex: True\nsvg.fonttype: none\nno.such_key: 1\nbroken\n"


def store(root: Path, teacher: str = "net", setting: str = "") -> Store:
    """One method at all widths and seeds, with names as given."""
    made = Store(root, writable=True)
    for cell in cells(25):
        card = dataclasses.replace(cell.teacher, label=teacher)
        write_cell(made, dataclasses.replace(cell, teacher=card, changed={"kind": setting} if setting else {}))
    return made


def plotted(root: Path, out: Path, cwd: Path, **environment: str) -> tuple[dict[str, str], str]:
    """File name -> sha256, and what is said on standard error."""
    command = [sys.executable, "-m", "dfqbench.cli", "plot", "--results", str(root), "--out", str(out), "--format", "svg", "--format", "png"]
    given = {name: value for name, value in os.environ.items() if not name.startswith("MPL") and name != "MATPLOTLIBRC"}
    done = subprocess.run(command, cwd=cwd, env={**given, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}, done.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], str]:
    root = tmp_path_factory.mktemp("plain")
    store(root / "r")
    return (root / "r", *plotted(root / "r", root / "out", root))


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "no such backend"},
        {"MATPLOTLIBRC": "{ugly}"},
        {"MPLCONFIGDIR": "{ugly}"},
    ],
)
def test_what_the_user_tells_matplotlib_changes_no_plot_and_prints_nothing(
    environment: dict[str, str], plain: tuple[Path, dict[str, str], str], tmp_path: Path
) -> None:
    root, hashes, said = plain
    (tmp_path / "ugly").mkdir()
    (tmp_path / "ugly" / "matplotlibrc").write_text(UGLY)
    given = {name: value.replace("{ugly}", str(tmp_path / "ugly")) for name, value in environment.items()}
    assert plotted(root, tmp_path / "out", tmp_path, **given) == (hashes, said)


@pytest.mark.slow
def test_a_matplotlibrc_in_the_working_folder_changes_nothing(plain: tuple[Path, dict[str, str], str], tmp_path: Path) -> None:
    root, hashes, said = plain
    (tmp_path / "matplotlibrc").write_text(UGLY)
    assert plotted(root, tmp_path / "out", tmp_path) == (hashes, said)


def test_settings_of_the_process_change_nothing_and_stay(tmp_path: Path) -> None:
    drawn = prepare(read_store(store(tmp_path / "r")))
    before = dict(files(drawn, "cost", ["svg"]))
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.hashsalt": "x", "font.family": "serif", "text.parse_math": False}):
        assert dict(files(drawn, "cost", ["svg"])) == before
        assert matplotlib.rcParams["font.size"] == 30


@pytest.fixture
def texts(tmp_path: Path) -> Iterator[list[Text]]:
    """Every text of every plot of a store whose names hold signs of mathtext."""
    drawn = prepare(read_store(store(tmp_path / "r", r"net$x_1$and$y\frac", "my$^2$")))
    with settings():
        figures = [figure for kind in ("accuracy", "cost", "drop", "losses") for figure in draw(kind, drawn)]
        for figure in figures:
            rendered(figure, ["svg"])
        yield [text for figure in figures for text in figure.findobj(Text) if text.get_text()]


def test_a_dollar_in_a_name_begins_no_formula(texts: list[Text]) -> None:
    named = [text for text in texts if "net$" in text.get_text() or "=my$" in text.get_text()]
    assert len(named) > 6
    assert not any(text.get_parse_math() for text in named)
    assert not any(text.get_text().startswith("$") for text in texts), "ticks of logarithmic axes are plain numbers"


@pytest.mark.slow
def test_a_name_that_is_no_formula_is_drawn(tmp_path: Path) -> None:
    drawn = prepare(read_store(store(tmp_path / "r", r"$\nosuchcommand{$", "a$b")))
    for kind in ("accuracy", "cost", "drop", "losses"):
        assert dict(files(drawn, kind, ["svg", "pdf", "png"]))


RARE = "\U00013000"  # an Egyptian hieroglyph


def font_of(path: Path, characters: str, family: str) -> None:
    """A font in which each of these characters is a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"g{i}" for i in range(len(characters)))]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): f"g{i}" for i, character in enumerate(characters)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


@pytest.mark.slow
def test_names_in_other_scripts_are_written_in_a_font_that_has_them(tmp_path: Path) -> None:
    name = f"模型{RARE}"
    store(tmp_path / "r", name)
    config = str(tmp_path / "mpl")  # where matplotlib remembers which fonts there are: before and after the font is installed
    empty, full = ({"MPLCONFIGDIR": config, "XDG_DATA_HOME": str(tmp_path / place)} for place in ("empty", "full"))
    font_of(tmp_path / "full" / "fonts" / "two.ttf", "模" + RARE, "Two Of Them")
    without, said = plotted(tmp_path / "r", tmp_path / "without", tmp_path, **empty)
    (line,) = (line for line in said.splitlines() if not line.startswith("not drawn"))
    assert line.startswith("dfqbench: plots: no installed font has ")
    assert RARE in line
    assert line.endswith("install one that has them, such as Noto Sans CJK")
    found, said = plotted(tmp_path / "r", tmp_path / "with", tmp_path, **full)
    assert RARE not in said
    assert found.keys() == without.keys()
    assert found != without
    again, _ = plotted(tmp_path / "r", tmp_path / "again", tmp_path, **full)
    assert again == found


def test_a_name_that_no_font_has_is_said_once(tmp_path: Path) -> None:
    reading = read_store(store(tmp_path / "r", f"{RARE}\U00013001"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = prepare(reading)
        for kind in ("accuracy", "drop"):
            assert dict(files(drawn, kind, ["svg", "pdf"]))
    (said,) = (str(warning.message) for warning in caught)
    assert "no installed font has" in said

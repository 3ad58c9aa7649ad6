"""LaTeX: what a paper's table has, and that pdfLaTeX sets it. With DFQBENCH_REQUIRE_TEX=1 the tests of what it sets may not be skipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_store import cells, make_store, write_cell, write_failure, write_without_data
from synthetic_store import without_data as blind
from test_blocks import result

from dfqbench.analysis.names import name_rows, read_names
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.records import read_store
from dfqbench.analysis.tables.blocks import Block, blocks
from dfqbench.analysis.tables.choice import Choice, Columns
from dfqbench.analysis.tables.latex import PACKAGES, escaped, latex
from dfqbench.analysis.tables.means import ranking
from dfqbench.analysis.tables.papers import bibliography, papers
from dfqbench.analysis.tables.printed import Tables, arranged
from dfqbench.analysis.tables.wide import side_by_side
from dfqbench.analysis.tables.without_data import agreements
from dfqbench.method.registry import built_in_names, find_method
from dfqbench.store import Store

Run = Callable[..., tuple[int, str, str]]
STUDY = Path(__file__).parents[2] / "results" / "reference" / "cifar10-jpeg-study"


@pytest.fixture(scope="module")
def study() -> list[Block]:
    reading = read_store(Store(STUDY))
    reading = name_rows(reading, over=[read_names(STUDY / "names.csv")])
    return [arranged(block, Choice()) for block in blocks([*reading.results, *reading.unfinished], per_image=PerImage(reading))]


def line_of(text: str, name: str) -> list[str]:
    """The cells of the row that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.removeprefix(r"\raggedright ").startswith(name)]
    return line.removesuffix(r" \\").split(" & ")


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_studys_table_is_a_papers(study: list[Block]) -> None:
    text = latex(study[:1])
    assert r"\caption{Top-1 accuracy (\%) of resnet20-jpeg (87.44 \% in full precision) on cifar10-jpeg, protocol lineage, fp32.}" in text
    assert re.findall(r"\\label\{(.*?)\}", text) == ["tab:cifar10-jpeg-resnet20-jpeg-lineage-fp32"]
    assert re.findall(r"\\shortstack\{(.*?)\}", text) == ["W4/A4", "W3/A3"]
    assert all(rf"\{rule}rule" in text for rule in ("top", "mid", "bottom"))
    assert text.index(r"\end{tabular}") < text.index(r"\begin{tablenotes}") < text.index(r"\item[] Bold: ") < text.index(r"\end{threeparttable}")
    assert line_of(text, "IntraQ, rate 1e-05")[4] == r"\textbf{86.0 $\pm$ 0.2}"
    assert line_of(text, "IntraQ, rate 0.0001")[6:8] == ["diverged, epochs 14-16", "--"]
    assert text.count(r"\underline{") == 2, "one in each column"
    assert r"\item[] Underlined: the best of the others." in text


def test_a_method_is_cited_once_where_it_is_as_published(study: list[Block]) -> None:
    text = latex(study[:1])
    assert len(re.findall(r"\\cite\{", text)) == len({row.method for row in study[0].rows})
    assert line_of(text, "ACQ~")[0].endswith(r"ACQ~\cite{li2024acq}")
    assert line_of(text, "ACQ, student on KL")[0].endswith("on KL")


@pytest.mark.parametrize(("error", "shown"), [(0.7, "52.3"), (0.15, "52.35"), (0.02, "52.35"), (1.2, "52.3"), (3.0, "52"), (20.0, "52")])
def test_an_accuracy_has_the_digits_that_its_standard_error_allows(error: float, shown: str) -> None:
    (block,) = blocks([result(top1=52.346)])
    (row,) = block.rows
    text = latex([replace(block, rows=[replace(row, entries={"w4a4": replace(row.entries["w4a4"], error=error)})])])
    assert re.sub(r"\\phantom\{.*?\}", "", line_of(text, "gdfq")[4]) == shown


def test_points_stand_below_points() -> None:
    (block,) = blocks([*(result(seed=s, top1=t) for s, t in enumerate((50.6, 51.6))), result("round", top1=40.0)])
    for row in block.rows:
        row.entries["w4a4"].error = 0.1 if row.label == "round" else 4.0
    text = latex([block])
    assert line_of(text, "round")[4] == r"40.00\phantom{ $\pm$ 1}"
    assert line_of(text, "gdfq")[4] == r"51\phantom{.00} $\pm$ 1"


def test_two_tables_have_two_labels() -> None:
    found = blocks([result(), result(cell__identity__protocol={"ranges": "ema", "batch_norm": "fixed", "first_bits": 8})])
    labels = re.findall(r"\\label\{(.*?)\}", latex(found))
    assert len(set(labels)) == 2


# --- BibTeX -----------------------------------------------------------------------------------------------------------


def test_every_built_in_method_has_a_paper_and_it_is_that_of_its_registration() -> None:
    assert papers().keys() == {name for name in built_in_names() if find_method(name).info.paper.startswith("arXiv:")}
    for method, (key, entry) in papers().items():
        assert f"eprint    = {{{find_method(method).info.paper.removeprefix('arXiv:')}}}" in entry
        year = re.search(r"year +=\s*\{(\d{4})\}", entry)
        assert year is not None
        assert year[1] in key
        assert "keywords" not in entry


def test_bib_writes_what_the_table_cites_and_names_what_has_no_paper(dfqbench: Run, tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    for cell in cells(500):
        if cell.method in ("gdfq", "round", "zeroq") and cell.seed == 0:
            write_cell(store, cell)
    bib, where = tmp_path / "t.bib", ("--results", store.root)
    code, out, err = dfqbench("table", *where, "--format", "latex", "--bib", bib, "--rows", "gdfq", "--rows", "round")
    assert (code, err) == (0, "")
    assert set(re.findall(r"@\w+\{(.*),", bib.read_text())) == set(re.findall(r"\\cite\{(.*?)\}", out)) == {"xu2020gdfq", "nagel2019dfq"}
    assert dfqbench("table", *where, "--bib", bib)[::2] == (2, f"dfqbench: --bib {bib}: only --format latex cites\n")
    assert bibliography(["mine", "gdfq"])[1] == ["mine"]


# --- what TeX makes of it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def typeset(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Sets a document with these tables, and returns its log."""
    command = shutil.which("pdflatex")
    if command is None:
        if os.environ.get("DFQBENCH_REQUIRE_TEX") == "1":
            pytest.fail("there is no pdflatex, and DFQBENCH_REQUIRE_TEX asks for one")
        pytest.skip("there is no pdflatex")

    def run(tables: str) -> str:
        folder = tmp_path_factory.mktemp("tex")
        document = rf"\documentclass{{article}}\usepackage[margin=2cm]{{geometry}}{PACKAGES}\begin{{document}}\input{{t}}\end{{document}}"
        (folder / "t.tex").write_text(tables, encoding="utf-8")
        (folder / "d.tex").write_text(document)
        done = subprocess.run([command, "-halt-on-error", "-interaction=nonstopmode", "d.tex"], cwd=folder, capture_output=True, check=False)
        log = (folder / "d.log").read_text(encoding="latin-1")
        assert done.returncode == 0, log[-3000:]
        assert (folder / "d.pdf").stat().st_size > 1000
        return log

    return run


def overfull(log: str) -> list[float]:
    """By how many points boxes are too wide."""
    return [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]


@pytest.mark.slow
def test_the_studys_tables_are_set_without_an_error(study: list[Block], typeset: Callable[[str], str]) -> None:
    log = typeset(latex(study, ranking(study)))
    assert max(overfull(log), default=0.0) < 20
    few = [arranged(block, Choice(columns=Columns.of("w3a3,size,seeds,seconds"))) for block in study]
    typeset(latex(few))


@pytest.mark.slow
def test_tables_of_every_kind_are_set(tmp_path: Path, typeset: Callable[[str], str]) -> None:
    store = make_store(tmp_path / "r", 500, 100, sized=True)
    for cell in cells(250):
        if cell.bits.weights in (8, 3) and cell.method in ("gdfq", "acq"):
            write_without_data(store, blind(cell)) if cell.seed else write_failure(store, replace(cell, precision="bf16"))
    reading = name_rows(read_store(store))
    found: Tables = blocks([*reading.results, *reading.unfinished], per_image=PerImage(reading))
    choice = Choice(columns=Columns.of("+size,+bops"))
    found = [arranged(table, choice) for table in found]
    blocks_only = [table for table in found if isinstance(table, Block)]
    typeset(latex([*found, *side_by_side(blocks_only), *agreements(reading, choice)], ranking(blocks_only)))


@pytest.mark.slow
def test_every_letter_is_set_as_it_is_or_named(typeset: Callable[[str], str]) -> None:
    odd = "&%$#_{}~^\\<>|[]\"'`*-±†×éßñŁαβγΩΔ–—≤≥→∞…µ°²中🙂"
    names = [odd, "[first", "]", "*starred", "a" * 60, "--", "%", "x & y", "\\input{/etc/passwd}", "$", "{"]
    found = blocks([result(name, cell__teacher__label=odd, cell__evaluation__name=odd) for name in names])
    typeset(latex(found, ranking(found)))
    assert escaped("α ≤ Ω, é, 中") == r"$\alpha$ $\leq$ $\Omega$, é, \texttt{U+4E2D}"

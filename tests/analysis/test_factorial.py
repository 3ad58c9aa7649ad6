"""The factorial table: images by trainings, means over what is complete, shares of squares, yardsticks below; beside sums made by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console
from test_blocks import result

from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.kinds import draw
from dfqbench.analysis.plots.style import WIDTHS
from dfqbench.analysis.records import Reading
from dfqbench.analysis.tables.blocks import blocks
from dfqbench.analysis.tables.factorial import Factorial, factorials, written
from dfqbench.analysis.tables.formats import html, markdown
from dfqbench.analysis.tables.latex import latex
from dfqbench.analysis.tables.printed import Written
from dfqbench.analysis.tables.terminal import print_tables
from dfqbench.store import Store

RANDOM = np.random.default_rng(0)
READING = Reading(Store(Path("none")), [])
HOSTS, STUDENTS = ("gaussian", "gdfq", "lrq"), ("gdfq", "kl")
REACHED = {(host, student): float(RANDOM.uniform(40, 80)) for host in HOSTS for student in STUDENTS}


def pair(host: str, student: str, top1: float, seed: int = 0, bits: str = "w4a4", changed: dict[str, Any] | None = None, **config: Any) -> Any:
    own = {"epochs": 3, "batch_size": 64, "host": host, "student": student, "host_settings": {}, **config}
    changed = {"host": host, "student": student, **(changed or {})}
    label = f"qat({', '.join(f'{name}={value}' for name, value in sorted(changed.items()))})"
    made = result("qat", seed=seed, bits=bits, top1=top1, cell__changed=changed, cell__identity__config=own | (changed or {}))
    made["cell"]["label"] = label
    return made


def all_pairs(**changes: Any) -> list[Any]:
    return [pair(host, student, top1, **changes) for (host, student), top1 in REACHED.items()]


def table_of(*results: Any) -> Factorial:
    (table,) = factorials(blocks(list(results)))
    return table


def printed(table: Written) -> dict[str, list[str]]:
    return {line[0]: list(line[1:]) for line in table.texts.to_numpy()}


def test_every_pair_stands_in_its_place_with_means_of_rows_and_columns() -> None:
    table = table_of(*all_pairs(), result("round", top1=33.0))
    shown, order = printed(written(table)), [name for _, name in written(table).texts.columns[1:]]
    assert {*order} == {*STUDENTS, "mean"}
    assert order[-1] == "mean"
    for (host, student), top1 in REACHED.items():
        assert shown[host][order.index(student)] == f"{top1:.2f}"
    for host in HOSTS:
        assert shown[host][-1] == f"{np.mean([REACHED[host, student] for student in STUDENTS]):.2f}"
    for student in STUDENTS:
        assert shown["mean"][order.index(student)] == f"{np.mean([REACHED[host, student] for host in HOSTS]):.2f}"
    assert shown["mean"][-1] == f"{np.mean([*REACHED.values()]):.2f}"
    means = [float(shown[host][-1]) for host in table.sources]
    assert means == sorted(means, reverse=True), "best to worst"
    assert shown["round"] == ["-", "-", "33.00"]
    assert shown["teacher, full precision"] == ["-", "-", "90.00"]


def test_the_shares_are_those_of_the_sums_of_squares() -> None:
    shares = table_of(*all_pairs()).shares("w4a4")
    assert shares is not None
    values = np.array([[REACHED[host, student] for student in STUDENTS] for host in HOSTS])
    mean, whole = values.mean(), ((values - values.mean()) ** 2).sum()
    rows, columns = np.broadcast_to(values.mean(1, keepdims=True), values.shape), np.broadcast_to(values.mean(0), values.shape)
    residual = values - rows - columns + mean
    expected = [100 * (part**2).sum() / whole for part in (rows - mean, columns - mean, residual)]
    assert list(shares.values()) == pytest.approx(expected)
    assert sum(shares.values()) == pytest.approx(100)
    assert table_of(pair("gdfq", "kl", 50.0), pair("lrq", "kl", 60.0)).shares("w4a4") is None, "one training is no factor"


def test_means_are_over_what_is_complete_and_a_gap_is_shown() -> None:
    given = all_pairs()
    missing = given.pop()
    host, student = missing["cell"]["identity"]["config"]["host"], missing["cell"]["identity"]["config"]["student"]
    table = table_of(*given, pair("gdfq", "gdfq", 12.0, bits="w3a3"))
    shown, columns = printed(written(table)), list(written(table).texts.columns[1:])
    assert shown[host][columns.index(("w4a4", student))] == "-"
    assert shown[host][columns.index(("w4a4", "mean"))] == "-"
    assert shown["mean"][columns.index(("w4a4", student))] == "-"
    other = next(name for name in STUDENTS if name != student)
    assert shown["mean"][columns.index(("w4a4", other))] != "-"
    assert table.shares("w4a4") is None
    assert shown["gdfq"][columns.index(("w3a3", "gdfq"))] == "12.00"


def test_seeds_are_a_mean_with_their_deviation() -> None:
    shown = printed(written(table_of(pair("gdfq", "kl", 50.0), pair("gdfq", "kl", 52.0, seed=1))))
    assert shown["gdfq"] == ["51.00 ± 1.41", "51.00"]


def test_real_images_stand_below_and_in_no_mean_over_rows() -> None:
    real = [pair("real", student, 99.0, yardstick={"digest": "ab", "count": 3}) for student in STUDENTS]
    table = table_of(*all_pairs(), *real)
    shown = printed(written(table))
    names = list(shown)
    assert names.index("real (yardstick)") == len(HOSTS)
    assert shown["real (yardstick)"] == ["99.00"] * 3
    assert shown["mean, without real images"][-1] == f"{np.mean([*REACHED.values()]):.2f}"
    assert table.shares("w4a4") == table_of(*all_pairs()).shares("w4a4")


def test_other_settings_of_a_source_or_a_training_are_other_rows_and_columns() -> None:
    table = table_of(
        pair("lrq", "kl", 50.0, host_settings={"images": 64}, changed={"host_settings": {"images": 64}}),
        pair("lrq", "kl", 60.0, host_settings={"images": 128}, changed={"host_settings": {"images": 128}}),
        pair("gdfq", "kl", 55.0),
        pair("gdfq", "kl", 56.0, changed={"start": "squant"}, start="squant"),
        pair("gdfq", "kl", 57.0, bits="w3a3"),
    )
    assert {*table.sources} == {"lrq, host_settings={images:64}", "lrq, host_settings={images:128}", "gdfq"}
    assert {*table.trainings} == {"kl", "kl, start=squant"}
    assert len(table.rows) == 4


def test_every_format_prints_every_number_and_nothing_is_bold() -> None:
    found = [written(table_of(*all_pairs(), *all_pairs(bits="w3a3")))]
    out = io.StringIO()
    print_tables(found, [], Console(file=out, width=200))
    for text in (out.getvalue(), markdown(found), html(found), latex(found)):
        for top1 in REACHED.values():
            assert f"{top1:.2f}" in text
    assert "**4" not in markdown(found).replace("**Images", "")
    assert r"\textbf" not in latex(found)


@pytest.mark.parametrize("width", [*WIDTHS.values()])
def test_the_heat_map_says_what_the_table_does(width: float) -> None:
    real = [pair("real", student, 99.0, yardstick={"digest": "ab", "count": 3}) for student in STUDENTS]
    found = blocks([*all_pairs(), *all_pairs(bits="w3a3"), *real, result("round", top1=33.0)])
    (figure,) = draw("factorial", Drawn(READING, found, PerImage(READING), width=width))
    texts = [text.get_text() for text in figure.findobj(Text)]
    for top1 in REACHED.values():
        assert texts.count(f"{top1:.1f}") >= 2, "at both bit widths"
    assert texts.count("99.0") == 3
    assert texts.count("real") == 2
    assert any("W4A4: round 33.0, teacher 90.0" in text.replace("\n", " ") for text in texts)
    assert figure.get_size_inches()[0] <= width + 0.01
    with pytest.raises(NothingToDraw, match="no student was trained on a host's images"):
        draw("factorial", Drawn(READING, blocks([result()]), PerImage(READING)))


def test_plots_keep_real_images_apart_and_do_not_compare_them() -> None:
    def texts_of(kind: str, given: list[Any]) -> set[str]:
        drawn = Drawn(Reading(Store(Path("none")), given), blocks(given), PerImage(READING))
        return {text.get_text().replace("\n", " ") for figure in draw(kind, drawn) for text in figure.findobj(Text)}

    real = pair("real", "kl", 99.0, yardstick={"digest": "ab", "count": 3})
    given = [pair("gdfq", "kl", 50.0), real]
    assert any(text.startswith("Yardsticks (real images), resnet20") for text in texts_of("accuracy", given))
    for kind in ("cost", "drop"):
        texts = texts_of(kind, given)
        assert any("gdfq" in text for text in texts)
        assert not any("real" in text for text in texts), kind
        with pytest.raises(NothingToDraw, match="no data-free methods to be compared"):
            texts_of(kind, [real])


def test_without_a_hosting_method_there_is_none() -> None:
    assert factorials(blocks([result(), result("round")])) == []

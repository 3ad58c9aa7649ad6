"""Plots as files: what is drawn is decided in plots.py, how it looks in plot_style.py. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmark.ledger import load_ledger
from benchmark.per_image import PerImage
from benchmark.plot_style import rendered
from benchmark.plots import Drawn, draw
from benchmark.records import Reading
from benchmark.store import write_atomically
from benchmark.tables import Rule, blocks


def prepare(reading: Reading, rule: Rule = "last") -> Drawn:
    """The tables of a store with everything that its plots need."""
    per_image = PerImage(reading)
    return Drawn(reading, blocks(reading.results, rule, ledger=load_ledger(), per_image=per_image), per_image, rule)


def files(drawn: Drawn, kind: str, formats: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of every page of one kind in every format. Raises NothingToDraw."""
    found = draw(kind, drawn)
    for number, figure in enumerate(found, 1):
        name = kind if len(found) == 1 else f"{kind}-{number}"
        for extension, content in rendered(figure, formats).items():
            yield f"{name}.{extension}", content


def write_figures(drawn: Drawn, folder: Path, kind: str, formats: Iterable[str]) -> Iterator[Path]:
    """Writes the pages of one kind, one by one. Raises NothingToDraw, and OSError where the folder cannot be written."""
    for name, content in files(drawn, kind, formats):
        write_atomically(folder / name, content)
        yield folder / name

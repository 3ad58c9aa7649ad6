"""Plots as files: kinds.py says what is drawn, style.py how it looks. No torch here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from dfqbench.analysis.ledger import load_ledger
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.fonts import undrawable
from dfqbench.analysis.plots.kinds import draw
from dfqbench.analysis.plots.style import WIDTHS, rendered, settings
from dfqbench.analysis.records import Reading
from dfqbench.analysis.tables.blocks import Rule, blocks
from dfqbench.analysis.tables.choice import Choice
from dfqbench.errors import Notice

WORKERS = 4  # each takes up to 200 MB more
_shared: Drawn | None = None


def prepare(reading: Reading, rule: Rule = "last", width: str = "page", choice: Choice | None = None) -> Drawn:
    """The tables of a store with everything that its plots need. width: see WIDTHS; choice: of which rows come first."""
    per_image = PerImage(reading)
    found = blocks([*reading.results, *reading.unfinished], rule, ledger=load_ledger(), per_image=per_image)
    drawn = Drawn(reading, found, per_image, rule, WIDTHS[width], choice or Choice())
    _say_what_no_font_has(drawn)
    return drawn


def _say_what_no_font_has(drawn: Drawn) -> None:
    """Once, before pages are drawn side by side, which also finds the fonts once for all of them."""
    names = {name for block in drawn.blocks for name in (block.teacher, block.evaluation, block.protocol, *(row.label for row in block.rows))}
    foreign = [name for name in names if not name.isascii()]
    if not foreign:
        return
    with settings():
        lacking = undrawable(foreign)
    if lacking:
        said = f"no installed font has {', '.join(lacking[:5])}{f' and {len(lacking) - 5} more characters' if len(lacking) > 5 else ''} of a name"
        warnings.warn(f"plots: {said}: boxes are drawn instead; install one that has them, such as Noto Sans CJK", Notice, stacklevel=3)


def files(drawn: Drawn, kind: str, formats: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of every page of one kind in every format: `cost.png`, `cost-2.png`. Raises NothingToDraw."""
    for number, figure in enumerate(draw(kind, drawn), 1):
        name = kind if number == 1 else f"{kind}-{number}"
        for extension, content in rendered(figure, formats).items():
            yield f"{name}.{extension}", content


def drawn_kinds(drawn: Drawn, kinds: Iterable[str], formats: Iterable[str]) -> Iterator[tuple[str, list[tuple[str, bytes]] | NothingToDraw]]:
    """(kind, its files or why there are none), in the order given, drawn side by side on as many cores as there are."""
    global _shared
    kinds, formats = list(kinds), list(formats)
    workers = max(1, min(len(kinds), os.cpu_count() or 1, WORKERS))
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from ((kind, _files_or_why(kind, formats, drawn)) for kind in kinds)
        return
    _shared, others = drawn, multiprocessing.active_children()  # what is forked need not be sent
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                yield from zip(kinds, pool.map(_files_or_why, kinds, [formats] * len(kinds)), strict=True)
            except KeyboardInterrupt:  # nobody waits for what they draw, nor, if they only start, at Python's end for them
                for worker in multiprocessing.active_children():
                    if worker not in others:
                        worker.kill()
                raise
    finally:
        _shared = None


def _files_or_why(kind: str, formats: list[str], drawn: Drawn | None = None) -> list[tuple[str, bytes]] | NothingToDraw:
    given = drawn or _shared
    assert given is not None
    try:
        return list(files(given, kind, formats))
    except NothingToDraw as why:
        return why

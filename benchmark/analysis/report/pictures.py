"""The plots of a page, as pictures in it or beside it. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dfqbench.analysis.plots.budgets import has_budgets
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.figures import drawn_kinds
from dfqbench.analysis.plots.kinds import KINDS
from dfqbench.analysis.report.assets import Assets
from dfqbench.analysis.tables.blocks import Block
from dfqbench.analysis.tables.factorial import factorials

COORDINATES = re.compile(rb' (?:d|x|y)="[^"]*"')
DECIMALS = re.compile(rb"(\.\d\d)\d+")  # of a point: what is beyond the second nobody can see
RARE: dict[str, Callable[[list[Block]], Any]] = {"factorial": factorials, "budgets": has_budgets}
FIRST = "accuracy"  # of every block, below its table; the other kinds are of all blocks together


@dataclass(frozen=True)
class Picture:
    """address: empty where there is nothing to draw; `words` then say why."""

    words: str
    address: str = ""


def of_blocks(drawn: Drawn, assets: Assets) -> list[list[Picture]]:
    """The first kind, for each block."""
    return [_drawn(replace(drawn, blocks=[block]), [kind for kind in KINDS if kind == FIRST], assets) for block in drawn.blocks]


def of_all(drawn: Drawn, assets: Assets) -> list[Picture]:
    """The other kinds; one that few stores have is passed over in silence where this has none."""
    return _drawn(drawn, [kind for kind in KINDS if kind != FIRST and (kind not in RARE or RARE[kind](drawn.blocks))], assets)


def _drawn(drawn: Drawn, kinds: Sequence[str], assets: Assets) -> list[Picture]:
    found = []
    for kind, pages in drawn_kinds(drawn, kinds, ["svg"]):
        caption = KINDS[kind][0][0].upper() + KINDS[kind][0][1:]
        if isinstance(pages, NothingToDraw):
            found.append(Picture(f"{caption}: {pages}."))
            continue
        for number, (_, content) in enumerate(pages, 1):
            words = caption + (f" ({number} of {len(pages)})" if len(pages) > 1 else "")
            found.append(Picture(words, assets.image(_trimmed(content), "svg")))
    return found


def _trimmed(svg: bytes) -> bytes:
    """A third smaller, and the same to look at. Transforms keep their digits."""
    return COORDINATES.sub(lambda found: DECIMALS.sub(rb"\1", found[0]), svg)

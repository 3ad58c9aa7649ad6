"""Fonts for names in scripts that matplotlib's own font does not have: an installed one where there is one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

PLAIN = "DejaVu Sans"  # what matplotlib brings, and what everything else is written in
_families: dict[str, str | None] = {}  # character that PLAIN lacks -> an installed family that has it


def families_for(text: str) -> list[str]:
    """The families that a text is to be written in, the first that has a character first. Call it within `settings`."""
    lacking = {character for character in text if character not in " \n" and not character.isascii() and ord(character) not in _plain()}
    _find(lacking - _families.keys())
    return [PLAIN, *sorted({family for character in lacking if (family := _families[character])})]


def undrawable(texts: Iterable[str]) -> list[str]:
    """The characters that no installed font has."""
    for text in texts:
        families_for(text)
    return sorted(character for text in set("".join(texts)) for character in text if _families.get(character, "") is None)


@functools.cache
def _plain() -> frozenset[int]:
    from matplotlib import font_manager

    return _characters(font_manager.findfont(PLAIN))


def _find(wanted: set[str]) -> None:
    """Notes a family for each character, as few families as will do; None where there is none."""
    while wanted:
        there = {family: wanted & {chr(code) for code in codes} for family, codes in _installed()}
        best = max(sorted(there), key=lambda family: len(there[family]), default=None)
        if best is None or not there[best]:
            _families.update(dict.fromkeys(wanted))
            return
        _families.update(dict.fromkeys(there[best], best))
        wanted = wanted - there[best]


@functools.cache
def _installed() -> list[tuple[str, frozenset[int]]]:
    """(family, its characters) of every upright font on this machine, those that were installed since matplotlib last looked included."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with contextlib.suppress(Exception):  # a damaged font, or one of a kind that matplotlib does not read
                manager.addfont(path)
    upright = [entry for entry in manager.ttflist if entry.style == "normal" and not entry.name.startswith("Last Resort")]  # that one has boxes
    found: dict[str, frozenset[int]] = {}
    for entry in upright:
        with contextlib.suppress(Exception):
            found.setdefault(entry.name, _characters(entry.fname))
    return list(found.items())


def _characters(path: str) -> frozenset[int]:
    from matplotlib import ft2font

    font: Any = ft2font.FT2Font(path)
    return frozenset(font.get_charmap()) if font.scalable else frozenset()

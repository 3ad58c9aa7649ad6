"""What the methods of a table are cited as: entries of methods/papers.bib, by the method's name. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from dfqbench.method.registry import built_in_folders

ENTRY = re.compile(r"^@\w+\{([^,\s]+),\n.*?^\}$", re.MULTILINE | re.DOTALL)
METHODS = re.compile(r",?\n *keywords *= *\{([^}]*)\}")


@cache
def papers() -> dict[str, tuple[str, str]]:
    """(cite key, BibTeX) by method. What an entry says of methods is no part of its BibTeX."""
    found = {}
    for folder in built_in_folders():
        for entry in ENTRY.finditer((folder / "papers.bib").read_text(encoding="utf-8")):
            methods = METHODS.search(entry[0])
            for method in methods[1].split(",") if methods else ():
                found[method.strip()] = (entry[1], METHODS.sub("", entry[0]))
    return found


def bibliography(methods: Iterable[str]) -> tuple[str, list[str]]:
    """The BibTeX of what these methods are cited as, each entry once; and the methods that have none."""
    asked = sorted(set(methods))
    entries = sorted({papers()[method][1] for method in asked if method in papers()})
    return "\n\n".join(entries) + "\n" * bool(entries), [method for method in asked if method not in papers()]

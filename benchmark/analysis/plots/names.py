"""What rows are called beside points and lines, where there is little room. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import combinations

from dfqbench.analysis.tables.blocks import Row

LONGEST = 22  # characters of a name that is left as it is
AUTOMATIC = re.compile(r"([^()]+)\((.*)\)(.*)", re.DOTALL)  # method, settings, what tells rows of one name apart


def brief_names(rows: Iterable[Row]) -> dict[str, str]:
    """By row label: the label, or for a long one that is made of settings the fewest of them that tell the row from the others of its method.

    `acq(student_loss=kl +4)` has four more.
    """
    methods = {row.label: row.method for row in rows}
    parts = {label: match.groups() for label, method in methods.items() if (match := AUTOMATIC.fullmatch(label)) and match[1] == method}
    settings = {label: inside.split(", ") for label, (_, inside, _) in parts.items()}
    names = {label: label for label in methods}
    for label, own in settings.items():
        if len(label) > LONGEST and len(own) > 1:
            alike = (there for there, its in settings.items() if methods[there] == methods[label] and len(its) == len(own))
            others = [set(settings[there]) for there in alike if there != label]
            fewer = (few for n in range(1, len(own)) for few in _shortest_first(own, n) if not any(set(few) <= its for its in others))
            few = next(fewer, tuple(own))
            more = f" +{len(own) - len(few)}" if len(few) < len(own) else ""
            names[label] = f"{methods[label]}({', '.join(few)}{more}){parts[label][2]}"
    return names


def _shortest_first(settings: list[str], count: int) -> list[tuple[str, ...]]:
    return sorted(combinations(settings, count), key=lambda few: (sum(map(len, few)), few))

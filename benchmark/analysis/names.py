"""What rows are called: their label, or their method with the fewest settings that tell it from its other rows. No torch here."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfqbench.analysis.records import Reading
from dfqbench.errors import UserError

Names = Mapping[str, Mapping[str, str]]  # `name` and `group` by cell id or by what a cell calls itself, like `gdfq(bn_weight=2)`
FILE = "names.csv"  # in a results folder: what its rows are called where no sweep is asked for
BUDGET = ("epochs", "iterations", "batch_size")
NAMED = 3  # unknown ones that are named; the rest is counted


def read_names(path: Path) -> Names:
    """Of a file with the columns row (a cell's id, or a row's name), label and group, of which the last two may be empty or missing. Raises
    UserError where it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            heads = reader.fieldnames or []
            if not {"row"} < set(heads) <= {"row", "label", "group"}:
                raise UserError(f"{path}: the columns are {', '.join(heads) or 'none'}; row and label are expected, and perhaps group")
            found: dict[str, dict[str, str]] = {}
            for line in reader:
                if None in line or None in line.values() or not line["row"] or line["row"] in found:
                    raise UserError(f"{path}:{reader.line_num}: a row of its own and {len(heads)} values are expected; quote what has commas")
                found[line["row"]] = {"name": line.get("label", ""), "group": line.get("group", "")}
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def unknown_in(names: Names, reading: Reading) -> str:
    """What of `names` is no cell and no row of the reading, in words; empty where nothing is."""
    known = {key for record in _records(reading) for key in (record["id"], _own_name(record["cell"]), record["cell"].get("label"))}
    unknown = [repr(name) for name in names if name not in known]
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    return f"no cell or row is called {', '.join(unknown[:NAMED])}{more}" if unknown else ""


def name_rows(reading: Reading, names: Names | None = None, over: Sequence[Names] = (), group: str | None = None) -> Reading:
    """The reading with cells called as their sweep calls them: `names` by cell id, or what the sweep said when they ran. Each of `over` counts before
    that and those before it.

    What a cell is called (`label`) stands for its settings in tables and plots. `settings` keeps what it calls itself, and `left_out` has the
    settings that all rows of its method share. With `group`, only its cells.
    """
    short = _short_names([record["cell"] for record in _records(reading)])
    for record in _records(reading):
        cell, itself = record["cell"], _own_name(record["cell"])
        said = cell if names is None else names.get(record["id"], {})
        said = {key: said.get(key) or "" for key in ("name", "group")}
        for given, key in ((given, key) for given in over for key in (said["name"], itself, record["id"])):
            said |= {what: text for what, text in given.get(key, {}).items() if text}
        cell["settings"], cell["group"] = itself, said["group"]
        cell["label"], shared, together = short.get(itself, (itself, [], []))
        cell["left_out"] = ", ".join(shared if said["name"] else [*shared, *together])
        cell["label"] = said["name"] or cell["label"]
    return reading if group is None else _of_group(reading, group)


def keep(reading: Reading, wanted: Any) -> Reading:
    """Only the cells, as cell.json has them, for which `wanted` holds."""
    kept = ([record for record in records if wanted(record["cell"])] for records in (reading.results, reading.without_data, reading.failures))
    results, others, failures = kept
    return replace(reading, results=results, without_data=others, failures=failures)


def _of_group(reading: Reading, group: str) -> Reading:
    found = keep(reading, lambda cell: cell.get("group") == group)
    if not (found.results or found.without_data or found.failures):
        groups = sorted({str(cell["group"]) for record in _records(reading) if (cell := record["cell"]).get("group")})
        raise UserError(f"--group {group!r}: no cell is of that group" + (f"; there are {', '.join(groups)}" if groups else ""))
    return found


def _records(reading: Reading) -> list[dict[str, Any]]:
    return [*reading.results, *reading.without_data, *reading.failures]


def _own_name(cell: Mapping[str, Any]) -> str:
    return str(cell.get("settings") or cell.get("label", ""))


def _short_names(cells: list[dict[str, Any]]) -> dict[str, tuple[str, list[str], list[str]]]:
    """By what cells call themselves: their method with the settings in which its rows differ, the settings that are the same in all of them, and
    what goes along with what is shown: of settings that only occur together, as `matching_weight=0 with condition=False`, one stands for all.
    """
    methods: dict[str, dict[str, dict[str, str]]] = {}
    for cell in cells:
        if (settings := _settings_of(cell)) is not None:
            methods.setdefault(str(cell["method"]), {})[_own_name(cell)] = settings
    found = {}
    for method, rows in methods.items():
        every = list(rows.values())
        shared = [key for key in every[0] if all(of.get(key) == every[0][key] for of in every)]
        alike: dict[tuple[tuple[int, bool], ...], list[str]] = {}  # settings by which rows agree in them
        for key in sorted({key for of in every for key in of}.difference(shared)):
            values = [of.get(key) for of in every]
            alike.setdefault(tuple((values.index(value), value is None) for value in values), []).append(key)
        shown: list[str] = []
        together: list[str] = []
        for keys in alike.values():
            first, *others = sorted(keys, key=lambda key: (key in BUDGET, max(len(of.get(key, "")) for of in rows.values())))
            shown.append(first)
            there = (of for of in every if first in of and others)
            together += dict.fromkeys(f"{' and '.join(of[key] for key in others)} with {of[first]}" for of in there)
        for own_name, of in rows.items():
            inside = ", ".join(of[key] for key in sorted(shown) if key in of)
            found[own_name] = (f"{method}({inside})" if inside else method, [every[0][key] for key in shared], together)
    return found


def _settings_of(cell: Mapping[str, Any]) -> dict[str, str] | None:
    """`key=value` by key, as the cell's own name has them; None where it has others than those that were changed."""
    method, changed = cell.get("method"), cell.get("changed")
    if not isinstance(method, str) or not isinstance(changed, dict):
        return None
    keys = sorted(map(str, changed))
    inside = ", ".join(f"({re.escape(key)}=.*)" for key in keys)
    match = re.fullmatch(re.escape(method) + (rf"\({inside}\)" if keys else ""), _own_name(cell), re.DOTALL)
    return dict(zip(keys, match.groups(), strict=True)) if match else None

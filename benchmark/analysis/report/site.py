"""A static site: an index, a page for every block, pictures, style and script in files beside them. No torch here."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from dfqbench.analysis.plots.figures import prepare
from dfqbench.analysis.records import Reading
from dfqbench.analysis.report.assets import Beside
from dfqbench.analysis.report.comparisons import bold_means
from dfqbench.analysis.report.keytable import Heading, KeyTable, Line, arrange, ids_of, key_tables
from dfqbench.analysis.report.report import render, skipped_of, summary_of, view
from dfqbench.analysis.tables.blocks import Block, Rule
from dfqbench.analysis.tables.means import ranking
from dfqbench.errors import UserError, counted
from dfqbench.files import read_json, write_atomically

LISTED = "dfqbench-site.json"  # which files of the folder are the site's: they alone are replaced and removed
INDEX = "index.html"
WITHOUT_DATA = "without-data.html"
SHOWN = 5  # rows of a block on the index
NAMED = 3  # foreign files that are named


@dataclass(frozen=True)
class Card:
    """A block on the index. address: of its page."""

    address: str
    table: KeyTable

    @property
    def heads(self) -> list[Heading]:
        return [head for head, width in zip(self.table.heads, self.table.block.widths, strict=False)]

    @property
    def lines(self) -> list[Line]:
        return self.table.lines[:SHOWN]


def write_site(reading: Reading, folder: Path, title: str, rule: Rule = "last", sort: str = "") -> list[Path]:
    """The files of the site; those of an earlier one that it no longer has are removed. The same store gives the same bytes.

    UserError where the folder holds anything that no earlier site wrote (names that begin with a dot, as .git, may stay); OSError as the file system
    says.
    """
    old = _listed(folder)
    files = site(reading, title, rule, sort)
    _spare_others(folder, old, files)
    for name, content in files.items():
        path = folder / name
        if not (path.is_file() and path.read_bytes() == content):
            write_atomically(path, content)
    write_atomically(folder / LISTED, json.dumps(sorted(files), indent=0, ensure_ascii=False) + "\n")
    for name in old - files.keys():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


def site(reading: Reading, title: str, rule: Rule = "last", sort: str = "") -> dict[str, bytes]:
    """The content of every file, by its path in the site."""
    drawn, assets = arrange(prepare(reading, rule), sort), Beside()
    pages, cards = {}, []
    for name, block in zip(page_names(drawn.blocks), drawn.blocks, strict=True):
        its = replace(drawn, reading=_only(reading, block), blocks=[block])
        pages[name] = view(its, block.title, assets, index=INDEX)
        cards += [Card(name, table) for table in key_tables(its)]
    blind = replace(reading, results=[], failures=_of(reading.failures, {cell["id"] for cell in reading.unfinished_without_data}), skipped=[])
    if blind.without_data or blind.failures:
        pages[WITHOUT_DATA] = view(replace(drawn, reading=blind, blocks=[]), "Without data", assets, index=INDEX)
    pages[INDEX] = render(
        "index.html",
        assets,
        title=title,
        summary=summary_of(drawn),
        bold_means=bold_means(drawn),
        cards=cards,
        ranks=ranking(drawn.blocks) if drawn.blocks else [],
        without_data=(WITHOUT_DATA, counted(len(blind.finished), "cell")) if WITHOUT_DATA in pages else None,
        skipped=skipped_of(reading),
    )
    return {name: text.encode() for name, text in sorted(pages.items())} | assets.files


def page_names(blocks: Iterable[Block]) -> list[str]:
    """`resnet20-cifar10-lineage-fp32.html`: plain letters that any file system and address takes, each once."""
    names: list[str] = []
    for block in blocks:
        words = "-".join((block.teacher, block.evaluation, block.protocol, block.precision))
        plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().lower()
        name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:80] or "block"
        names.append(next(given for given in (f"{name}-{n}.html" if n > 1 else f"{name}.html" for n in count(1)) if given not in names))
    return names


def _only(reading: Reading, block: Block) -> Reading:
    """The cells of one block."""
    ids = {cell_id for row in block.rows for width in block.widths for cell_id in ids_of(row, width)}
    return replace(reading, results=_of(reading.results, ids), failures=_of(reading.failures, ids), without_data=[], skipped=[])


def _of(records: list[dict[str, Any]], ids: set[str]) -> list[dict[str, Any]]:
    return [record for record in records if record["id"] in ids]


def _listed(folder: Path) -> set[str]:
    """What an earlier site wrote, empty where there was none. UserError where pages would be among what is not a site's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--site {folder}: a file; name a folder")
    try:
        names = read_json(folder / LISTED)
    except ValueError:
        names = {}
    if names is None:
        if foreign := sorted(path.name for path in folder.glob("*") if not path.name.startswith(".")):
            more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
            raise UserError(f"--site {folder}: holds {', '.join(foreign[:NAMED])}{more}, and no earlier site; name an empty or a new folder")
        return set()
    if not isinstance(names, list) or any(not isinstance(name, str) or not _inside(name) for name in names):
        raise UserError(f"{folder / LISTED}: damaged, so it does not say which files are an earlier site's; take another folder, or empty this one")
    return set(names)


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _spare_others(folder: Path, old: set[str], files: Iterable[str]) -> None:
    """UserError where what others put beside an earlier site has the name of a page."""
    if foreign := sorted(name for name in files if name not in old and (folder / name).exists()):
        raise UserError(f"--site {folder}: {', '.join(foreign[:NAMED])}: not written by this command, and would be overwritten")

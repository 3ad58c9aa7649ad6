"""Tables in markdown: whatever a row, a teacher or a set is called, a reader of the rendered page sees those letters and no markup."""

from __future__ import annotations

import html
import re
from pathlib import Path

from markdown_it import MarkdownIt
from synthetic_store import cells, write_cell

from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.records import read_store
from dfqbench.analysis.tables.blocks import blocks
from dfqbench.analysis.tables.formats import markdown
from dfqbench.analysis.tables.means import ranking
from dfqbench.files import write_json
from dfqbench.store import Store

NAME = r"""<b>a</b> `b` | *c* _d_ **e** [f](http://g) &lt; ~~h~~ \| \<i> $j$ <!-- k"""


def test_names_stay_text_in_a_rendered_page(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    for cell in [*cells(250)][::5]:
        result = write_cell(store, cell)
        if cell.method == "gdfq":
            result["cell"]["label"] = NAME + "\n2"
        result["cell"]["teacher"]["label"] = result["cell"]["evaluation"]["name"] = NAME
        write_json(store.folder(cell.id) / "result.json", result)
    reading = read_store(store)
    found = blocks(reading.results, per_image=PerImage(reading))
    text = markdown(found, ranking(found))
    page = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert page.count("<table>") == 1
    assert set(re.findall(r"</?(\w+)", page)) <= {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    seen = [html.unescape(re.sub(r"<[^>]*>", "", line)) for line in page.splitlines()]
    assert f"{NAME} 2" in seen
    assert f"{NAME} on {NAME} (1000 images): teacher 92.00 %, protocol lineage, fp32" in seen
    assert any(line.startswith("average rank") and f"{NAME} 2 " in line for line in seen)

"""Tables as text for people: pandas writes markdown, Jinja2 HTML (tables.html). No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Template

from dfqbench.analysis.tables.printed import LEFT, Tables, groups_of, names_of, notes_of, texts_of

MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "|*_"})


def markdown(found: Tables, ranks: Sequence[str] = ()) -> str:
    """GitHub tables, each under its title, notes below. There are no groups of columns in markdown: every heading says its own."""
    parts = []
    for table in found:
        texts, bold = texts_of(table)
        texts = texts.map(lambda text: text.translate(MARKDOWN))
        texts = texts.mask(bold, "**" + texts + "**")
        above = {i: f"{heading}<br>".translate(MARKDOWN) for heading, places in groups_of(texts) if heading for i in places}
        heads = [above.get(i, "") + name for i, name in enumerate(names_of(texts))]
        sides = ["left" if name in LEFT else "right" for name in names_of(texts)]
        written = texts.to_markdown(index=False, headers=heads, colalign=sides, disable_numparse=True)
        parts += [f"**{table.title}**", written, "- " + "\n- ".join(notes_of(table)).translate(MARKDOWN)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in ranks).translate(MARKDOWN)]).strip() + "\n"


def html(found: Tables, ranks: Sequence[str] = (), page: bool = True) -> str:
    """A page of its own with nothing but the tables; else only <section> elements with a table each, whose classes the report page styles."""
    template = Template((Path(__file__).parent / "tables.html").read_text(encoding="utf-8"), autoescape=True)
    shown = [(table.title, *texts_of(table), notes_of(table)) for table in found]
    return str(template.render(tables=shown, ranks=ranks, left=LEFT, page=page, groups_of=groups_of, zip=zip)).strip() + "\n"

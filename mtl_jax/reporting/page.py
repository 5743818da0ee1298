"""The page report.html: a single file without external resources."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources

from mtl_jax.reporting import formatting, render
from mtl_jax.reporting.render import Figure
from mtl_jax.reporting.statistics import Spread

WIDE = 120  # characters of a table row that fit on a screen of 1280 pixels
# Whatever names contain, the page loads nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: Its text.
        by: Its sort key; None: its text.
        kind: CSS classes: n, a number; wrap, a long text; top, the best of its column; bad.
        after: A text after it in a lighter style.
    """

    text: str
    by: float | str | None = None
    kind: str = ""
    after: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that can be sorted.

    Attributes:
        name: Its title for screen readers.
        head: (heading, text below it) of each column.
        rows: The rows; the first cell is the name of the row.
        foot: Rows at the bottom that are not sorted.
        sortable: Whether the headings are buttons.
    """

    name: str
    head: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Sequence[Cell]] = ()
    sortable: bool = True


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with an anchor.

    Attributes:
        slug: Its anchor.
        title: Its heading.
        parts: Paragraphs, tables and figures in order.
    """

    slug: str
    title: str
    parts: Sequence[str | Table | Figure]


def number(value: float | None, decimals: int = 3, plus: bool = False) -> Cell:
    """A cell with a number; a dash for None or a number that is not finite."""
    if value is None or not math.isfinite(value):
        return Cell(formatting.NOTHING, "", "n")
    return Cell(formatting.number(value, decimals, plus), value, "n")


def spread(score: Spread | None, decimals: int = 3, plus: bool = False, top: bool = False) -> Cell:
    """A cell with a mean and its standard deviation."""
    if score is None:
        return Cell(formatting.NOTHING, "", "n")
    mean, _, deviation = formatting.spread(score, decimals, plus).partition(" ")
    return Cell(mean, score.mean, "n top" if top else "n", deviation)


def html(title: str, command: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], footer: str) -> str:
    """The page. All texts are escaped here.

    Args:
        title: Its title.
        command: The command that started the runs, or empty.
        facts: (name, value) of each fact at the top.
        sections: Its sections.
        footer: The text at the bottom.
    """
    links = "".join(f'<a href="#{escape(section.slug)}">{escape(section.title)}</a>\n' for section in sections)
    fact_list = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in facts)
    words = " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))
    code = f"<pre><code>{words}</code></pre>\n" if command else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{_file("page.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{code}<dl class="facts">
{fact_list}</dl>
<nav aria-label="Contents">
{links}</nav>
</header>
<main>
{"".join(_section(section) for section in sections)}</main>
<footer><p>{escape(footer)}</p></footer>
<script>
{_file("page.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _section(section: Section) -> str:
    parts = []
    for part in section.parts:
        if isinstance(part, str):
            parts.append(f'<p class="note">{escape(part)}</p>\n')
        else:
            parts.append(_table(part) if isinstance(part, Table) else _figure(part))
    slug = escape(section.slug)
    head = f'<section id="{slug}" aria-labelledby="{slug}-title">\n<h2 id="{slug}-title">{escape(section.title)}</h2>\n'
    return f"{head}{''.join(parts)}</section>\n"


def _table(table: Table) -> str:
    kinds = [_numeric(table.rows, column) for column in range(len(table.head))]
    heads = []
    for (text, unit), numeric in zip(table.head, kinds, strict=True):
        below = f'<span class="unit">{_breakable(unit)}</span>' if unit else ""
        name = _breakable(text)
        inner = f'<button type="button">{name}</button>{below}' if table.sortable else f"{name}{below}"
        heads.append(f'<th scope="col"{" class=n" if numeric else ""}>{inner}</th>')
    labels = [f"{text} {unit}".strip() for text, unit in table.head]
    foot = f"<tfoot>\n{_rows(table.foot, kinds, labels)}</tfoot>\n" if table.foot else ""
    kind = " class=tight" if _width(table) > WIDE else ""
    body = f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{_rows(table.rows, kinds, labels)}</tbody>\n{foot}"
    region = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.name)}">'
    return f"{region}\n<table{kind}>\n{body}</table>\n</div>\n"


def _breakable(name: str) -> str:
    """The name of a field, with points at which a line may break."""
    return re.sub(r"([._/])(?=\w)", r"\1<wbr>", escape(name))


def _width(table: Table) -> int:
    """The approximate number of characters in the widest row."""
    columns = zip(*[[len(f"{cell.text} {cell.after}") for cell in row] for row in table.rows], strict=True)
    heads = [max(map(len, re.split(r"[._/ ]", text))) for text, _ in table.head]
    return sum(min(max(head, *cells), 40) + 3 for head, cells in zip(heads, columns, strict=False))


def _numeric(rows: Sequence[Sequence[Cell]], column: int) -> bool:
    return any("n" in row[column].kind.split() for row in rows)


def _rows(rows: Sequence[Sequence[Cell]], numeric: Sequence[bool], labels: Sequence[str]) -> str:
    return "".join(f"<tr>{''.join(_cell(row, column, numeric, labels) for column in range(len(row)))}</tr>\n" for row in rows)


def _cell(row: Sequence[Cell], column: int, numeric: Sequence[bool], labels: Sequence[str]) -> str:
    cell, tag = row[column], "td" if column else "th"
    kinds = " ".join(dict.fromkeys([*(["n"] if numeric[column] else []), *cell.kind.split()]))
    kind = f' class="{kinds}"' if kinds else ""
    by = "" if cell.by is None else f' data-v="{escape(str(cell.by))}"'
    label = f' data-label="{escape(labels[column])}"'
    after = f' <span class="sd">{escape(cell.after)}</span>' if cell.after else ""
    scope = ' scope="row"' if tag == "th" else ""
    return f"<{tag}{scope}{kind}{by}{label}>{escape(cell.text)}{after}</{tag}>"


def _figure(figure: Figure) -> str:
    swatches = "".join(
        f'<li><svg viewBox="0 0 22 10" aria-hidden="true"><path d="M0 5H22" stroke="var(--s{number % render.SERIES})" '
        f'stroke-width="3.5"{" stroke-dasharray=5,3" if number // render.SERIES % 2 else ""}/></svg>{escape(name)}</li>\n'
        for number, name in enumerate(figure.legend)
    )
    legend = f'<ul class="legend">\n{swatches}</ul>\n' if swatches else ""
    choice = ""
    if figure.choice:
        options = "".join(f'<option value="{n}">{escape(panel.title)}</option>' for n, panel in enumerate(figure.panels))
        choice = (
            f'<label class="choice" hidden>{escape(figure.choice.capitalize())} <select autocomplete="off">{options}'
            '<option value="all">all of them</option></select></label>\n'
        )
    panels = []
    for n, panel in enumerate(figure.panels):
        prefix = f"{figure.slug}-{n}".replace(".", "-")
        drawn = render.svg(panel, prefix).replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1)
        notes = "".join(f"<li>{escape(note)}</li>" for note in panel.notes)
        below = f"<ol>{notes}</ol>\n" if notes else ""
        below += f'<p class="note">{escape(panel.remark)}</p>\n' if panel.remark else ""
        panels.append(f'<div class="panel">\n<h3>{escape(panel.title)}</h3>\n{drawn}\n{below}</div>\n')
    few = " few" if len(figure.panels) < 3 or figure.choice else " even" if len(figure.panels) == 4 else ""
    return (
        f"<figure>\n<figcaption>{escape(figure.caption)}</figcaption>\n{choice}{legend}"
        f'<div class="panels{few}">\n{"".join(panels)}</div>\n</figure>\n'
    )

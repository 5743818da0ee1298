"""Draws panels with matplotlib, as SVG with the colours of the page and as PNG on white."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from mtl_jax.core import plotting
from mtl_jax.core.files import write_bytes

SERIES = 8  # colours; more series cannot be told apart
TITLE = 0.35  # inches above a panel of a PNG
WIDTH, HEIGHT = 4.2, 2.9  # inches of a panel; on the page its text is then as large as small print
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mtl_jax",  # the same input gives the same bytes
    "text.parse_math": False,  # dollar signs in names are no formulas
    "font.size": 10.5,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


class Palette(NamedTuple):
    """Colours by their use.

    Attributes:
        ink: Text.
        muted: Axes, and anything in the background.
        grid: Grid lines.
        surface: The background itself.
        series: A colour for each of SERIES series.
    """

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]


PAPER = Palette(
    ink="#1c2430",
    muted="#66707f",
    grid="#e3e7ec",
    surface="#ffffff",
    series=("#2a6fdb", "#d9730d", "#12906a", "#c9306b", "#7d5bd0", "#8a7a00", "#9a5b3c", "#0b8ba8"),
)
# Placeholders in SVG, which are replaced by CSS variables of the page: they differ between its light and dark mode.
SCREEN = Palette("#010101", "#010102", "#010103", "#010104", tuple(f"#01020{number}" for number in range(SERIES)))
VARIABLES = {
    SCREEN.ink: "currentColor",
    SCREEN.muted: "var(--muted)",
    SCREEN.grid: "var(--grid)",
    SCREEN.surface: "var(--surface)",
} | {mark: f"var(--s{number})" for number, mark in enumerate(SCREEN.series)}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Its title.
        draw: A function that draws it.
        notes: Lines below it, numbered like the points that they explain.
        remark: A line below it, or empty.
        height: In inches.
        left: Inches for the labels of the ticks.
        below: Inches for those below, and the name of the axis.
        frame: Whether it has axes, a grid and ticks.
    """

    title: str
    draw: Callable[[Axes, Palette], None]
    notes: tuple[str, ...] = ()
    remark: str = ""
    height: float = HEIGHT
    left: float = 0.7
    below: float = 0.48
    frame: bool = True


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels that belong together.

    Attributes:
        slug: Its name as a file and as an anchor.
        title: Its heading.
        caption: A text on what is drawn, and over what means are taken.
        panels: At least one panel.
        legend: Names of the series, in the order of their colours.
        choice: Label of the menu in which a reader chooses a panel; empty: all panels are shown.
    """

    slug: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[str, ...] = ()
    choice: str = ""


def svg(panel: Panel, prefix: str) -> str:
    """The panel as an <svg> element for HTML: without width, fonts and addresses, in the colours of the page.

    Args:
        panel: The panel.
        prefix: A prefix for its ids, which must be unique on the page.
    """
    with _style(SCREEN):
        canvas = Canvas(figsize=(WIDTH, panel.height))
        _draw(panel, canvas, (0, 0), SCREEN)
        text = io.StringIO()
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), prefix)


def _inline(text: str, prefix: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL
    )  # matplotlib repeats each text as a comment
    tag = re.compile(r"<[^>]*>")
    return re.sub(r"\n\s*", "\n", tag.sub(lambda match: _tag(match[0], prefix), text)).strip()


def _tag(tag: str, prefix: str) -> str:
    """Adapts a tag of matplotlib to the page; texts between tags are the user's and stay as they are."""
    if tag.startswith("<svg"):
        tag = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", tag)
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", tag.replace("xlink:href", "href"))
    tag = re.sub(r"font-family: [^;\"]*; ", "", tag)  # the page's own font
    tag = re.sub(r' transform="rotate\(-0[^"]*"', "", tag)
    tag = re.sub(
        r' (d|x|y|transform)="[^"]*"', lambda match: _short(match[0], 1), tag
    )  # less than a tenth of a point is not visible
    tag = _short(tag, 2)
    for mark, variable in VARIABLES.items():
        tag = tag.replace(mark, variable)
    return tag


def _short(text: str, decimals: int) -> str:
    """The text with rounded numbers and single spaces."""
    text = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.{decimals}f}".rstrip("0").rstrip("."), text)
    return re.sub(r"\s+", " ", text)


def png(figure: Figure, path: Path) -> None:
    """Writes all panels of a figure with its legend as one picture."""
    with _style(PAPER):
        write_bytes(path, plotting.png(_picture(figure), metadata={"Software": None}))


def _picture(figure: Figure) -> Canvas:
    number = len(figure.panels)
    across = 2 if number == 4 else min(number, 3) if number < 13 else math.ceil(math.sqrt(number))
    down = -(-len(figure.panels) // across)
    entry = 0.7 + 0.09 * max((len(name) for name in figure.legend), default=0)  # inches: line, gap and name
    width = max(WIDTH * across, entry)
    columns = min(2 * across, int(width / entry))
    below = 0.28 * -(-len(figure.legend) // columns) + 0.1
    pitch = max(panel.height for panel in figure.panels) + TITLE
    canvas = Canvas(figsize=(width, pitch * down + below), facecolor=PAPER.surface)
    for number, panel in enumerate(figure.panels):
        corner = WIDTH * (number % across), below + pitch * (down - number // across) - TITLE - panel.height
        axes = _draw(panel, canvas, corner, PAPER)
        axes.set_title(panel.title, fontsize=11, color=PAPER.ink)
    if figure.legend:
        handles = [Line2D([], [], color=PAPER.series[n % SERIES], linewidth=3) for n in range(len(figure.legend))]
        names = [f" {name}" for name in figure.legend]  # matplotlib leaves out names that begin with _
        canvas.legend(handles, names, loc="lower center", ncols=columns, frameon=False)
    return canvas


def _draw(panel: Panel, canvas: Canvas, corner: tuple[float, float], palette: Palette) -> Axes:
    """Draws a panel at a lower left corner, in inches. Margins are fixed: measuring texts would take most of the time."""
    wide, high = canvas.get_size_inches()
    left, bottom, right, top = (panel.left, panel.below, 0.14, 0.12) if panel.frame else (0.05, 0.05, 0.05, 0.05)
    width, height = WIDTH - left - right, panel.height - bottom - top
    axes = canvas.add_axes(((corner[0] + left) / wide, (corner[1] + bottom) / high, width / wide, height / high))
    if panel.frame:
        axes.grid(color=palette.grid, linewidth=0.8)
        axes.tick_params(color=palette.muted, labelcolor=palette.ink, length=3)
        for spine in axes.spines.values():
            spine.set_color(palette.muted)
        axes.xaxis.label.set_color(palette.ink)
        axes.locator_params(nbins=5)
    else:
        axes.set_axis_off()
    panel.draw(axes, palette)
    return axes


@contextmanager
def _style(palette: Palette) -> Iterator[None]:
    with matplotlib.rc_context({**STYLE, "text.color": palette.ink}):
        yield

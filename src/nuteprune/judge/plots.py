"""The plots of a report, layers and loss: how they look, each as an `<svg>` and a PNG.

Colours are those of the light page. In SVG each becomes the CSS variable of its name, so that the
page decides; it also gives text its font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from nuteprune.console import megabytes, scaled

THIN = "\u202f"
"""Stands between a number and its unit."""

Line = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Points of a line: x and y."""

COLOURS: Final[Mapping[str, str]] = {
    "ink": "#1d2125",
    "muted": "#5c646d",
    "rule": "#d5d3cc",
    "blue": "#1f5c99",
    "orange": "#a84c08",
    "green": "#2f7350",
    "violet": "#7b4a94",
    "paper": "#fdfcf9",
}
"""Name of a CSS variable -> its colour on the light page."""

_STYLE = Path(__file__).with_name("plots.mplstyle")
_WIDTH = 340
"""Points, and CSS pixels on a page: a phone's."""

POINTS: Final = 500
"""Steps that a line has room for; if there are more, neighbours are averaged."""

LOSS_PARTS: Final[Mapping[str, tuple[str, str]]] = {
    "token_kl": ("tokens (KL)", "blue"),
    "layer": ("layers", "orange"),
    "lm": ("language model", "green"),
    "penalty": ("sparsity term", "violet"),
}
"""Key in metrics.jsonl -> (label, colour)."""


@dataclass(frozen=True)
class Plot:
    """A drawing in both of its forms.

    Args:
        name: file name without suffix.
        alt: what can be read from it, for those who do not see it.
        svg: an `<svg>` element to stand in a page.
        png: the same as a picture on the light page's ground.
    """

    name: str
    alt: str
    svg: str
    png: bytes


def number(value: float) -> str:
    """Return a number for people: grouped in thousands, fewer digits where it is large."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def count(value: float) -> str:
    """Return a count of parameters for people."""
    return THIN.join(filter(None, scaled(value, "B")))


def size(value: float) -> str:
    """Return a number of bytes for people."""
    return megabytes(value).replace(" ", THIN)


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.0f}{THIN}s"
    minutes = round(seconds / 60)
    return f"{minutes}{THIN}min" if minutes < 120 else f"{seconds / 3600:.1f}{THIN}h"


def percent(share: float, digits: int = 0) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.{digits}f}{THIN}%"


@contextmanager
def new_figure(title: str, height: int) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure of the common width and its axes, to be drawn on in the common style.

    Args:
        title: what it shows.
        height: in points.
    """
    with mpl.rc_context(fname=_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72))
        axes = figure.add_subplot()
        axes.set_title(title)
        yield figure, axes


def finish(name: str, alt: str, figure: Figure) -> Plot:
    """Write a drawing in both forms; see `Plot`."""
    with mpl.rc_context(fname=_STYLE):
        picture, drawing = io.BytesIO(), io.StringIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawing, format="svg", transparent=True, metadata=metadata)
    return Plot(name, alt, _for_page(drawing.getvalue(), name), picture.getvalue())


def _for_page(svg: str, name: str) -> str:
    """Return a drawing as an element that takes colours and fonts from the page around it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<svg\b.*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    svg = re.sub(r"<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r"\s*\n\s*", " ", svg)

    def adapt(match: re.Match[str]) -> str:
        # Ids are unique within a drawing only, and a page holds several.
        tag = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", match[0])
        for variable, colour in COLOURS.items():
            tag = tag.replace(colour, f"var(--{variable})")
        return tag.replace("xlink:href", "href")

    svg = re.sub(r"<[^<>]+>", adapt, svg)  # tags alone: words in between are as they are
    return svg.strip()


# -- parts of drawings


def column(metrics: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """Return a figure of each logged step, nan where a step lacks it."""
    return np.array([line.get(key) for line in metrics], dtype=float)  # None is nan


def thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Line:
    """Return a line's points, averaged over neighbours where there are too many."""
    size = -(-len(x) // POINTS)
    if size == 1:
        return x, y
    parts = range(0, len(x), size)
    x, y = (np.array([values[i : i + size].mean() for i in parts]) for values in (x, y))
    return x, y


def dots(step: NDArray[np.float64]) -> dict[str, Any]:
    """Return markers for the points of a line that is too short to be seen."""
    return {"marker": "o", "ms": 3.5} if len(step) < 4 else {}


def steps_axis(axes: Axes) -> None:
    """Label an axis of steps, which are whole."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def legend(axes: Axes) -> None:
    """Put the legend between title and plot, three to a row."""
    columns = 3
    made = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns)
    rows = -(-len(made.get_texts()) // columns)
    axes.set_title(axes.get_title(loc="left"), pad=10 + 14 * rows)
    made.set_in_layout(False)  # the title's pad makes room for it


# -- the plots


@dataclass(frozen=True)
class LayerRow:
    """A row of the heat map: what each layer kept of one kind, and had before."""

    name: str
    kept: Sequence[int]
    before: Sequence[int]

    @property
    def shares(self) -> dict[int, float]:
        """Layer -> share that it kept, of layers that had something to keep."""
        pairs = zip(self.kept, self.before, strict=True)
        return {layer: kept / before for layer, (kept, before) in enumerate(pairs) if before}


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw the parts of the loss over the steps."""
    step = column(metrics, "step")
    parts = {key: column(metrics, key) for key in LOSS_PARTS if any(key in m for m in metrics)}
    with new_figure("Loss by step", 235) as (figure, axes):
        total = column(metrics, "loss")
        drawn = [total, *parts.values()]
        if len(parts) != 1:
            label = "sum" if parts else "loss"
            axes.plot(*thinned(step, total), color=COLOURS["ink"], lw=1, label=label, alpha=0.75)
        for key, values in parts.items():
            label, colour = LOSS_PARTS[key]
            x, y = thinned(step, values)
            axes.plot(x, y, color=COLOURS[colour], label=label, **dots(step))
        _loss_scale(axes, np.concatenate(drawn))
        steps_axis(axes)
        legend(axes)
    named = {LOSS_PARTS[key][0]: values for key, values in parts.items()} or {"loss": total}
    ends = "; ".join(
        f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in named.items()
    )
    return finish("loss", f"Line chart over {step[-1]:.0f} steps: {ends}.", figure)


def layers_plot(rows: Sequence[LayerRow]) -> Plot:
    """Draw a heat map: layers from first to last, and the share that each kept of each kind."""
    count = len(rows[0].kept)
    with new_figure("Kept in each layer", 62 + 40 * len(rows)) as (figure, axes):
        for i, row in enumerate(rows):
            for layer, share in row.shares.items():
                _cell(axes, layer, i, share)
        axes.set(xlim=(-0.5, count - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="layer")
        axes.set_yticks(range(len(rows)), [row.name for row in rows], color=COLOURS["ink"])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.grid(False)
        axes.spines[:].set_visible(False)
        _scale(figure)
    alt = "Heat map. " + " ".join(_row_in_words(row) for row in rows)
    return finish("layers", alt, figure)


# -- parts of drawings


def _loss_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Make the scale logarithmic, linear around 0 where parts of the loss go below."""
    values = values[np.isfinite(values)]
    if not len(values) or values.max() <= 0:
        return
    linear = 0.0 if values.min() > 0 else float(values.max()) / 30
    if linear:
        axes.set_yscale("symlog", linthresh=linear)
    else:
        axes.set_yscale("log")
        if values.max() < 30 * values.min():  # powers of ten alone would be too few
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))

    def label(y: float) -> str:
        return f"{y:g}" if y == 0 or abs(y) >= linear else ""

    axes.yaxis.set_major_formatter(lambda y, _: label(y))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _cell(axes: Axes, x: float, y: float, share: float) -> None:
    box = (x - 0.46, y - 0.4), 0.92, 0.8
    axes.add_patch(Rectangle(*box, fc="none", ec=COLOURS["rule"], lw=0.6))
    if share:
        alpha = 0.05 + 0.95 * min(share, 1.0) ** 1.5  # a record may say anything
        axes.add_patch(Rectangle(*box, fc=COLOURS["blue"], alpha=alpha, lw=0))
    else:
        axes.plot(x, y, "x", color=COLOURS["muted"], ms=4)


def _scale(figure: Figure) -> None:
    """Draw the heat map's scale at the upper right."""
    axes = figure.add_axes((0.62, 0.9, 0.36, 0.07))
    axes.set_axis_off()
    axes.set(xlim=(-3, 8.5), ylim=(-0.5, 0.5))
    for i in range(5):
        _cell(axes, i, 0, 0.1 + i / 4 * 0.9)
    for x, text, side in ((-0.8, "few", "right"), (4.8, "all", "left")):
        axes.text(x, 0, text, ha=side, va="center", color=COLOURS["muted"])


def _row_in_words(row: LayerRow) -> str:
    said, shares = f"{row.name}: {sum(row.kept):,} of {sum(row.before):,} kept", row.shares
    if not shares:
        return f"{said}."
    least = min(shares, key=lambda layer: shares[layer])
    return f"{said}, least in layer {least} ({row.kept[least]:,} of {row.before[least]:,})."

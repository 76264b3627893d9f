"""The plots of a report: layers and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from nuteprune.judge.drawing import (
    COLOURS,
    Plot,
    column,
    dots,
    finish,
    legend,
    new_figure,
    steps_axis,
    thinned,
)

LOSS_PARTS: Final[Mapping[str, tuple[str, str]]] = {
    "token_kl": ("tokens (KL)", "blue"),
    "layer": ("layers", "orange"),
    "lm": ("language model", "green"),
    "penalty": ("sparsity term", "violet"),
}
"""Key in metrics.jsonl -> (label, colour)."""


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

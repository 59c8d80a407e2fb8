"""Plot of stored bits and error of every quantised matrix, for the card."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path

from hf_qep import extras
from hf_qep.hub.cards.manifest import Layer

PLOT = "images/bits_per_layer.png"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#4d4d4d")
_MARKERS = "osD^vP*X"
"""Colours that colour-blind people can tell apart, and shapes for those who see none; after eight both repeat."""
_LEGEND = 24
"""Families that are named; with more the legend would be larger than the plot."""


def draw(layers: tuple[Layer, ...], folder: Path) -> str:
    """Write `images/bits_per_layer.png` below `folder` in one step and return that name.

    Raises ExtraMissingError without matplotlib.
    """
    extras.require("eval", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    families: dict[str, list[tuple[int, Layer]]] = defaultdict(list)
    for place, layer in enumerate(layers):
        families[layer.family].append((layer.block if layer.block is not None else place, layer))
    for number, (name, members) in enumerate(families.items()):
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 0.8,
            "label": _plain(name) if number < _LEGEND else "_",
        }
        places = [place for place, _ in members]
        # Families with equal bits would hide each other, so each stands a little to the side, without a line.
        aside = (number - (len(families) - 1) / 2) * min(0.08, 0.6 / len(families))
        points = style | {"linestyle": "none"}
        above.plot([place + aside for place in places], [layer.bits for _, layer in members], **points)
        # Experts of one block share its place: no line through them either.
        style = points if len(set(places)) < len(places) else style
        if all(layer.error is not None for _, layer in members):
            below.plot(places, [layer.error for _, layer in members], **style)
    above.set_ylabel("stored bits per weight")
    above.set_ylim(0, 1.15 * max(layer.bits for layer in layers))
    below.set_ylabel("relative error")
    below.set_ylim(bottom=0)
    below.set_xlabel("block of the model")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, folder / PLOT)
    return PLOT


def _plain(name: str) -> str:
    """A name in which matplotlib reads no formula and hides nothing."""
    return name.replace("$", "").lstrip("_")[:60] or "-"


def _save(figure: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            figure.savefig(file, format="png", metadata={"Software": None})  # type: ignore[attr-defined]
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise

"""
The figures of the lens, on matplotlib without a display. Every function gives a figure; `save` writes it.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from steer.errors import SteerError
from steer.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator
    from numpy.typing import ArrayLike

DPI = 110
FORMATS = (".png", ".svg", ".pdf")
COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#e08214", "#762a83", "#777777")
TICKS = 16  # most labels on an axis


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write `figure` to `path`; its suffix is the format. The folder is made where it is missing."""
    path = check_format(path)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), bbox_inches="tight")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())
    except OSError as error:
        raise SteerError(f"cannot write the figure {path}: {error.strerror}") from error
    return path


def check_format(path: str | os.PathLike[str]) -> Path:
    """`path` where its suffix is a format of figures; SteerError elsewhere."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise SteerError(f"{str(path)!r} is not the name of a figure: it must end in {', '.join(FORMATS)}")
    return path


def data_uri(figure: Figure) -> str:
    """The figure as a PNG inside a URI, for a page without files beside it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def text(token: str) -> str:
    """A token as a label: visible spaces, no line breaks, no mathematics, nothing the font lacks."""
    shown = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·").replace("$", r"\$")
    shown = "".join(
        char if char.isascii() or char == "·" or char in _GLYPHS else "\N{WHITE SQUARE}" for char in shown
    )
    return shown if len(shown) <= 14 else shown[:13] + "…"


def lines(
    values: Mapping[str, Any],
    *,
    x: Sequence[float],
    xlabel: str,
    ylabel: str,
    title: str,
    level: tuple[str, float] | None = None,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """One line a name over `x`, a dashed one for `level`, a shaded (low, high) band where given."""
    figure, axes = _figure(6.4, 3.2)
    for colour, (name, line) in zip(COLOURS, values.items(), strict=False):
        axes.plot(x, as_array(line), marker="o", markersize=3, color=colour, label=name)
        if bands and name in bands:
            low, high = zip(*bands[name], strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if level:
        axes.axhline(level[1], color="black", linestyle="--", linewidth=1, label=level[0])
    whole_ticks(axes, x)
    finish(axes, title, xlabel, ylabel)
    if len(values) > 1 or level:
        axes.legend(frameon=False, fontsize=8)
    return figure


def draws_line(draws: Any, what: str) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """
    The mean of random draws (draws, x) as a line of `lines`, and their range as its band; nothing for none.
    `what` they are, such as "equal length".
    """
    if not len(draws):
        return {}, {}
    values = as_array(draws)
    name = f"random, {what} ({len(values)} draws)"
    band = zip(values.min(0).tolist(), values.max(0).tolist(), strict=True)
    return {name: values.mean(0)}, {name: list(band)}


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    ylabel: str,
    title: str,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> Figure:
    """Horizontal bars, the first on top, with (low, high) whiskers."""
    figure, axes = _figure(6.4, 0.9 + 0.36 * len(names))
    at = np.arange(len(names))[::-1]
    error = None
    if intervals:
        error = np.abs(np.array(intervals).T - np.array(values))
    axes.barh(at, values, xerr=error, color=COLOURS[0], ecolor="#444444", capsize=3, height=0.65)
    axes.set_yticks(at, [name if len(name) < 40 else name[:38] + "…" for name in map(_plain, names)])
    finish(axes, title, ylabel, "")
    return figure


def grouped_bars(names: Sequence[str], groups: Mapping[str, Any], *, ylabel: str, title: str) -> Figure:
    """
    A cluster of horizontal bars a name, one bar a group; values far outside 0..1 are cut and written out.
    """
    figure, axes = _figure(6.4, 1.0 + (0.16 + 0.17 * len(groups)) * len(names))
    at = np.arange(len(names))[::-1]
    height = 0.8 / len(groups)
    for n, (group, values) in enumerate(groups.items()):
        shown = np.clip(as_array(values), -0.5, 1.5)
        place = at + 0.4 - height * (n + 0.5)
        axes.barh(place, shown, height=height, color=COLOURS[n % len(COLOURS)], label=group)
        for y, value, width in zip(place, as_array(values), shown, strict=True):
            if not math.isnan(value):
                shown_value = f"{0.0 if abs(value) < 0.005 else value:.2f}"
                label = axes.text(max(width, 0) + 0.02, y, shown_value, va="center", fontsize=7)
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(at, [_plain(name) for name in names])
    axes.set_xlim(right=max(1.15, axes.get_xlim()[1] + 0.12))
    finish(axes, title, ylabel, "")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def stacked_bars(parts: Mapping[str, Any], *, xlabel: str, ylabel: str, title: str) -> Figure:
    """One bar a layer, parts on top of each other; negative ones hang below zero."""
    figure, axes = _figure(6.4, 3.2)
    above = below = np.zeros(len(next(iter(parts.values()))))
    for colour, (name, values) in zip(COLOURS, parts.items(), strict=False):
        line = as_array(values)
        bottom = np.where(line >= 0, above, below)
        axes.bar(np.arange(len(line)), line, bottom=bottom, color=colour, label=name, width=0.85)
        above, below = above + line.clip(min=0), below + line.clip(max=0)
    axes.axhline(0, color="black", linewidth=0.8)
    finish(axes, title, xlabel, ylabel)
    axes.legend(frameon=False, fontsize=8)
    return figure


def heatmaps(
    maps: Mapping[str, Any],
    *,
    xlabel: str,
    ylabel: str,
    rows: Sequence[str] | None = None,
    columns: Sequence[Any] | None = None,
) -> Figure:
    """Matrices of cosines side by side, from -1 to 1."""
    tall = max(len(values) for values in maps.values())
    figure = Figure(figsize=(4.4 * len(maps), min(6.5, 1.4 + 0.13 * tall)), dpi=DPI)
    FigureCanvasAgg(figure)
    for n, (name, values) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(1, len(maps), n)
        image = axes.imshow(
            as_array(values), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
        )
        thin_ticks(axes.set_yticks, rows or range(tall))
        thin_ticks(axes.set_xticks, columns or range(np.shape(values)[1]))
        finish(axes, name, xlabel, ylabel if n == 1 else "")
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    figure.tight_layout()
    return figure


def matrix(values: ArrayLike, names: Sequence[str], *, xlabel: str, ylabel: str, title: str) -> Figure:
    """A square of numbers, written out."""
    size = min(8.0, 2.2 + 0.42 * len(names))
    figure, axes = _figure(size + 0.9, size)
    numbers = as_array(values)
    image = axes.imshow(numbers, cmap="viridis", interpolation="nearest")
    middle = (np.nanmin(numbers) + np.nanmax(numbers)) / 2 if np.isfinite(numbers).any() else 0
    for (i, j), value in np.ndenumerate(numbers):
        word = "–" if math.isnan(value) else f"{value:.2f}"
        axes.text(
            j, i, word, ha="center", va="center", fontsize=7, color="white" if value < middle else "black"
        )
    axes.set_xticks(
        range(len(names)), [_plain(n) for n in names], rotation=45 if max(map(len, names)) > 3 else 0
    )
    axes.set_yticks(range(len(names)), [_plain(n) for n in names])
    finish(axes, title, xlabel, ylabel)
    axes.grid(False)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    return figure


def token_heatmap(
    values: ArrayLike,
    tokens: Sequence[Sequence[str]],
    *,
    rows: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str,
    colour: str,
) -> Figure:
    """Cells with a token in each, coloured by value: blue above zero, red below."""
    figure, axes = _figure(1.6 + 0.95 * len(tokens[0]), 1.0 + 0.21 * len(tokens))
    numbers = as_array(values)
    limit = float(np.abs(numbers).max()) or 1.0
    image = axes.imshow(numbers, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    for (i, j), value in np.ndenumerate(numbers):
        shade = "white" if abs(value) > 0.65 * limit else "black"
        axes.text(j, i, text(tokens[i][j]), ha="center", va="center", fontsize=7, color=shade)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xticks([])
    finish(axes, title, xlabel, ylabel)
    axes.grid(False)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, label=colour)
    return figure


def strip(values: ArrayLike, tokens: Sequence[str], layers: Sequence[int], prompt: int) -> Figure:
    """
    Coefficients by layer and token, each layer's as a share of its largest, first token apart: that is an
    attention sink, out of proportion. The tokens are written below; a line where the completion begins.
    """
    figure, axes = _figure(max(5.0, 0.24 * len(tokens)), 1.4 + 0.2 * len(layers))
    numbers = as_array(values)
    largest = np.abs(numbers[:, 1:]).max(1, initial=0.0, keepdims=True)
    shares = numbers / np.where(largest > 0, largest, 1.0)
    image = axes.imshow(shares, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.axvline(prompt - 0.5, color="black", linewidth=1.2)
    axes.set_xticks(range(len(tokens)), [text(token) for token in tokens], rotation=90, fontsize=7)
    thin_ticks(axes.set_yticks, layers)
    finish(axes, "Adaptive scale: the vector's coefficient at each token", "", "layer")
    axes.grid(False)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, label="share of the layer's largest")
    return figure


_GLYPHS = "…–—\\"


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def panels(width: float, height: float, *args: Any, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure of several axes; the arguments after its size in inches are those of `Figure.subplots`."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*args, **kwargs)


def finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def whole_ticks(axes: Axes, x: Sequence[float]) -> None:
    """No ticks between layers."""
    if all(isinstance(value, int) for value in x):
        cast("MaxNLocator", axes.xaxis.get_major_locator()).set_params(integer=True)


def thin_ticks(setter: Callable[..., object], labels: Sequence[Any] | range) -> None:
    """At most `TICKS` of the labels, evenly."""
    step = max(1, math.ceil(len(labels) / TICKS))
    at = range(0, len(labels), step)
    setter(at, [str(labels[n]) for n in at], fontsize=7)


def _plain(name: str) -> str:
    return name.replace("$", r"\$")


def as_array(values: ArrayLike) -> np.ndarray:
    return np.array(values.tolist() if hasattr(values, "tolist") else values, dtype=float)

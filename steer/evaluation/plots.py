"""The plots of a comparison, each as PNG bytes and as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from steer.evaluation.collect import Collection

BASE_COLOUR = "#6b7280"
COLOURS = ["#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d"]
COLOURS += ["#b91c1c", "#78350f", "#1e3a8a", "#f472b6", "#0f172a"]

Figures = dict[str, tuple[bytes, str]]


def draw(collection: Collection, rows: Sequence[dict[str, Any]]) -> Figures:
    """`accuracy`, `parameters` (where anything was trained) and `lengths`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "axes.axisbelow": True,
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # a name with dollars is a name
        "svg.hashsalt": "steer",  # the same page for the same scores
    }
    names = [method.name for method in collection.methods]
    colours = {
        name: BASE_COLOUR if not i else COLOURS[(i - 1) % len(COLOURS)] for i, name in enumerate(names)
    }
    figures: Figures = {}
    with pyplot.rc_context(style):
        figures["accuracy"] = _saved(pyplot, _accuracy(pyplot, rows, colours))
        if any(row["parameters"] for row in rows):
            figures["parameters"] = _saved(pyplot, _parameters(pyplot, rows, colours))
        figures["lengths"] = _saved(pyplot, _lengths(pyplot, collection, rows, colours))
    return figures


def _accuracy(pyplot: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Any:
    """A panel for each benchmark; a line for each method, first on top: filled greedy, hollow sampled."""
    panels = _panels(rows)
    lines = max(len({r["method"] for r in of}) for of in panels.values())
    figure, axes = _grid(pyplot, len(panels), 0.9 + 0.42 * lines)
    for ax, (benchmark, of) in zip(axes, panels.items(), strict=False):
        names = list(dict.fromkeys(row["method"] for row in of))
        for row in of:
            e, colour = row["accuracy"], colours[row["method"]]
            greedy = row["decoding"] == "greedy"
            y = names.index(row["method"]) + (-0.13 if greedy else 0.13)
            ax.plot([e["low"], e["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            ax.plot(
                e["value"], y, "o", color=colour, markerfacecolor=colour if greedy else "white", markersize=6
            )
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlim(left=min(0, ax.get_xlim()[0]))
        ax.set_title(f"{benchmark}, {of[0]['problems']} problems", loc="left", fontsize=10, fontweight="bold")
        ax.set_xlabel("accuracy (filled: greedy, hollow: sampled; bars: 95 %)")
    return figure


def _parameters(pyplot: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Any:
    """Accuracy against trainable parameters; what trained none is a dashed line."""
    panels = {
        name: [r for r in of if r["decoding"] == of[-1]["decoding"]] for name, of in _panels(rows).items()
    }
    figure, axes = _grid(pyplot, len(panels), 3.0)
    for ax, (benchmark, of) in zip(axes, panels.items(), strict=False):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: _short(value))
        untrained: dict[float, list[str]] = {}  # names by height; what lies close together shares a label
        for row in of:
            e, colour = row["accuracy"], colours[row["method"]]
            if not row["parameters"]:
                ax.axhline(e["value"], color=colour, linestyle="--", linewidth=1)
                close = next((y for y in untrained if abs(y - e["value"]) < 0.04), e["value"])
                untrained.setdefault(close, []).append(row["method"])
                continue
            error = [[e["value"] - e["low"]], [e["high"] - e["value"]]]
            ax.errorbar(row["parameters"], e["value"], error, fmt="o", color=colour, capsize=3)
            ax.annotate(
                row["method"], (row["parameters"], e["value"]), (6, 4), textcoords="offset points", fontsize=8
            )
        for value, names in untrained.items():
            ax.annotate(
                ", ".join(names), (0.01, value), xycoords=("axes fraction", "data"), fontsize=8, va="bottom"
            )
        trained = [row["parameters"] for row in of if row["parameters"]]
        ax.set_xlim(min(trained, default=1) / 5, max(trained, default=10) * 12)
        ax.set_title(f"{benchmark}, {of[0]['decoding']}", loc="left", fontsize=10, fontweight="bold")
        ax.set_xlabel("trainable parameters")
        ax.set_ylabel("accuracy")
    return figure


def _lengths(
    pyplot: Any, collection: Collection, rows: Sequence[dict[str, Any]], colours: dict[str, str]
) -> Any:
    """How many answers had ended by each length; what is missing to 1 at the right was cut off."""
    panels = _panels(rows)
    figure, axes = _grid(pyplot, len(panels), 3.0)
    for ax, (benchmark, of) in zip(axes, panels.items(), strict=False):
        decoding = of[-1]["decoding"]
        for cell in collection.cells(benchmark, decoding == "greedy"):
            tokens, cut = cell.array("tokens").ravel(), cell.array("truncated").ravel()
            ended = sorted(tokens[~cut].tolist())
            longest = int(tokens.max())
            x = [0, *ended, longest]
            y = [0.0, *((i + 1) / len(tokens) for i in range(len(ended))), len(ended) / len(tokens)]
            name = cell.method.name
            ax.step(x, y, where="post", color=colours[name], label=f"{name} (mean {tokens.mean():.0f})")
        ax.set_ylim(0, 1.02)
        ax.set_xlim(left=0)
        ax.set_title(f"{benchmark}, {decoding}", loc="left", fontsize=10, fontweight="bold")
        ax.set_xlabel("tokens in the answer")
        ax.set_ylabel("answers that had ended")
        ax.legend(fontsize=8, frameon=False, loc="best")
    return figure


def curves(accuracy: dict[str, list[list[float]]]) -> bytes:
    """A PNG of the samples' accuracy by update: a line for each seed of each method, names in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, seeds) in enumerate(accuracy.items()):
        for i, values in enumerate(seeds):
            colour = COLOURS[number % len(COLOURS)]
            ax.plot(range(1, 1 + len(values)), values, color=colour, alpha=0.8, label=None if i else name)
    ax.set_xlabel("update")
    ax.set_ylabel("accuracy of the samples of training")
    ax.set_ylim(0, 1)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    return _saved(pyplot, figure)[0]


def _short(count: float) -> str:
    """10,000 as 10K, 1,000,000 as 1M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def _panels(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(row["benchmark"], []).append(row)
    return panels


def _grid(pyplot: Any, count: int, height: float) -> tuple[Any, list[Any]]:
    columns = min(2, count)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(6.4 if columns == 1 else 11.0, height * lines),
        layout="constrained",
        squeeze=False,
    )
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.set_axis_off()
    return figure, flat


def _saved(pyplot: Any, figure: Any) -> tuple[bytes, str]:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=130)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    # without its XML header, so that it can be part of a page
    return png.getvalue(), re.sub(r"(?s)^.*?(?=<svg)", "", svg.getvalue())

"""The end of a run for human eyes: a table, a few answers before and after, and the training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.train.evaluation import Answered, Score


def score_table(before: Score, after: Score, trained: str = "steered") -> str:
    """Two rows of text: accuracy with its 95 % interval, and how the answers were given."""
    head = ("", "accuracy", "95 % interval", "boxed", "finished", "tokens")
    rows = [
        [name, f"{s.accuracy:.3f}", f"{s.low:.3f} to {s.high:.3f}", *map("{:.2f}".format, shares)]
        for name, s in (("untrained", before), (trained, after))
        for shares in [(s.answered, s.finished, s.mean_tokens)]
    ]
    return "\n".join("{:10}{:>10}{:>18}{:>8}{:>10}{:>8}".format(*row) for row in (head, *rows))


def sample_answers(
    before: list[Answered], after: list[Answered], count: int, trained: str = "steered"
) -> str:
    """`count` problems with both answers; those that training turned from wrong to right come first."""
    pairs = sorted(zip(before, after, strict=True), key=lambda pair: pair[0].correct >= pair[1].correct)
    blocks = []
    for old, new in pairs[:count]:
        lines = [f"{old.problem}  (answer: {old.answer})"]
        for name, got in (("untrained", old), (trained, new)):
            text = " ".join(got.completion.split()) or "(nothing)"
            lines.append(f"  {'right' if got.correct else 'wrong':6}{name:10} {text}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def plot_training(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """
    A PNG: reward and accuracy by update, answer length and entropy by update, and the norm of each layer's
    vector where vectors were trained.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in history if row.get("reward") is not None]
    last: dict[str, Any] = next(
        (row for row in reversed(steps) if any(k.startswith("layer/") for k in row)), {}
    )
    norms = {
        int(k.split("/")[1]): v for k, v in last.items() if k.startswith("layer/") and k.endswith("/norm")
    }
    panels = 3 if norms else 2
    figure, (top, middle, *rest) = pyplot.subplots(panels, 1, figsize=(7, 2.8 * panels), layout="constrained")
    figure.suptitle(title)
    curves = (
        (top, "reward", "reward", "tab:blue"),
        (top, "accuracy", "accuracy of samples", "tab:green"),
        (middle, "completions/mean_length", "tokens in an answer", "tab:orange"),
    )
    for axes, key, label, colour in curves:
        points = [(row["step"], row[key]) for row in steps if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour)
    entropy = [(row["step"], row["entropy"]) for row in steps if row.get("entropy") is not None]
    if entropy:
        right = middle.twinx()
        right.plot(*zip(*entropy, strict=True), color="tab:purple", alpha=0.6)
        right.set_ylabel("entropy (nats)", color="tab:purple")
    for axes in (top, middle):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.legend(loc="best")
    for bottom in rest:
        bottom.bar(list(norms), list(norms.values()), color="tab:gray")
        bottom.set_xlabel("layer")
        bottom.set_ylabel("norm of the vector")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

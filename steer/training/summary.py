"""The end of a run for human eyes: a table, a few answers before and after, and the training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.evaluation.heldout import Answered
from steer.tasks.elicited import best_base, stages


def score_table(results: Mapping[str, Any], trained: str = "steered") -> str:
    """
    A run's results as text: accuracy in the box and read leniently, each with its 95 % interval, and how the
    answers were given; below, the gain over the best elicited base.
    """
    head = ("", "boxed", "95 % interval", "lenient", "95 % interval", "in a box", "finished", "tokens")
    rows: list[Sequence[str]] = [head]
    for name, s in stages(results, trained):
        cells = [f"{s['accuracy']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}"]
        if s.get("lenient") is None:
            cells += ["", ""]
        else:
            cells += [f"{s['lenient']:.3f}", f"{s['lenient_low']:.3f} to {s['lenient_high']:.3f}"]
        cells += [f"{s[key]:.2f}" if key in s else "" for key in ("answered", "finished", "mean_tokens")]
        rows.append((name, *cells))
    width = max(len(name) for name, *_ in rows)
    form = "{:{width}}{:>8}{:>18}{:>10}{:>18}{:>10}{:>10}{:>8}"
    text = "\n".join(form.format(*row, width=width) for row in rows)
    best, after = best_base(results), results["after"].get("lenient")
    if best is None or after is None:
        return f"{text}\n\nThe base was not elicited in this run: part of the gain may be form alone."
    name, score = best
    return (
        f"{text}\n\nbest elicited base: {name}, {score['lenient']:.3f}; {trained} gains "
        f"{after - score['lenient']:+.3f} over it, both read leniently"
    )


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


def validation_line(validation: Mapping[str, Any]) -> str:
    """The validation of a run, as its results hold it, in one line."""
    top, history = validation["best"], validation["history"]
    text = f"on {validation['problems']} problems, {len(history)} times"
    if top:
        last = history[-1]["accuracy"]
        text += f"; best accuracy {top['accuracy']:.3f} at update {top['step']}, last {last:.3f}"
    text += f"; the artifact is the {validation['kept']} one"
    return f"{text}; stopped: {validation['stopped']}" if validation["stopped"] else text


def plot_training(
    history: list[dict[str, Any]],
    path: Path,
    title: str,
    validation: Sequence[Mapping[str, Any]] = (),
) -> None:
    """
    A PNG: reward, accuracy and validation accuracy by update, answer length and entropy by update, and the
    norm of each layer's vector where vectors were trained. Where given answers were trained on, loss and
    accuracies by update in place of rewards and lengths.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    given = not any(row.get("reward") is not None for row in history)  # answers, which none was sampled
    steps = [row for row in history if row.get("loss" if given else "reward") is not None]
    last: dict[str, Any] = next(
        (row for row in reversed(steps) if any(k.startswith("layer/") for k in row)), {}
    )
    norms = {
        int(k.split("/")[1]): v for k, v in last.items() if k.startswith("layer/") and k.endswith("/norm")
    }
    panels = 3 if norms else 2
    figure, (top, middle, *rest) = pyplot.subplots(panels, 1, figsize=(7, 2.8 * panels), layout="constrained")
    figure.suptitle(title)
    sampled = (
        (top, "reward", "reward", "tab:blue"),
        (top, "dynamic_sampling/reward", "reward before dynamic sampling", "tab:cyan"),
        (top, "accuracy", "accuracy of samples", "tab:green"),
        (middle, "completions/mean_length", "tokens in an answer", "tab:orange"),
    )
    trained_on = (
        (top, "mean_token_accuracy", "accuracy of tokens", "tab:blue"),
        (top, "rewards/accuracies", "pairs in their order", "tab:green"),
        (middle, "loss", "loss", "tab:orange"),
    )
    curves = trained_on if given else sampled
    for axes, key, label, colour in curves:
        points = [(row["step"], row[key]) for row in steps if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour)
    if validation:
        points = [(row["step"], row["accuracy"]) for row in validation]
        label = "validation accuracy (greedy)"
        top.plot(*zip(*points, strict=True), label=label, color="tab:red", marker="o", markersize=3)
    entropy = [(row["step"], row["entropy"]) for row in steps if row.get("entropy") is not None]
    if entropy:
        right = middle.twinx()
        right.plot(*zip(*entropy, strict=True), color="tab:purple", alpha=0.6)
        right.set_ylabel("entropy of rows in the loss (nats)", color="tab:purple")
    for axes in (top, middle):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
    for bottom in rest:
        bottom.bar(list(norms), list(norms.values()), color="tab:gray")
        bottom.set_xlabel("layer")
        bottom.set_ylabel("norm of the vector")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""
Every analysis of one artifact, with its controls, and the paper's findings judged by the numbers.

`study` measures, `page.format_prompt` writes the result as one HTML page, `save_figures` as image files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from steer.card import is_score
from steer.errors import SteerError
from steer.files import replace_file
from steer.lens import findings as rules
from steer.lens.composition import compose, leave_one_out, likelihoods, scale_sweep
from steer.lens.conditions import BASE, Condition, steered
from steer.lens.controls import mean_difference, random_vectors, shuffled_layers, values
from steer.lens.decomposition import decompose
from steer.lens.directions import directions
from steer.lens.findings import Finding
from steer.lens.logit_lens import logit_lens
from steer.lens.patching import ROUTES, by_layer, frozen_routes, group_routes, head_routes, patch
from steer.lens.persistence import persistence
from steer.lens.report_results import Frozen, Paths, PathsByLayer, SingleLayers
from steer.lens.results import Result, plain, spread
from steer.lens.sampling import complete, graded
from steer.lens.scale_maps import scale_maps
from steer.lens.scripts import count_scripts
from steer.lens.subject import Row, Subject
from steer.lens.token_shift import common_opening, prefix_substitution, token_shift
from steer.prompt import PromptSpec, recorded
from steer.stats import wilson
from steer.tasks.elicited import best_base
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import DEFAULT_PROMPT

Record = dict[str, Any]
ADDED = "added to the base run"
SINGLE = 4  # texts that single vectors and controls of paths are measured on, all tokens of the answer


@dataclass
class Report:
    """
    `results` by section name, `numbers` that the findings were judged by, and `findings`. `accuracy` has, by
    condition, (accuracy, low, high) with the 95 % Wilson interval over `problems`.
    """

    subject: Subject
    problems: int
    accuracy: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    numbers: dict[str, float | None] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What was found, without the larger tensors: accuracies, numbers and findings."""
        config = self.subject.vectors.config
        vectors = {
            k: getattr(config, k)
            for k in ("base_model_name_or_path", "kind", "layers", "site", "positions", "scale")
        }
        return {
            "vectors": vectors,
            "problems": self.problems,
            "accuracy": {
                k: dict(zip(("accuracy", "low", "high"), v, strict=True)) for k, v in self.accuracy.items()
            },
            "numbers": plain(self.numbers),
            "findings": rules.to_dict(self.findings),
            "notes": self.notes,
        }


def study(
    subject: Subject,
    problems: Sequence[Record],
    grader: MathGrader,
    *,
    checkpoints: Sequence[str | os.PathLike[str]] = (),
    seed: int = 0,
) -> Report:
    """
    Run everything on `problems`: accuracies on all of them, sampled answers and scales on the first half,
    paths on a fifth, single vectors on `SINGLE` answers. Shows its progress. checkpoints: artifacts of
    the same run, the earliest first.
    """
    if len(problems) < 4:
        raise SteerError(f"a report needs at least 4 problems, got {len(problems)}")
    made = _Study(subject, list(problems), grader, list(checkpoints), seed)
    return made.run()


class _Study:
    """The steps of a report, in order; each adds its results and numbers."""

    def __init__(
        self, subject: Subject, problems: list[Record], grader: MathGrader, checkpoints: list[Any], seed: int
    ):
        self.subject, self.problems, self.grader = subject, problems, grader
        self.checkpoints, self.seed = checkpoints, seed
        self.report = Report(subject, len(problems))
        self.last = subject.decoder.num_hidden_layers - 1
        self.random = random_vectors(subject.vectors, seed)
        self.rows: list[Row] = []  # the steered model's greedy answers
        self.base: list[Row] = []  # the base model's
        self.right: list[Row] = []  # those of them that are right
        self.few = max(SINGLE, len(problems) // 5)

    def run(self) -> Report:
        steps: list[tuple[str, Callable[[], None]]] = [
            ("accuracy and controls", self.accuracies),
            ("directions", self.directions),
            ("logit lens", self.logit_lens),
            ("token shift", self.token_shift),
            ("prefix substitution", self.prefix),
            ("path patching", self.patching),
            ("path patching, the last layers", self.last_layers_patched),
            ("persistence", self.persistence),
            ("single layers and leave-one-out", self.layers),
            ("composition", self.composition),
            ("scale sweep", self.scales),
        ]
        with tqdm(steps, unit="step", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]") as bar:
            for name, step in bar:
                bar.set_description(name)
                step()
            bar.set_description("report")
        self.report.findings = rules.judge(self.report.numbers)
        return self.report

    def accuracies(self) -> None:
        subject, report = self.subject, self.report
        rows = subject.rows(self.problems)
        self.base, self.rows = complete(subject, rows, [BASE, steered(subject)], label="greedy answers")
        self._score("base", graded(subject, self.base, self.problems, self.grader))
        right = graded(subject, self.rows, self.problems, self.grader)
        self._score("steered", right)
        report.notes.append(_elicited(subject.vectors.config.provenance))
        self.right = [row for row, ok in zip(self.rows, right.tolist(), strict=True) if ok]
        for row, plain_row, problem in list(zip(self.rows, self.base, self.problems, strict=True))[:3]:
            texts = subject.answers([plain_row, row])
            report.samples.append({"problem": problem["problem"], "base": texts[0], "steered": texts[1]})
        controls: list[tuple[str, Callable[[], dict[str, torch.Tensor]]]] = [
            ("random vectors of equal length", lambda: self.random),
            ("layers shuffled", lambda: shuffled_layers(subject.vectors, self.seed)),
            ("mean-difference vectors", lambda: mean_difference(subject, self.rows, self.base, "means")),
        ]
        for name, make in controls:
            try:
                with values(subject.vectors, make()):
                    (written,) = complete(subject, rows, [steered(subject)], label=name)
            except SteerError as error:
                report.notes.append(f"Control left out: {name} ({error}).")
                continue
            self._score(name, graded(subject, written, self.problems, self.grader))
        trained = (subject.prompt or DEFAULT_PROMPT).template
        plain = "plain" if trained != "plain" else "qwen_math"
        other = replace(subject, prompt=PromptSpec(plain))
        title = f"template {plain} instead of {trained}"
        try:
            asked = other.rows(self.problems)
        except SteerError as error:  # its prompts do not fit into the model
            report.notes.append(f"Control left out: {title} ({error}).")
            asked = []
        if asked:
            both = complete(other, asked, [BASE, steered(other)], label="another template")
            for name, some in zip(("base", "steered"), both, strict=True):
                self._score(f"{name}, {title}", graded(other, some, self.problems, self.grader))
        random = report.accuracy["random vectors of equal length"][0]
        self._note(
            base_interval_top=report.accuracy["base"][2],
            steered_interval_bottom=report.accuracy["steered"][1],
        )
        self._note(random_vectors_accuracy=random)

    def directions(self) -> None:
        from steer.artifact import Artifact

        now = Artifact(self.subject.vectors.config, self.subject.vectors.tensors())
        # A checkpoint of another run or kind has nothing to say here.
        try:
            self.report.results["directions"] = directions([*self.checkpoints, now])
        except SteerError as error:
            self.report.notes.append(f"Checkpoints left out: {error}.")
            self.report.results["directions"] = directions([now])
        self.report.results["directions"].names[-1] = "these vectors"  # type: ignore[attr-defined]

    def logit_lens(self) -> None:
        subject, results = self.subject, self.report.results
        read = lambda vectors: logit_lens(subject.model, subject.tokenizer, vectors)  # noqa: E731
        own = read(subject.vectors.effective())
        with values(subject.vectors, self.random):
            control = read(subject.vectors.effective())
        results["logit lens"] = own
        counts, control_counts = (count_scripts(lens, subject.tokenizer) for lens in (own, control))
        results["scripts"] = counts
        middle = [n for n, i in enumerate(own.layers) if self.last / 3 <= i <= 2 * self.last / 3]
        if middle and counts.foreign_base >= 0.01:
            self._note(middle_foreign=counts.foreign()[middle].mean().item())
            self._note(vocabulary_foreign=counts.foreign_base)
            self._note(random_middle_foreign=control_counts.foreign()[middle].mean().item())

    def token_shift(self) -> None:
        subject, results = self.subject, self.report.results
        half = subject.rows(self.problems[: len(self.problems) // 2])
        (sampled,) = complete(
            subject, half, [steered(subject)], temperature=1.0, seed=self.seed, label="sampling"
        )
        results["token shift"] = token_shift(subject, sampled, label="token shift")
        if self.last not in subject.layers:
            return
        last = token_shift(subject, sampled, layers=[self.last], texts=0, label="last layer")
        results["token shift, last layer"] = last
        with values(subject.vectors, self.random):
            control = token_shift(subject, sampled, layers=[self.last], texts=0, label="last layer, random")
            random_lens = self._last_lens()
        self._note(last_first_share=last.first_share, last_concentration=last.concentration)
        self._note(
            random_last_first_share=control.first_share, random_last_concentration=control.concentration
        )
        gained = last.top[0][1]
        self._note(last_lens_rank=_rank(self._last_lens(), gained))
        self._note(random_last_lens_rank=_rank(random_lens, gained))

    def _last_lens(self) -> torch.Tensor:
        subject = self.subject
        vector = {self.last: subject.vectors.effective()[self.last]}
        return logit_lens(subject.model, subject.tokenizer, vector).scores[0]

    def prefix(self) -> None:
        subject, shift = self.subject, self.report.results["token shift"]
        top: str = shift.top[0][0]  # type: ignore[attr-defined]
        usual = common_opening(self.base, share=0.01)[:1]
        opening = subject.tokenizer.decode(common_opening(self.rows))
        openings = list(dict.fromkeys([top, subject.tokenizer.decode(usual), str(opening)]))
        openings = [text for text in openings if text]
        ends = self.report.accuracy["base"][0], self.report.accuracy["steered"][0]
        found = prefix_substitution(
            subject, self.problems, openings, self.grader, ends=ends, label="forced openings"
        )
        self.report.results["prefix substitution"] = found
        share = dict(zip(openings, found.share.tolist(), strict=True))
        if found.steered > found.base and len(share) > 1:
            control = str(subject.tokenizer.decode(usual))
            self._note(forced_share=share[top], control_forced_share=share.get(control))

    def patching(self) -> None:
        subject, results = self.subject, self.report.results
        rows = self.rows[: self.few]
        problems = self.problems[: self.few]
        try:
            added = patch(subject, rows, problems=problems, grader=self.grader, label="path patching, add")
            taken = patch(subject, rows, direction="remove", label="path patching, remove")
        except SteerError as error:
            self.report.notes.append(f"Path patching of all vectors at once left out: {error}.")
        else:
            effect_paths = frozen_routes(subject, min(subject.layers))
            own = patch(subject, rows, effect_paths, label="later layers frozen")
            with values(subject.vectors, self.random):
                random = patch(subject, rows[:SINGLE], label="path patching, random")
                control = patch(subject, rows[:SINGLE], effect_paths, label="later layers frozen, random")
            parts = {ADDED: added, "taken out of the steered run": taken, "random vectors, added": random}
            results["path patching"] = Paths(parts)
            ends = [int(name.split()[-1]) for name in effect_paths]
            results["later layers frozen"] = Frozen(ends, own.recovered(), control.recovered())
        try:
            results["decomposition"] = decompose(subject, self.rows[: self.few], label="decomposition")
        except SteerError as error:
            self.report.notes.append(f"Decomposition left out: {error}.")

    def last_layers_patched(self) -> None:
        try:
            self.last_layers()
        except SteerError as error:
            self.report.notes.append(f"Path patching of the last layers left out: {error}.")

    def last_layers(self) -> None:
        subject, results = self.subject, self.report.results
        rows = self.rows[:SINGLE]
        before = self.last - 1
        if before in subject.layers:
            found = patch(subject, rows, layers=[before], label="penultimate layer")
            with values(subject.vectors, self.random):
                control = patch(subject, rows, layers=[before], label="penultimate layer, random")
            results["penultimate layer"] = Paths({ADDED: found, "random vector, added": control})
            for name, done in (("", found), ("random_", control)):
                self._note(**{f"{name}penultimate_without_attention": done["all but attention"]})
                self._note(**{f"{name}penultimate_without_mlp": done["all but MLP"]})
            effect_paths = {**head_routes(subject, self.last), **group_routes(subject, self.last)}
            heads = patch(subject, rows, effect_paths, layers=[before], label="heads")
            results["heads of the last layer"] = heads
        some = spread([layer for layer in subject.layers if layer < self.last], 8)
        kept = {name: ROUTES[name] for name in ("attention only", "MLP only", "residual only")}
        if some:
            each = by_layer(subject, rows, some, effect_paths=kept, label="path patching by layer")
            shares = {name: torch.tensor([done[name] for done in each]) for name in kept}
            results["paths by layer"] = PathsByLayer(some, shares)

    def persistence(self) -> None:
        subject, results = self.subject, self.report.results
        rows = self.rows[: self.few]
        results["persistence, all vectors"] = persistence(subject, rows, label="persistence")
        some = spread([layer for layer in subject.layers if layer < self.last], 6)
        if not some:
            return
        sources = {str(layer): [layer] for layer in some}
        own = persistence(subject, rows[:SINGLE], sources, label="persistence of single vectors")
        results["persistence, single vectors"] = own
        above = torch.arange(self.last + 1)[None, :] > torch.tensor(some)[:, None]
        self._note(diff_diff=_mean(own.diff_diff[above]), diff_vector=_mean(own.diff_vector[above]))
        with values(subject.vectors, self.random):
            control = persistence(subject, rows[:SINGLE], sources, label="persistence, random")
        self._note(random_diff_diff=_mean(control.diff_diff[above]))
        if len(subject.layers) > 1:
            trained = subject.vectors.effective()
            order = subject.layers[1:] + subject.layers[:1]
            moved = {layer: trained[other] for layer, other in zip(subject.layers, order, strict=True)}
            shuffled = persistence(subject, rows[:SINGLE], sources, vectors=moved, label="layers shuffled")
            self._note(shuffled_diff_vector=_mean(shuffled.diff_vector[above]))
        else:
            self.report.numbers["diff_vector"] = None

    def layers(self) -> None:
        subject = self.subject
        rows = self.right[:SINGLE]
        if len(subject.layers) < 2 or not rows:
            return
        self.report.results["leave one out"] = leave_one_out(
            subject, self.problems, None, rows, "leave one out"
        )
        conditions = [BASE, *(Condition(frozenset([layer])) for layer in subject.layers)]
        own = likelihoods(subject, rows, conditions, "single layers")
        with values(subject.vectors, self.random):
            control = likelihoods(subject, rows, conditions, "single layers, random")
        self.report.results["single layers"] = SingleLayers(
            subject.layers, own[1:] - own[0], control[1:] - control[0]
        )
        self._note(layers_that_help=(own[1:] - own[0] > 0.05).double().mean().item())
        self._note(random_layers_that_help=(control[1:] - control[0] > 0.05).double().mean().item())

    def composition(self) -> None:
        subject, rows = self.subject, self.right[:SINGLE]
        if len(subject.layers) < 2 or not rows:
            return
        some = spread(subject.layers, 6)
        found = compose(subject, [], None, some, rows, "pairs of layers")
        self.report.results["composition"] = found
        with values(subject.vectors, self.random):
            control = compose(subject, [], None, some, rows, "pairs of layers, random")
        control.joint = found.joint  # random vectors were not trained at all
        self._note(pair_gain=_mean(found.score), random_pair_gain=_mean(control.score))

    def scales(self) -> None:
        subject = self.subject
        self.report.results["scale sweep"] = scale_sweep(
            subject, self.problems[: len(self.problems) // 2], self.grader, label="scale"
        )
        if subject.vectors.config.kind == "adaptive":
            maps = scale_maps(subject, self.rows)
            self.report.results["scale maps"] = maps
            with values(subject.vectors, self.random):
                control = scale_maps(subject, self.rows)
            for name, found in (("", maps), ("random_", control)):
                self._note(**{f"{name}adaptive_spread": _mean(found.std / found.mean.abs().clamp(min=1e-12))})

    def _score(self, name: str, right: torch.Tensor) -> None:
        hits = int(right.sum())
        self.report.accuracy[name] = (hits / len(right), *wilson(hits, len(right)))

    def _note(self, **numbers: float | None) -> None:
        self.report.numbers.update(numbers)


def _elicited(provenance: dict[str, Any] | None) -> str:
    """What the run that trained the vectors found of its base, asked and read as well as can be."""
    scores = {name: score for name, score in recorded(provenance, "results").items() if is_score(score)}
    best = best_base(scores)
    if best is None:
        return (
            "The base was not elicited (worked examples, a longer limit, lenient reading) where these "
            "vectors were trained: part of the gain over it may be form alone."
        )
    name, score = best
    return (
        f"The best elicited base of the training run is {name}: {score['lenient']:.3f} of "
        f"{score['problems']} problems, read leniently. A gain over the base that is above that is not form."
    )


def save_figures(report: Report, folder: str | os.PathLike[str]) -> Path:
    """One PNG a section and `findings.json` into `folder`."""
    folder = Path(folder)
    for name, result in report.results.items():
        result.plot(folder / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"
    replace_file(folder / "findings.json", text.encode())
    return folder


def _mean(values: torch.Tensor) -> float | None:
    found = values[~values.isnan()]
    return found.double().mean().item() if len(found) else None


def _rank(scores: torch.Tensor, token: int) -> int:
    """How many tokens score higher."""
    return int((scores > scores[token]).sum())

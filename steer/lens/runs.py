"""What the commands of `steer lens` do, some in `*_runs.py`: measure, draw if asked, print lines or JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import steer
from steer import artifact
from steer.base_adapter import artifact_base
from steer.errors import SteerError
from steer.files import replace_file
from steer.lens.attention import attention_distance
from steer.lens.baselines import tuned_baselines
from steer.lens.composition import SCALES, as_trained, leave_one_out, likelihoods, scale_sweep
from steer.lens.composition import compose as pairs_of
from steer.lens.conditions import BASE, steered
from steer.lens.directions import checkpoints
from steer.lens.directions import directions as along
from steer.lens.feature_runs import features as features
from steer.lens.input_routes import input_routes
from steer.lens.inputs import (
    answer_limit,
    apply_control,
    chosen_layers,
    read_both,
    read_problems,
    read_prompt,
    read_subject,
    right_answers,
    write_answers,
)
from steer.lens.page import render
from steer.lens.pair_correlation import pair_correlations
from steer.lens.patching import ROUTES, frozen_routes, group_routes, head_routes
from steer.lens.patching import patch as patch_routes
from steer.lens.persistence import persistence as measure_persistence
from steer.lens.prose import markdown
from steer.lens.reading_runs import jacobian as jacobian
from steer.lens.reading_runs import logit as logit
from steer.lens.report import save_figures, study
from steer.lens.results import spread
from steer.lens.sampling import accuracies, complete, graded
from steer.lens.scale_maps import check_adaptive, scale_maps
from steer.lens.set_runs import conventions as conventions
from steer.lens.set_runs import downstream as downstream
from steer.lens.set_runs import entropy as entropy
from steer.lens.set_runs import spectrum as spectrum
from steer.lens.show import show as _show
from steer.lens.subject import Subject
from steer.lens.token_shift import prefix_substitution, token_shift
from steer.lens.transfer_matrix import Entry, transfer_matrix
from steer.models import load_model, load_tokenizer
from steer.outputs import output
from steer.tasks.grading import MathGrader


def shift(args: argparse.Namespace) -> None:
    if args.opening and args.temperature > 0:
        raise SteerError(
            f"--temperature {args.temperature:g} has no effect with --opening, whose answers are greedy; "
            "leave one of them out"
        )
    subject, problems = read_both(args)
    layers = chosen_layers(args, subject)
    if args.opening:
        with MathGrader() as grader:
            forced = prefix_substitution(
                subject, problems, args.opening, grader, layers=layers, label="answers"
            )
        rows = zip(forced.openings, forced.accuracy.tolist(), forced.share.tolist(), strict=True)
        gained = forced.steered > forced.base
        told = [
            f"{opening!r:24} {value:.3f}  {f'{share:.2f}' if gained else 'undefined share'} of the gain"
            for opening, value, share in rows
        ]
        _show(
            args,
            forced,
            iter([f"{'base':24} {forced.base:.3f}", *told, f"{'steered':24} {forced.steered:.3f}"]),
        )
        return
    answers = write_answers(subject, problems, args.temperature, args.seed)
    result = token_shift(subject, answers, layers=layers, label="token shift")

    def lines() -> Iterator[str]:
        yield f"share of the whole change that sits on the first generated token: {result.first_share:.3f}"
        for n, (variation, kl) in enumerate(zip(result.variation.tolist(), result.kl.tolist(), strict=True)):
            yield f"token {n:3}  total variation {variation:.3f}  KL {kl:.3f} nats"
        for token, _, value in [*result.top[:8], *result.bottom[:8]]:
            yield f"at the first generated token  {value:+.4f}  {token!r}"

    _show(args, result, lines())


def patch(args: argparse.Namespace) -> None:
    if args.qkv and args.heads is None:
        raise SteerError(f"--qkv {args.qkv} needs a layer whose heads are looked at; give --heads LAYER")
    subject, problems = read_both(args)
    effect_paths = ROUTES
    if args.heads is not None:
        layer = range(subject.decoder.num_hidden_layers)[_in(args.heads, subject.decoder.num_hidden_layers)]
        effect_paths = {**head_routes(subject, layer), **group_routes(subject, layer)}
        if args.qkv:
            effect_paths = input_routes(subject, layer, args.qkv)
    if args.frozen:
        effect_paths = frozen_routes(subject, min(chosen_layers(args, subject) or subject.layers))
    common: dict[str, Any] = {
        "layers": chosen_layers(args, subject),
        "others": args.others,
        "direction": args.direction,
    }
    rows = write_answers(subject, problems)
    if args.solve:
        with MathGrader() as grader:
            result = patch_routes(
                subject, rows, effect_paths, problems=problems, grader=grader, label="patching", **common
            )
    else:
        result = patch_routes(subject, rows, effect_paths, label="patching", **common)

    def lines() -> Iterator[str]:
        yield f"{'share of the effect':20} {'logit diff':>10} {'KL':>8}" + (
            "  accuracy" if args.solve else ""
        )
        solved = [""] * len(result.names)
        if result.accuracy is not None:
            solved = [f"{value:10.3f}" for value in result.accuracy.tolist()]
        shares = zip(
            result.names, result.recovered().tolist(), result.recovered("kl").tolist(), solved, strict=True
        )
        for name, share, kl, right in shares:
            yield f"{name:20} {share:10.3f} {kl:8.3f}{right}"

    _show(args, result, lines())


def _in(layer: int, num_hidden_layers: int) -> int:
    if not -num_hidden_layers <= layer < num_hidden_layers:
        raise SteerError(f"layer {layer} does not exist: the model has layers 0 to {num_hidden_layers - 1}")
    return layer


def attention(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    answers = write_answers(subject, problems)
    seed = args.seed + (args.control == "random")  # that control is the draw of args.seed
    result = attention_distance(subject, answers, draws=args.draws, seed=seed, label="attention maps")
    _show(args, result, result.lines())


def baselines(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    base, answers = complete(subject, subject.rows(problems), [BASE, steered(subject)], label="answers")
    with MathGrader() as grader:
        right = graded(subject, answers, problems, grader).tolist()
    layers = chosen_layers(args, subject) or spread(subject.layers, 8)
    more: dict[str, Any] = {"lengths": args.lengths} if args.lengths else {}
    more |= {"draws": args.draws, "seed": args.seed, "label": "baselines"}
    result = tuned_baselines(subject, base, answers, right, layers=layers, **more)
    _show(args, result, result.lines())


def persistence(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    layers = chosen_layers(args, subject)
    sources = {str(layer): [layer] for layer in layers} if layers else None
    result = measure_persistence(subject, write_answers(subject, problems), sources, label="persistence")

    def lines() -> Iterator[str]:
        for n, name in enumerate(result.sources):
            for layer, (one, two) in enumerate(
                zip(result.diff_diff[n].tolist(), result.diff_vector[n].tolist(), strict=True)
            ):
                yield f"vectors {name:4} after layer {layer:3}  Diff-Diff {one:6.3f}  Diff-Vector {two:6.3f}"

    _show(args, result, lines())


def _joint(source: str, subject: Subject) -> Subject:
    """The jointly trained set of `source`, in the place of the vectors of `subject`."""
    read = artifact.read(source)
    if not as_trained(read.config):
        raise SteerError(
            f"--joint {source} is the outcome of arithmetic with artifacts; give vectors as training saved "
            "them"
        )
    model = subject.model
    steer.detach(model)
    return replace(subject, vectors=steer.load(read, model, tokenizer=subject.tokenizer))


def compose(args: argparse.Namespace) -> None:
    if args.leave_one_out and (args.joint or args.likelihood):
        option = "--joint" if args.joint else "--likelihood"
        raise SteerError(f"{option} has no effect with --leave-one-out; leave one of them out")
    subject, problems = read_both(args)
    own_vectors = subject.vectors.effective()
    with MathGrader() as grader:
        if args.leave_one_out:
            chosen = chosen_layers(args, subject)
            out = leave_one_out(subject, problems, grader, label="leave one out", layers=chosen)
            rows = zip(out.layers, out.accuracy.tolist(), out.likelihood.tolist(), strict=True)
            told = [f"without {layer:3}  accuracy {a:.3f}  {p:7.3f} nats a token" for layer, a, p in rows]
            whole = f"with all     accuracy {out.whole:.3f}  {out.whole_likelihood:7.3f} nats a token"
            _show(args, out, iter([whole, *told]))
            return
        layers = chosen_layers(args, subject)
        if args.likelihood:
            right = right_answers(subject, problems, grader)
            result = pairs_of(subject, [], None, layers, right, "composition")
        else:
            result = pairs_of(subject, problems, grader, layers, label="composition")
        if args.control:
            result.joint = None  # a control was not trained
        if args.joint:
            trained = _joint(args.joint, subject)
            if args.likelihood:
                measured = likelihoods(trained, right, [steered(trained)], "jointly trained")
            else:
                measured = accuracies(trained, problems, [steered(trained)], grader, "jointly trained")
            result.joint = measured[0].item()
    correlated = result.correlations = pair_correlations(result, own_vectors)

    def lines() -> Iterator[str]:
        yield f"base {result.base:.3f}, all vectors {result.whole:.3f}, these together {result.together:.3f}"
        for i, layer in enumerate(result.layers):
            for j in range(i + 1):
                name = f"layer {layer}" if i == j else f"layers {result.layers[j]} and {layer}"
                score = "" if i == j else f"  score {result.told(i, j)}"
                yield f"{name:20} {result.pairs[i, j].item():.3f}{score}"
        for measure, against, told in correlated.rows():
            yield f"Spearman, {measure} with {against}: {told}"

    _show(args, result, lines())


def sweep(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    with MathGrader() as grader:
        result = scale_sweep(subject, problems, grader, args.scales or SCALES, label="scale")
    rows = zip(result.scales, result.accuracy.tolist(), result.tokens.tolist(), strict=True)
    _show(args, result, (f"scale {s:6g}  accuracy {a:.3f}  {t:6.1f} tokens" for s, a, t in rows))


def scales(args: argparse.Namespace) -> None:
    check_adaptive(artifact.read(args.artifact).config)
    subject = read_subject(args)
    problems = read_problems(args, subject.vectors.config.provenance)
    rows = write_answers(subject, problems)  # before the control, so that all are read on the same tokens
    apply_control(args, subject, problems)
    result = scale_maps(subject, rows)

    def lines() -> Iterator[str]:
        yield "coefficient over tokens; its size on prompts / answers; share of its variance between types"
        numbers = (result.mean, result.std, result.on_prompt, result.explained)
        for layer, *row in zip(result.layers, *(n.tolist() for n in numbers), strict=True):
            mean, std, on_prompt, explained = row
            yield f"layer {layer:3}  {mean:8.3f} +- {std:.3f}  {on_prompt:6.2f}  {explained:6.2f}"
        yield "mean coefficient by type of token, in standard deviations from the mean, averaged over layers"
        for name, value in zip(result.types, result.apart.tolist(), strict=True):
            if not math.isnan(value):
                yield f"{name:20} {value:.2f}"

    _show(args, result, lines())


def directions(args: argparse.Namespace) -> None:
    result = along(args.artifacts)

    def lines() -> Iterator[str]:
        for n, layer in enumerate(result.layers):
            told = [
                f"{norm:8.3f} ({cosine:+.2f})"
                for norm, cosine in zip(
                    result.norms[:, n].tolist(), result.to_last[:, n].tolist(), strict=True
                )
            ]
            yield f"layer {layer:3} {' '.join(told)}"

    _show(args, result, lines())


def transfer(args: argparse.Namespace) -> None:
    entries = []
    for source in args.artifacts:
        read = artifact.read(source)
        name = read.config.base_model_name_or_path
        if not name:
            raise SteerError(f"{source} does not name its base model, which the matrix needs")
        prompt = read_prompt(args, source, read)
        trust = args.trust_remote_code
        base, revision = artifact_base(read.config, trust_remote_code=trust)
        model = load_model(base, dtype="float32", revision=revision, trust_remote_code=trust)
        tokenizer = load_tokenizer(base, revision=revision, trust_remote_code=trust)
        entries.append(Entry(name, model, tokenizer, read, prompt))
    problems = read_problems(args, entries[0].artifact.config.provenance)
    with MathGrader() as grader:
        options = {
            "max_new_tokens": max(answer_limit(args, entry.artifact) for entry in entries),
            "batch_size": args.batch_size,
            "force": args.force,
            "seed": args.seed,
        }
        made = transfer_matrix(entries, problems, grader, label="transfer", **options)

    def lines() -> Iterator[str]:
        for i, name in enumerate(made.names):
            scores = " ".join(f"{score:7.3f}" for score in made.score[i].tolist())
            yield f"{name:32} {scores}"
        yield f"{'random, own length':32} {' '.join(f'{s:7.3f}' for s in made.random_score.tolist())}"
        yield from (f"{pair}: {why}" for pair, why in made.refused.items())
        for name, score in zip(made.names, made.score.diagonal().tolist(), strict=True):
            if math.isnan(score):
                yield f"{name}: scores are undefined (nan), since its own vectors do not gain"

    _show(args, made, lines())


def report(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    with MathGrader() as grader:
        run = checkpoints(args.checkpoints or Path(args.artifact).parent)
        result = study(subject, problems, grader, checkpoints=run, seed=args.seed)
    with ExitStack() as outputs:
        page = outputs.enter_context(output(args.out, args.replace))
        if args.figures:
            outputs.enter_context(output(args.figures, args.replace, option="--figures", folder=True))
            folder = save_figures(result, args.figures)
            replace_file(folder / "findings.md", markdown(result).encode())
        replace_file(page, render(result).encode())
    if args.json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
        return
    for finding in result.findings:
        print(f"{finding.verdict:21} {finding.claim}")
    print(f"page: {page}")

"""What `steer lens features` does: vectors, an SAE and texts from the command line, and the tables."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from steer.errors import SteerError
from steer.evaluation.neutral_text import prose
from steer.extract.rows import Row
from steer.lens.features import Features, Reading, check_upstream, read_features
from steer.lens.inputs import chosen_layers, read_problems, read_subject, write_answers
from steer.lens.show import show
from steer.lens.subject import Subject
from steer.models import context_length
from steer.prompt import recorded
from steer.sae import load_sae
from steer.sae.place import sae_place
from steer.sae.texts import Texts

LENGTH = 256  # tokens of a text that are read
# The first token, an attention sink, and the one after it, which has nothing else before it.
PROMPT = 2


def features(args: argparse.Namespace) -> None:
    sae = load_sae(args.sae)
    subject = read_subject(args)
    layer, site = sae_place(sae, subject.model, args.sae, args.sae_layer, args.sae_site)
    layers = chosen_layers(args, subject) or subject.layers
    if missing := sorted(set(layers) - set(subject.layers)):
        raise SteerError(f"layers {missing} have no vector; the artifact steers {subject.layers}")
    check_upstream(subject, layers, layer, site, args.sae)
    rows, told = _texts(args, subject)
    result = read_features(
        subject,
        sae.to(subject.device),
        args.sae,
        layer,
        site,
        rows,
        layers=layers,
        draws=args.draws,
        top=args.top,
        seed=args.seed,
        label="random vectors",
    )
    show(args, result, _lines(result, told, subject.site))


def _texts(args: argparse.Namespace, subject: Subject) -> tuple[list[Row], str]:
    """
    The texts, and what they are: those that are asked for; else the steered model's answers to problems,
    given or held out by the run of the vectors; without a run the neutral text of the package.
    """
    config = subject.vectors.config
    problems = args.data or recorded(config.provenance, "run").get("train_data")
    if args.texts and args.data:
        raise SteerError("give --texts or --data, not both: features are measured on the one or the other")
    if problems and not args.texts:
        rows = write_answers(subject, read_problems(args, config.provenance))
        return rows, "answers of the steered model"
    if config.positions not in ("all", "completion"):
        raise SteerError(
            f"these vectors act at positions={config.positions!r}, which a text without a prompt does not "
            "have; give problems with --data"
        )
    texts = itertools.islice(Texts(args.texts), args.problems) if args.texts else prose()
    limit = min(LENGTH, context_length(subject.model.config) or LENGTH)
    cut = [subject.tokenizer(text, verbose=False)["input_ids"][:limit] for text in texts]
    rows = [Row(tuple(ids), PROMPT) for ids in cut if len(ids) > PROMPT]
    if not rows:
        raise SteerError("the texts have no tokens to measure features at; give longer ones")
    return rows, "texts" if args.texts else "paragraphs of neutral text"


def _lines(result: Features, told: str, site: str) -> Iterator[str]:
    where = f"{result.site} of layer {result.layer}"
    yield f"SAE       {result.sae}, {where}"
    if result.direct:
        yield f"direction the vector at {where} itself, length {result.length:.4g}"
    else:
        layers = ", ".join(map(str, result.layers))
        yield (
            f"direction the mean change at {where} that the vectors ({site} of layers {layers}) make, length "
            f"{result.length:.4g}"
        )
    yield f"texts     {result.texts} {told}, {result.tokens} tokens"
    yield f"random    {result.draws} sets of vectors of equal length; in brackets 5 % to 95 % of them"
    yield from _table("writes", result.writes, {"projection": "projection"})
    if result.reads is None:
        yield ""
        yield "reads: a KronSAE's feature has no encoder row of its own"
    else:
        yield from _table("reads", result.reads, {"change of pre-activation": "change"})
    columns = {"off": "off", "on": "on", "fires off": "fires_off", "fires on": "fires_on"}
    yield from _table("activation on the texts", result.activation, columns)


def _table(name: str, reading: Reading, columns: dict[str, str]) -> Iterator[str]:
    own, median, low, high = reading.strongest
    yield ""
    yield (
        f"{name}: {reading.measure}; strongest {own:.3g}, of random vectors {median:.3g} "
        f"[{low:.3g}, {high:.3g}]"
    )
    yield f"{'feature':>8} {'value':>9}  {'random':22} {'p':>6}" + "".join(
        f"  {column:>10}" for column in columns
    )
    for n, feature in enumerate(reading.features):
        band = f"[{reading.low[n].item():+.3g}, {reading.high[n].item():+.3g}]"
        more = "".join(
            f"  {reading.extra[key][n].item():{max(10, len(column))}.3g}" for column, key in columns.items()
        )
        words = " ".join(map(repr, reading.promotes[n]))
        value, p = reading.value[n].item(), reading.p[n].item()
        yield f"{feature:8} {value:+9.3g}  {band:22} {p:6.3f}{more}  {words}"

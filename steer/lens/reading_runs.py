"""What the commands of `steer lens` do that read vectors through the unembedding: `logit` and `jacobian`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from steer.base_adapter import base_source
from steer.config import SteeringConfig
from steer.lens.inputs import apply_control, read_subject
from steer.lens.jacobian import JacobianLens, fit, sample_windows
from steer.lens.languages import classifier, languages
from steer.lens.logit_lens import logit_lens
from steer.lens.scripts import ScriptCounts, count_scripts
from steer.lens.show import show
from steer.models import load_model, load_tokenizer
from steer.sae.texts import Texts
from steer.sites import find_decoder


def logit(args: argparse.Namespace) -> None:
    subject = read_subject(args)
    apply_control(args, subject)
    vectors, through = subject.vectors.added(), None
    if args.jacobian is not None:
        lens = JacobianLens.load(args.jacobian)
        lens.check(subject.model, subject.vectors.config)
        vectors, through = lens.transport(vectors), lens.told()
        print(through, file=sys.stderr)
    result = logit_lens(
        subject.model,
        subject.tokenizer,
        vectors,
        reading=args.reading,
        final_norm=not args.no_final_norm,
        top=args.top or (50 if args.scripts else 10),
    )
    result.jacobian = through
    if args.scripts:
        counts = count_scripts(result, subject.tokenizer)
        if find_spec("py3langid"):
            counts.languages = languages(result, subject.tokenizer, classifier(), seed=args.seed)
        show(args, counts, _script_lines(counts, result.top.shape[1]))
        return

    def lines() -> Iterator[str]:
        for layer, top, bottom in zip(result.layers, result.top_tokens, result.bottom_tokens, strict=True):
            yield f"layer {layer:3}  + {' '.join(map(repr, top))}"
            yield f"{'':9}  - {' '.join(map(repr, bottom))}"

    show(args, result, lines())


def jacobian(args: argparse.Namespace, going_on: bool) -> None:
    name, revision = base_source(args.model, args.base_adapter, args.revision, args.trust_remote_code)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
    texts = Texts(args.texts)
    sample = sample_windows(texts, tokenizer, args.limit, args.length, args.skip)
    start = JacobianLens.load(args.out) if going_on else None
    model = load_model(name, dtype=args.dtype, revision=revision, trust_remote_code=args.trust_remote_code)
    layers = SteeringConfig(layers=args.layers).resolve_layers(find_decoder(model).num_hidden_layers)
    lens = start
    options: dict[str, Any] = {"site": args.site, "batch_size": args.batch_size, "label": "Jacobian lens"}
    steps = fit(model, sample, layers, start=start, **options)
    for lens in steps:
        lens.save(args.out)
    assert lens is not None
    print(f"{lens.told()}: {args.out}")


def _script_lines(counts: ScriptCounts, top: int) -> Iterator[str]:
    yield f"of the {top} most promoted and the {top} most suppressed tokens of each layer, in a script other"
    yield f"than plain Latin; of the whole vocabulary {counts.foreign_base:.1%}"
    sides = zip(counts.layers, counts.foreign("promoted"), counts.foreign("suppressed"), strict=True)
    for layer, promoted, suppressed in sides:
        yield f"layer {layer:3}  promoted {promoted:6.1%}  suppressed {suppressed:6.1%}"
    if counts.languages is None:
        yield 'languages of the tokens: pip install "steer-rl[langid]"'
        return
    found = counts.languages
    yield f"by the language classifier, not English; of the vocabulary {found.foreign_base:.1%}"
    for layer, *both in zip(
        found.layers, found.foreign("promoted"), found.foreign("suppressed"), strict=True
    ):
        promoted, suppressed = ("   -  " if x != x else f"{x:6.1%}" for x in both)
        yield f"layer {layer:3}  promoted {promoted}  suppressed {suppressed}"
    for name, decided, share, kappa, _ in found.rows():
        yield f"script and language agree, {name:10}  {share:.3f} of {decided} tokens (kappa {kappa:.2f})"

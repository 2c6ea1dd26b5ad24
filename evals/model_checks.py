"""
What steering does on one tiny model, capability by capability, against `evals.model_oracle`.

Each check returns None where everything is right, or an outcome with a remark, such as why a fast path was
replaced by the plain one; it raises `Wrong` for a result that differs from the oracle's. `SteerError` means
that the model is refused for a named reason; any other exception is a crash.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import steer
from evals import model_exports
from evals import model_oracle as oracle
from evals.architectures import tiny
from evals.model_outcomes import TOLERANCE, Outcome, Wrong, far, same
from evals.model_training import scored, updated
from steer import SteerError, SteeringConfig, SteeringVectors
from steer.artifact import Artifact
from steer.errors import one_line
from steer.generation import cpu
from steer.generation.decoding import pad_left
from steer.generation.sampler import Sampling, rollout
from steer.generation.verify import fast_paths

ROW = torch.tensor([5, 17, 40, 9, 33, 61, 22, 8, 70, 12, 45, 3])
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


Check = Callable[[str], Outcome | None]


def check(model_type: str) -> dict[str, Outcome]:
    """All checks of one model type by name, in the order of `CHECKS`."""
    try:
        tiny(model_type)
    except Exception as error:  # whatever transformers raises: the model is not there to be checked
        return dict.fromkeys(CHECKS, Outcome("not built", f"{type(error).__name__}: {one_line(error)}"))
    return {name: _outcome(run, model_type) for name, run in CHECKS.items()}


def _outcome(run: Check, model_type: str) -> Outcome:
    try:
        return run(model_type) or Outcome("works")
    except SteerError as error:
        return Outcome("refused", one_line(error))
    except Wrong as error:
        return Outcome("wrong", one_line(error))
    except Exception:  # what a user would see as a traceback is what this table looks for
        return Outcome("crash", traceback.format_exc())


# ---- vectors in the model


def _attached(model: PreTrainedModel, zero: bool = False, **config: Any) -> SteeringVectors:
    """Vectors of random values, or of zeros."""
    vectors = steer.attach(model, SteeringConfig(**config))
    if not zero:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in vectors.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return vectors


def _blocks(vectors: SteeringVectors) -> list[Any]:
    """The decoder layers, by the names that the vectors say they have."""
    names = [name for name in vectors.named_parameters() if name.endswith(".steering.vector")]
    return [vectors.model.get_submodule(name.removesuffix(".steering.vector")) for name in names]


def _attach(model_type: str) -> None:
    model = tiny(model_type)
    vectors = steer.attach(model)
    config = model.config.get_text_config()
    layers = getattr(
        config, "num_layers", config.num_hidden_layers
    )  # LongCat's are two layers each for a cache
    if vectors.num_hidden_layers != layers:
        raise Wrong(f"vectors in {vectors.num_hidden_layers} layers of a model of {layers}")
    if any(p.requires_grad for n, p in model.named_parameters() if ".steering." not in n):
        raise Wrong("the base is not frozen")


@torch.no_grad()
def _zeros(model_type: str) -> None:
    model = tiny(model_type)
    base = oracle.logits(model, ROW)
    vectors = _attached(model, zero=True)
    if not torch.equal(oracle.logits(model, ROW), base):
        raise Wrong("zero vectors change the logits")
    for parameter in vectors.parameters():
        parameter.add_(0.5)
    if torch.equal(oracle.logits(model, ROW), base):
        raise Wrong("vectors change nothing")
    with vectors.disabled():
        if not torch.equal(oracle.logits(model, ROW), base):
            raise Wrong("the base inside disabled() differs")
    steer.detach(model)
    if not torch.equal(oracle.logits(model, ROW), base):
        raise Wrong("the model after detach() differs")


@torch.no_grad()
def _site(model_type: str, site: str) -> None:
    model = tiny(model_type)
    base = oracle.logits(model, ROW)
    vectors = _attached(model, site=site)
    steered = oracle.logits(model, ROW)
    blocks, s = _blocks(vectors), [p.detach().clone() for p in vectors.parameters()]
    for layer in range(vectors.num_hidden_layers):
        vectors.set_tensors({n: s[i] * (i == layer) for i, n in enumerate(vectors.named_parameters())})
        if far(oracle.logits(model, ROW), base) < TOLERANCE:
            raise Wrong(f"the vector of layer {layer} changes nothing")
    steer.detach(model)
    if site == "resid_mid":
        return _moves_mid_stream(model_type, s)
    modules: list[Any] = (
        blocks if site.startswith("resid") else [oracle.sublayer(block, site) for block in blocks]
    )
    if None in modules:
        raise Wrong(f"{site} is steered, but not every layer has one such module")
    with oracle.added(modules, s, before=site == "resid_pre"):
        expected = oracle.logits(model, ROW)
    same(steered, expected, f"logits steered at {site}")


def _moves_mid_stream(model_type: str, s: list[torch.Tensor]) -> None:
    """What the module after the attention reads moves by s, in each layer alone."""
    model = tiny(model_type)
    vectors = _attached(model, site="resid_mid", zero=True)
    for layer, block in enumerate(_blocks(vectors)):
        reader = oracle.mid_reader(model, block, ROW)
        if reader is None:
            raise Wrong(f"resid_mid is steered, but no module of layer {layer} reads the stream between")
        seen: list[torch.Tensor] = []
        with oracle.recorded(reader, seen, inputs=True):
            oracle.logits(model, ROW)
            vectors.set_tensors({n: s[i] * (i == layer) for i, n in enumerate(vectors.named_parameters())})
            oracle.logits(model, ROW)
            vectors.set_tensors({n: torch.zeros_like(t) for n, t in vectors.tensors().items()})
        same(
            seen[1] - seen[0], s[layer].expand_as(seen[0]), f"movement of the middle stream of layer {layer}"
        )


@torch.no_grad()
def _adaptive(model_type: str) -> None:
    model = tiny(model_type)
    base = oracle.logits(model, ROW)
    vectors = _attached(model, kind="adaptive")
    steered = oracle.logits(model, ROW)
    blocks, tensors = _blocks(vectors), vectors.tensors()
    steer.detach(model)
    for block, name in zip(blocks, list(tensors)[::2], strict=True):
        down = oracle.down_projection(block, len(tensors[name]))
        if down is None:
            raise Wrong("adaptive vectors where no layer's MLP ends in a linear module")
        write, read = tensors[name], tensors[name.removesuffix("vector") + "readout"]
        change = torch.outer(write, read)  # W x + (a . x) b = (W + b a^T) x
        weight: Any = down.weight
        weight += change if weight.shape == change.shape else change.T
    same(steered, oracle.logits(model, ROW), "logits of adaptive vectors")
    if far(steered, base) < TOLERANCE:
        raise Wrong("adaptive vectors change nothing")


@torch.no_grad()
def _shared(model_type: str) -> None:
    model = tiny(model_type)
    vectors = _attached(model, kind="shared", rank=2)
    steered = oracle.logits(model, ROW)
    tensors = vectors.tensors()
    (directions,) = [t for n, t in tensors.items() if n.endswith("directions")]
    s = [t @ directions for n, t in tensors.items() if n.endswith("mix")]
    steer.detach(model)
    blocks = _blocks(_attached(model, zero=True))
    with oracle.added(blocks, s):
        same(steered, oracle.logits(model, ROW), "logits of shared vectors")


# ---- positions, files

COLUMNS: dict[str, Callable[[int], slice]] = {
    "prompt": lambda n: slice(0, n),
    "last_prompt": lambda n: slice(n - 1, n),
    "completion": lambda n: slice(n, None),
    "first_completion": lambda n: slice(n, n + 1),
}
NEW = 5
PROMPTS = [[5, 17, 40, 9, 33, 61, 22], [8, 70, 12], [5, 17, 40, 9, 33, 61, 22], [45, 3, 9, 77]]


@torch.no_grad()
def _positions(model_type: str) -> None:
    """Each of `COLUMNS` in one pass with `prompt_length`."""
    model = tiny(model_type)
    blocks = _blocks(_attached(model, zero=True))
    steer.detach(model)
    n = len(PROMPTS[0])
    for positions, columns in COLUMNS.items():
        vectors = _attached(model, positions=positions)
        s = [p.detach().clone() for p in vectors.parameters()]
        with vectors.prompt_length(n):
            steered = oracle.logits(model, ROW)
        steer.detach(model)
        with oracle.added(blocks, s, only=columns(n)):
            same(steered, oracle.logits(model, ROW), f"logits with positions={positions}")


@torch.no_grad()
def _generating(model_type: str) -> Outcome | None:
    """
    Each of `COLUMNS` in generate() with its cache, on a left-padded batch: as generate() does with modules
    that count their columns. Those are compared with passes over whole rows, which some models' caches
    differ from.
    """
    model = tiny(model_type)
    blocks = _blocks(_attached(model, zero=True))
    steer.detach(model)
    prompts, n = PROMPTS[:2], len(PROMPTS[0])
    whole = True
    for positions, columns in COLUMNS.items():
        vectors = _attached(model, positions=positions)
        s = [p.detach().clone() for p in vectors.parameters()]
        steered, ids = _generate(model, prompts)
        steer.detach(model)
        with oracle.added(blocks, s, only=columns(n), counting=True):
            expected, same_ids = _generate(model, prompts)
        if ids != same_ids:
            raise Wrong(f"generate() with positions={positions} writes {ids}, expected {same_ids}")
        same(steered, expected, f"logits of generate() with positions={positions}")
        for row, prompt in enumerate(prompts):
            with oracle.added(blocks, s, only=columns(len(prompt))):
                passed = oracle.logits(model, torch.tensor([*prompt, *ids[row]]))[len(prompt) - 1 : -1]
            whole &= far(expected[row], passed) <= TOLERANCE
    if not whole:
        return Outcome(
            "works", "transformers' generate() of a padded batch differs from whole passes over its rows"
        )
    return None


def _generate(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits (rows, NEW, vocabulary) that greedy generate() chose by, and the tokens chosen."""
    ids, mask = pad_left(prompts, torch.device("cpu"))
    made = model.generate(  # type: ignore[operator]  # a mixin of the model's class
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.logits, 1), made.sequences[:, -NEW:].tolist()


@torch.no_grad()
def _files(model_type: str) -> None:
    model = tiny(model_type)
    vectors = _attached(model)
    steered = oracle.logits(model, ROW)
    with tempfile.TemporaryDirectory() as folder:
        vectors.save(folder)
        fresh = tiny(model_type)
        steer.load(folder, fresh)
    if not torch.equal(oracle.logits(fresh, ROW), steered):
        raise Wrong("loaded vectors give other logits")


@torch.no_grad()
def _exported(model_type: str, through: Callable[..., torch.Tensor]) -> None:
    """Vectors at resid_post: logits of what was written, without `steer` where the format needs none."""
    model = tiny(model_type)
    base = oracle.logits(model, ROW)
    vectors = _attached(model)
    steered = oracle.logits(model, ROW)
    made = Artifact(vectors.config, vectors.tensors())
    steer.detach(model)
    with tempfile.TemporaryDirectory() as folder:
        got = through(made, model, ROW, Path(folder))
    same(got, steered, "logits of the exported vectors")
    if far(steered, base) < TOLERANCE:
        raise Wrong("vectors change nothing")


# ---- training


@torch.no_grad()
def _sampling(model_type: str) -> Outcome | None:
    """Greedy completions of a padded batch with a repeated prompt, as evaluation and training draw them."""
    model = tiny(model_type)
    _attached(model)
    with cpu.grouped(model):
        drawn = rollout(model, PROMPTS, Sampling(NEW, (), temperature=0.0))
    for prompt, one in zip(PROMPTS, drawn, strict=True):
        ids, logps = one.ids, one.logps
        row = torch.tensor([*prompt, *ids])
        scores = torch.log_softmax(oracle.logits(model, row), -1)[len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        if len(ids) != NEW or (scores.amax(-1) - chosen).max() > TOLERANCE:
            raise Wrong(f"sampled {ids}, the most likely are {oracle.greedy(model, prompt, NEW)}")
        same(torch.tensor(logps), chosen, "log-probabilities of sampled tokens")
    return _plainly(model, "attention", "sampler")


def _scoring(model_type: str) -> Outcome | None:
    model = tiny(model_type)
    _attached(model)
    completions = [[9, 4, 77], [30, 31, 32, 33, 34], [60, 9], [11, 12, 13, 14]]
    got = scored(model, PROMPTS, completions)
    with torch.no_grad():
        for values, prompt, completion in zip(got, PROMPTS, completions, strict=True):
            expected = oracle.log_probs(model, prompt, completion)
            same(values[: len(completion)], expected, "log-probabilities of completions")
    return _plainly(model, "attention", "scorer", "head")


def _update(model_type: str) -> Outcome | None:
    """One update by plain gradient descent: what every vector moved by is the gradient of the naive loss."""
    for plainly in (False, True):
        model = tiny(model_type)
        vectors = _attached(model)
        before = vectors.tensors()
        step = updated(model, plainly)
        moved = [before[n] - t for n, t in vectors.tensors().items()]
        vectors.set_tensors(before)
        tokens = sum(len(row.completion) for row in step)
        loss = torch.zeros(())
        for row in step:
            loss = loss - row.advantage * oracle.log_probs(model, row.prompt, row.completion).sum() / tokens
        expected = torch.autograd.grad(loss, vectors.parameters())
        what = "the update on the plain path" if plainly else "the update"
        same(torch.cat(moved), torch.cat(expected), what)
        if not torch.cat(expected).abs().max() > 0:
            raise Wrong("the gradient is zero")
    return _plainly(model, "attention", "sampler", "scorer", "head")


def _plainly(model: PreTrainedModel, *paths: str) -> Outcome | None:
    """Why some of these fast paths are not taken on `model`; None where all are."""
    reasons = dict.fromkeys(reason for path in paths if (reason := getattr(fast_paths(model), path)))
    return Outcome("plain path", "; ".join(reasons)) if reasons else None


CHECKS: dict[str, Check] = {
    "attach": _attach,
    "zeros": _zeros,
    **{site: partial(_site, site=site) for site in SITES},
    "adaptive": _adaptive,
    "shared": _shared,
    "positions": _positions,
    "generate": _generating,
    "files": _files,
    "peft": partial(_exported, through=model_exports.through_peft),
    "checkpoint": partial(_exported, through=model_exports.through_checkpoint),
    "gguf": partial(_exported, through=model_exports.through_gguf),
    "sampling": _sampling,
    "scoring": _scoring,
    "update": _update,
}

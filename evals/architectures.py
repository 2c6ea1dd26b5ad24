"""
Tiny random models of every decoder-only architecture that the installed transformers has, made by one rule:
the default configuration of a model type, with every size in it replaced by a small one of the same meaning.

`causal_lm_types()` is the list, `tiny(model_type)` builds one: every kind of layer that the architecture
mixes, width 32, a vocabulary of 97, float32, evaluation mode, weights large enough that different tokens give
clearly different logits.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

LAYERS = 4
VOCABULARY = 97
# Standard deviation of the weights: 0.3 * sqrt(32) = 1.7, so that a layer's effect is as large as its input.
SPREAD = 0.3
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What a configuration field is set to, by the first pattern that matches its whole name. Fields that an
# architecture lacks, or leaves at None (except those of SET_ANYWAY), are not touched.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size(_per_layer_input)?|n_vocab", VOCABULARY),
    (r"ngram_vocab_size_base|encoder_hash_byte_group_vocab", 64),
    (r"(num_)?(hidden_|decoder_)?layers|n_layers?|num_blocks|num_layers_per_stack|depth", LAYERS),
    (r"num_kv_shared_layers", LAYERS // 2),
    (r"hidden_size_per_layer_input|ple_embed_dim|d_rel|emb_rank", 8),
    (r"(hidden|embedding|attention_hidden|word_embed_proj|backbone_hidden|lru)_?(size|dim|width)", 32),
    (r"(hidden_size_global|d_model|n_embd|n_embed|lru_width|mamba_intermediate)", 32),
    (r"out_hidden_size|projector_(in|out)put_dim|vision_output_dim|output_channels", 32),
    (r"(moe|expert|shared|shared_expert|moe_shared_expert|router)_?(ffn)?_?(hidden|intermediate)_size", 16),
    (
        r"(dense_)?intermediate_size(_mlp)?|ffn_hidden_size|(decoder_)?ffn_dim|dff|dim_ff|n_inner|d_inner|mlp_dim",
        48,
    ),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"(num_|n_|decoder_|swa_num_|conf_num_)?(attention_)?heads?(_per_layer)?|num_heads", 4),
    (r"linear_num_(value_)?heads", 4),
    (r"((swa_)?num_|num_global_)?(key_value|kv)_heads|kv_n_heads|linear_num_key_heads", 2),
    # As many as the smallest published: with few heads scores are often equal, all zero.
    (r"index_n_heads", 16),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", 12),
    (r"attention_head_dim", 16),
    (r".*head_dim|d_head|dim_head|kv_channels|mamba_d_head|mamba_headdim", 8),
    (r"(q|kv|o)_lora_rank|hc_lowrank|adapter_rank|gated_norm_rank", 16),
    (r"laurel_rank|time_step_rank|mamba_dt_rank", 4),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_d_ssm", 64),
    (r"(num_|n_|moe_num_|num_local_|n_routed_)experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_k|moe_top_?k|top_k_experts", 2),
    (r"n_groups?|o_groups|mamba_n_?groups", 2),
    (r"topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_mem_blocks", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"(sliding|attention|local)_window(_size)?|window_size|local_attention|attention_chunk_size", 8),
    (r"keep_window_size|index_topk|(mamba_)?chunk_size|block_size", 8),
    (r"index_block_size", 4),
    (r"index_topk_blocks|split_ngram_parts|heads_per_ngram", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|rel_extent", 128),
    (r"block_multiple_of|ffn_round_up_to_multiple_of|make_ngram_vocab_size_divisible_by", 8),
    (r"image_size|crop_size", 32),
    (r"patch_size", 16),
]
# Often None, which means "as many as there are heads" or "hidden_size / heads".
SET_ANYWAY = re.compile(
    r"head_dim|num_key_value_heads|n_inner|ffn_hidden_size|n_(routed|shared)_experts|num_experts_per_tok"
)
# Factors that are 1 by default and something else in published checkpoints: a fault there must show.
FACTOR = re.compile(r"(?!depthwise).*_multiplier|.*_(alpha|beta)_factor|logits_scaling")
NOISE = re.compile(r".*(drop|jitter).*")

# What cannot be told from a field's name.
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # layer types that published checkpoints mix and the default leaves out
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    # fields that every checkpoint has and the default lacks
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "Qwen4ExpTextConfig": {**_QSA, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 8},
    # sizes that are computed, or must agree with others
    "GPTNeoConfig": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "Gemma4TextConfig": {"global_head_dim": 16},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
    "Mamba2Config": {"num_heads": 8},
    "xLSTMConfig": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
}


def causal_lm_types() -> list[str]:
    """
    The model types with a causal language model in the installed transformers, alphabetically. Left out by
    what transformers says of them: encoder-decoders, encoders (types with a masked language model), drafters
    of speculative decoding, which read the keys and values of another model, and second names of one
    configuration.
    """
    found: dict[type, str] = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = CONFIG_MAPPING[name]
        if hasattr(kind, "backbone_hidden_size"):  # of the model that it drafts for
            continue
        encoder_decoder = (
            name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
            or "decoder" in kind.sub_configs
            or kind().is_encoder_decoder
        )
        if encoder_decoder or name in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            continue
        if kind not in found or kind.model_type == name:
            found[kind] = name
    return sorted(found.values())


def tiny(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """
    A random model of this type, always the same for a seed: float32, in evaluation mode, without dropout.

    Args:
        model_type: one of `causal_lm_types()`.
        seed: of the weights.
        changes: fields of the configuration that are to have another value.

    Returns:
        The model, of `LAYERS` layers of width 32 with `VOCABULARY` tokens unless `changes` says otherwise.
        Weights that are initialised to zeros or ones get small noise, so that a bias or a norm's gain that is
        left out or applied twice shows; so does the embedding of the padding token.
    """
    config = tiny_config(CONFIG_MAPPING[model_type], **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                flat = parameter.flatten()
                if flat.is_floating_point() and bool((flat == flat[:1]).all()):
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:  # zero, else
                    module.weight[module.padding_idx].normal_(std=SPREAD)
    return model.eval()


def tiny_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """The small configuration of a class of configurations; `changes` are set as they are."""
    default = dict(vars(kind()))
    depth = changes.get("num_hidden_layers", LAYERS)
    renamed = getattr(kind, "attribute_map", {})
    default |= {name: default[kept] for name, kept in renamed.items() if kept in default}
    declared = {f.name: f.default for f in dataclasses.fields(kind) if f.name in default}
    small = {name: _small(name, default[name], declared, default, depth) for name in declared}
    small = {name: value for name, value in small.items() if value is not default[name]}
    small |= {name: value for name, value in TOKENS.items() if name in default}
    if "kv_lora_rank" in declared and "num_key_value_heads" in declared:  # all heads read one latent
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "head_dim" in declared and default["head_dim"] == default.get(
        "qk_rope_head_dim", 0
    ):  # the rotated part
        small["head_dim"] = small["qk_rope_head_dim"]
    small |= EXCEPTIONS.get(kind.__name__, {})
    small |= {name if name in declared else renamed.get(name, name): value for name, value in changes.items()}
    return kind(**small)


def _small(name: str, value: Any, declared: dict[str, Any], default: dict[str, Any], depth: int) -> Any:
    """What a field of a default configuration becomes; `value` itself where it says nothing about size."""
    if isinstance(value, PreTrainedConfig):
        return tiny_config(type(value))
    if isinstance(value, (list, tuple)):
        counts = [default.get(field) for field in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")]
        return _cut(name, value, depth) if value and len(value) in counts else value
    if name == "is_decoder":
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        return value
    if name in ("initializer_range", "init_std", "initializer_factor"):
        return SPREAD
    if NOISE.fullmatch(name):
        return value and type(value)(0)
    if FACTOR.fullmatch(name):
        return 0.5 if value == 1 else value
    unset = value is None or (declared[name] is None and SET_ANYWAY.fullmatch(name))
    if (
        SET_ANYWAY.fullmatch(name)
        if unset
        else isinstance(value, int) and value > 1 and declared[name] is not None
    ):
        return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    return value


def _cut(name: str, value: Any, depth: int) -> Any:
    """
    A list with an entry for each layer, cut to `depth` so that every kind of entry is there: in the order in
    which they first appear, again and again.
    """
    if list(value) == list(range(len(value))):  # indices of layers
        return list(range(depth))
    kinds = list(dict.fromkeys(_small(name, entry, {name: entry}, {}, depth) for entry in value))
    return [kinds[i % len(kinds)] for i in range(depth)]

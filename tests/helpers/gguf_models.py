"""GGUF models for llama.cpp to run: tiny Hugging Face ones, written here, and the bundled real ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def write_gguf(model: PreTrainedModel, path: Path, quantised: bool = False) -> Path:
    """
    `model` (llama or qwen2) as llama.cpp's own converter writes it, without a vocabulary: in float32, or the
    matrices in Q8_0.
    """
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and config.model_type == "llama":
                tensor = pairs_together(tensor, heads)
        values, name = tensor.contiguous().numpy(), names.get_name(name, (".weight", ".bias"))
        if quantised and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs_together(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head that are rotated together, i and i + half, at 2i and 2i + 1: Llama's order in GGUF."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + i + side * half for h in range(heads) for i in range(half) for side in (0, 1)]
    return rows[order]

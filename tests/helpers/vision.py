"""Tiny random vision-language models, and a prompt with an image for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from evals.architectures import LAYERS, tiny_config

IMAGE = 90  # the token that stands for a piece of the image
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
# By model type: fields of the whole, of the text model and of the vision tower; how many tokens an image is.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "qwen2_vl": (_QWEN, {}, {"embed_dim": 32, "hidden_size": 32}, 4),
    "qwen2_5_vl": (_QWEN, {}, {"fullatt_block_indexes": [1, 3], "window_size": 64}, 4),
    "qwen3_vl": (_QWEN, {}, {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}, 4),
    "gemma3": ({"image_token_index": IMAGE, "mm_tokens_per_image": 4}, {}, {}, 4),
    "llava": ({"image_token_index": IMAGE, "image_seq_length": 4}, {}, {}, 4),
    "idefics3": ({"image_token_id": IMAGE}, {}, {}, 1),
    "smolvlm": ({"image_token_id": IMAGE}, {}, {}, 1),
}


@dataclass(frozen=True)
class Seeing:
    """A model, and the inputs of a prompt of two rows: `text`, then with an image in the middle, `seen`."""

    model: PreTrainedModel
    text: dict[str, torch.Tensor]
    seen: dict[str, torch.Tensor]


def tiny_seeing(model_type: str, seed: int = 0) -> Seeing:
    """`tiny_vision` and its inputs."""
    model = tiny_vision(model_type, seed)
    generator = torch.Generator().manual_seed(5)
    count = FAMILIES[model_type][3]
    words = torch.randint(3, 80, (1, 9), generator=generator)
    image = torch.full((1, count), IMAGE)
    qwen = model_type.startswith("qwen")
    border = torch.tensor([[92], [93]]) if qwen else torch.tensor([[85], [86]])
    ids = torch.cat([words[:, :4], border[:1], image, border[1:], words[:, 4:]], 1)
    if qwen:  # a row for each patch of 16 x 16, in three colours and two moments
        pixels = torch.randn(16, 3 * 2 * 16 * 16, generator=generator)
    else:
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
    seen = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    if qwen:
        seen["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        seen["mm_token_type_ids"] = (ids == IMAGE).int()
    if model_type == "gemma3":
        seen["token_type_ids"] = (ids == IMAGE).int()
    if model_type in ("idefics3", "smolvlm"):
        seen["pixel_values"] = pixels[None]
    return Seeing(model, {"input_ids": words, "attention_mask": torch.ones_like(words)}, seen)


def tiny_vision(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model of this type: `LAYERS` layers of width 32 in the text model, 97 tokens."""
    whole, text, vision, _ = FAMILIES[model_type]
    config: Any = tiny_config(CONFIG_MAPPING[model_type])
    for name, value in whole.items():
        setattr(config, name, value)
    for part, changes in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in changes.items():
            setattr(part, name, value)
    if model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        config.text_config.rope_parameters = {
            **config.text_config.rope_parameters,
            "mrope_section": [2, 1, 1],
        }
    for name, value in TOKENS.items():
        setattr(config, name, value)
        setattr(config.text_config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # a projection of zeros would see nothing
                if not parameter.any():
                    parameter.normal_(std=0.3)
    assert model.config.get_text_config().num_hidden_layers == LAYERS
    return model.eval()

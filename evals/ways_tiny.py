"""A tiny random model and task for `evals.ways --tiny`: the model boxes a number now and then."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evals.architectures import tiny

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = [" ", "\n", *string.ascii_letters, *string.digits, *"+*?.=$:"]
# Whole boxed answers are single tokens, which the last matrix favours, and after which the end is likely: so
# some samples are right and end before their limit.
BOXED = [rf"\boxed{{{number}}}" for number in range(2, 19)]
FAVOUR = 2.0


def tiny_configs(folder: Path) -> dict[str, str]:
    """Configs of `steer train` by its method, for a model in `folder`, which is made there."""
    if not (folder / "model").is_dir():
        _make_model(folder / "model")
    shared: dict[str, Any] = {
        "model": str(folder / "model"), "train_data": "arithmetic", "operators": "+", "digits": 1,
        "heldout": 0.4, "generated_problems": 20, "eval_limit": 12, "template": "plain", "layers": "all",
        "max_completion_length": 8, "save_steps": 50, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    methods: dict[str, dict[str, Any]] = {
        "grpo": {"rewards": ["correct01", "format"], "reward_weights": [1.0, 0.25], "num_generations": 8},
        "sft": {"method": "sft", "per_device_train_batch_size": 8},
        "dpo": {"method": "dpo", "per_device_train_batch_size": 4},
    }
    for method, own in methods.items():
        (folder / f"{method}.yaml").write_text(yaml.safe_dump({**shared, **own}))
    return {method: str(folder / f"{method}.yaml") for method in methods}


def _make_model(folder: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(SPECIAL + CHARACTERS)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_tokens(BOXED)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512, **tokens)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.lm_head.weight[-len(BOXED) :] *= FAVOUR
        boxed = torch.randn(model.config.hidden_size)
        model.get_input_embeddings().weight[-len(BOXED) :] += boxed
        model.lm_head.weight[tokens["eos_token_id"]] = boxed
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

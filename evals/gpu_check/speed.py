"""
GRPO updates on a model with random weights, so that nothing has to be downloaded: seconds of rollout and
update, tokens per second, and memory beyond the base. Rollouts are by PyTorch, and no completion ends early.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from dataclasses import asdict, replace
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from evals.step_timing import Batch, measured
from steer.generation.verify import fast_paths

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size of
# SmolLM2-135M and of Qwen2.5 models.
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "tiny": (32, 64, 2, 4, 2, 97),
}
METHODS = ("steer", "trl-lora", "trl-full")
PROMPT = 64  # tokens
WARM = 16  # tokens of a sample of the update that is not measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES, help="shape of the model")
    parser.add_argument("method", choices=METHODS, help="what is trained, and by what")
    parser.add_argument("--prompts", type=int, required=True, help="prompts of an update")
    parser.add_argument("--samples", type=int, required=True, help="samples of a prompt")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--rows", type=int, required=True, help="rows of a forward and backward pass")
    parser.add_argument("--steps", type=int, required=True, help="updates; of several the first is left out")
    args = parser.parse_args()
    batch = Batch(args.prompts, args.samples, args.tokens, args.rows)
    tokenizer = words(SHAPES[args.shape][-1])
    if args.steps == 1:  # there is no first update to leave out
        warm_up(args.shape, args.method, tokenizer, batch)
    model = random_model(args.shape, args.method)
    found: dict[str, Any] = {"shape": args.shape, "method": args.method, "batch": asdict(batch)}
    found |= {"dtype": str(model.dtype).removeprefix("torch."), "steps": args.steps, "prompt tokens": PROMPT}
    texts = prompts(args.prompts * args.steps, model.config.vocab_size)
    found |= measured(args.method, model, tokenizer, texts, args.steps, batch)
    if args.method == "steer":  # what the trainer found: before there is one the head is not tried
        found["plain paths"] = {name: why for name, why in asdict(fast_paths(model)).items() if why}
    print(json.dumps(found))


def warm_up(shape: str, method: str, tokenizer: PreTrainedTokenizerFast, batch: Batch) -> None:
    """The same update with short completions and another model, so that kernels are compiled and loaded."""
    model = random_model(shape, method)
    texts = prompts(batch.prompts, model.config.vocab_size)
    measured(method, model, tokenizer, texts, 1, replace(batch, tokens=WARM))
    del model
    gc.collect()  # trainers hold themselves; the memory is measured next


def random_model(
    shape: str, method: str, dtype: str | None = None, depth: int | None = None
) -> PreTrainedModel:
    """
    A model of this shape, or its first `depth` layers. By default in bfloat16 on a GPU and in float32 on a
    CPU; what is trained itself is in float32 on both.
    """
    width, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    on_gpu = torch.cuda.is_available()
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    usual = "bfloat16" if on_gpu and method != "trl-full" else "float32"
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype or usual))
    return model.eval()


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each id of a model; the end token is one that the model cannot sample."""
    core = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", padding_side="left")
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})
    return tokenizer


def prompts(count: int, vocabulary: int) -> list[str]:
    """They begin alike, as behind a system turn, and differ in their second half."""
    draw = random.Random(0)
    ids = [[draw.randrange(1, vocabulary) for _ in range(PROMPT // 2)] for _ in range(count + 1)]
    return [" ".join(f"w{i}" for i in [*ids[0], *own]) for own in ids[1:]]


if __name__ == "__main__":
    main()

"""Which tokens end an answer, for models whose sources disagree about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from helpers.chat_templates import STYLES, tokenizer
from helpers.training import SPREAD, config, make_trainer, parity, problems
from transformers import GenerationConfig, PreTrainedTokenizerFast

from steer import SteeringConfig
from steer.evaluation.engines import generation_config
from steer.generation.sampler import Sampling, rollout
from steer.stop_tokens import end_of_turn, greedy_config, stop_token_ids
from steer.training.sweep.member import Member
from steer.training.sweep.trainer import PopulationTrainer

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def made(template: str | None, specials: list[str], eos: str, pad: str | None = None) -> Any:
    tokens = tokenizer(template)
    tokens.add_special_tokens({"additional_special_tokens": specials})
    tokens.eos_token = eos
    tokens.pad_token = pad
    return tokens


def ids(tokens: PreTrainedTokenizerFast, *names: str) -> tuple[int, ...]:
    return tuple(sorted(tokens.convert_tokens_to_ids(list(names))))


def test_llama_3_has_three():
    names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokens = made(STYLES["llama-3"].template, names, "<|eot_id|>")
    settings = GenerationConfig(eos_token_id=list(ids(tokens, *names[:3])))
    assert stop_token_ids(tokens, settings) == ids(tokens, *names[:3])
    # the base model's tokenizer, without a generation config: the template still ends turns with <|eot_id|>
    tokens.eos_token = "<|end_of_text|>"
    assert stop_token_ids(tokens) == ids(tokens, "<|end_of_text|>", "<|eot_id|>")


def test_qwen_pads_with_another_token_that_ends_an_answer_too():
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = made(STYLES["qwen-2.5"].template, names, "<|im_end|>", "<|endoftext|>")
    assert stop_token_ids(tokens) == ids(tokens, "<|im_end|>")  # a pad token ends nothing by itself
    listed = GenerationConfig(eos_token_id=list(ids(tokens, "<|im_end|>", "<|endoftext|>")))
    assert stop_token_ids(tokens, listed) == ids(tokens, "<|im_end|>", "<|endoftext|>")
    base = made(STYLES["qwen-2.5"].template, names, "<|endoftext|>", "<|endoftext|>")
    single = GenerationConfig(eos_token_id=base.eos_token_id)
    assert stop_token_ids(base, single) == ids(base, "<|im_end|>", "<|endoftext|>")


def test_gemma_ends_a_turn_with_a_token_of_its_own():
    tokens = made(STYLES["gemma"].template, ["<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>")
    assert stop_token_ids(tokens) == ids(tokens, "<eos>", "<end_of_turn>")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gptoss", "<|return|>"),  # <|end|> ends its reasoning, not its answer
        ("phi3", "<|end|>"),
        ("qwen3", "<|im_end|>"),
        ("gemma3", "<end_of_turn>"),
        ("llama3", "<|eot_id|>"),
        ("deepseekv3", "<｜end▁of▁sentence｜>"),
    ],
)
def test_templates_of_models_in_use(name, end):
    template = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    specials = ["<|end|>", "<|return|>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<｜end▁of▁sentence｜>"]
    tokens = made(template, specials, "<｜end▁of▁sentence｜>" if name == "deepseekv3" else "</s>")
    assert end_of_turn(tokens) == tokens.convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}",
    ],
)
def test_without_an_end_of_turn_the_tokenizers_end_is_left(template):
    tokens = tokenizer(template)
    assert end_of_turn(tokens) is None
    assert stop_token_ids(tokens) == (2,)
    tokens.eos_token = None
    assert stop_token_ids(tokens, GenerationConfig()) == ()


def test_a_marker_that_is_no_single_token_ends_nothing():
    assert end_of_turn(tokenizer(STYLES["chatml"].template)) is None


def test_a_model_without_a_generation_config_has_that_of_its_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert stop_token_ids(tokenizer(None), generation_config(str(tmp_path), None)) == (2,)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [3, 5]}')
    assert stop_token_ids(tokenizer(None), generation_config(str(tmp_path), None)) == (2, 3, 5)
    GenerationConfig(eos_token_id=[3, 4]).save_pretrained(tmp_path)
    assert stop_token_ids(tokenizer(None), generation_config(str(tmp_path), None)) == (2, 3, 4)


def test_a_sampler_without_stop_tokens_writes_to_the_limit(tiny_llama):
    (one,) = rollout(tiny_llama, [[1, 5]], Sampling(6, (), temperature=0))
    assert len(one.ids) == 6 and not one.finished


def test_greedy_answers_know_no_penalties_of_the_model(build_tiny, tiny_tokenizer):
    model = build_tiny("llama", initializer_range=SPREAD)
    tiny_tokenizer.eos_token = model.generation_config.eos_token_id = None
    (plain,) = rollout(model, [[1, 5]], Sampling(60, (), temperature=0))
    model.generation_config.repetition_penalty = 1000.0
    model.generation_config.no_repeat_ngram_size = 1
    config = greedy_config(tiny_tokenizer, model.generation_config, 60)
    ids = torch.tensor([[1, 5]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert out[0, 2:].tolist() == list(plain.ids)
    assert len(set(plain.ids)) < 60, "or penalties would change nothing"


def test_training_and_analysis_agree(build_tiny, tiny_tokenizer, tmp_path):
    """The template ends turns with <unk>, the generation config lists 5, the tokenizer ends with </s>."""
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}"
    model = build_tiny("llama", initializer_range=SPREAD)
    model.generation_config.eos_token_id = 5
    trainer = make_trainer(model, tiny_tokenizer, config(tmp_path))
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == [2, 3, 5]
    assert trainer.generation_kwargs["eos_token_id"] == [2, 3, 5]
    assert greedy_config(tiny_tokenizer, model.generation_config, 4).eos_token_id == [2, 3, 5]
    other = build_tiny("llama")
    other.generation_config.eos_token_id = 5
    members = [Member("one", [parity], config(tmp_path), SteeringConfig())]
    assert PopulationTrainer(other, members, problems(), tiny_tokenizer).eos_token_ids == (2, 3, 5)

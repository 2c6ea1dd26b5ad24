"""Shared by the tests of tools: a tokenizer whose chat template knows them, and a model that calls one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "{% endif %}{% for message in messages %}{% if message.role == 'tool' %}"
    "<|user|><result>{{ message.content }}</result>{{ eos_token }}"
    "{% else %}<|{{ message.role }}|>{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": "</call>\\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "</s>", "content": "text"},
    },
}


def knows_tools(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSE
    return tokenizer


def call(name: str, **arguments: Any) -> str:
    """What a model writes to call a tool."""
    return f"<call>{json.dumps({'name': name, 'arguments': arguments})}</call></s>"


def calls_first(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Callable[[int], str],
) -> None:
    """
    Make the first turn of every answer what `asked` says of its row. A prompt with the result of a tool is
    answered by the model itself.
    """
    own = model.generate

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        text = tokenizer.batch_decode(input_ids)
        if any("<result>" in one for one in text):
            return own(input_ids=input_ids, **kwargs)
        first = [tokenizer(asked(i), add_special_tokens=False)["input_ids"] for i in range(len(input_ids))]
        longest = max(map(len, first))
        rows = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in first]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    model.generate = generate

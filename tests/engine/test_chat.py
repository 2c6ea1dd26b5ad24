"""How the server puts the question of a chat request. No vLLM is needed."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.steering import message

from steer.engine.chat import is_question, put, served_prompt
from steer.errors import SteerError
from steer.prompt import PromptSpec
from steer.tasks.prompts import format_prompt

SHORT = PromptSpec("boxed_short")


@pytest.mark.parametrize(
    ("trained", "template", "prompt", "line"),
    [
        (SHORT, None, SHORT, "a chat of one question is put with template boxed_short (as in training)"),
        (None, None, None, "as sent: the vectors name no prompt"),
        (SHORT, "none", None, "as sent (--template none)"),
        (PromptSpec("plain"), None, None, "template plain is for plain text"),
        (None, "boxed", PromptSpec(), "put with template boxed (--template)"),
        (SHORT, "boxed", PromptSpec(), "put with template boxed (trained with template boxed_short)"),
    ],
)
def test_the_prompt_of_a_set_and_its_line(trained: Any, template: Any, prompt: Any, line: str) -> None:
    found, said = served_prompt(trained, template)
    assert found == prompt
    assert line in said and "\n" not in said


@pytest.mark.parametrize("template", ["plain", "boxd"])
def test_a_template_that_is_no_chat_is_refused(template: str) -> None:
    with pytest.raises(SteerError, match=r"lays out no chats; give one of boxed, boxed_short, or none"):
        served_prompt(SHORT, template)


def test_the_text_of_the_turns_is_that_of_training(tiny_tokenizer: Any) -> None:
    prompt = PromptSpec("boxed", "To", "Be brief.", examples=(("2+2?", "4"),))
    request = {"model": "math", "messages": [{"role": "user", "content": "1+1?"}], "max_tokens": 5}
    changed = put(request, prompt, tiny_tokenizer)
    assert changed["max_tokens"] == 5 and request["messages"] == [{"role": "user", "content": "1+1?"}]
    text = tiny_tokenizer.apply_chat_template(
        changed["messages"],
        tokenize=False,
        add_generation_prompt=changed["add_generation_prompt"],
        continue_final_message=changed["continue_final_message"],
    )
    assert text == format_prompt("1+1?", tiny_tokenizer, prompt)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("'<t></t>' + message['content']", "it writes '<t></t>To' where training had 'To'"),  # as Qwen3's
        ("''", "does not appear in the chat"),
    ],
)
def test_a_prefix_that_the_template_lays_out_otherwise_is_refused(
    tiny_tokenizer: Any, answer: str, told: str
) -> None:
    tiny_tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
        f"{{{{ {answer} }}}}{{% else %}}{{{{ message['content'] }}}}{{% endif %}}{{{{ eos_token }}}}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    request = {"messages": [{"role": "user", "content": "1+1?"}]}
    assert put(request, SHORT, tiny_tokenizer)["messages"][-1]["role"] == "user"
    with pytest.raises(SteerError, match=told) as error:
        put(request, PromptSpec("boxed_short", "To"), tiny_tokenizer)
    assert "trained with the prefix 'To'" in message(error)


def test_a_question_in_parts_of_text_is_one(tiny_tokenizer: Any) -> None:
    parts = [{"type": "text", "text": text} for text in ("What is", "1+1?")]
    whole, split = ({"messages": [{"role": "user", "content": c}]} for c in ("What is\n1+1?", parts))
    assert is_question(split)
    assert put(split, SHORT, tiny_tokenizer) == put(whole, SHORT, tiny_tokenizer) != whole


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}],
        [{"role": "user", "content": []}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "1+1?"}, {"type": "image_url", "image_url": "x"}],
            }
        ],
        [{"role": "assistant", "content": "2"}],
        [],
        "1+1?",
    ],
)
def test_other_chats_stay_as_they_are(messages: Any, tiny_tokenizer: Any) -> None:
    request = {"messages": messages}
    assert put(request, SHORT, tiny_tokenizer) == request


def test_a_variable_that_the_template_does_not_read_is_refused(tiny_tokenizer: Any) -> None:
    request = {"messages": [{"role": "user", "content": "?"}], "chat_template_kwargs": {"nobody": 1}}
    with pytest.raises(SteerError, match="'nobody'"):
        put(request, SHORT, tiny_tokenizer)

"""Prompts through the chat templates of models in use: nothing is lost, doubled or ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from helpers.chat_templates import STYLES, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.prompt import PromptSpec
from steer.tasks import prompts
from steer.tasks.prompts import TEMPLATES


def format_prompt(problem: str, tokenizer: Any, *fields: Any, **named: Any) -> str:
    """As `steer.tasks.prompts.format_prompt`, with the fields of the prompt."""
    return prompts.format_prompt(problem, tokenizer, PromptSpec(*fields, **named))


STEPS = r"put your final answer within \boxed{}."
SHORT = r"Give the answer as $\boxed{answer}$."
TOKENIZERS = {
    (name, adds_bos): tokenizer(style.template, adds_bos)
    for name, style in STYLES.items()
    for adds_bos in (False, True)
}
# Digits around it tell a problem from all that a template says by itself.
PROBLEMS = st.text(st.sampled_from("ab7 +=?$\\{}<|>\n"), max_size=30).map(lambda text: f"31{text}82")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=15, deadline=None)
@given(problem=PROBLEMS, boxed=st.booleans(), system=st.sampled_from(["", "Be brief."]))
def test_instruction_and_problem_are_there_once_after_one_bos(name, adds_bos, problem, boxed, system):
    tokens = TOKENIZERS[name, adds_bos]
    text = format_prompt(problem, tokens, "boxed" if boxed else "boxed_short", system=system)
    assert text.count(problem) == 1 and text.count(STEPS if boxed else SHORT) == 1
    assert not system or text.count(system) == 1
    assert text.endswith(STYLES[name].ending)
    ids = tokens(text, add_special_tokens=False)["input_ids"]
    assert ids.count(1) <= 1 and 1 not in ids[1:]
    assert not adds_bos or ids[0] == 1


@pytest.mark.parametrize(
    "path", sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja")), ids=lambda p: p.stem
)
@pytest.mark.parametrize("template", ["boxed", "boxed_short"])
def test_templates_that_trl_ships_lose_nothing_or_are_refused(path, template):
    tokens = tokenizer(path.read_text(encoding="utf-8"), adds_bos=True)
    if path.stem.startswith(("idefics3", "llava_next", "smolvlm")):  # text is a list of parts there
        with pytest.raises(SteerError, match="chat template refused"):
            format_prompt("3182?", tokens, template)
        return
    text = format_prompt("3182?", tokens, template)
    assert text.count("3182?") == 1 and text.count(STEPS if template == "boxed" else SHORT) == 1
    ids = tokens(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and 1 not in ids[1:]


@pytest.mark.parametrize("name", ["gemma", "mistral", "phi-3, drops the system turn"])
def test_without_a_system_turn_the_instruction_opens_the_user_turn(name):
    text = format_prompt("1+1?", TOKENIZERS[name, False], "boxed", system="Be brief.")
    assert f"Be brief.\nPlease reason step by step, and {STEPS}\n\n1+1?" in text


def test_a_default_system_text_stays_out_where_there_is_a_system_turn():
    assert "helpful" not in format_prompt("1+1?", TOKENIZERS["qwen-2.5", False], "boxed_short")


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{{ bos_token }}Solve it.", "1\\+1\\?"),
        ("{% for m in messages %}{{ m['content'][:20] }}{% endfor %}", "Please reason"),
        ("{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}", "Please reason"),
    ],
)
def test_a_template_that_loses_the_prompt_is_refused(template, lost):
    with pytest.raises(SteerError, match=rf"chat template.*{lost}.*use one of qwen_math") as caught:
        format_prompt("1+1?", tokenizer(template), "boxed")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\nturns') }}",
        "{% if %}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages['a']['b'].c() }}",
        "{{ ''.__class__.__mro__ }}{{ ().x.y }}",
    ],
)
def test_a_template_that_fails_is_refused_on_one_line(template):
    with pytest.raises(SteerError, match="chat template refused prompt template 'boxed_short'") as caught:
        format_prompt("1+1?", tokenizer(template), "boxed_short")
    assert "\n" not in str(caught.value)


def test_chat_template_kwargs_reach_the_template():
    tokens = TOKENIZERS["qwen-3", False]
    quiet = format_prompt("1+1?", tokens, "boxed", chat_template_kwargs={"enable_thinking": False})
    assert quiet == format_prompt("1+1?", tokens, "boxed") + "<think>\n\n</think>\n\n"
    tokens = TOKENIZERS["llama-3", True]
    assert "Date: 1 Jan" in format_prompt("1+1?", tokens, chat_template_kwargs={"date_string": "1 Jan"})


@pytest.mark.parametrize("name", STYLES)
def test_chat_template_kwargs_that_the_template_never_reads_are_refused(name):
    known = STYLES[name].variables
    said = f"reads {', '.join(known)}" if known else "reads no settings"
    for wrong in ("enable_thinkin", "tokenize", "messages", "add_generation_prompt"):
        with pytest.raises(SteerError, match=rf"chat_template_kwargs.*'{wrong}'.*{said}"):
            format_prompt("1+1?", TOKENIZERS[name, False], chat_template_kwargs={wrong: True})


@pytest.mark.parametrize("template", [name for name, t in TEMPLATES.items() if not t.chat])
def test_chat_template_kwargs_for_a_plain_template_are_refused(template):
    with pytest.raises(SteerError, match=f"{template!r} is not a chat.*use one of boxed, boxed_short"):
        format_prompt(
            "1+1?", TOKENIZERS["qwen-3", False], template, chat_template_kwargs={"enable_thinking": False}
        )

"""`PromptSpec`: to JSON and back, what is refused, and what artifacts of either format say of it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.prompt import PromptSpec
from steer.tasks.prompts import TEMPLATES, agreed_prompt, choose_prompt, with_changes

# a busy machine is no fault of the strategies
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
texts = st.text(max_size=12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
prompts = st.builds(
    PromptSpec,
    template=st.sampled_from(sorted(TEMPLATES)) | texts,
    prefix=texts,
    system=texts,
    chat_template_kwargs=st.none() | st.dictionaries(texts, plain, max_size=3),
    examples=st.lists(st.tuples(texts, texts), max_size=3),
)


@patient
@given(prompts)
def test_to_json_and_back(prompt: PromptSpec) -> None:
    text = json.dumps(prompt.to_dict())
    assert PromptSpec.from_dict(json.loads(text)) == prompt
    assert json.loads(text) == prompt.to_dict(), "plain JSON types"


@patient
@given(prompts)
def test_a_config_holds_it_through_json(prompt: PromptSpec) -> None:
    config = SteeringConfig(prompt=prompt)
    assert SteeringConfig.from_json(json.dumps(config.to_dict()), "here") == config
    assert SteeringConfig.from_dict(SteeringConfig().to_dict()).prompt is None


@patient
@given(prompts, st.sampled_from(sorted(TEMPLATES)))
def test_changes_are_those_asked_for(prompt: PromptSpec, template: str) -> None:
    assert with_changes(prompt) == prompt or not TEMPLATES[prompt.template].chat
    changed = with_changes(prompt, template, "So")
    assert (changed.template, changed.prefix, changed.examples) == (template, "So", prompt.examples)
    kept = (prompt.system, prompt.chat_template_kwargs) if TEMPLATES[template].chat else ("", None)
    assert (changed.system, changed.chat_template_kwargs) == kept
    assert with_changes(prompt, template, chat_template_kwargs={"a": 1}).chat_template_kwargs == {"a": 1}


def test_what_means_the_same_is_equal() -> None:
    assert PromptSpec(chat_template_kwargs={}) == PromptSpec()
    assert PromptSpec(examples=[["a", "b"]]) == PromptSpec(examples=(("a", "b"),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"templat": "boxed"}, "no field 'templat'; did you mean 'template'"),
        ({"chat_template_kwarg": {}}, "did you mean 'chat_template_kwargs'"),
        ({"sistem": ""}, "did you mean 'system'"),
        ({"qqq": ""}, "no field 'qqq'; there are template, prefix, system"),
        ({"template": 3}, "template=3 is not text"),
        ({"prefix": ["To"]}, r"prefix=\['To'\] is not text"),
        ({"system": None}, "system=None is not text"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs=\[1\] is not a mapping"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs='x' is not a mapping"),
        ({"examples": [["a"]]}, "is not a list of pairs"),
        ({"examples": [["a", 1]]}, "is not a list of pairs"),
        ({"examples": "ab"}, "is not a list of pairs"),
        (["boxed"], r"prompt is \['boxed'\], expected an object"),
        ("boxed", "prompt is 'boxed', expected an object"),
    ],
)
def test_what_is_no_prompt_is_one_line(values: Any, named: str) -> None:
    with pytest.raises(SteerError, match=named) as caught:
        PromptSpec.from_dict(values)
    assert "\n" not in str(caught.value)
    with pytest.raises(SteerError, match=named):
        SteeringConfig.from_dict({"prompt": values})


# ---- artifacts of format 1 name the prompt in their provenance


def old(provenance: Any) -> PromptSpec | None:
    return SteeringConfig.from_dict({"format_version": 1, "provenance": provenance}).prompt


def test_format_1_has_it_from_the_provenance() -> None:
    run = {"template": "boxed_short", "prefix": "To", "model": "m"}
    found = old({"run": run, "training": {"chat_template_kwargs": {"quiet": True}, "seed": 1}})
    assert found == PromptSpec("boxed_short", "To", chat_template_kwargs={"quiet": True})
    assert old({"run": {"template": "plain", "prefix": ""}}) == PromptSpec("plain")


@pytest.mark.parametrize("provenance", [None, {}, {"run": "by hand"}, {"run": None, "training": []}])
def test_a_provenance_that_says_nothing_is_no_prompt(provenance: Any) -> None:
    assert old(provenance) is None


@pytest.mark.parametrize(
    "provenance",
    [{"run": {"template": 3}}, {"run": {"prefix": ["To"]}}, {"training": {"chat_template_kwargs": [1]}}],
)
def test_a_provenance_that_describes_no_prompt_is_refused(provenance: Any) -> None:
    with pytest.raises(SteerError, match="provenance describes no prompt"):
        old(provenance)


def test_format_1_has_no_field_of_that_name() -> None:
    with pytest.raises(SteerError, match="unknown fields 'prompt'"):
        SteeringConfig.from_dict({"format_version": 1, "prompt": {}})


# ---- which prompt vectors are asked with


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_the_prompt_of_training_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "steer")
    short = PromptSpec("boxed_short", "To")
    assert choose_prompt({"a": short, "b": short, "c": None}) == short
    assert lines(caplog) == ["prompt: template boxed_short, prefix 'To' (as the vectors were trained with)"]

    assert choose_prompt({"a": None}) == choose_prompt({}) == PromptSpec()
    assert lines(caplog) == [
        "prompt: template boxed (the default, since the vectors name none)",
        "prompt: template boxed (the default)",
    ]

    assert choose_prompt({"a": short}, template="plain") == replace(short, template="plain")
    assert lines(caplog) == [
        "prompt: template plain, prefix 'To' (as asked for)",
        "warning: prompt differs from what vectors were trained with: a (template boxed_short, prefix 'To')",
    ]


def test_vectors_of_different_prompts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "steer")
    trained = {"a": PromptSpec("think"), "b": PromptSpec("plain"), "c": None}
    own = PromptSpec("boxed_short")
    assert choose_prompt(trained, own, label="prompt of gsm8k") == own == agreed_prompt(trained, own)
    assert lines(caplog) == [
        "prompt of gsm8k: template boxed_short (since the vectors were trained with different ones)",
        "warning: prompt of gsm8k differs from what vectors were trained with: a (template think); "
        "b (template plain)",
    ]
    assert choose_prompt(trained, own, template="think") == PromptSpec("think")
    assert lines(caplog)[1].endswith(": b (template plain)")

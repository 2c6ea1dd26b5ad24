import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steer.errors import SteerError
from steer.prompt import PromptSpec
from steer.tasks import prompts
from steer.tasks.prompts import TEMPLATES
from steer.training.answer_tokens import Example, tokens


def format_prompt(problem, tokenizer, *fields, **named):
    """As `steer.tasks.prompts.format_prompt`, with the fields of the prompt."""
    return prompts.format_prompt(problem, tokenizer, PromptSpec(*fields, **named))


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROBLEM = r"Find {x} with \frac{1}{2}x = {problem}."


def make_tokenizer(chat=None, adds_bos=False):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = chat
    return tokenizer


def test_boxed_puts_the_instruction_in_the_system_turn():
    assert format_prompt(PROBLEM, make_tokenizer(CHAT)) == (
        "<|system|>Please reason step by step, and put your final answer within \\boxed{}.\n"
        f"<|user|>{PROBLEM}\n<|assistant|>"
    )


def test_boxed_short_is_one_user_turn_and_keeps_default_system_texts_out():
    default = "{% if messages[0]['role'] != 'system' %}<|system|>Be nice.\n{% endif %}" + CHAT
    text = format_prompt(PROBLEM, make_tokenizer(default), "boxed_short")
    assert text.startswith(f"<|system|>\n<|user|>{PROBLEM} ")
    assert r"\boxed{answer}" in text and "Be nice" not in text


def test_a_constant_system_text_comes_before_the_templates_own():
    assert format_prompt("1+1?", make_tokenizer(CHAT), "boxed", system="Be brief.").startswith(
        "<|system|>Be brief.\nPlease reason step by step"
    )
    short = format_prompt("1+1?", make_tokenizer(CHAT), "boxed_short", system="Be brief.")
    assert short.startswith("<|system|>Be brief.\n<|user|>1+1? ")
    with pytest.raises(SteerError, match="'plain' has no turn for a system text; use one of boxed, "):
        format_prompt("1+1?", make_tokenizer(CHAT), "plain", system="Be brief.")


def test_qwen_math_is_exactly_its_own_format():
    assert format_prompt("1+1?", make_tokenizer(), "qwen_math") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_and_think():
    assert format_prompt("1+1?", make_tokenizer(), "plain") == "1+1?\nAnswer:"
    text = format_prompt("1+1?", make_tokenizer(), "think")
    assert text.endswith("User: 1+1?\nAssistant: <think>") and r"\boxed{}" in text


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_holds_the_problem_once_and_ends_with_the_prefix(template):
    tokenizer = make_tokenizer(CHAT)
    text = format_prompt(PROBLEM, tokenizer, template, prefix="Step")
    assert text.count(PROBLEM) == 1
    assert text == format_prompt(PROBLEM, tokenizer, template) + "Step"
    assert TEMPLATES[template].description


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_tokens_are_those_the_tokenizer_itself_would_make(template):
    tokenizer = make_tokenizer(CHAT, adds_bos=True)
    text = format_prompt("a", tokenizer, template)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 1
    assert ids == tokenizer(text.removeprefix("<s>"))["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("single", "before"),
    [("</s> $A", "</s>"), ("[g] <s> $A", "[g]<s>"), ("<s> $A </s>", "<s>"), ("$A </s>", "")],
)
def test_training_reads_the_tokens_that_evaluation_reads(template, single, before):
    words = {"<unk>": 0, "<s>": 1, "a": 2, "</s>": 3, "[g]": 4}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [(name, words[name]) for name in ("<s>", "</s>", "[g]")]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = [AddedToken("[g]", special=True)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=more, **named)
    tokenizer.chat_template = CHAT
    text = format_prompt("a", tokenizer, template)
    assert text == before + format_prompt("a", make_tokenizer(CHAT), template)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (trained,) = prompts.prompt_ids(tokenizer, [text])
    assert trained == ids
    assert tokens([Example(text, "a")], tokenizer, "dpo")[0]["prompt_ids"] == ids
    # a text of one's own, and a chat template that writes what the tokenizer puts before a text
    own = tokenizer("a a")["input_ids"]
    (trained,) = prompts.prompt_ids(tokenizer, ["a a"])
    assert trained == (own[:-1] if single.endswith("</s>") else own)
    tokenizer.chat_template = before + CHAT
    assert format_prompt("a", tokenizer, template) == text


def test_bos_written_by_the_chat_template_is_not_doubled():
    text = format_prompt("a", make_tokenizer("{{ bos_token }}" + CHAT, adds_bos=True))
    assert text.startswith("<s><|system|>") and text.count("<s>") == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_bos_when_the_tokenizer_adds_none(template):
    assert "<s>" not in format_prompt("a", make_tokenizer(CHAT), template)


def test_unknown_template_lists_the_known():
    with pytest.raises(
        SteerError, match="unknown prompt template 'boxes'; expected one of boxed, boxed_short"
    ):
        format_prompt("a", make_tokenizer(CHAT), "boxes")


def test_tokenizer_without_chat_template():
    with pytest.raises(SteerError, match="has none; use one of qwen_math, plain, think") as caught:
        format_prompt("a", make_tokenizer())
    assert "\n" not in str(caught.value)


# ---- worked examples

EXAMPLES = (("1 + 2?", r"It is 3. $\boxed{3}$"), ("2 + 2?", r"$\boxed{4}$"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_examples_stand_once_and_in_order_before_the_problem(template):
    tokenizer = make_tokenizer(CHAT)
    text = format_prompt(PROBLEM, tokenizer, template, prefix="Step", examples=EXAMPLES)
    places = [text.index(part) for pair in EXAMPLES for part in pair] + [text.index(PROBLEM)]
    assert places == sorted(places)
    assert all(text.count(part) == 1 for part in (PROBLEM, *(pair[0] for pair in EXAMPLES)))
    # around them is the prompt without examples: what opens it, and the problem's own turn
    without = format_prompt(PROBLEM, tokenizer, template, prefix="Step")
    shared = next(n for n in range(len(text)) if text[n] != without[n : n + 1])
    assert text.endswith(without[shared:])


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_example_is_written_as_the_turns_that_the_model_answers(template):
    tokenizer = make_tokenizer(CHAT)
    worked = format_prompt("Q?", tokenizer, template, examples=[("Q?", "A.")])
    asked = format_prompt("Q?", tokenizer, template)
    start, end = worked.index("Q?"), worked.index("A.")
    # from the problem to the place where the model writes, the two are the same
    assert worked[start:end].strip() == asked[asked.index("Q?") :].strip()


def test_examples_in_a_chat_are_turns():
    tokenizer = make_tokenizer(CHAT)
    assert format_prompt("1+1?", tokenizer, "boxed", examples=[("2+3?", r"$\boxed{5}$")]) == (
        "<|system|>Please reason step by step, and put your final answer within \\boxed{}.\n"
        "<|user|>2+3?\n<|assistant|>$\\boxed{5}$\n<|user|>1+1?\n<|assistant|>"
    )


def test_examples_in_plain_text():
    assert format_prompt("1+1?", make_tokenizer(), "plain", examples=[("2+3?", "5")]) == (
        "2+3?\nAnswer: 5\n\n1+1?\nAnswer:"
    )
    assert format_prompt("1+1?", make_tokenizer(), "qwen_math", examples=[("2+3?", "5")]) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n"
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_system_turn_the_instruction_opens_the_first_example():
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    text = format_prompt("1+1?", make_tokenizer(refuses), "boxed", examples=[("2+3?", "5")])
    assert text.count("Please reason") == 1
    assert text.index("Please reason") < text.index("2+3?") < text.index("1+1?")


def test_a_chat_template_that_drops_examples_is_refused():
    last_alone = "{% for m in messages[-1:] %}<|user|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(SteerError, match=r"leaves out '2\+3\?"):
        format_prompt("1+1?", make_tokenizer(last_alone), "boxed_short", examples=[("2+3?", "5")])

"""
Answers with tools: the model calls functions, reads what they return, and writes on. trl runs the calls of
training; here are what is refused with them, and greedy answers by the same loop.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from steer.errors import SteerError
from steer.evaluation.heldout import BATCH, Answered
from steer.prompt import PromptSpec
from steer.tasks.grading import MathGrader
from steer.tasks.lenient import extract_lenient
from steer.tasks.majority import text_of
from steer.tasks.prompts import TEMPLATES, Question, chat_turns, formatter, question
from steer.tasks.tools import Tool

Turns = list[dict[str, Any]]


def check_tools(given: Mapping[str, Any], use_vllm: bool, positions: str) -> None:
    """
    Refuse what is wrong beside tools or environments.

    Args:
        given: the arguments of a trainer of trl.
        use_vllm: whether an engine samples.
        positions: which tokens are steered (`SteeringConfig.positions`).

    Raises:
        SteerError: an engine, whose samples with tools were not checked; vectors at some of the tokens: a
            later turn is drawn with the earlier ones in its prompt, and scored with them in its completion.
    """
    named = [name for name in ("tools", "environment_factory", "rollout_func") if given.get(name)]
    if named and use_vllm:
        raise SteerError(f"{named[0]} with use_vllm was not checked for vectors; set use_vllm=false")
    if named and positions != "all":
        raise SteerError(
            f"positions={positions} with {named[0]}: in later turns the tokens of earlier ones would be part "
            "of the prompt where they are sampled, and of the completion where they are scored; set "
            "positions=all"
        )


def with_tools(prompt: PromptSpec, tools: Sequence[Tool]) -> PromptSpec:
    """
    The prompt that also describes `tools` to the model, as the tokenizer's chat template does.

    Raises:
        SteerError: a template that is not a chat, or a forced opening of the answers.
    """
    if not TEMPLATES[prompt.template].chat:
        chats = ", ".join(name for name, template in TEMPLATES.items() if template.chat)
        raise SteerError(
            f"tools need a chat, and prompt template {prompt.template!r} is none; use one of {chats}"
        )
    if prompt.prefix:
        raise SteerError(
            f"prefix={prompt.prefix!r} is the opening of an answer, and an answer with tools has several "
            "turns; leave it out"
        )
    variables = {**(prompt.chat_template_kwargs or {}), "tools": list(tools)}
    return replace(prompt, chat_template_kwargs=variables)


def asker(
    prompt: PromptSpec, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]
) -> Callable[[Question], Any]:
    """What a trainer is given of a problem: the text of its prompt, or with tools its turns."""
    if not tools:
        return formatter(prompt, tokenizer)
    described = with_tools(prompt, tools)
    return lambda problem: chat_turns(problem, tokenizer, described)[0]


def answer_with_tools(
    trainer: Any,
    rows: Sequence[dict[str, Any]],
    chat: Callable[[Question], Turns],
    grader: MathGrader,
    label: str,
    temperature: float = 0.0,
    leave: bool = True,
) -> list[Answered]:
    """
    One answer to each problem by the model in training, with the tools of its trainer and as long as its
    `max_completion_length`, results of tools included. What is graded is the last turn.

    Args:
        trainer: a `GroupGRPOTrainer` with tools.
        rows: problems in the record form.
        chat: makes the turns that put a problem (`asker`).
        grader: judges the answers.
        label: names the progress bar, which stays when it is full if `leave` is set.
        temperature: 0 is greedy.
    """
    tokenizer, stop = trainer._tokenizer, set(trainer.eos_token_ids)
    was_training = trainer.model.training
    trainer.model.eval()
    answered: list[Answered] = []
    with (
        tqdm(total=len(rows), desc=label, unit="problem", leave=leave) as bar,
        patch.object(trainer, "generation_config", _drawing(trainer.generation_config, temperature)),
        torch.random.fork_rng(),  # training draws what it would have drawn
    ):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            ids, mask, turns = _converse(trainer, [chat(question(row)) for row in batch])
            texts = [text_of(said) for said in turns]
            golds = [row.get("golds") or row["answer"] for row in batch]
            verdicts = grader.check(texts, golds)
            lenient = grader.check(texts, golds, extract_lenient)
            written = tokenizer.batch_decode(ids, skip_special_tokens=True)
            for i, row in enumerate(batch):
                answered.append(
                    Answered(
                        row["problem"],
                        row["answer"],
                        written[i],
                        verdicts[i].answer,
                        verdicts[i].correct,
                        sum(mask[i]),
                        ids[i][-1] in stop,
                        lenient[i].correct,
                    )
                )
            bar.update(len(batch))
    trainer.model.train(was_training)
    return answered


def _drawing(config: Any, temperature: float) -> Any:
    """The generation config at another temperature, with nothing cut from the distribution."""
    config = copy.deepcopy(config)
    config.do_sample = temperature > 0
    config.temperature = temperature or None
    config.top_k, config.top_p, config.min_p = (0, 1.0, None) if temperature else (None, None, None)
    return config


def _converse(trainer: Any, prompts: list[Turns]) -> tuple[list[list[int]], list[list[int]], list[Turns]]:
    """
    Returns:
        Of each prompt the tokens after it, 1 for those that the model wrote and 0 for those of tools, and the
        turns after it.
    """
    prompts = copy.deepcopy(prompts)  # trl appends to them
    called = {tool.__name__: tool for tool in trainer.tools if not inspect.iscoroutinefunction(tool)}
    awaited = {tool.__name__: tool for tool in trainer.tools if inspect.iscoroutinefunction(tool)}
    trainer._sync_tool_dicts = [called] * len(prompts)
    trainer._async_tool_dicts = [awaited] * len(prompts)
    prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
    ids, logps = trainer._generate_single_turn(prompt_ids, images, fields, 1)
    turns = [
        [parse_response(trainer._tokenizer, one, prefix=asked, tools=trainer.tools)]
        for one, asked in zip(ids, prompt_ids, strict=True)
    ]
    mask, turns, ids, *_ = trainer._tool_call_loop(prompts, prompt_ids, ids, turns, logps, images, fields)
    return ids, mask, turns

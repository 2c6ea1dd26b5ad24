"""Answers with tools: what is sampled, what the loss reads, what is graded, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.launching import ROOT, run_folder, run_here
from helpers.steering import fill
from helpers.tools import call, calls_first, knows_tools
from helpers.training import config, make_trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from steer import SteeringConfig
from steer.errors import SteerError
from steer.evaluation import variants
from steer.evaluation.answers import read_answers
from steer.prompt import PromptSpec
from steer.tasks.rewards import MathGrader
from steer.tasks.tools import calculator
from steer.training.batches import loss_mask
from steer.training.tool_calls import answer_with_tools, asker

ROWS = ["2+3", "4*5", "7", "9-1"]


@pytest.fixture
def model(build_tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return build_tiny("llama", max_position_embeddings=2048, initializer_range=0.3)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tiny_tokenizer.model_max_length = 2048
    return knows_tools(tiny_tokenizer)


def chats() -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in ROWS])


def half_call(row: int) -> str:
    """Every other row calls the calculator; the others answer at once."""
    return call("calculator", expression=f"{row}+40") if row % 2 else "no</s>"


def kept_batches(trainer: Any) -> list[dict[str, Any]]:
    """The batches that the loss is computed of, while the trainer trains."""
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_loss

    def keep(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    return seen


def lengths(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids) + 3 * i % 7) for i, ids in enumerate(completion_ids)]


def test_a_tool_answers_and_its_tokens_are_in_no_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    calls_first(model, tokenizer, half_call)
    steering = SteeringConfig(layers="all")
    still = {"max_grad_norm": 0.0, "learning_rate": 0.0}
    args = config(tmp_path, max_completion_length=120, max_steps=1, loss_type="grpo", **still)
    trainer = make_trainer(model, tokenizer, args, lengths, steering, chats(), tools=[calculator])
    fill(trainer.vectors, 0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            got.update({name: p.grad.clone() for name, p in trained.items()})

    trainer.add_callback(Keep())
    [batch] = kept_batches(trainer)
    mask = loss_mask(batch)
    for i, (ids, own) in enumerate(zip(batch["completion_ids"], mask, strict=True)):
        written = tokenizer.decode(ids[own.bool()])
        given = tokenizer.decode(ids[(own == 0) & batch["completion_mask"][i].bool()])
        asked = half_call(i)
        assert written.startswith(asked)
        if i % 2:  # the results are the tool's, and the model wrote on after them
            assert given == f"<|user|><result>{i + 40}</result></s><|assistant|>"
            assert len(written) > len(asked)
        else:
            assert (given, written) == ("", asked)
    assert trainer.state.log_history[0]["tools/call_frequency"] == 0.5

    # The gradient, by transformers' own forward pass and the definition of the loss.
    total = torch.zeros(())
    for i in range(len(mask)):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, completion])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        own = mask[i][batch["completion_mask"][i].bool()]
        total = total - batch["advantages"][i] * (logps * own).sum() / own.sum() / len(mask)
    total.backward()
    assert len(trained) == 3
    for name, parameter in trained.items():
        # float32: what differs is the order of sums
        assert (got[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


class Counter:
    """Counts up when it is asked to; the reward is how far it came."""

    def reset(self, **row: Any) -> str:
        self.value = 0
        return " from 0"

    def add(self, amount: int) -> str:
        """
        Count up.

        Args:
            amount: How far.
        """
        self.value += amount
        return str(self.value)

    def get_reward(self) -> float:
        return float(self.value)


def test_an_environment_has_a_state_for_each_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    calls_first(model, tokenizer, lambda row: call("add", amount=row + 1))
    trainer = make_trainer(
        model, tokenizer, config(tmp_path, max_completion_length=120, max_steps=1), [], None, chats(),
        environment_factory=Counter,
    )  # fmt: skip
    [batch] = kept_batches(trainer)
    log = trainer.state.log_history[0]
    assert log["rewards/Counter/mean"] == pytest.approx(4.5)  # 1 to 8
    assert log["tools/call_frequency"] >= 1
    assert batch["tool_mask"].min() == 0
    assert log["grad_norm"] > 0


def test_greedy_answers_use_the_tools(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expressions = {"2+3": "2+3", "4*5": "4*5"}
    rows = [{"problem": text, "answer": str(eval(text))} for text in expressions]
    calls_first(model, tokenizer, lambda row: call("calculator", expression=list(expressions)[row]))
    args = config(tmp_path, max_completion_length=120)
    trainer = make_trainer(model, tokenizer, args, lengths, None, chats(), tools=[calculator])
    with MathGrader() as grader:
        chat = asker(PromptSpec("boxed"), tokenizer, [calculator])
        state = torch.get_rng_state()
        answered = answer_with_tools(trainer, rows, chat, grader, "test")
        assert torch.equal(torch.get_rng_state(), state)
        again = answer_with_tools(trainer, rows, chat, grader, "test")
    assert answered == again  # greedy
    for row, one in zip(rows, answered, strict=True):
        assert f"<result>{row['answer']}</result>" in one.completion
        assert 0 < one.tokens < len(tokenizer(one.completion)["input_ids"])
    assert trainer.generation_config.do_sample


def test_drawn_answers_leave_out_the_models_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    calls_first(model, tokenizer, lambda row: call("calculator", expression="2+3"))
    args = config(tmp_path, max_completion_length=120)
    trainer = make_trainer(model, tokenizer, args, lengths, None, chats(), tools=[calculator])
    chat = asker(PromptSpec("boxed"), tokenizer, [calculator])
    drawn = []
    with MathGrader() as grader:
        for min_p in (None, 1.0):  # 1 leaves the likeliest token alone
            model.generation_config.min_p = min_p
            torch.manual_seed(0)
            rows = [{"problem": "2+3", "answer": "5"}]
            drawn.append(answer_with_tools(trainer, rows, chat, grader, "test", temperature=1.0))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("steering", "changes", "message"),
    [
        (SteeringConfig(positions="completion"), {}, r"positions=completion with tools.*set positions=all"),
        (SteeringConfig(positions="prompt"), {}, r"positions=prompt with tools"),
        (None, {"use_vllm": True}, r"tools with use_vllm was not checked.*use_vllm=false"),
        (None, {"dynamic_sampling_rounds": 1}, r"tools cannot be used with dynamic_sampling_rounds"),
    ],
)
def test_what_cannot_work_beside_tools(
    steering: SteeringConfig | None,
    changes: dict[str, Any],
    message: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with pytest.raises(SteerError, match=message):
        make_trainer(
            model, tokenizer, config(tmp_path, **changes), lengths, steering, chats(), tools=[calculator]
        )
    assert "steering_vectors" not in model.__dict__


# ---- recipes

OWN = '''
def double(number: int) -> int:
    """
    Double a number.

    Args:
        number: The number.
    """
    return 2 * number


def untold(number):
    return number
'''


@pytest.fixture
def base(
    build_tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    sys.modules.pop("own_tools", None)
    (tmp_path / "own_tools.py").write_text(OWN)
    settings: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "examples": 0, "max_completion_length": 100}
    settings |= {"tools": ["calculator", "own_tools.py:double"], "template": "boxed"}
    build = partial(build_tiny, max_position_embeddings=2048)
    return run_folder(tmp_path, build, tokenizer, 4, **settings)


SCRIPT = ROOT / "recipes" / "grpo_steer.py"


def test_a_recipe_with_tools(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--config", str(base / "config.yaml"), "--validate_every", "1"]
    run_here(SCRIPT, *words)
    folder = base / "whole"
    results = json.loads((folder / "results.json").read_text())
    assert {"before", "after"} <= set(results) and "elicited" not in results
    run = json.loads((folder / "run.json").read_text())
    assert run["run"]["tools"] == ["calculator", "own_tools.py:double"]
    assert set(run["source"]) == {"source of own_tools.py:double"}
    made = json.loads((folder / "vectors" / "steering_config.json").read_text())
    assert made["provenance"]["run"]["tools"] == ["calculator", "own_tools.py:double"]
    card = (folder / "vectors" / "README.md").read_text()
    assert "trained to answer with tools (`calculator`, `own_tools.py:double`)" in card
    variants.tell_of_trained_on([variants.Variant("v", "vectors", str(folder / "vectors"))], [])
    assert "was trained with tools (calculator, own_tools.py:double), and answers without" in caplog.text
    with pytest.raises(SteerError, match=r"hold calls of tools \(calculator, own_tools.py:double\)"):
        read_answers(folder, None)
    (base / "own_tools.py").write_text(OWN.replace("2 * number", "3 * number"))
    with pytest.raises(SystemExit, match=r"holds another run: .*source of own_tools.py:double was"):
        run_here(SCRIPT, *words, "--max_steps", "2")


def test_a_dry_run_with_tools(base: Path, recipe: Callable[..., str]) -> None:
    text = recipe(SCRIPT, "--config", str(base / "config.yaml"), "--dry_run", "true")
    prompt = text.partition("A prompt in full:")[2]
    assert "<tools>" in prompt and "<|assistant|>" in prompt and "for 1 updates" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": ["calculatr"]}, r"unknown tool 'calculatr' \(did you mean 'calculator'\?\)"),
        ({"tools": ["own_tools.py:untold"]}, r"cannot be described to a model .* type hint"),
        ({"tools": ["own_tools.py:treble"]}, r"no function 'treble' there.* double"),
        ({"tools": ["calculator", "calculator"]}, r"tools name 'calculator' twice"),
        ({"examples": 8}, r"examples=8 would show .*--examples 0"),
        ({"template": "plain"}, r"tools need a chat, and prompt template 'plain' is none"),
        ({"prefix": "To"}, r"prefix='To' is the opening of an answer"),
        ({"learning_rates": [0.1, 0.2]}, r"a population draws one turn .*leave tools out"),
        ({"find_lr": True}, r"find_lr, which trains a population, draws one turn"),
        ({"method": "sft"}, r"tools=.* has no effect: method=sft samples no answers"),
        ({"tools": [], "max_tool_calling_iterations": 2}, r"max_tool_calling_iterations=2 has no effect"),
        ({"use_vllm": True}, r"tools with use_vllm was not checked"),
    ],
)
def test_settings_that_tools_refuse(changes: dict[str, Any], message: str, base: Path) -> None:
    given = yaml.safe_load((base / "config.yaml").read_text())
    if changes.get("method") == "sft":
        given = {
            k: v
            for k, v in given.items()
            if k in ("model", "model_dtype", "train_data", "tools", "output_dir")
        }
    (base / "changed.yaml").write_text(yaml.safe_dump({**given, **changes}))
    with pytest.raises(SystemExit, match=message):
        run_here(SCRIPT, "--config", str(base / "changed.yaml"))


def test_a_chat_template_without_tools(base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = tokenizer.chat_template.split("{% if tools %}")[0] + (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    folder = next(path.parent for path in base.rglob("tokenizer_config.json"))
    shutil.rmtree(folder / "chat_template.jinja", ignore_errors=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit, match=r"chat_template_kwargs names 'tools', which .* never reads"):
        run_here(SCRIPT, "--config", str(base / "config.yaml"))

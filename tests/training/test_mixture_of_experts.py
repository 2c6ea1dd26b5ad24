"""Vectors are trained on mixtures of experts: the update is the gradient, and the reward rises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.training import config, logged, make_trainer, target_share
from torch import nn
from transformers import PreTrainedModel

import steer
from evals.architectures import tiny
from steer.generation.verify import fast_paths

FAMILIES = [
    *("mixtral", "gpt_oss"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "glm4_moe", "deepseek_v3")),
    pytest.param("llama4_text", marks=pytest.mark.slow),
]


def routed(model: PreTrainedModel) -> int:
    """Number of layers with experts in them."""
    return sum(any("expert" in name for name, _ in layer.named_modules()) for layer in model.model.layers)


def hooked(model: PreTrainedModel) -> list[torch.Tensor]:
    """One zero vector a layer, added by a plain hook; nothing of `steer`."""
    vectors = []
    for layer in model.model.layers:
        vector = torch.zeros(model.config.hidden_size, requires_grad=True)
        vectors.append(vector)

        def add(module: nn.Module, args: Any, output: Any, vector: torch.Tensor = vector) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        layer.register_forward_hook(add)
    return vectors


def naive_gradient(
    model: PreTrainedModel, rows: list[tuple[list[int], list[int], float]]
) -> list[torch.Tensor]:
    """
    Of -advantage * log p(completion) summed over tokens and divided by their number, row by row without
    padding, caches or shared prompts.
    """
    vectors = hooked(model.requires_grad_(False))
    loss = torch.zeros(())
    for prompt, completion, reward in rows:
        others = [other for p, _, other in rows if p == prompt]
        advantage = reward - (sum(others) - reward) / (len(others) - 1)
        ids = torch.tensor([*prompt, *completion])
        logs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        loss = loss - advantage * logs.gather(1, ids[len(prompt) :, None]).sum()
    return list(torch.autograd.grad(loss / sum(len(ids) for _, ids, _ in rows), vectors))


def check_update(
    model: PreTrainedModel, plain: PreTrainedModel, tokenizer: Any, folder: Any, **settings: Any
) -> None:
    """One update by gradient descent with a rate of 1 against `naive_gradient` of `plain`, the same model."""
    rows: list[tuple[list[int], list[int], float]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        values = [float(sum(ids) % 7) for ids in completion_ids]
        read = tokenizer(prompts, add_special_tokens=False).input_ids
        rows.extend(zip(read, completion_ids, values, strict=True))
        return values

    plain_descent = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}
    trainer = make_trainer(model, tokenizer, config(folder, **plain_descent, **settings), reward)
    trainer.train()
    moved = [-vector for vector in trainer.vectors.tensors().values()]
    expected = naive_gradient(plain, rows)
    size = max(gradient.norm() for gradient in expected)
    assert size > 1e-3
    for got, gradient in zip(moved, expected, strict=True):
        assert (got - gradient).norm() < 1e-4 * size


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("shared", [True, False], ids=["prompts shared", "prompts not shared"])
def test_an_update_is_the_gradient_of_plain_hooks(
    model_type: str, shared: bool, tiny_tokenizer: Any, tmp_path: Any
) -> None:
    model = tiny(model_type)
    assert routed(model) > 0
    if shared:
        assert fast_paths(model).sampler is None and fast_paths(model).scorer is None
    check_update(model, tiny(model_type), tiny_tokenizer, tmp_path, share_prompts=shared)


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe"])
def test_the_noise_of_routers_in_training_is_off(model_type: str, tiny_tokenizer: Any, tmp_path: Any) -> None:
    noise = {"router_jitter_noise": 0.3} | ({"input_jitter_noise": 0.3} if model_type == "phimoe" else {})
    model, ids = tiny(model_type, **noise), torch.tensor([[5, 17, 40, 9, 33]])
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        expected = model(ids).logits
    check_update(model, tiny(model_type, **noise), tiny_tokenizer, tmp_path)
    model.steering_vectors.scale = 0.0
    with torch.no_grad():
        model.train()
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("model_type", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "gpt_oss"])
def test_the_reward_rises(model_type: str, tiny_tokenizer: Any, tmp_path: Any) -> None:
    model = tiny(model_type)
    args = config(tmp_path, max_steps=30, logging_steps=1, learning_rate=0.5)
    trainer = make_trainer(model, tiny_tokenizer, args, target_share)
    trainer.train()
    rewards = logged(trainer, "reward")
    first, last = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert last > first + 0.2, rewards
    trainer.vectors.save(tmp_path / "vectors")
    fresh = tiny(model_type)
    steer.load(tmp_path / "vectors", fresh)
    ids = torch.tensor([[5, 17, 40, 9, 33]])
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)


def test_experts_are_chosen_by_the_steered_stream() -> None:
    """A vector changes which experts later layers choose, as a bias in the layer would."""
    model = tiny("mixtral")
    ids = torch.randint(3, 97, (1, 24), generator=torch.Generator().manual_seed(0))

    def chosen() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        return [layer.topk(2, dim=-1).indices.sort(-1).values for layer in logits]

    before = chosen()
    vectors = steer.attach(model, steer.SteeringConfig(layers=0))
    with torch.no_grad():
        vectors.parameters()[0].normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    after = chosen()
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])

"""Several threads in one model, as a server has them: what one sets does not reach the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers.steering import fill, logits, message, tokens
from torch.utils.checkpoint import checkpoint

import steer
from steer import SteerError, SteeringConfig

THREADS = 4


def test_vectors_off_in_one_thread_are_on_in_another(tiny_llama) -> None:
    ids = tokens()
    base = logits(tiny_llama, ids)
    vectors = fill(steer.attach(tiny_llama, SteeringConfig()), 0.3)
    steered = logits(tiny_llama, ids)
    assert (steered - base).abs().max() > 0.1
    inside, done = Barrier(2), Barrier(2)

    def off() -> torch.Tensor:
        with vectors.disabled():
            inside.wait()
            done.wait()  # the other thread runs while the vectors are off here
            return logits(tiny_llama, ids)

    def on() -> torch.Tensor:
        inside.wait()
        found = logits(tiny_llama, ids)
        done.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(off), pool.submit(on)
        assert torch.equal(first.result(), base)
        assert torch.equal(second.result(), steered)


def test_continuous_batching_is_refused_where_vectors_are_off(tiny_llama, monkeypatch) -> None:
    monkeypatch.setattr(type(tiny_llama), "generate_batch", lambda model, inputs: inputs)
    vectors = steer.attach(tiny_llama)
    assert tiny_llama.generate_batch([[5]]) == [[5]]
    with vectors.disabled():
        with pytest.raises(SteerError, match=r"`vectors.disabled\(\)` does not reach") as error:
            tiny_llama.generate_batch([[5]])
        message(error)
        with pytest.raises(SteerError, match="in a thread of its own"):
            tiny_llama.generate(tokens(1), cache_implementation="paged", max_new_tokens=2)
    assert tiny_llama.generate_batch([[5]]) == [[5]]
    steer.detach(tiny_llama)
    assert "generate_batch" not in tiny_llama.__dict__


@pytest.mark.parametrize("positions", ["completion", "last_prompt"])
def test_prompts_of_different_length_at_once(tiny_llama, positions: str) -> None:
    fill(steer.attach(tiny_llama, SteeringConfig(positions=positions)), 0.3)
    prompts = [tokens(1, length) for length in (5, 9, 14, 22)]

    def answer(ids: torch.Tensor) -> torch.Tensor:
        return tiny_llama.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)

    alone = [answer(ids) for ids in prompts]
    together = Barrier(THREADS)

    def in_step(ids: torch.Tensor) -> torch.Tensor:
        together.wait()
        return answer(ids)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(in_step, prompts), alone, strict=True))


def test_a_prompt_told_in_one_thread_is_not_told_in_another(tiny_llama) -> None:
    vectors = steer.attach(tiny_llama, SteeringConfig(positions="completion"))
    with vectors.prompt_length(3), ThreadPoolExecutor(1) as pool:
        assert vectors._state.prompt_length == 3
        assert pool.submit(lambda: vectors._state.prompt_length).result() is None


@pytest.mark.parametrize("positions", ["all", "completion"])
def test_replicas_are_refused_where_their_threads_know_too_little(tiny_llama, positions: str) -> None:
    """`nn.DataParallel` marks its copies of the model, and runs each in a new thread."""
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions=positions)), 0.3)
    with vectors.prompt_length(3):
        steered = logits(tiny_llama, tokens())
    tiny_llama.model._is_replica = True
    with ThreadPoolExecutor(1) as pool:
        if positions == "all":
            assert torch.equal(pool.submit(logits, tiny_llama, tokens()).result(), steered)
            refused = vectors.disabled()
        else:
            refused = vectors.prompt_length(3)
        with refused, pytest.raises(SteerError, match=r"nn\.DataParallel runs the model") as error:
            pool.submit(logits, tiny_llama, tokens()).result()
    message(error)


def test_layers_run_again_in_the_backward_pass_are_steered_as_in_the_forward_pass(tiny_llama) -> None:
    """On a GPU a checkpointed layer runs again in a thread of autograd's, which nothing was set in."""
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")), 0.3)
    state = vectors._state
    with vectors.prompt_length(4):
        logits(tiny_llama, tokens(1, 9))
    seen: list[torch.Tensor | None] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(state.mask)
        return x.exp()

    def forward_and_backward_elsewhere() -> None:
        x = torch.ones(1, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).backward()

    with ThreadPoolExecutor(1) as pool:  # this thread has no mask of its own
        pool.submit(forward_and_backward_elsewhere).result()
    first, again = seen
    assert first is None and again is state.mask and again is not None

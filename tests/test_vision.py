"""Vision-language models: vectors stand in the text model, at the tokens of images as at those of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.steering import SOME, fill, message, relative
from helpers.training import config, make_trainer, parity, problems, target_share
from helpers.vision import FAMILIES, IMAGE, tiny_seeing, tiny_vision
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteerError, SteeringConfig
from steer.cli import main
from steer.export import checkpoint, peft
from steer.models import load_model, skeleton
from steer.sites import find_decoder
from steer.training.sweep.member import Member
from steer.training.sweep.trainer import PopulationTrainer


def text_layers(model: PreTrainedModel) -> nn.ModuleList:
    """By hand: where transformers has the decoder layers of the text model."""
    inner: Any = model.model
    return (inner.text_model if hasattr(inner, "text_model") else inner.language_model).layers


@contextmanager
def hooks(model: PreTrainedModel, vectors: list[torch.Tensor], columns: slice) -> Iterator[None]:
    """Each layer returns its output plus its vector, at `columns` of the whole sequence, without `steer`."""
    seen = 0

    def add(vector: torch.Tensor, last: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal seen
            hidden = output[0] if isinstance(output, tuple) else output
            tokens = hidden.shape[1]
            where = torch.zeros(seen + tokens)
            where[columns] = 1
            steered = hidden + where[seen:, None] * vector
            seen += tokens * last
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return hook

    layers = list(text_layers(model))
    handles = [
        layer.register_forward_hook(add(vector, layer is layers[-1]))
        for layer, vector in zip(layers, vectors, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


COLUMNS: dict[str, Callable[[int], slice]] = {
    "all": lambda n: slice(None),
    "prompt": lambda n: slice(0, n),
    "last_prompt": lambda n: slice(n - 1, n),
    "completion": lambda n: slice(n, None),
    "first_completion": lambda n: slice(n, n + 1),
}


def generated(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    """Five greedy tokens, and the logits that they were chosen by."""
    made = model.generate(
        **inputs,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[0, -5:].tolist(), torch.stack(made.logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_text_model_is_steered_at_every_token_of_text_and_image(model_type: str) -> None:
    tiny = tiny_seeing(model_type)
    assert (tiny.seen["input_ids"] == IMAGE).sum() == FAMILIES[model_type][3]
    model = tiny.model
    assert find_decoder(model).layers is text_layers(model)
    with torch.no_grad():
        base = model(**tiny.seen).logits
        vectors = steer.attach(model)
        assert torch.equal(model(**tiny.seen).logits, base)
        fill(vectors)
        steered = model(**tiny.seen).logits
        values = list(vectors.tensors().values())
        with vectors.disabled():
            assert torch.equal(model(**tiny.seen).logits, base)
        steer.detach(model)
        with hooks(model, values, slice(None)):
            expected = model(**tiny.seen).logits
    assert relative(steered, expected) < 1e-6
    # an image token's own logits move, as a text token's do
    moved = (steered - base).norm(dim=-1)[0]
    assert (moved > 0.01 * base.norm(dim=-1)[0]).all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_positions_in_generate_with_an_image(model_type: str) -> None:
    tiny = tiny_seeing(model_type)
    model, length = tiny.model, tiny.seen["input_ids"].shape[1]
    plain = generated(model, tiny.seen)
    for positions in ("all", *SOME):
        vectors = fill(steer.attach(model, SteeringConfig(positions=positions)))
        ids, logits = generated(model, tiny.seen)
        values = list(vectors.tensors().values())
        steer.detach(model)
        with hooks(model, values, COLUMNS[positions](length)):
            expected_ids, expected = generated(model, tiny.seen)
        assert ids == expected_ids, positions
        assert relative(logits, expected) < 1e-5, positions
        assert relative(logits, plain[1]) > 1e-3, positions


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3", "llava", "smolvlm"])
def test_every_site_is_in_the_text_model(model_type: str, site: str) -> None:
    tiny = tiny_seeing(model_type)
    layer = text_layers(tiny.model)[1]
    steer.attach(tiny.model, SteeringConfig(site=site, layers=1))
    hooked = [m for m in layer.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked
    tower = [m for n, m in tiny.model.named_modules() if "vision" in n or "visual" in n]
    assert tower and not any(m._forward_hooks or m._forward_pre_hooks for m in tower)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    tiny = tiny_seeing(model_type)
    tiny.model.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert type(model) is type(tiny.model)
    vectors = fill(steer.attach(model))
    vectors.save(tmp_path / "vectors")
    with torch.no_grad():
        steered = model(**tiny.seen).logits
    again = load_model(str(tmp_path / "model"))
    steer.load(tmp_path / "vectors", again)
    with torch.no_grad():
        assert torch.equal(again(**tiny.seen).logits, steered)
    saved = steer.read(tmp_path / "vectors")
    assert saved.config.model_type == model.config.get_text_config().model_type
    bones = skeleton(str(tmp_path / "model"))
    assert find_decoder(bones).name == find_decoder(model).name


@pytest.mark.parametrize("kind", ["constant", "shared", "adaptive"])
def test_vectors_of_the_text_model_fit_the_whole_and_back(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    whole = tiny_vision("llava")
    text = LlamaForCausalLM(whole.config.text_config).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    ids = torch.randint(3, 80, (1, 9))
    options = {"rank": 2} if kind == "shared" else {}
    fill(steer.attach(text, SteeringConfig(kind=kind, **options))).save(tmp_path / "text")
    steer.load(tmp_path / "text", whole).save(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).logits, text(input_ids=ids).logits)
    steer.detach(text)
    steer.load(tmp_path / "whole", text)
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).logits, text(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_peft_adapter_of_a_vision_language_model(tmp_path: Path) -> None:
    from peft import PeftModel

    tiny = tiny_seeing("llava")
    vectors = fill(steer.attach(tiny.model))
    vectors.save(tmp_path / "vectors")
    with torch.no_grad():
        steered = tiny.model(**tiny.seen).logits
    steer.detach(tiny.model)
    peft.write(steer.read(tmp_path / "vectors"), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(tiny.model, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert relative(adapted(**tiny.seen).logits, steered) < 1e-5


@pytest.mark.parametrize("kind", ["constant", "adaptive"])
def test_a_plain_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    model = tiny_vision("llava")
    model.save_pretrained(tmp_path / "model")
    vectors = fill(steer.attach(model, SteeringConfig(kind=kind)))
    made = steer.Artifact(vectors.config, vectors.tensors())
    with pytest.raises(SteerError, match="is a vision-language model, and plain checkpoints") as error:
        checkpoint.write(made, str(tmp_path / "model"), tmp_path / "out")
    message(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl"])
def test_a_text_only_update_is_the_gradient_of_plain_hooks(
    model_type: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_vision(model_type)
    rows: list[tuple[list[int], list[int], float]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        values = [float(sum(ids) % 7) for ids in completion_ids]
        read = tiny_tokenizer(prompts, add_special_tokens=False).input_ids
        rows.extend(zip(read, completion_ids, values, strict=True))
        return values

    args = config(tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1)
    trainer = make_trainer(model, tiny_tokenizer, args, reward)
    trainer.train()
    moved = [-vector for vector in trainer.vectors.tensors().values()]
    plain = tiny_vision(model_type).requires_grad_(False)
    vectors = [torch.zeros(32, requires_grad=True) for _ in text_layers(plain)]
    loss = torch.zeros(())
    for prompt, completion, value in rows:
        others = [other for p, _, other in rows if p == prompt]
        advantage = value - (sum(others) - value) / (len(others) - 1)
        ids = torch.tensor([*prompt, *completion])
        with hooks(plain, vectors, slice(None)):
            logits = plain(input_ids=ids[None], use_cache=False).logits[0]
        logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        loss = loss - advantage * logs.gather(1, ids[len(prompt) :, None]).sum()
    expected = torch.autograd.grad(loss / sum(len(ids) for _, ids, _ in rows), vectors)
    size = max(gradient.norm() for gradient in expected)
    assert size > 1e-3
    for got, gradient in zip(moved, expected, strict=True):
        assert (got - gradient).norm() < 1e-4 * size


def test_training_with_images_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": ["1+1="] * 8, "image": [[0]] * 8, "number": range(8)})
    with pytest.raises(
        SteerError, match="the column 'image', and vectors are trained on text alone"
    ) as error:
        make_trainer(tiny_vision("llava"), tiny_tokenizer, config(tmp_path), parity, data=data)
    message(error)


def test_vllm_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_vision("gemma3")
    with pytest.raises(
        SteerError, match="gemma3 is a vision-language model, which the engine does not"
    ) as error:
        make_trainer(model, tiny_tokenizer, config(tmp_path, use_vllm=True), target_share)
    message(error)
    assert "steering_vectors" not in model.__dict__
    member = Member("one", [target_share], config(tmp_path, use_vllm=True), SteeringConfig())
    with pytest.raises(SteerError, match="gemma3 is a vision-language model, which the engine does not"):
        PopulationTrainer(model, [member], problems(), tiny_tokenizer)


def test_generate_answers_a_text_prompt(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_vision("smolvlm")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    fill(steer.attach(model), std=10.0).save(tmp_path / "vectors")
    words = ["generate", str(tmp_path / "model"), "--vectors", str(tmp_path / "vectors")]
    assert main([*words, "--prompt", "1+1=", "--max-new-tokens", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"] != told["steered"]

"""
Features of a difference: the statistics against second implementations, the model with one added, the page.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from helpers.steering import fill, logits, message, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import steer
from steer.cli import main
from steer.errors import SteerError
from steer.sae import SAE, SAEConfig, save_sae
from steer.sae.activations import Reader, read_all
from steer.sae.browser import write_browser
from steer.sae.features import (
    Feature,
    GradedCompletion,
    Snippet,
    analyse,
    difference_within_prompts,
    logit_effects,
    of_equal_mass,
    read_completions,
    within_prompts,
)
from steer.sae.intervene import answer_without, shifted


@pytest.fixture
def diff(tiny_llama, tiny_tokenizer):
    """A steered model, an SAE of its differences, and completions of which those with an 8 are right."""
    fill(steer.attach(tiny_llama))
    generator = torch.Generator().manual_seed(0)
    completions = []
    for _ in range(40):
        ids = torch.randint(10, 97, (7,), generator=generator).tolist()
        completions.append(GradedCompletion([1, 20, 21], ids, ids[0] % 2 == 0))
    reader = Reader(tiny_llama, 2, what="difference")
    sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4))
    sae.start_from(read_all(reader, [c.window() for c in completions]))
    return sae.eval(), reader, tiny_tokenizer, completions


def test_firing_rates_are_counted_by_completion(diff):
    sae, reader, tokenizer, completions = diff
    features = analyse(sae, reader, tokenizer, completions, least=3)
    assert features
    fires, strengths = [], []
    for completion in completions:
        ids = torch.tensor([completion.prompt + completion.ids])
        model = reader.model
        with torch.no_grad():
            steered = _stream(model, ids)
            with steer.attached(model).disabled():
                base = _stream(model, ids)
            z = sae.encode((steered - base)[0, 3:])
        fires.append((z > 0).any(0))
        strengths.append(z)
    fires, correct = torch.stack(fires), torch.tensor([c.correct for c in completions])
    counted = fires.sum(0)
    assert {f.index for f in features} == {i for i in range(64) if counted[i] >= 3}
    for feature in features:
        assert feature.right == pytest.approx(fires[correct, feature.index].float().mean().item())
        assert feature.wrong == pytest.approx(fires[~correct, feature.index].float().mean().item())
        mean = torch.cat(strengths)[:, feature.index].mean().item()
        assert feature.mean == pytest.approx(mean, rel=1e-3, abs=1e-6)
        assert feature.difference == pytest.approx(feature.right - feature.wrong)  # there is one prompt
        assert feature.low <= feature.difference <= feature.high
        for snippet in feature.snippets:
            assert len(snippet.tokens) == len(snippet.strengths) == 7
            assert max(snippet.strengths) > 0
        assert feature.strongest == pytest.approx(max(feature.snippets[0].strengths), rel=1e-3)
    assert [f.p for f in features] == sorted(f.p for f in features)


def _stream(model, ids):
    """The last layer's output, before the final norm."""
    kept = []
    handle = model.model.layers[2].register_forward_hook(lambda m, a, out: kept.append(out))
    model(ids, use_cache=False)
    handle.remove()
    return kept[0]


def test_equal_completions_are_read_once_and_shown_once(diff, monkeypatch):
    sae, reader, tokenizer, completions = diff
    for feature in analyse(sae, reader, tokenizer, [*completions, *completions], least=3):
        shown = [tuple(snippet.tokens) for snippet in feature.snippets]
        assert len(set(shown)) == len(shown)
    repeated = [*completions[:4], *completions[:2], GradedCompletion([1], [], True)]
    expected = read_all(reader, [c.window() for c in repeated[:6]])
    windows: list = []
    plain = type(reader).read
    monkeypatch.setattr(type(reader), "read", lambda self, batch: windows.extend(batch) or plain(self, batch))
    torch.testing.assert_close(read_completions(reader, repeated), expected)
    assert len(windows) == 4


def test_as_many_other_features_of_equal_mass():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(60, generator=generator).tolist()
    made = [
        Feature(i, 0.5, 0.4, 0.1, 0, 0.2, 0.5, 0.5, mean, 1.0, [], [], []) for i, mean in enumerate(means)
    ]
    made[50] = replace(made[50], q=0.01)  # of wrong answers, say
    chosen = list(range(12))
    mass = sum(means[i] for i in chosen)
    sets = [of_equal_mass(made, chosen, seed) for seed in range(4)]
    for one in sets:
        assert len(set(one)) == 12
        assert not set(one) & {*chosen, 50}
        assert sum(means[i] for i in one) == pytest.approx(mass, rel=1e-3)
    assert len({tuple(one) for one in sets}) > 1
    assert of_equal_mass(made, chosen, 0) == sets[0]
    heavy = [replace(made[0], mean=100.0), *made[1:]]  # nothing else weighs as much: the heaviest others
    assert of_equal_mass(heavy, [0], 0) == [max((m, i) for i, m in enumerate(means) if i not in (0, 50))[1]]
    with pytest.raises(SteerError, match="29 other features are not as many as the 30 chosen"):
        of_equal_mass(made, range(30))


def test_one_sided_completions_are_refused(diff):
    sae, reader, tokenizer, completions = diff
    wrong = [GradedCompletion(c.prompt, c.ids, False) for c in completions]
    with pytest.raises(SteerError) as error:
        analyse(sae, reader, tokenizer, wrong)
    assert "0 of 40 completions are right" in message(error)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 20))
def test_with_one_prompt_the_test_is_the_chi_square_of_a_table(hits, others):
    """Pearson's chi-square of the 2 x 2 table, times (n - 1) / n, with one degree of freedom."""
    fires = torch.tensor([i < hits for i in range(30)] + [i < others for i in range(20)])[:, None]
    correct = torch.arange(50) < 30
    p = within_prompts(fires, correct, torch.zeros(50, dtype=torch.long)).item()
    observed = [[hits, 30 - hits], [others, 20 - others]]
    columns = [hits + others, 50 - hits - others]
    if 0 in columns:
        assert p == 1
    else:
        expected = [[n * c / 50 for c in columns] for n in (30, 20)]
        chi2 = sum((observed[i][j] - expected[i][j]) ** 2 / expected[i][j] for i in (0, 1) for j in (0, 1))
        assert p == pytest.approx(math.erfc(math.sqrt(chi2 * 49 / 50 / 2)), abs=1e-9)


def test_p_values_are_those_of_shuffling_within_prompts():
    """Right and wrong shuffled within each of 6 prompts, 4,000 times; p to 0.02."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(6).repeat_interleave(20)
    correct = torch.rand(120, generator=generator) < (0.2 + 0.1 * prompt)
    fires = torch.rand(120, 5, generator=generator) < 0.3 + 0.1 * torch.arange(5) * correct[:, None]
    found = within_prompts(fires, correct, prompt)
    hits = torch.empty(4000, 5)
    for i in range(4000):  # a random order whose prompts stay together
        order = (torch.rand(120, generator=generator) + prompt).argsort()
        hits[i] = fires[correct[order]].float().sum(0)
    centre, seen = hits.mean(0), fires[correct].float().sum(0)
    share = ((hits - centre).abs() >= (seen - centre).abs() - 0.5).float().mean(0)  # half a count: continuity
    low = ((hits - centre).abs() >= (seen - centre).abs() + 0.5).float().mean(0)
    assert ((low - 0.02 <= found) & (found <= share + 0.02)).all()
    assert found[4] < 0.01


def test_a_feature_that_only_knows_which_prompt_it_is_tells_nothing():
    prompt = torch.arange(4).repeat_interleave(10)
    fires = (prompt == 2)[:, None]
    correct = torch.arange(40) % 10 < 2 + 2 * prompt
    assert within_prompts(fires, correct, prompt).item() == 1
    assert [one.item() for one in difference_within_prompts(fires, correct, prompt)] == [0, 0, 0]
    shares = [fires[some].float().mean().item() for some in (correct, ~correct)]
    assert shares == pytest.approx([0.3, 0.2])  # all completions taken together, it seems to


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 20))
def test_with_one_prompt_the_interval_is_that_of_two_shares(hits, others):
    fires = torch.tensor([i < hits for i in range(30)] + [i < others for i in range(20)])[:, None]
    correct = torch.arange(50) < 30
    found = difference_within_prompts(fires, correct, torch.zeros(50, dtype=torch.long))
    a, b = hits / 30, others / 20
    reach = 1.959964 * math.sqrt(a * (1 - a) / 30 + b * (1 - b) / 20)
    expected = [a - b, max(-1, a - b - reach), min(1, a - b + reach)]
    assert [one.item() for one in found] == pytest.approx(expected, abs=1e-6)


def test_intervals_within_prompts_hold_the_difference_of_many_small_prompts():
    """2,000 features that fire by 0.2 more often in right completions, whatever their rate in a prompt."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(100).repeat_interleave(4)
    easy = torch.rand(100, generator=generator)
    correct = torch.rand(400, generator=generator) < easy[prompt]  # easy prompts have more right completions
    rate = 0.1 + 0.6 * easy[prompt] + 0.2 * correct  # and more that fire
    fires = torch.rand(400, 2000, generator=generator) < rate[:, None]
    found, low, high = difference_within_prompts(fires, correct, prompt)
    assert found.mean().item() == pytest.approx(0.2, abs=0.01)
    assert ((high - low) / 2 / 1.96).mean().item() == pytest.approx(found.std().item(), rel=0.06)
    assert ((low <= 0.2) & (high >= 0.2)).double().mean().item() == pytest.approx(0.95, abs=0.02)
    assert fires[correct].double().mean() - fires[~correct].double().mean() > 0.3


def test_prompts_of_which_all_completions_are_right_or_wrong_tell_no_difference():
    fires, prompt = torch.tensor([[True], [True], [False]]), torch.tensor([0, 0, 1])
    found = difference_within_prompts(fires, prompt == 0, prompt)
    assert [one.item() for one in found] == [0, -1, 1]


def test_logit_effects_are_those_of_the_unembedding(diff):
    sae, reader, tokenizer, _ = diff
    up, down = logit_effects(sae, reader.model, tokenizer, [5, 9], 3)
    model = reader.model
    for place, feature in enumerate((5, 9)):
        with torch.no_grad():
            effect = model.lm_head.weight @ (model.model.norm.weight * sae.W_dec[feature])
        order = effect.argsort(descending=True).tolist()
        assert up[place] == [tokenizer.decode([t]) for t in order[:3]]
        assert down[place] == [tokenizer.decode([t]) for t in order[::-1][:3]]


def test_shifted_adds_like_a_steering_vector(tiny_llama):
    """A constant vector at the same layer: the same logits to rounding."""
    ids, direction = tokens(), torch.linspace(-1, 1, 32)
    base = logits(tiny_llama, ids)
    with shifted(tiny_llama, 1, direction):
        found = logits(tiny_llama, ids)
    assert torch.equal(logits(tiny_llama, ids), base)
    vectors = steer.attach(tiny_llama, steer.SteeringConfig(layers=1))
    vectors.set_tensors({name: direction for name in vectors.tensors()})
    torch.testing.assert_close(found, logits(tiny_llama, ids), rtol=1e-4, atol=1e-5)
    with shifted(tiny_llama, 1, -direction):
        torch.testing.assert_close(logits(tiny_llama, ids), base, rtol=1e-4, atol=1e-5)
    with pytest.raises(SteerError) as error, shifted(tiny_llama, 1, torch.zeros(3)):
        pass
    assert "hidden size is 32" in message(error)


def greedily(model, prompts: list[list[int]], length: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(length):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


@torch.no_grad()
def test_without_the_feature_that_is_the_whole_difference_the_model_is_the_base(tiny_llama):
    """Ablated token by token with caches, against plain passes over the whole text."""
    prompts = [[1, 20, 21], [1, 30, 31], [1, 40, 41, 42]]
    plain = greedily(tiny_llama, prompts, 6)
    vectors = steer.attach(tiny_llama, steer.SteeringConfig(layers=1))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    direction /= direction.norm()
    vectors.set_tensors({name: 5 * direction for name in vectors.tensors()})
    steered = greedily(tiny_llama, prompts, 6)
    assert steered != plain
    sae = SAE(SAEConfig(d_in=32, d_sae=8, k=1)).eval()  # feature 3 is the vector
    sae.W_dec[3] = direction
    sae.encoder.weight.mul_(1e-3)[3] = direction
    reader = Reader(tiny_llama, 1, what="difference")
    assert answer_without(sae, reader, [3], prompts, 6, []) == plain
    assert answer_without(sae, reader, [4], prompts, 6, []) == steered
    end = steered[0][2]
    cut = steered[0][: steered[0].index(end) + 1]
    assert answer_without(sae, reader, [], prompts[:1], 6, [end]) == [cut]
    with pytest.raises(SteerError) as error:
        answer_without(sae, Reader(tiny_llama, 1), [3], prompts, 6, [])
    assert "what='difference'" in message(error)


# --- the page


def feature(index: int, word: str) -> Feature:
    snippet = Snippet([word, " b"], [0.5, 0.0], True)
    return Feature(index, 0.7, 0.2, 0.5, 0.3, 0.6, 1e-5, 1e-3, 0.01, 0.5, [word], ["no"], [snippet])


def test_the_page_holds_its_data_and_nothing_breaks_out(tmp_path):
    nasty = "</script><script>alert(1)</script><!-- é \n"
    path = write_browser(tmp_path / "features.html", [feature(3, nasty), feature(8, "x")], "A & <b>", "about")
    page = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found[1])
    assert data["features"][0]["promotes"] == [nasty]
    assert data["features"][1]["index"] == 8
    assert page.count("<script") == 2
    assert "<title>A &amp; &lt;b&gt;</title>" in page
    assert "http" not in page  # one page, nothing fetched


# --- the command line


def test_sae_info_and_convert(tmp_path, capsys):
    sae = SAE(SAEConfig(d_in=8, d_sae=16, k=2, source={"model": "made", "layer": 3}))
    own, other = str(save_sae(sae, tmp_path / "own")), str(tmp_path / "lens")
    assert main(["sae", "info", own]) == 0
    shown = capsys.readouterr().out
    assert "16 for activations of width 8, topk with k=2" in shown
    assert re.search(r"layer +3", shown)
    assert main(["sae", "convert", own, other]) == 0
    assert (tmp_path / "lens" / "sae_weights.safetensors").exists()
    assert main(["sae", "convert", own, str(tmp_path / "third"), "--format", "numpy"]) == 1
    assert "choose one of steer, saelens, sparsify, dictionary_learning" in message_of(capsys)
    assert main(["sae", "info", str(tmp_path)]) == 1
    assert "holds no SAE" in message_of(capsys)


def message_of(capsys) -> str:
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line

"""The study of the Jacobian lens on a tiny model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.lens import subject_of
from helpers.paths import ROOT
from helpers.training import model_folder

from evals import jacobian_lens
from steer import SteerError
from steer.lens.jacobian import fit, sample_windows


@torch.no_grad()
def test_ranks_of_the_token_that_is_promoted_most(build_tiny, tiny_tokenizer, tmp_path, capsys) -> None:
    model = build_tiny("llama", initializer_range=0.3)
    folder = model_folder(tmp_path / "model", model, tiny_tokenizer)
    texts = ["12+3=15", "7-4=3", "x*y=z"]
    sample = sample_windows(texts, tiny_tokenizer, 2, 6)
    lens = list(fit(model, sample, [0, 1, 2]))[-1].save(tmp_path / "lens.safetensors")
    subject = subject_of(model, tiny_tokenizer, std=0.05)
    subject.vectors.config.base_model_name_or_path = str(folder)
    source = subject.vectors.save_pretrained(tmp_path / "vectors")
    (tmp_path / "fit.txt").write_text("\n".join(texts[:2]))
    (tmp_path / "others.txt").write_text("\n".join(texts[::-1]))
    argv = [str(source), "--lens", str(lens), "--out", str(tmp_path / "new/out.json"), "--length", "6"]
    jacobian_lens.main([*argv, "--limit", "3", "--texts", str(tmp_path / "others.txt")])
    result = json.loads((tmp_path / "new/out.json").read_text())
    assert result["model"] == str(folder) and result["base_adapter"] is None
    assert capsys.readouterr().out.count("| ") > 3

    # measured by hand: the last layer's vector alone
    own = subject.vectors.tensors()
    last = list(own)[-1]
    subject.vectors.set_tensors({name: value * (name == last) for name, value in own.items()})
    total = torch.zeros(97)
    for window in sample_windows(texts[::-1], tiny_tokenizer, 3, 6):
        ids = torch.tensor([window.ids])
        steered = model(ids).logits.log_softmax(-1)[0, 1:]
        with subject.vectors.disabled():
            total += (steered - model(ids).logits.log_softmax(-1)[0, 1:]).sum(0)
    row = result["rows"]["trained"][2]
    top = int(total[: len(tiny_tokenizer)].argmax())
    assert row["token"] == tiny_tokenizer.decode([top])
    assert row["change"] == pytest.approx(total[top].item() / result["measured"]["tokens"], rel=1e-3)
    # nothing is above the last layer: both lenses read the same there
    assert row["rank_logit"] == row["rank_jacobian"]
    assert row["r_logit"] == pytest.approx(row["r_jacobian"], abs=1e-5)
    assert result["rows"]["trained"][0]["r_jacobian"] > result["rows"]["trained"][0]["r_logit"]
    assert [row["layer"] for row in result["rows"]["random"]] == [0, 1, 2] * 2
    assert result["summary"]["random"]["logit"]["rows"] == 6

    with pytest.raises(SteerError, match="fitted on these very texts"):
        jacobian_lens.main([*argv, "--limit", "2", "--texts", str(tmp_path / "fit.txt")])


def test_the_page_quotes_the_committed_results() -> None:
    files = sorted((ROOT / "evals/results/lens").glob("jacobian*.json"))
    tables = [jacobian_lens.table(json.loads(file.read_text())) for file in files]
    page = (ROOT / "docs/lens.md").read_text().splitlines()
    quoted = [line for line in page if re.match(r"\| \d+ \| `'", line)]
    for lines in tables:
        assert len(set(lines) & set(quoted)) > 9
    assert set(quoted) <= {line for lines in tables for line in lines}
    assert page.count(tables[0][0]) == len(tables) == 2

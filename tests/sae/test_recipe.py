"""
`steer sae train`: from a config to SAEs on disk, its overrides and its mistakes, one process and two.
"""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import torch
import yaml
from helpers.launching import LAUNCHERS, ROOT, launcher, started
from helpers.steering import message

from steer.cli import train_sae
from steer.errors import SteerError
from steer.sae import SAEConfig, load_sae
from steer.sae.schedule import TrainConfig

RECIPE = ROOT / "recipes" / "train_sae.py"
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("sae-*.yaml"))


@pytest.fixture
def config(build_tiny, tiny_tokenizer, tmp_path):
    """A config file with a tiny model and texts beside it."""
    folder = tmp_path / "model"
    build_tiny("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    texts = tmp_path / "texts.jsonl"
    rows = [{"problem": f"What is {a} + {b}?", "solution": f"{a + b}"} for a in range(30) for b in range(10)]
    texts.write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "run.yaml"
    settings = {
        "model": str(folder),
        "layer": 1,
        "texts": [str(texts)],
        "window": 32,
        "block": 1000,
        "tokens": 2048,
        "batch_size": 128,
        "log_every": 4,
        "saes": {"topk": {"d_sae": 64, "k": 4}, "kron": {"d_sae": 64, "k": 4, "encoder": "kron"}},
        "output_dir": str(tmp_path / "run"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_writes_saes_that_load(config, tmp_path, capsys):
    trained = train_sae.main(["--config", str(config)])
    for name in ("topk", "kron"):
        sae = load_sae(tmp_path / "run" / name)
        assert torch.equal(sae.W_dec, trained[name].W_dec)
        assert sae.cfg.source["layer"] == 1
        assert sae.cfg.source["texts"] == [str(tmp_path / "texts.jsonl")]
        assert name in capsys.readouterr().out or name == "kron"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 16]
    stopped = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    again = train_sae.main(["--config", str(config)])  # finished: nothing is trained again
    assert torch.equal(again["topk"].W_dec, trained["topk"].W_dec)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns >= stopped


def test_a_cache_serves_a_second_run(config, tmp_path):
    overrides = [f"cache={tmp_path / 'cache'}", "cache_tokens=1500", "epochs=2"]
    train_sae.main(["--config", str(config), *overrides])
    written = (tmp_path / "cache" / "activations.f16").stat().st_mtime_ns
    train_sae.main(
        ["--config", str(config), *overrides, f"output_dir={tmp_path / 'second'}", "saes.topk.k=2"]
    )
    assert (tmp_path / "cache" / "activations.f16").stat().st_mtime_ns == written
    assert load_sae(tmp_path / "second" / "topk").cfg.k == 2


def test_a_stream_that_ends_early_leaves_a_checkpoint(config, tmp_path):
    with pytest.raises(SteerError) as error:
        train_sae.main(["--config", str(config), "tokens=1000000", "save_every=5"])
    assert "the stream ended after" in message(error)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] > 10
    again = ["--config", str(config), "tokens=1000000", "save_every=5"]
    for override, part in (
        ("layer=2", "stream.layer was 1, now 2"),
        ("window=16", "stream.window was 32, now 16"),
    ):
        with pytest.raises(SteerError) as error:
            train_sae.main([*again, override])
        assert part in message(error)
    with pytest.raises(SteerError) as error:
        train_sae.main([*again, "epochs=2"])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] > state["step"]


def test_a_run_until_flat_says_how_it_ended(config, tmp_path, capsys):
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text(json.dumps({"text": "What is 77 + 5? It is 82. " * 40}))
    words = ["schedule=wsd", f"heldout={unseen}", "heldout_tokens=100", "eval_every=2", "epochs=3"]
    for threshold, said in (("1.0", "flat after"), ("1e-9", "not flat: stopped by the cap of 2,048")):
        folder = tmp_path / threshold
        words_now = [*words, f"early_stopping_threshold={threshold}", f"output_dir={folder}"]
        train_sae.main(["--config", str(config), *words_now])
        out = capsys.readouterr().out
        assert (
            said in out
            and "over the last 20% of the steps before the decay: kron +0." in out
            and "by the decay: kron" in out
        ), out
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["outcome"]["stopped"] == {"1.0": "flat", "1e-9": "capped"}[threshold]
        assert last["step"] == last["outcome"]["steps"] == last["heldout"]["step"]
    assert set(last["heldout"]["explained_variance"]) == {"topk", "kron"}


def test_processes_wait_while_one_writes_the_cache(config, monkeypatch):
    """NCCL gives up after ten minutes by default."""
    handlers = []

    def made(cpu, kwargs_handlers):
        handlers.extend(kwargs_handlers)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_sae, "Accelerator", made)
    with pytest.raises(KeyboardInterrupt):
        train_sae.main(["--config", str(config)])
    assert handlers[0].timeout >= timedelta(hours=12)


def test_two_processes_train_one_sae(config, tmp_path, monkeypatch):
    """Data parallel on two CPU processes: it finishes, and both read their share of the texts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = started([*launcher(LAUNCHERS / "cpu-2.yaml"), str(RECIPE), "--config", str(config)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["asked"]["stream"]["world"] == 2
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 16
    assert line["tokens"] == 2048
    sae = load_sae(tmp_path / "run" / "topk")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["lr"], "has no '='"),
        (["texts=[a.txt"], "override 'texts=[a.txt' is not YAML"),
        (["rate=1"], "unknown setting 'rate'"),
        (["saes.topk.size=1"], "unknown settings size"),
        (["saes=4"], "saes must be a mapping"),
        (["lr.max=1"], "'lr' has no settings of its own"),
        (["saes.topk.k=65"], "k=65 is more than"),
        (["saes.topk.d_in=31"], "give d_in=32"),
        (["layer=7"], "layer 7 does not exist"),
        (["texts=nowhere.txt"], "no file 'nowhere.txt'"),
        (["schedule=wsd", "early_stopping_threshold=0.1"], "needs texts to measure on"),
        (["texts=a.txt", "heldout=a.txt"], "heldout=a.txt is among the texts of training"),
        (["heldout_tokens=0"], "heldout_tokens=0"),
        (["heldout_tokens=5"], "heldout_tokens=5 has no effect without heldout=FILE"),
        (["eval_every=5"], "eval_every=5 has no effect without heldout=FILE"),
        (["decay=0.5"], "decay=0.5 has no effect without schedule=wsd"),
        (["early_stopping_window=0.5"], "has no effect without early_stopping_threshold; give that"),
        (["cache_tokens=5"], "cache_tokens=5 without a cache"),
        (
            ["saes={a: {d_sae: 64, k: 4, activation: jumprelu}}", "precision=bfloat16", "auxiliary=0"],
            "precision=bfloat16 has no effect without an SAE of topk or batchtopk",
        ),
        (["block=127"], "block=127 is less than one batch of batch_size=128"),
        (["saes.kron.loss=matryoshka", "saes.kron.prefixes=[12,64]"], "cuts a head of KronSAE in two"),
    ],
)
def test_mistakes_are_named(config, overrides, part):
    with pytest.raises(SteerError) as error:
        train_sae.main(["--config", str(config), "lr=1e-3", *overrides])
    assert part in message(error)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_hold_settings_that_can_be(path):
    run, training = train_sae.parse(["--config", str(path)])
    for settings in run.saes.values():
        SAEConfig(**{"d_in": 576, **settings})
    assert training.steps > 100


def test_published_settings_are_in_the_configs():
    _, training = train_sae.parse(["--config", str(ROOT / "recipes/configs/sae-kron-qwen2.5-1.5b.yaml")])
    assert (training.lr, training.final_lr, training.warmup) == (8e-4, 1e-6, 0.1)
    assert (training.batch_size, training.auxiliary, training.tokens) == (8192, 1 / 32, 125_000_000)
    assert TrainConfig().lr == 8e-4


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        train_sae.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("batch_size", "prefixes", "cache_tokens"))


def test_an_sae_of_no_run_is_not_replaced(config, tmp_path):
    (tmp_path / "run" / "topk").mkdir(parents=True)
    (tmp_path / "run" / "topk" / "cfg.json").write_text("mine")
    with pytest.raises(SteerError, match=r"topk exists already: give another output_dir") as error:
        train_sae.main(["--config", str(config)])
    message(error)
    assert (tmp_path / "run" / "topk" / "cfg.json").read_text() == "mine"

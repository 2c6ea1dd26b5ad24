"""A whole evaluation on a tiny model: every variant, stopped and resumed, grown, and refused in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluating import TOKENS, arguments, everything, make_base, make_run, rows
from helpers.paths import ROOT
from helpers.steering import fill
from helpers.training import write_problems
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import steer
from steer import SteerError
from steer.artifact_scores import vectors_checksum
from steer.config import Condition
from steer.evaluation import run, store, variants
from steer.evaluation.collect import collect
from steer.evaluation.engines import Decoding, HfEngine, row_seed
from steer.evaluation.heldout import answer
from steer.evaluation.store import GREEDY, read_completions, read_settings
from steer.files import held
from steer.generation import allocator
from steer.identity import MERGED
from steer.prompt import PromptSpec
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import format_prompt


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evals")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    if not (place / "sums.jsonl").exists():
        make_base(place, build_tiny, tiny_tokenizer)
    return place


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert run.main(argv) == 1
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in printed
    return lines[0]


@pytest.fixture
def whole(base: Path) -> Path:
    """One finished run of every variant."""
    out = base / "whole"
    if not out.exists():
        assert run.main(everything(base, out)) == 0
    return out


def test_every_completion_is_kept_and_graded(base, whole):
    found = rows(whole)
    names = ["base", "base + To", "s", "s x-0.5", "lora"]
    ids = {problem for _, problem, _ in found}
    assert len(ids) == 9
    assert set(found) == {(v, i, k) for v in names for i in ids for k in (GREEDY, 0, 1)}
    problems = {row["id"]: row for row in store.read_problems(whole)}
    with MathGrader() as grader:
        listed = list(found.values())
        verdicts = grader.check(
            [row["text"] for row in listed], [problems[row["problem"]]["answer"] for row in listed]
        )
    assert [(v.correct, v.answer, v.how) for v in verdicts] == [
        (r["correct"], r["answer"], r["how"]) for r in listed
    ]
    assert {row["correct"] for row in listed} == {True, False}, "the test sees both verdicts"
    for row in listed:
        assert row["tokens"] == TOKENS or not row["truncated"]
        assert row["seed"] == row_seed(0, row["problem"], row["sample"])
    assert {row["truncated"] for row in listed} == {True, False}
    settings = read_settings(whole)
    assert settings["variants"]["s"]["parameters"] == 3 * 32
    assert settings["variants"]["lora"]["parameters"] == 3 * 2 * (32 + 48)
    assert settings["variants"]["base + To"]["prefix"] == "To"
    assert settings["sessions"][0]["completions"] == len(listed)
    assert settings["sessions"][0]["versions"]["torch"]
    assert json.loads((whole / "scores.json").read_text())["base"] == "base"


def test_greedy_answers_are_those_of_a_plain_evaluation(base, whole):
    """Base and vectors against `answer`, the adapter against peft and transformers' own generate."""
    found = rows(whole)
    tokenizer = AutoTokenizer.from_pretrained(base / "model", padding_side="left")
    problems = store.read_problems(whole)
    format_problem = lambda text: format_prompt(text, tokenizer, PromptSpec("plain"))  # noqa: E731

    def evaluated(model: Any) -> list[str]:
        with MathGrader() as grader:
            answers = answer(model, tokenizer, problems, format_problem, grader, TOKENS, [2])
        return [answer.completion for answer in answers]

    def stored(variant: str) -> list[str]:
        return [found[variant, row["id"], GREEDY]["text"] for row in problems]

    model = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    plain = evaluated(model)
    assert stored("base") == plain
    vectors = steer.load(base / "vectors", model)
    assert stored("s") == evaluated(model) != plain
    vectors.scale = -0.5
    assert stored("s x-0.5") == evaluated(model) != plain
    steer.detach(model)

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, base / "lora").eval()
    for row in problems[:3]:
        inputs = tokenizer(format_problem(row["problem"]), add_special_tokens=False, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        out = adapted.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        text = tokenizer.decode(out[0, length:], skip_special_tokens=True)
        assert found["lora", row["id"], GREEDY]["text"] == text
    inputs = tokenizer(format_problem(problems[0]["problem"]) + "To", add_special_tokens=False)["input_ids"]
    assert found["base + To", problems[0]["id"], GREEDY]["prompt_tokens"] == len(inputs)


def test_variants_leave_the_base_as_it_was(base):
    engine = HfEngine(str(base / "model"), None, "auto")
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    ids = torch.tensor([[5, 9, 33, 60]])
    with torch.no_grad():
        logits = engine.model(ids).logits
        for variant in run.variants.collect(
            run.Variant("base"), [str(base / "vectors")], [2.0], [str(base / "lora")]
        ):
            with engine.variant(variant):
                inside = engine.model(ids).logits
            assert torch.equal(inside, logits) == (variant.kind == "base")
            assert torch.equal(engine.model(ids).logits, logits)
    after = dict(engine.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_each_batch_looks_at_the_memory_that_is_kept(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(allocator, "limit_kept_memory", asked.append)
    engine = HfEngine(str(base / "model"), None, "auto")
    for _ in range(2):
        engine.complete([[5, 9, 33]], [0], Decoding(2, (2,), temperature=0))
    assert asked == [engine.model.device] * 2


def test_names_of_variants(base):
    source = f"s#2={base / 'vectors'}"
    found = run.variants.collect(run.Variant("full#1"), [source], [1, 0.5], [str(base / "lora")], ["To"])
    names = ["full#1", "full + To#1", "s#2", "s x0.5#2", "lora"]
    assert [variant.name for variant in found] == names, "a scale is another method, not another seed"
    assert [variant.scale for variant in found] == [1, 1, 1, 0.5, 1]


def test_a_prefix_or_a_system_prompt_does_not_make_a_fine_tune_untrained():
    full = run.Variant("full", parameters=5, digest="d")
    found = run.variants.collect(full, prefixes=["To"], systems=["brief=Be brief."])
    assert [(variant.parameters, variant.digest) for variant in found] == [(5, "d")] * 3


def test_a_condition_tells_vectors_apart(base, tmp_path):
    saved = steer.read(base / "vectors")
    above = saved.select("1-2")
    digests = [variants._vectors(str(base / "vectors"))[1]]
    checksums = []
    for threshold in (0.1, 0.2):
        made = above.with_condition(Condition(0, threshold), torch.ones(32), {})
        made.save_pretrained(tmp_path / str(threshold))
        digests.append(variants._vectors(str(tmp_path / str(threshold)))[1])
        checksums.append(vectors_checksum(made.config, made.tensors))
    assert len(set(digests)) == 3 and len(set(checksums)) == 2


def test_a_name_with_dots_is_whole(base, tmp_path):
    source = shutil.copytree(base / "vectors", tmp_path / "Qwen2.5-7B-math")
    file = shutil.copy(source / "steering.safetensors", tmp_path / "v1.5.safetensors")
    found = run.variants.collect(run.Variant("base"), [str(source), str(file)])
    assert [variant.name for variant in found] == ["base", "Qwen2.5-7B-math", "v1.5"]


def test_system_prompts_are_variants_and_the_base_can_be_left_out(base, tmp_path):
    argv = [*arguments(base, tmp_path / "out"), "--template", "boxed_short", "--samples", "0"]
    assert run.main([*argv, "--no-base", "--systems", "brief=Be brief.", "long=Say all you know."]) == 0
    found = rows(tmp_path / "out")
    assert {variant for variant, _, _ in found} == {"brief", "long"}
    length = {(variant, problem): row["prompt_tokens"] for (variant, problem, _), row in found.items()}
    apart = len("Say all you know.") - len("Be brief.")  # a token a character
    problems = {problem for _, problem in length}
    assert all(length["long", p] == length["brief", p] + apart for p in problems)
    assert read_settings(tmp_path / "out")["variants"]["brief"]["system"] == "Be brief."


def test_results_do_not_depend_on_the_batch_or_the_order(base, whole):
    out = base / "small-batches"
    assert run.main(arguments(base, out, "--batch-size", "4", "--vectors", f"s={base / 'vectors'}")) == 0
    everything = rows(whole)
    assert rows(out) == {key: row for key, row in everything.items() if key[0] in ("base", "s")}


def test_samples_differ_and_follow_the_seed(base, whole):
    found = rows(whole)
    ids = {problem for _, problem, _ in found}
    assert any(found["base", i, 0]["text"] != found["base", i, 1]["text"] for i in ids)
    out = base / "other-seed"
    assert run.main(arguments(base, out, "--seed", "1")) == 0
    other = rows(out)
    assert all(other["base", i, GREEDY]["text"] == found["base", i, GREEDY]["text"] for i in ids)
    assert any(other["base", i, 0]["text"] != found["base", i, 0]["text"] for i in ids)


def test_a_stopped_run_goes_on(base, whole, tmp_path, monkeypatch, capsys):
    """Ctrl-C after three batches: they are kept, the rest is made, and the whole is as if never stopped."""
    out, add, written = tmp_path / "out", store.Store.add, []

    def stop_after_three(self: store.Store, batch: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(len(batch))
        add(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "add", stop_after_three)
        assert run.main(everything(base, out, "--batch-size", "5")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    kept = rows(out)
    assert len(kept) == sum(written) == 14  # two batches of greedy answers (5 and 4), one of samples
    made = []
    complete = HfEngine.complete
    monkeypatch.setattr(
        HfEngine, "complete", lambda self, *args: made.append(len(args[0])) or complete(self, *args)
    )
    assert run.main(everything(base, out, "--batch-size", "5")) == 0
    assert sum(made) == len(rows(whole)) - len(kept)
    assert rows(out) == rows(whole)
    assert [s["completions"] for s in read_settings(out)["sessions"]] == [14, sum(made)]
    made.clear()
    assert run.main(everything(base, out)) == 0
    assert not made, "a finished run computes nothing"


def test_a_killed_run_loses_one_batch_at_most(base, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "steer.cli", "eval", *arguments(base, out, "--batch-size", "1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    kept = rows(out)
    assert len(kept) >= 3
    assert run.main(arguments(base, out)) == 0
    assert rows(out) == {key: row for key, row in rows(whole).items() if key[0] == "base"}


def test_a_full_disk_loses_nothing(base, whole, tmp_path, monkeypatch, capsys):
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        line = refused(capsys, arguments(base, out, "--batch-size", "3"))
    assert "No space left on device; what is there is whole" in line
    kept = rows(out)
    assert kept
    assert not [name for name in os.listdir(out) if name.startswith(".part")], "no half-written file stays"
    assert run.main(arguments(base, out, "--batch-size", "3")) == 0
    done = rows(out)
    assert done == {key: row for key, row in rows(whole).items() if key[0] == "base"}
    assert kept.items() <= done.items()


def test_a_run_grows(base, whole, tmp_path):
    out = tmp_path / "out"
    write_problems(tmp_path / "more.jsonl", range(30, 33), modulus=10)
    assert run.main(arguments(base, out, "--samples", "0", "--limit", "4")) == 0
    assert len(rows(out)) == 4
    assert run.main(arguments(base, out)) == 0
    assert rows(out) == {key: row for key, row in rows(whole).items() if key[0] == "base"}
    grown = arguments(base, out, "--vectors", f"s={base / 'vectors'}")
    grown[grown.index("--benchmarks") + 1] = str(tmp_path / "more.jsonl")
    assert run.main(grown) == 0
    found = read_completions(out, ("variant", "benchmark"))
    counts = {
        pair: list(zip(*found.values(), strict=True)).count(pair)
        for pair in zip(*found.values(), strict=True)
    }
    assert counts == {("base", "sums"): 27, ("base", "more"): 9, ("s", "more"): 9}


def test_benchmarks_may_share_problems(base, tmp_path):
    out, hard = tmp_path / "out", tmp_path / "hard.jsonl"
    hard.write_text("".join((base / "sums.jsonl").read_text().splitlines(keepends=True)[:3]))
    argv = arguments(base, out, "--samples", "0")
    argv[argv.index("--benchmarks") + 1] += f",{hard}"
    assert run.main(argv) == 0
    assert run.main(argv) == 0  # and when it is opened again
    counts = Counter(row["benchmark"] for row in store.read_problems(out))
    assert counts == {"sums": 9, "hard": 3}
    found = collect([out])
    assert {name: len(problems) for name, problems in found.problems.items()} == counts
    assert [len(found.cells(name, greedy=True)[0].problems) for name in counts] == [9, 3]
    assert not found.notes


def test_a_field_that_is_taken_away_is_another_run(base, tmp_path, capsys):
    out = tmp_path / "out"
    asked = arguments(base, out, "--samples", "0", "--limit", "2")
    assert run.main([*asked, "--prefix", "To"]) == 0
    line = refused(capsys, asked)
    assert "sums: prefix was 'To', now None" in line


def test_a_merged_base_in_another_folder_is_the_same_model(tmp_path):
    made = make_run(tmp_path / "run", {"base": [[True]]}, model=str(tmp_path / "one"))
    settings = read_settings(made)
    same = {"base": "org/base", "revision": "r1", "adapter": "lora", "checksum": "c"}
    others = {"adapter": {"checksum": "d"}, "revision": {"revision": "r2"}, "weights": {}}
    for name, changes in {"one": {}, "two": {"adapter": "moved"}, **others}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({MERGED: {**same, **changes}}))
        weights = {"weight": torch.full((4,), float(name == "weights"))}
        save_file(weights, tmp_path / name / "model.safetensors")
    assert store._merge(made, settings, {**settings, "model": str(tmp_path / "two")})
    for name in others:
        with pytest.raises(SteerError, match="holds another run: model was"):
            store._merge(made, settings, {**settings, "model": str(tmp_path / name)})


@pytest.mark.parametrize("option", ["--prefix", "--prefixes"])
def test_a_forced_opening_with_a_box_is_refused(base, tmp_path, capsys, option):
    """The box would not be in what is graded."""
    for text in (r"The answer is $\boxed{", r"\fbox"):
        line = refused(capsys, arguments(base, tmp_path / "out", option, text))
        assert "opens a box, and only what the model writes after it is graded" in line


def test_another_run_in_the_folder_is_refused(base, whole, tmp_path, capsys):
    assert "seed was 0, now 5" in refused(capsys, everything(base, whole, "--seed", "5"))
    assert "max_new_tokens was 6, now 4" in refused(capsys, everything(base, whole, "--max-new-tokens", "4"))
    other = tmp_path / "s"
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    fill(steer.attach(model), seed=8).save(other)
    assert "s: digest was" in refused(capsys, arguments(base, whole, "--vectors", f"s={other}"))
    (tmp_path / "file").write_text("")
    assert "holds file, which is not a run" in refused(capsys, arguments(base, tmp_path))
    assert len(rows(whole)) == 5 * 27


def test_a_run_killed_while_it_begins(base, tmp_path, monkeypatch):
    """The problems are written before run.json: with them alone in the folder, the run begins anew."""
    out, write = tmp_path / "out", store.Store._write

    def die(self: store.Store, name: str, content: bytes) -> None:
        if name == store.RUN_FILE:
            raise KeyboardInterrupt
        write(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "_write", die)
        assert run.main(arguments(base, out)) == 130
    assert [path.name for path in out.glob("[!.]*")] == [store.PROBLEMS_FILE]
    assert run.main(arguments(base, out)) == 0
    assert len(rows(out)) == 27


def test_only_one_process_writes(base, whole, capsys):
    with held(whole, "--out"):
        line = refused(capsys, everything(base, whole))
    assert f"{whole} is in use: process {os.getpid()} on " in line and "another --out" in line


def test_a_damaged_part_is_named(base, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main(arguments(base, out)) == 0
    part = sorted(out.glob("part-*"))[0]
    part.write_bytes(part.read_bytes()[:-20])
    assert f"{part.name} cannot be read" in refused(capsys, arguments(base, out))
    part.unlink()
    assert run.main(arguments(base, out)) == 0
    assert rows(out) == {key: row for key, row in rows(whole).items() if key[0] == "base"}


def test_answers_longer_than_the_context(base, tmp_path, capsys):
    line = refused(capsys, arguments(base, tmp_path / "out", "--max-new-tokens", "500"))
    assert "do not fit the context" in line
    assert "(128 tokens)" in line
    room = line.rpartition("--max-new-tokens ")[2]
    assert not (tmp_path / "out").exists(), "nothing is begun"
    settings = ["--samples", "0", "--limit", "1"]
    assert run.main(arguments(base, tmp_path / "out", "--max-new-tokens", room, *settings)) == 0
    line = refused(
        capsys, arguments(base, tmp_path / "out2", "--max-new-tokens", str(int(room) + 1), *settings)
    )
    assert "do not fit the context" in line


def test_vectors_of_another_tokenizer(base, tmp_path, capsys):
    from dataclasses import replace

    saved = steer.read(base / "vectors")
    changed = steer.Artifact(replace(saved.config, tokenizer_checksum="0" * 16), saved.tensors)
    steer.artifact.write(tmp_path / "v", changed)
    argv = arguments(base, tmp_path / "out", "--vectors", str(tmp_path / "v"), "--limit", "2")
    assert "another tokenizer (vocabulary 0000000000000000" in refused(capsys, argv)
    assert run.main([*argv, "--other-tokenizer"]) == 0


def test_vectors_of_another_model(base, build_tiny, tmp_path, capsys):
    fill(steer.attach(build_tiny("llama", num_hidden_layers=2))).save(tmp_path / "v")
    line = refused(capsys, arguments(base, tmp_path / "out", "--vectors", str(tmp_path / "v")))
    assert "num_hidden_layers=2" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--vectors", "nowhere"], "no steering vectors at nowhere"),
        (["--adapter", "nowhere"], "no adapter at nowhere"),
        (["--vectors", "{base}/vectors", "--scales", "1", "1"], "two variants are called"),
        (["--temperature", "0"], "for greedy answers alone use --samples 0"),
        (["--no-greedy", "--samples", "0"], "--no-greedy with no samples asks for nothing"),
        (["--benchmarks", "gsm8k,gsm8k"], "benchmark 'gsm8k' is there twice"),
        (["--benchmarks", "gsm8k", "--data-dir", "{base}"], "no file .*gsm8k_test.jsonl"),
        (["--template", "boxed_long"], "unknown template 'boxed_long'"),
        (["--no-base"], "--no-base leaves no variant"),
        (["--systems", "Be brief."], "has no name; write NAME=TEXT"),
        (["--systems", "brief=Be brief."], "'plain' has no turn for a system text"),
        (["--model", "{base}/nothing"], "no model"),
        (["--engine-args", '{{"enforce_eager": true}}'], "--engine-args are vLLM's"),
        (["--examples-from", "{base}/sums.jsonl", "--examples", "0"], "--examples-from is for the elicited"),
        (["--benchmarks", "{base}/sums.jsonl:split=train"], "split=train is for sets on the hub"),
        (["--benchmarks", "arithmetic:split=train"], "split=train is for sets on the hub.*generated"),
    ],
)
def test_mistakes_are_one_line(base, tmp_path, capsys, more, expected):
    import re

    argv = arguments(base, tmp_path / "out", *(text.format(base=base) for text in more))
    assert re.search(expected, refused(capsys, argv))
    assert not (tmp_path / "out").exists()


def test_a_broken_line_is_named(base, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer"\n')
    line = refused(capsys, arguments(base, tmp_path / "out", "--benchmarks", str(path)))
    assert "bad.jsonl, line 2 is not JSON" in line


def test_vllm_that_is_not_there(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "--engine vllm needs vLLM" in refused(
        capsys, arguments(base, tmp_path / "out", "--engine", "vllm")
    )


def test_a_fine_tune_counts_all_its_numbers(base, tmp_path):
    out = tmp_path / "out"
    argv = arguments(base, out, "--samples", "0", "--limit", "2", "--name", "full", "--fine-tuned")
    assert run.main(argv) == 0
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    variant = read_settings(out)["variants"]["full"]
    assert variant["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_full_fine_tune_in_another_precision_than_it_learned_in_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    model = str(tmp_path / "model")
    weights = {"layer": torch.linspace(0, 1, 12).view(3, 4)}
    save_file(weights, tmp_path / "model/model.safetensors")
    variants.tell_of_precision(model, "float32")  # of no run
    variants.tell_of_precision("org/name", "float32")
    (tmp_path / "run.json").write_text(json.dumps({"training": {"bf16": False, "fp16": False}}))
    variants.tell_of_precision(model, "float32")
    (tmp_path / "run.json").write_text(json.dumps({"training": {"bf16": True, "fp16": False}}))
    variants.tell_of_precision(model, "bfloat16")
    variants.tell_of_precision(model, "auto")
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    save_file(rounded, tmp_path / "model/model.safetensors")
    variants.tell_of_precision(model, "float32")  # as a finished run is saved
    assert not caplog.text
    save_file(weights, tmp_path / "model/model.safetensors")
    variants.tell_of_precision(model, "float32")
    assert "trained in mixed precision (bfloat16) and is measured with --dtype float32" in caplog.text

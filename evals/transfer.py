"""What is left of trained vectors in another model: a fine-tune of their own, and one of another family.

    python -m evals.transfer --vectors runs/demo/vectors --out evals/results/transfer.json

Trains SmolLM2-135M-Instruct fully, by supervised learning, on word problems and on bare sums, and copies the
demo's vectors into either; maps them into Gemma-3-270M, which has another hidden size, depth, family and
tokenizer.
For each: greedy accuracy on the problems that the vectors were judged on, the log-probability of what the
steered donor answers to them, and two controls, the model alone and random vectors that are as long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import steer
from steer.artifact import Artifact, from_vectors, read
from steer.evaluation.heldout import answer, score
from steer.files import replace_file
from steer.models import load_model, load_tokenizer
from steer.stop_tokens import stop_token_ids
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.data import load_problems
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import choose_prompt, formatter
from steer.transfer import transfer
from steer.weights import cache_dir

OTHER = "gemma-3-270m"
# Gemma's base model has no chat template: the demo's words as plain text.
PLAIN = "{problem} Give the answer as $\\boxed{{answer}}$.\nAnswer:"
# Lessons to fine-tune on, with their learning rates. Neither teaches a box; the sums teach to answer without.
LESSONS = {"word problems": 2e-5, "sums": 1e-4}
BATCH = 16
PEOPLE = ("Ana", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "pens", "cards", "stones", "shells", "stamps")


def lesson(name: str, count: int) -> list[tuple[str, str]]:
    """Questions and answers with numbers of two digits: bare sums, or small stories."""
    if name == "sums":
        rows = Arithmetic(operators="+-", problems=count).generate()
        sums = [row["problem"].removeprefix("What is ").removesuffix("?") for row in rows]
        answers = [f"{text} = {row['answer']}." for text, row in zip(sums, rows, strict=True)]
        return [(row["problem"], answer) for row, answer in zip(rows, answers, strict=True)]
    rng = random.Random(0)
    told = []
    for _ in range(count):
        who, what = rng.choice(PEOPLE), rng.choice(THINGS)
        x, y, few = rng.randint(10, 99), rng.randint(10, 99), rng.randint(2, 9)
        told.append(
            rng.choice(
                [
                    (
                        f"{who} has {x} {what} and buys {y} more. How many {what} does {who} have now?",
                        f"{who} has {x} + {y} = {x + y} {what} now.",
                    ),
                    (
                        f"There are {x + y} {what} on a table. {who} takes {y} of them. How many are left?",
                        f"There are {x + y} - {y} = {x} {what} left.",
                    ),
                    (
                        f"{few} boxes hold {x} {what} each. How many {what} does {who} find in them?",
                        f"{who} finds {few} * {x} = {few * x} {what}.",
                    ),
                ]
            )
        )
    return told


def finetuned(name: str, about: str, steps: int) -> Path:
    """
    A folder with `name` after `steps` updates of all its weights (AdamW) on a lesson in its own chat form.
    Made once, kept in the cache.
    """
    key = f"{name}-{steps}-{LESSONS[about]}-{BATCH}-1"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = cache_dir() / "evals" / f"{about.replace(' ', '-')}-{digest}"
    if folder.exists():
        return folder
    tokenizer, model = load_tokenizer(name), load_model(name, dtype="float32")
    rows = lesson(about, steps * BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LESSONS[about], weight_decay=0.0)
    torch.manual_seed(0)
    model.train()
    bar = tqdm(range(0, len(rows), BATCH), desc=f"fine-tuning on {about}", unit="step")
    for start in bar:
        texts, starts = [], []
        for question, reply in rows[start : start + BATCH]:
            turns = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            texts.append(f"{prompt}{reply}{tokenizer.eos_token}")
            starts.append(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for line, length in zip(labels, starts, strict=True):
            line[:length] = -100
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    partial = folder.with_suffix(".partial")
    tokenizer.save_pretrained(partial)
    model.bfloat16().save_pretrained(partial)
    partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vectors", required=True, help="the demo's artifact: folder, .safetensors file or hub id"
    )
    parser.add_argument("--out", default="evals/results/transfer.json", help="default: %(default)s")
    parser.add_argument("--problems", type=int, default=75, help="held-out problems (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="fine-tuning steps (default: %(default)s)")
    args = parser.parse_args()
    start = time.time()
    source = read(args.vectors)
    results: dict[str, Any] = {"vectors": source.config.base_model_name_or_path, "rows": [], "maps": {}}
    with MathGrader() as grader:
        for row, report in conditions(source, args.problems, args.steps, grader):
            results["rows"].append(row)
            if report is not None:
                results["maps"][f"{row['model']}: {row['vectors']}"] = report
            score = row["score"]
            print(
                f"{row['model']:22} {row['vectors']:36} accuracy {score['accuracy']:.3f} "
                f"({score['low']:.3f} to {score['high']:.3f})  leniently {score['lenient']:.3f}  "
                f"boxed {score['answered']:.2f}  log p {row['log_probability']:7.2f}",
                flush=True,
            )
    results["minutes"] = round((time.time() - start) / 60, 1)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(args.out), (json.dumps(results, indent=1) + "\n").encode())
    print(f"{args.out}, {results['minutes']} minutes")


def conditions(
    source: Artifact, count: int, steps: int, grader: MathGrader
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """One measured row after the other, with the report of the transfer that made its vectors."""
    run = (source.config.provenance or {})["run"]
    generator = Arithmetic(
        **{f.name: run[f.name] for f in fields(Arithmetic) if f.name in run} | {"problems": count}
    )
    problems = load_problems("arithmetic", "heldout", arithmetic=generator).to_list()
    donor_name = str(source.config.base_model_name_or_path)
    donor, donor_tokenizer = load_model(donor_name, dtype="fast"), load_tokenizer(donor_name)

    right: list[tuple[str, str]] = []  # problems with the steered donor's right answers

    def measure(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        vectors: Artifact | None,
        label: str,
        format_problem: Callable[[str], str],
    ) -> dict[str, Any]:
        if vectors is not None:
            steer.load(vectors, model)
        ends = stop_token_ids(tokenizer, model.generation_config)
        answered = answer(model, tokenizer, problems, format_problem, grader, 16, ends, label=label)
        if not right:
            right.extend((a.problem, a.completion) for a in answered if a.correct)
        probability = log_probability(model, tokenizer, right, format_problem)
        if vectors is not None:
            steer.detach(model)
        examples = [asdict(a) for a in answered[:3]]
        return {
            "model": name,
            "vectors": label,
            "score": asdict(score(answered)),
            "log_probability": probability,
            "examples": examples,
        }

    chat = formatter(choose_prompt({"the donor's": source.config.prompt}), donor_tokenizer)

    own = (donor, donor_tokenizer, donor_name)
    yield measure(*own, source, "its own", chat), None
    yield measure(*own, None, "none", chat), None

    for about in LESSONS:
        tuned = load_model(str(finetuned(donor_name, about, steps)), dtype="fast")
        tuned.config.name_or_path = f"{donor_name}, fine-tuned on {about}"
        there = (tuned, donor_tokenizer, tuned.config.name_or_path)
        yield measure(*there, None, "none", chat), None
        copied = transfer(source, None, tuned, method="direct", rescale=False)
        yield measure(*there, copied.artifact, "copied", chat), None
        found = transfer(
            source,
            donor,
            tuned,
            method="direct",
            donor_tokenizer=donor_tokenizer,
            recipient_tokenizer=donor_tokenizer,
        )
        yield measure(*there, found.artifact, "copied, rescaled", chat), found.report.to_dict()
        yield measure(*there, at_random(found.artifact, tuned), "random, as long", chat), None
    del tuned, there

    other, other_tokenizer = load_model(OTHER, dtype="fast"), load_tokenizer(OTHER)
    bos = other_tokenizer.bos_token

    def plain(problem: str) -> str:
        return bos + PLAIN.format(problem=problem)

    far = (other, other_tokenizer, OTHER)
    yield measure(*far, None, "none", plain), None
    settings: tuple[dict[str, Any], ...] = (
        {"method": "procrustes"},
        {"method": "ridge"},
        {"method": "ridge", "rescale": False},
        {"method": "ridge", "layers_by": "cka"},
    )
    for options in settings:
        found = transfer(
            source,
            donor,
            other,
            force=True,
            donor_tokenizer=donor_tokenizer,
            recipient_tokenizer=other_tokenizer,
            **options,
        )
        label = f"{options['method']}, layers by {found.report.layers_by}"
        label += "" if found.report.rescale else ", the map's length"
        yield measure(*far, found.artifact, label, plain), found.report.to_dict()
        if label == "ridge, layers by depth":
            alike = at_random(found.artifact, other)
    yield measure(*far, alike, "random, as long as by ridge", plain), None


def at_random(vectors: Artifact, model: PreTrainedModel) -> Artifact:
    """Random directions for the layers of `vectors`, each as long as the vector there."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for layer, vector in vectors.by_layer().items():
        direction = torch.randn(len(vector), generator=generator)
        drawn[layer] = direction * (vector.norm() / direction.norm())
    return from_vectors(drawn, model)


@torch.no_grad()
def log_probability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: list[tuple[str, str]],
    format_problem: Callable[[str], str],
) -> float:
    """Mean over (problem, answer) of the log-probability of the answer, in nats: whole, not by token."""
    total = 0.0
    for problem, gold in answers:
        prompt = format_problem(problem)
        gap = "" if prompt[-1].isspace() else " "
        before, ids = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, prompt + gap + gold)
        )
        same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        tokens = torch.tensor([ids])
        logits = model(tokens, logits_to_keep=len(ids) - same + 1).logits[0, :-1].float()
        total += logits.log_softmax(-1).gather(1, tokens[0, same:, None]).sum().item()
    return total / len(answers)


if __name__ == "__main__":
    try:
        main()
    except steer.SteerError as error:
        sys.exit(f"error: {error}")

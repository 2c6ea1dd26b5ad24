"""What `steer eval` can be asked on the command line."""

from __future__ import annotations

import argparse
import os
from typing import Any

from steer.arguments import Help, add_base_options, count, finite, json_object, text, whole
from steer.evaluation import benchmarks
from steer.evaluation.engines import ENGINES
from steer.tasks.elicited import EXAMPLES

# Answers sampled at once, and lost when the run is killed: minutes of work, so fewer where there is no GPU.
BATCH = 64
BATCH_VLLM_GPU = 1024


def parser(description: str) -> argparse.ArgumentParser:
    """The parser of `steer eval`."""
    made = argparse.ArgumentParser(
        prog="steer eval",
        description=description,
        formatter_class=Help,
    )
    about_model = made.add_argument_group("the model and its variants")
    add_base_options(about_model)
    model = about_model.add_argument
    model(
        "--model",
        type=text,
        required=True,
        help="hub id, local folder, .gguf file or the name of bundled weights",
    )
    model("--dtype", default="auto", help="precision of the base model (default: as saved)")
    model("--name", help="what the model without vectors is called (default: base)")
    yes = argparse.BooleanOptionalAction
    model("--base", action=yes, default=True, help="the model by itself is a variant too (default: yes)")
    model("--fine-tuned", action="store_true", help="the model is a fine-tune: all its numbers were trained")
    many: dict[str, Any] = {"nargs": "+", "default": [], "type": text}
    model("--vectors", **many, metavar="[NAME=]PATH", help="folders, files or hub ids of vectors")
    model(
        "--scales", nargs="+", type=finite, default=[1.0], help="factors on the vectors as saved (default: 1)"
    )
    model("--adapter", **many, metavar="[NAME=]PATH", help="folders or hub ids of peft adapters")
    model("--prefixes", **many, help="forced openings of the base's answers, e.g. To Step (controls)")
    model("--systems", **many, metavar="NAME=TEXT", help="system prompts for the base (controls)")
    model(
        "--examples",
        type=whole,
        metavar="N",
        help="worked examples for the elicited base: the base with N training problems in its prompts and a "
        f"longer limit; 0 leaves it out (default: {EXAMPLES} beside a base, if training problems are known)",
    )
    model(
        "--examples-from",
        metavar="SOURCE",
        help="training problems for --examples: a file or a data set (default: the benchmark's own)",
    )
    model("--other-tokenizer", action="store_true", help="measure vectors made for another tokenizer as well")
    asked = made.add_argument_group("what is asked").add_argument
    names = ", ".join(benchmarks.KNOWN)
    asked(
        "--benchmarks",
        nargs="+",
        required=True,
        help=f"comma-separated: {names}, or files; settings after colons: gsm8k:limit=200:samples=4",
    )
    asked(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="columns of the files that have other names: problem=question,answer=solution",
    )
    local = os.environ.get("STEER_DATA")
    asked(
        "--data-dir", default=local, help="folder of files to read instead of the hub (default: $STEER_DATA)"
    )
    asked("--samples", type=whole, help="sampled answers per problem (default: the benchmark's own)")
    asked("--greedy", action=yes, default=True, help="one greedy answer per problem too (default: yes)")
    asked("--temperature", type=finite, default=1.0, help="of the sampled answers (default: 1)")
    asked("--top-p", type=finite, default=1.0, help="of the sampled answers (default: 1)")
    asked("--max-new-tokens", type=count, help="longest answer (default: the benchmark's own)")
    asked(
        "--template",
        help="prompt template (default: that which the vectors were trained with, else the benchmark's own)",
    )
    asked("--prefix", type=text, help="forced opening of every answer (default: as in training)")
    asked(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="variables of the chat template, e.g. '{\"enable_thinking\": false}' (default: as in training)",
    )
    asked("--limit", type=count, help="most problems of each benchmark: a seeded choice (default: all)")
    asked(
        "--side-effects",
        action="store_true",
        help="also measure vectors and adapters on neutral text: KL to the base and perplexity",
    )
    asked(
        "--side-effect-tasks",
        **many,
        metavar="TASK",
        help="side effects with the accuracy on these tasks of lm-eval, which must be installed: names of "
        "tasks or groups, or YAML files of your own",
    )
    asked("--side-effect-limit", type=count, metavar="N", help="most problems of each of these tasks")
    asked("--seed", type=int, default=0, help="of the sampled answers (default: 0)")
    how = made.add_argument_group("how it runs").add_argument
    how("--out", type=text, required=True, help="folder of the run; the same command goes on with it")
    how("--engine", choices=ENGINES, default="hf", help="what samples (default: hf)")
    engine = "arguments of vLLM's LLM: '{\"max_num_seqs\": 64}'"
    how("--engine-args", type=json_object, metavar="JSON", help=engine)
    sizes = f"{BATCH}; {BATCH_VLLM_GPU} with vllm on a GPU"
    how("--batch-size", type=count, help=f"answers sampled at once (default: {sizes})")
    how("--workers", type=count, default=1, help="processes that grade (default: 1)")
    return made

"""`steer generate`: one prompt, answered with and without the vectors."""

from __future__ import annotations

import argparse
import json

from steer.arguments import Help, add_base_options, add_prompt_arguments, count, finite, named_vectors, text
from steer.errors import SteerError


def add_commands(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="answer a prompt with and without the vectors, side by side",
        description="Answers a prompt with and without vectors. Several sets of --vectors add up; --steering "
        "chooses among them as requests to `steer serve` do: 'math@0.7+brief@-0.3', 'base', or JSON for "
        'layers and positions: \'{"sets": [{"name": "math", "scale": 0.7, "layers": "4-12"}]}\'.',
        formatter_class=Help,
    )
    generate.add_argument("model", help="hub id, local folder, .gguf file or the name of bundled weights")
    generate.add_argument(
        "--vectors",
        type=named_vectors,
        nargs="+",
        required=True,
        metavar="[NAME=]ARTIFACT[@SCALE]",
        help="folders, .safetensors files or hub ids, each with a factor; a name is by default that of the "
        "artifact's folder",
    )
    generate.add_argument(
        "--steering",
        type=text,
        metavar="EXPRESSION",
        help="which of the sets act, with a scale each; default: all of them",
    )
    generate.add_argument("--prompt", type=text, required=True, help="the problem or question")
    add_prompt_arguments(generate)
    generate.add_argument(
        "--scale",
        type=finite,
        help="factor on the vectors of one set, in place of its own; default: as saved",
    )
    generate.add_argument(
        "--max-new-tokens", type=count, default=64, help="length of the answer (default: 64)"
    )
    add_base_options(generate)
    generate.add_argument("--dtype", default="auto", help="precision of the base model (default: auto)")
    generate.add_argument("--json", action="store_true", help="print JSON")
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    from dataclasses import replace

    import steer
    from steer.base_adapter import base_source
    from steer.expression import Term, check_names, from_json, parse
    from steer.mixture import chosen, mixed
    from steer.models import check_context, load_model, load_tokenizer
    from steer.stop_tokens import greedy_config
    from steer.tasks.prompts import DEFAULT_PROMPT, choose_prompt, format_prompt

    names = [name for name, _, _ in args.vectors]
    prompt_of, terms = None, tuple(Term(name) for name in names)
    if args.steering is not None or len(names) > 1:
        check_names(names)
        if args.scale is not None:
            raise SteerError("--scale is for one set alone; write scales behind names, such as math@0.7")
    if args.steering is not None:
        if args.steering.lstrip().startswith("{"):
            try:
                given = json.loads(args.steering)
            except (ValueError, RecursionError) as error:
                raise SteerError(f"--steering is not JSON: {error}") from error
            terms, prompt_of = from_json(given)
            if prompt_of == "none" and "none" not in names:
                raise SteerError("steering.prompt 'none' is for chats sent to `steer serve`; give --template")
        else:
            terms = parse(args.steering)
    artifacts = {}
    for name, source, scale in args.vectors:
        if args.scale is not None and scale != 1:
            raise SteerError(f"--scale {args.scale:g} and {name}@{scale:g} both set the scale; give one")
        saved = steer.read(source)
        scale = scale * saved.config.scale if args.scale is None else args.scale
        artifacts[name] = replace(saved, config=replace(saved.config, scale=scale))
    sets = chosen(terms, artifacts)

    trust = args.trust_remote_code
    source, revision = base_source(args.model, args.base_adapter, args.revision, trust)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust)
    model = load_model(source, dtype=args.dtype, revision=revision, trust_remote_code=trust)
    asked = (args.template, args.prefix, args.chat_template_kwargs)
    wanted = [prompt_of] if prompt_of is not None else [term.name for term in terms]
    spec = choose_prompt({name: artifacts[name].config.prompt for name in wanted}, DEFAULT_PROMPT, *asked)
    prompt = format_prompt(args.prompt, tokenizer, spec)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)

    check_context(model.config, inputs["input_ids"].shape[1], args.max_new_tokens, "--max-new-tokens")

    greedy = greedy_config(tokenizer, model.generation_config, args.max_new_tokens)
    model.generation_config = greedy  # generate() takes from there what is unset

    def answer() -> str:
        out = model.generate(**inputs, generation_config=greedy)  # type: ignore[operator]  # of a mixin
        return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    base = answer()
    with mixed(model, sets, tokenizer):
        steered = answer()
    if args.json:
        scales = {name: made.config.scale for name, made in sets.items()}
        print(json.dumps({"prompt": prompt, "scales": scales, "base": base, "steered": steered}, indent=2))
    else:
        print(f"base     {base}\nsteered  {steered}")

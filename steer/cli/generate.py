"""`steer generate`: one prompt, answered with and without the vectors."""

from __future__ import annotations

import argparse
import json

from steer.arguments import Help, add_base_options, add_prompt_arguments, count, finite, text


def add_commands(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate", help="answer a prompt with and without the vectors, side by side", formatter_class=Help
    )
    generate.add_argument("model", help="hub id, local folder, .gguf file or the name of bundled weights")
    generate.add_argument("--vectors", required=True, help="folder, .safetensors file or hub id")
    generate.add_argument("--prompt", type=text, required=True, help="the problem or question")
    add_prompt_arguments(generate)
    generate.add_argument("--scale", type=finite, help="factor on the vectors; default: as saved")
    generate.add_argument(
        "--max-new-tokens", type=count, default=64, help="length of the answer (default: 64)"
    )
    add_base_options(generate)
    generate.add_argument("--dtype", default="auto", help="precision of the base model (default: auto)")
    generate.add_argument("--json", action="store_true", help="print JSON")
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    import steer
    from steer.base_adapter import base_source
    from steer.models import check_context, load_model, load_tokenizer
    from steer.stop_tokens import stop_token_ids
    from steer.tasks.prompts import DEFAULT_PROMPT, choose_prompt, format_prompt

    trust = args.trust_remote_code
    source, revision = base_source(args.model, args.base_adapter, args.revision, trust)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust)
    model = load_model(source, dtype=args.dtype, revision=revision, trust_remote_code=trust)
    vectors = steer.load(args.vectors, model, tokenizer=tokenizer)
    if args.scale is not None:
        vectors.scale = args.scale
    asked = (args.template, args.prefix, args.chat_template_kwargs)
    spec = choose_prompt({args.vectors: vectors.config.prompt}, DEFAULT_PROMPT, *asked)
    prompt = format_prompt(args.prompt, tokenizer, spec)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)

    check_context(model.config, inputs["input_ids"].shape[1], args.max_new_tokens, "--max-new-tokens")

    stops = list(stop_token_ids(tokenizer, model.generation_config)) or None

    def answer() -> str:
        out = model.generate(  # type: ignore[operator]  # a mixin of the model's class
            **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, eos_token_id=stops
        )
        return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    with vectors.disabled():
        base = answer()
    steered = answer()
    if args.json:
        print(
            json.dumps({"prompt": prompt, "scale": vectors.scale, "base": base, "steered": steered}, indent=2)
        )
    else:
        print(f"base     {base}\nsteered  {steered}")

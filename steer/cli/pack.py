"""`steer pack`: artifacts on the hub."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from steer.arguments import Help, count, text
from steer.outputs import add_force, check_output, output

ABOUT = """\
Steering vectors on the Hugging Face Hub: find, download and upload them. A repository holds a tensor file,
its config and a model card; nothing in it is ever run.
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "pack", help="find, download and upload artifacts on the hub", description=ABOUT, formatter_class=Help
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, short: str, example: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name, help=short, description=short, epilog=f"    {example}", formatter_class=Help
        )

    find = action(
        "list", "list the artifacts on the hub, those changed last first", "steer pack list steer-rl"
    )
    find.add_argument("author", nargs="?", type=text, help="user or organisation; default: all")
    find.add_argument(
        "--tag", type=text, help="a tag that they have besides, e.g. base_model:Qwen/Qwen2.5-0.5B-Instruct"
    )
    find.add_argument("--limit", type=count, default=20, help="at most so many")
    find.add_argument("--json", action="store_true", help="print JSON")
    find.set_defaults(run=_list)

    pull = action(
        "pull", "download an artifact into a folder, and check it", "steer pack pull user/math --out math"
    )
    pull.add_argument("repo_id", type=text, metavar="USER/NAME", help="repository on the hub")
    pull.add_argument("--revision", type=text, help="branch, tag or commit (default: main)")
    pull.add_argument("--out", type=text, help="the folder; default: NAME")
    add_force(pull)
    pull.set_defaults(run=_pull)

    push = action(
        "push",
        "show what is uploaded, and upload an artifact with its card",
        "steer pack push runs/demo/vectors user/math",
    )
    push.add_argument("artifact", type=text, help="folder, .safetensors file or hub id")
    push.add_argument(
        "repo_id", type=text, metavar="USER/NAME", help="repository on the hub, made if missing"
    )
    push.add_argument("--private", action="store_true", help="a repository that is made is private")
    push.add_argument("--message", type=text, default="Upload steering vectors", help="title of the commit")
    push.add_argument("--dry-run", action="store_true", help="show it alone, and the card")
    push.set_defaults(run=_push)


def _list(args: argparse.Namespace) -> None:
    from steer.pack import find

    found = find(args.author, args.tag, args.limit)
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    if not found:
        where = f" of {args.author}" if args.author else ""
        print(f"the hub has no steering vectors{where}" + (f" with the tag {args.tag}" if args.tag else ""))
    for one in found:
        if one.config is None:
            print(f"{one.repo_id}\n    cannot be read: {one.problem}")
            continue
        size = "no tensor file" if one.size is None else f"{one.size / 1000:,.0f} KB"
        site = "the MLP's output" if one.config.kind == "adaptive" else one.config.site
        print(
            f"{one.repo_id}\n    {one.config.base_model_name_or_path}, layers {one.config.layers} at {site}, "
            f"{one.config.kind}, {size}"
        )


def _pull(args: argparse.Namespace) -> None:
    from steer.pack import pull

    out = args.out or args.repo_id.rpartition("/")[2]
    check_output(out, args.replace, folder=True)
    with output(out, args.replace, folder=True) as folder:
        pull(args.repo_id, folder, args.revision)
    print(f"{out}: an artifact, every tensor checked; `steer info {out}` tells what it is")


def _push(args: argparse.Namespace) -> None:
    import shutil

    from steer import hub
    from steer.pack import packed

    with packed(args.artifact, args.repo_id) as folder:
        print(f"to {args.repo_id}{' (private if it is new)' if args.private else ''}:")
        for file in sorted(folder.iterdir()):
            print(f"    {file.name:24}{file.stat().st_size:>12,} bytes")
        if args.dry_run:
            print(f"\n{(folder / 'README.md').read_text()}\nnothing was uploaded (--dry-run)")
            return

        def copy(target: Path, name: str) -> None:
            with packed(args.artifact, name) as made:
                shutil.copytree(made, target, dirs_exist_ok=True)

        address = hub.push(copy, args.repo_id, private=args.private or None, commit_message=args.message)
    print(address)

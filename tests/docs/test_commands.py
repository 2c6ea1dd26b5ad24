"""Every command, flag, link, image and import that README.md and docs/*.md name exists."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.commands import parser
from helpers.paths import ROOT

from steer.cli.programs import PROGRAMS

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
STUDIES = [path for path in sorted((ROOT / "evals").rglob("*.py")) if "ArgumentParser(" in path.read_text()]
# Options of other programs that the pages name in their text.
FOREIGN = {
    "--additional-config",
    "--api-server-count",
    "--data-parallel-size",
    "--help",
    "--index-url",
    "--logprobs-mode",
    "--tensor-parallel-size",
    "--port",
    "--dtype",
    "--strict",
}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:    .*\n(?:\s*\n(?=    ))?)+")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"")


def shell(text: str) -> Iterator[str]:
    """The shell lines of a page: of its blocks, continuation lines joined, comments left out."""
    without_fences = _FENCE.sub("", text)
    blocks = [body for language, body in _FENCE.findall(text) if language in ("", "bash", "sh", "console")]
    blocks += _INDENTED.findall(without_fences)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ "))


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command line of ours in a page: in blocks, and in the text."""
    inline = [
        code
        for code in _INLINE.findall(_FENCE.sub("", text))
        if re.match(r"(steer|make|python|accelerate) ", code)
    ]
    for line in [*shell(text), *inline]:
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] == "export"):
            words.pop(0)
        if words:
            yield words


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """The program of ours that a command line starts, and its arguments; None for one of others."""
    name = words[0].rpartition("/")[2]
    if name == "steer" and len(words) > 1:
        for count in (2, 1):  # commands with a command line of their own
            if (own := " ".join(words[1 : 1 + count])) in PROGRAMS:
                rest = words[1 + count :]
                both = own == "compare" and "--config" in rest  # two programs: of runs, and of a config
                return f"steer {own}{' --config x' if both else ''}", rest
        return "steer", words[1:]
    if name == "python" and words[1:2] == ["-m"] and words[2].partition(".")[0] in ("steer", "evals"):
        return words[2], words[3:]
    if name in ("python", "accelerate"):
        script = next((word for word in words if word.startswith("recipes/") and word.endswith(".py")), None)
        module = next((word for word in words if word.startswith("steer.recipes.")), None)
        if start := script or module:
            return start, words[words.index(start) + 1 :]
    return None


def wrong(name: str, arguments: list[str]) -> list[str]:
    """What of a command line does not exist."""
    found, bad = parser(name), []
    anything = False
    previous: argparse.Action | None = None
    if "--launcher" in arguments:
        at = arguments.index("--launcher")
        launcher = arguments[at + 1]
        bad += [] if (ROOT / "recipes" / "accelerate" / f"{launcher}.yaml").is_file() else [launcher]
        arguments = arguments[:at] + arguments[at + 2 :]
    for word in arguments:
        subs = next((a for a in found._actions if isinstance(a, argparse._SubParsersAction)), None)
        if word.startswith("--") and word != "--":
            flag, _, value = word.partition("=")
            previous = found._option_string_actions.get(flag)
            if previous is None and not anything and flag != "--help":
                bad.append(flag)
            if value and previous and previous.choices and value not in previous.choices:
                bad.append(word)
        elif subs is not None and previous is None:
            if word in subs.choices:
                found = subs.choices[word]
                anything = "more" in found._defaults  # `steer serve` hands what it does not know to vLLM
            elif word != word.upper():
                return [*bad, word]
        elif previous is not None:
            known = previous.choices
            if known is not None and word != word.upper() and word not in known:
                bad.append(f"{previous.option_strings[0]} {word}")
            if previous.nargs is None or previous.nargs == 0:
                previous = None
    if "--config" in arguments[:-1]:
        config = arguments[arguments.index("--config") + 1]
        files = (ROOT / "recipes" / "configs" / f"{config}.yaml", ROOT / config)
        bad += [] if config.isupper() or any(file.is_file() for file in files) else [config]
    return bad


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name: str) -> None:
    text, bad = (ROOT / name).read_text(), []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(text):
        if words[0] == "make":
            bad += [f"make {word}" for word in words[1:] if "=" not in word and word not in targets]
        elif started := program(words):
            start, arguments = started
            script = start.endswith(".py")
            if not (
                (ROOT / start).is_file()
                if script
                else start.startswith("steer ") or start == "steer" or find_spec(start)
            ):
                bad.append(start)
            else:
                bad += [f"{start}: {what}" for what in wrong(start, arguments)]
    assert not bad, f"{name} names what does not exist: {bad}"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_commands_at_the_head_of_a_study_exist(path: Path) -> None:
    head, bad = ast.get_docstring(ast.parse(path.read_text()), clean=False) or "", []
    for words in commands(head):
        started = program(words)
        if started and any(word.startswith("--") for word in words):
            bad += [f"{started[0]}: {what}" for what in wrong(*started)]
    assert not bad, f"{path.name} names what does not exist: {bad}"


@pytest.mark.parametrize("name", NAMES)
def test_flags_in_the_text_exist(name: str) -> None:
    known = set(FOREIGN)
    others = ("steer compare --config x", "evals.gpu_check", "evals.sae_study")
    others += ("steer train --method sft", "steer train --method dpo")
    for start in ("steer", *(f"steer {name}" for name in PROGRAMS), *others):
        known |= flags(parser(start))
    known.add("--launcher")
    text = _FENCE.sub("", (ROOT / name).read_text())
    used = {flag for code in _INLINE.findall(text) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
            if not re.match(r"(pip|python|accelerate|vllm|\.venv)", code)}  # fmt: skip
    assert not used - known, f"{name} names unknown flags"


def flags(found: argparse.ArgumentParser) -> set[str]:
    known = set(found._option_string_actions)
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            known |= {flag for sub in action.choices.values() for flag in flags(sub)}
    return known


@pytest.mark.parametrize("name", NAMES)
def test_links_and_images_exist(name: str) -> None:
    page = ROOT / name
    text = _FENCE.sub("", page.read_text())
    missing = []
    for target in (one or other for one, other in _LINK.findall(_INLINE.sub("", text))):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:|mailto:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            missing.append(target)
    assert not missing, f"{name} links to what does not exist: {missing}"


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_files_in_the_text_exist(name: str) -> None:
    codes = _INLINE.findall(_FENCE.sub("", (ROOT / name).read_text()))
    files = {code for code in codes if re.fullmatch(r"(steer|tests|evals|recipes|docs)/[\w./-]+", code)}
    assert not {file for file in files if not (ROOT / file).exists()}


@pytest.mark.parametrize("name", NAMES)
def test_python_imports_exist(name: str) -> None:
    missing = []
    for language, body in _FENCE.findall((ROOT / name).read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "steer":
                module = importlib.import_module(node.module or "")
                names = [alias.name for alias in node.names]
                missing += [f"{node.module}.{x}" for x in names if not hasattr(module, x)]
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "steer":
                missing += [] if hasattr(importlib.import_module("steer"), node.attr) else [ast.unparse(node)]
    assert not missing


def test_what_does_not_exist_is_found() -> None:
    assert wrong("steer", ["export", "x", "--to", "peft", "--out", "y"]) == []
    assert wrong("steer", ["export", "x", "--to", "nothing"]) == ["--to nothing"]
    assert wrong("steer", ["explode", "x"]) == ["explode"]
    assert wrong("steer", ["export", "--vacuum"]) == ["--vacuum"]
    assert wrong("steer", ["serve", "m", "--port", "1"]) == []
    for start in ("recipes/grpo_steer.py", "steer train"):
        assert wrong(start, ["--learning_rate", "1", "--vacuum", "2"]) == ["--vacuum"]
    assert wrong("steer train", ["--config", "demo", "--launcher", "ddp"]) == []
    assert wrong("steer train", ["--config", "dome", "--launcher", "dpp"]) == ["dpp", "dome"]
    assert program(["steer", "compare", "--config", "demo"]) == (
        "steer compare --config x",
        ["--config", "demo"],
    )
    text = "Text.\n\n    steer info x \\\n        --json   # note\n    make demo && steer diff a b\n\n"
    text += "`steer lens logit`\n"
    lines = [words for words in commands(text) if words[0] in ("steer", "make")]
    assert lines == [
        ["steer", "info", "x", "--json"],
        ["make", "demo"],
        ["steer", "diff", "a", "b"],
        ["steer", "lens", "logit"],
    ]

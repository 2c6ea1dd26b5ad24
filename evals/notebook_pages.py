"""
Run the scripts in docs/notebooks (jupytext's percent format) and write each as a page with its output.

    python -m evals.notebook_pages            # all of them, in docs/notebooks
    python -m evals.notebook_pages inside     # one of them
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NOTEBOOKS = ("train", "inside", "features")
_CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
_OUTPUT = re.compile(r"^```python\n.*?^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


class Cell(NamedTuple):
    text: str
    code: bool


def cells(script: str) -> list[Cell]:
    """The cells of a script; a Markdown cell without its comment signs."""
    parts = _CELL.split(script)[1:]
    found = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        if "[markdown]" in kind:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        found.append(Cell(text.strip("\n"), "[markdown]" not in kind))
    return found


def run(script: Path) -> list[str]:
    """What each code cell prints, in a folder of its own."""
    names: dict[str, Any] = {"__name__": "__notebook__"}
    outputs, before = [], Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for cell in cells(script.read_text()):
                if cell.code:
                    with redirect_stdout(io.StringIO()) as printed:
                        exec(compile(cell.text, str(script), "exec"), names)
                    outputs.append(printed.getvalue())
        finally:
            os.chdir(before)
    return outputs


def page(script: str, outputs: list[str]) -> str:
    """The script as Markdown, each code cell followed by its output."""
    left, parts = iter(outputs), []
    for cell in cells(script):
        if not cell.code:
            parts.append(cell.text)
            continue
        parts.append(f"```python\n{cell.text}\n```")
        if printed := next(left).strip("\n"):
            parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def outputs(markdown: str) -> list[str]:
    """The outputs in a page, one for each code cell."""
    return [match[1] or "" for match in _OUTPUT.finditer(markdown)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evals.notebook_pages", description="Run the notebooks and write their pages."
    )
    parser.add_argument("names", nargs="*", default=NOTEBOOKS, help="names of scripts (default: all)")
    for name in parser.parse_args().names:
        script = FOLDER / f"{name}.py"
        script.with_suffix(".md").write_text(page(script.read_text(), run(script)))
        print(script.with_suffix(".md"))


if __name__ == "__main__":
    main()

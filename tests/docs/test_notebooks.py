"""The notebooks run on the real small model, and their pages show the present code."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.notebook_pages import FOLDER, NOTEBOOKS, cells, outputs, page, run


def test_every_script_is_a_notebook() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_shows_the_script(name: str) -> None:
    script, shown = (FOLDER / f"{name}{suffix}" for suffix in (".py", ".md"))
    printed = outputs(shown.read_text())
    assert sum(map(bool, printed)) >= 3
    made = page(script.read_text(), printed)
    assert made == shown.read_text(), "the page is stale: python -m evals.notebook_pages " + name


def test_cells_and_outputs_are_read_back() -> None:
    script = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n"
    script += "# %% [markdown]\n# More.\n\n# %%\nprint(x)\n"
    assert [cell.code for cell in cells(script)] == [False, True, False, True]
    made = page(script, ["", "1\n"])
    assert made.startswith("# Title\n\nText.\n\n```python\nx = 1\n```\n\nMore.\n\n")
    assert [text.strip() for text in outputs(made)] == ["", "1"]
    assert page(script.replace("x = 1", "x = 2"), outputs(made)) != made


SLOW = ("train", "features")


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NOTEBOOKS]
)
def test_a_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    path = FOLDER / f"{name}.py"
    printed = run(path)  # each asserts what it claims
    assert len(printed) == sum(cell.code for cell in cells(path.read_text()))

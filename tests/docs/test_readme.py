"""The first example of the README prints what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.paths import ROOT


@pytest.mark.real
def test_the_first_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found
    (tmp_path / "evals").symlink_to(ROOT / "evals")
    monkeypatch.chdir(tmp_path)
    exec(compile(found[1], "README.md", "exec"), {"__name__": "__example__"})
    printed, said = (text.splitlines() for text in (capsys.readouterr().out, found[2]))
    assert len(printed) == len(said)
    # what the base says to the end depends on the precision that the machine computes in
    assert [line for line in printed if "base" not in line] == [line for line in said if "base" not in line]

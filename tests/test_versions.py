"""`steer.__version__` is the only version, also beside a distribution of another project named `steer`."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.paths import ROOT

import steer
from steer.versions import versions


@pytest.fixture
def foreign_steer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution `steer` of the package index, which is another project, first on the path."""
    folder = tmp_path / "steer-9.9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: steer\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_version_beside_a_foreign_distribution(foreign_steer: None) -> None:
    assert version("steer") == "9.9.9"
    assert versions("steer", "torch") == {"steer": steer.__version__, "torch": version("torch")}


def test_what_is_not_installed_is_left_out() -> None:
    assert versions("steer", "no-such-distribution") == {"steer": steer.__version__}


def test_version_is_written_once_and_needs_no_torch() -> None:
    code = "import sys, steer; print(steer.__version__, 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert told == f"{steer.__version__} False\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", steer.__version__)


@pytest.mark.parametrize("folder", ["steer", "recipes", "evals"])
def test_nothing_asks_for_the_version_of_a_distribution_named_steer(folder: str) -> None:
    asking = [
        str(path)
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"importlib.*\bversion\b", path.read_text())
        and path.name not in ("versions.py", "serve.py", "export_readers.py")  # of other distributions
    ]
    assert asking == []


def test_packages_load_at_first_use() -> None:
    code = "import steer; print(steer.transfer.transfer.__name__, steer.export.__name__)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout == "transfer steer.export\n", told.stderr
    assert "transfer" not in steer.__all__
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = steer.train

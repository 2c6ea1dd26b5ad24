"""What the plugin relies on in vLLM is as it was: a failure names what a release changed."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from trl import import_utils

from steer.compat import Api, changed
from steer.engine.compat import APIS, CHECKED, warn_version

vllm = pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_vllm_is_as_it_was(api: Api) -> None:
    assert changed(api) is None


def test_trl_warns_once_and_of_other_versions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import steer.training, trl.generation.vllm_generation"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TRL currently supports" not in done.stderr
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *_, **__: (True, "0.99.0"))
    for version, warned in ((f"{CHECKED}.7", 0), ("0.99.0", 1)):
        monkeypatch.setattr(vllm, "__version__", version)
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("ignore", "TRL currently supports vLLM versions")
            warn_version()
        assert len(caught) == warned

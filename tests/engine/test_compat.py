"""What the plugin relies on in vLLM is as it was: a failure names what a release changed."""

from __future__ import annotations

import pytest

from steer.compat import Api, changed
from steer.engine.compat import APIS

pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_vllm_is_as_it_was(api: Api) -> None:
    assert changed(api) is None

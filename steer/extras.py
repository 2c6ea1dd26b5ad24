"""
Optional dependencies. A part of the package that needs more than the core says so where it is entered:
`steer.training needs trl: pip install "steer-rl[train]"`.
"""

from __future__ import annotations

from importlib.util import find_spec

from steer.errors import SteerError

_TRAIN = (
    *("trl", "accelerate", "peft", "datasets", "tokenizers", "pyarrow", "math_verify"),
    *("latex2sympy2_extended", "sympy", "pebble", "scipy", "matplotlib"),
)
# Top-level modules by extra, as pyproject.toml declares them.
MODULES = {
    **{"train": _TRAIN, "lens": _TRAIN, "sae": _TRAIN},
    "langid": (*_TRAIN, "py3langid"),
    "lm-eval": (*_TRAIN, "lm_eval"),
    **{"vllm": ("vllm", "fastapi", "requests"), "play": ("gradio",), "sae-lens": (*_TRAIN, "sae_lens")},
}


def require(purpose: str, extra: str) -> None:
    """
    Check that what an extra installs is there.

    Args:
        purpose: What needs it, for the message.
        extra: Name of the extra, a key of `MODULES`.

    Raises:
        SteerError: A module is missing; the message says what to install.
    """
    missing = next((name for name in MODULES[extra] if find_spec(name) is None), None)
    if missing is not None:
        cpu = ", or `make vllm` in a clone for the CPU build" if extra == "vllm" else ""
        raise SteerError(f'{purpose} needs {missing}: pip install "steer-rl[{extra}]"{cpu}')

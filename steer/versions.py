"""Which versions of this package and of the libraries a result was made with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import steer


def versions(*names: str) -> dict[str, str]:
    """
    Versions of installed distributions.

    Args:
        names: Names on the package index; "steer" stands for this package, whose version is
            `steer.__version__` whatever a distribution of that name says.

    Returns:
        Version by name, without those that are not installed.
    """
    known = {}
    for name in names:
        try:
            known[name] = steer.__version__ if name == "steer" else version(name)
        except PackageNotFoundError:
            continue
    return known

"""
How OpenMP's threads wait for each other, chosen before torch loads the OpenMP library.

By default they spin at every barrier. With any other process on the machine, a thread that spins holds the
core that the thread it waits for needs, and a training step takes two to ten times as long. Threads that
sleep instead must be woken at every barrier, which costs time on an idle machine where parallel regions are
short: set either variable (`GOMP_SPINCOUNT=300000` is close to the library's default) to have it your way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# OMP_WAIT_POLICY is OpenMP's own variable; GNU's library still spins a little unless GOMP_SPINCOUNT is 0.
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def passive_waiting(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    The variables that make OpenMP's threads sleep at barriers; empty when the user has set either of them.

    Every script that computes on a CPU does `os.environ.update(passive_waiting())` before it imports torch:
    the library reads the variables once, when it is loaded. Processes started later inherit them.

    Args:
        environment: The variables that are set; default `os.environ`.

    Returns:
        Variables to set, by name.
    """
    known = os.environ if environment is None else environment
    return {} if PASSIVE.keys() & known.keys() else dict(PASSIVE)

"""
How OpenMP's threads wait for each other, chosen before torch loads the OpenMP library.

By default they spin at every barrier. Beside another busy process, a thread that spins holds the core that
the thread it waits for needs, and a training step takes two to ten times as long. Threads that sleep instead
must be woken at every barrier, which costs a third of a step on an idle machine. So programs measure first,
and sleep only where something else computes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# OMP_WAIT_POLICY is OpenMP's own variable; GNU's library still spins a little unless GOMP_SPINCOUNT is 0.
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
IDLE = 0.25  # of one CPU: what a desktop or a shell beside the run takes


def passive_waiting(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    The variables that make OpenMP's threads sleep at barriers, if other processes keep the CPUs busy.

    The library reads the variables once, when it is loaded. Processes started later inherit them.

    Args:
        environment: The variables that are set; default `os.environ`.

    Returns:
        Variables to set, by name: none when the user has set either of them, or when the CPUs are idle.
    """
    known = os.environ if environment is None else environment
    if PASSIVE.keys() & known.keys() or busy_cpus() < IDLE:
        return {}
    return dict(PASSIVE)


def prepare_environment() -> None:
    """
    Set what the libraries read from the environment when they are loaded, where the user has not: how threads
    wait (`passive_waiting`), and no tokenizer threads, which do not survive the fork of a data loader.
    Every program calls this before it imports torch.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.update(passive_waiting())


def usable_cpus() -> int:
    """How many CPUs this process may use; macOS does not say, and gives all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of the GPU, where torch uses one; else of the CPU, where the system tells."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a record of times has to say of where they were measured."""
    return {"processor": processor(), "cores": usable_cpus()}


def busy_cpus(seconds: float = 0.1) -> float:
    """
    How many of the CPUs that this process may use are busy while it sleeps.

    Args:
        seconds: How long to measure. The kernel counts in hundredths of a second.

    Returns:
        Number of busy CPUs, fractions included; infinity where the system does not say (not Linux, or a
        sandbox without counters).
    """
    try:
        before = _cpu_times()
        time.sleep(seconds)
        after = _cpu_times()
        passed = [[b - a for a, b in zip(before[name], after[name], strict=True)] for name in after]
        return sum(1 - (times[3] + times[4]) / sum(times) for times in passed)
    except (OSError, KeyError, ZeroDivisionError, AttributeError):
        return float("inf")


def _cpu_times() -> dict[str, list[int]]:
    """For each CPU of this process: user, nice, system, idle, iowait, ... (proc(5)), in ticks."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    times = {name: [int(n) for n in numbers[:8]] for name, *numbers in lines if name.startswith("cpu")}
    return {name: times[name] for name in (f"cpu{number}" for number in os.sched_getaffinity(0))}

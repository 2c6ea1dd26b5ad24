"""
What the allocator of a process on a CPU does with freed tensors.

Every step frees and allocates gigabytes. By default glibc takes a fresh mapping for each large tensor, whose
pages fault in again, which took half of a step's time. So it is told to keep what is freed, and gives it back
where a process holds too much. Of the allocators that are preloaded in its place, tcmalloc keeps freed memory
by itself and can give it back too; any other is left as it is.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Share of the machine's memory from which a process gives back what it has freed.
KEPT = 0.8
# Limits of a container: of control groups, version 2 and 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def is_glibc() -> bool:
    """Whether `malloc` is that of glibc, and not of a preloaded allocator or of another C library."""
    try:
        own = ctypes.CDLL("libc.so.6").malloc
    except OSError:
        return False
    return _address(own) == _address(ctypes.CDLL(None).malloc)


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


def keep_freed_memory() -> bool:
    """Let glibc reuse freed tensors in place of returning them to the kernel; whether glibc is used."""
    if not is_glibc():
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
    return True


def return_freed_memory() -> None:
    """
    Give the freed memory that glibc or tcmalloc keeps back to the kernel once, as after a start-up that
    needed more than training will. What is used again afterwards is kept again.
    """
    if is_glibc():
        ctypes.CDLL(None).malloc_trim(0)
    elif release := getattr(ctypes.CDLL(None), "MallocExtension_ReleaseFreeMemory", None):  # tcmalloc's
        release()


def limit_kept_memory(device: torch.device) -> None:
    """
    Give freed memory back when a process that computes on the CPU holds more than `KEPT` of what it has.
    Tensors of other sizes with each batch leave gaps that no later tensor fits, so that what glibc keeps
    grows. What is given back is cleared by the kernel when it is used again, which takes time.
    """
    if device.type != "cpu":
        return
    with suppress(OSError):  # no Linux
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > KEPT * machine_memory():
            return_freed_memory()


def machine_memory() -> float:
    """
    Bytes of memory that a process has at most: its part of the machine's, or of its container's. Infinity
    where the system does not say.
    """
    if not hasattr(os, "sysconf"):
        return float("inf")
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or the word "max"
            sizes.append(int(Path(limit).read_text()))
    return min(sizes) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))

"""Whether an engine compiles its model before it samples, or starts at once and runs it as it is."""

from __future__ import annotations

import logging

log = logging.getLogger("steer")

# Sampled tokens from which compiling pays on a CPU. With SmolLM2-135M in bfloat16 on two cores (vLLM 0.32,
# processor time of all threads) it took 76 s at the first start and 10 s where its result was in the cache,
# and saved 0.2 to 0.8 ms a token, the more the longer the completions were.
COMPILING_PAYS = 200_000


def enforce_eager(tokens: int | None, asked: bool | None = None) -> bool:
    """
    vLLM's `enforce_eager`.

    Args:
        tokens: the most that the engine will sample; None where nobody knows.
        asked: what the user asked for; None for what is faster in all. On a GPU that is vLLM's own default,
            to compile.
    """
    from vllm.platforms import current_platform

    if asked is not None:
        return asked
    if tokens is None or tokens >= COMPILING_PAYS or not current_platform.is_cpu():
        return False
    log.info("vLLM starts without compiling, which pays from %d sampled tokens on", COMPILING_PAYS)
    return True

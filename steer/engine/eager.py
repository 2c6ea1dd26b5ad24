"""
Whether an engine compiles its model before it samples, or starts at once and runs it as it is; and whether it
pays at all.
"""

from __future__ import annotations

import logging

log = logging.getLogger("steer")

# Sampled tokens from which compiling pays on a CPU. With SmolLM2-135M in bfloat16 on two cores (vLLM 0.32,
# processor time of all threads) it took 76 s at the first start and 10 s where its result was in the cache,
# and saved 0.2 to 0.8 ms a token, the more the longer the completions were.
COMPILING_PAYS = 200_000
# Processor seconds that an engine's start on a CPU takes without compiling beyond that of steer's own sampler
# (6.7 and 7.5 were measured), and with compiling; and what a token takes without compiling beyond steer's own
# sampler, by the length of a row (SmolLM2-135M, 64 rows, `evals.rollouts`). Longer rows were not measured;
# shorter ones count as rows of 64. COMPILING_SAVES is the middle of what was measured above.
EAGER_START, COMPILED_START = 7.0, 76.0
MORE = {64: 0.82e-3, 256: -0.13e-3}
COMPILING_SAVES = 0.5e-3


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


def say_whether_it_pays(tokens: int | None, length: int, eager: bool) -> None:
    """
    Tell a run whose samples an engine draws on a CPU what that costs with SmolLM2-135M, where steer's own
    sampler is expected to be cheaper.

    Args:
        tokens: the most that the engine will sample; None where nobody knows.
        length: the most tokens of a completion.
        eager: whether it does not compile.
    """
    from vllm.platforms import current_platform

    (short, more), (long, less) = MORE.items()
    if not current_platform.is_cpu() or tokens is None or length > long:
        return
    share = max(0, length - short) / (long - short)
    each = more + share * (less - more) - (0 if eager else COMPILING_SAVES)
    start = EAGER_START if eager else COMPILED_START
    if start + each * tokens > 0:
        log.info(
            "use_vllm is not expected to pay on a CPU for %s tokens in answers of at most %d: SmolLM2-135M "
            "with 64 rows takes about %.0f s of processor time more than with steer's own sampler, %.0f s of "
            "them to start (other models were not measured); use_vllm=false avoids that",
            f"{tokens:,}",
            length,
            start + each * tokens,
            start,
        )

r"""Whether a completion's \boxed answer equals the reference answer, whatever the completion holds.

Model output is hostile input here: it may be a megabyte of LaTeX or 10^{10^{10}}. Comparing strings and
numbers settles most answers in this process; the rest go to math-verify in workers that can be killed.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import pebble

from steer.errors import SteerError, shown
from steer.tasks.answers.equality import compare
from steer.tasks.answers.worked_out import unevaluated

log = logging.getLogger(__name__)

How = Literal["exact", "unevaluated", "symbolic", "no_answer", "timeout", "crash", "too_long"]

_CACHE_SIZE = 20_000  # graded pairs kept
_START_SECONDS = (
    120.0  # a worker imports math-verify before its first answer; slower than this means it is stuck
)
_WORKER_MEMORY = 1 << 30  # bytes of address space on top of what the worker holds once it has started
_PATIENCE = 4  # timeouts in one batch before the answers left in it get a fifth of the time


@dataclass(frozen=True)
class Verdict:
    """One graded completion: `answer` is what was extracted, `how` the step that decided."""

    correct: bool
    answer: str | None
    how: How


def extract_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...}; None when there is none or the last is never closed.

    "Last" goes by where a box opens, so of nested boxes the inner one counts. An unclosed last box means the
    answer was cut off, and an earlier box is then not the answer either. Escaped braces (\{) do not nest.
    Linear in the length of `text`.
    """
    start = -1
    for opening in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        start = opening.end()
    if start < 0:
        return None
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()]
    return None


def check_prefix(prefix: str) -> None:
    r"""Raise SteerError where a forced opening opens a box: what the model writes is graded alone."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])", prefix))
    if boxes and extract_boxed(prefix[boxes[-1].start() :]) is None:
        raise SteerError(
            f"prefix={shown(prefix)} opens a box, and only what the model writes after it is graded: no "
            "answer would be right; give a prefix without it"
        )


# --- in this process ----------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"\s*([+-]?)([0-9]{1,15}|[0-9]{1,3}(?:,[0-9]{3}){1,4})(?:\.([0-9]{1,15}))?\s*")
_FRACTION = re.compile(r"\s*(-?)\\d?frac\{([0-9]{1,15})\}\{([0-9]{1,15})\}\s*")


def _same_plain(gold: str, answer: str) -> bool | None:
    """Whether two decimals, or two fractions, are equal; None for other texts.

    `compare` says the same, at ten times the cost: these are nearly all that training grades.
    """
    if (one := _DECIMAL.fullmatch(gold)) and (other := _DECIMAL.fullmatch(answer)):
        places = max(len(one[3] or ""), len(other[3] or ""))
        values = [
            int(m[1] + m[2].replace(",", "") + (m[3] or "") + "0" * (places - len(m[3] or "")))
            for m in (one, other)
        ]
        return values[0] == values[1]
    one, other = _FRACTION.fullmatch(gold), _FRACTION.fullmatch(answer)
    if one and other and int(one[3]) and int(other[3]):
        return int(one[1] + one[2]) * int(other[3]) == int(other[1] + other[2]) * int(one[3])
    return None


def _cheap(gold: str, answer: str) -> tuple[bool | None, How]:
    """Right, wrong, or None where only sympy can tell; and the step that decided."""
    if (plain := _same_plain(gold, answer)) is not None:
        return plain, "exact"
    verdict = compare(gold, answer)
    if verdict is False and unevaluated(gold, answer):
        return False, "unevaluated"
    return verdict, "exact"


# --- inside a worker ----------------------------------------------------------------------------------------


def _start_worker() -> None:
    """Import and warm up math-verify, then cap the memory. Runs before the worker takes its first answer."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for 10**10**10 to finish
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    _symbolic(r"\frac{1}{2}+x", "x+0.5")
    try:
        import resource
    except ImportError:  # Windows
        return
    try:
        with open("/proc/self/statm") as statm:
            held = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:  # no /proc: allow generously for what is loaded
        held = 4 << 30
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = held + _WORKER_MEMORY
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(
            resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _symbolic(gold: str, answer: str) -> bool:
    """Whether the answer is right, sympy consulted. Time limits are the pool's: math-verify's own need the
    main thread of their process."""
    return bool(compare(gold, answer, decide=True))


# --- the grader --------------------------------------------------------------------------------------------


def _best(verdicts: list[Verdict | None]) -> Verdict:
    """The first that says right, else the first; None are those that were not needed."""
    known = [verdict for verdict in verdicts if verdict is not None]
    return next((verdict for verdict in known if verdict.correct), known[0])


def _golds(answer: Any) -> list[str]:
    return [str(gold) for gold in answer] if isinstance(answer, list | tuple) else [str(answer)]


class MathGrader:
    r"""Grades \boxed answers. Works from any thread; starts no process until an answer needs math-verify.

    timeout: seconds one answer may take in a worker, which is killed when it takes longer.
    workers: processes that grade at the same time.
    max_chars: longest extracted answer looked into, in characters; longer ones are wrong ("too_long").
    A script that is not a module of a package must guard its entry point with `if __name__ == "__main__":`,
    as the workers import it.
    """

    def __init__(self, timeout: float = 5.0, workers: int = 1, max_chars: int = 2000) -> None:
        if not timeout > 0 or workers < 1 or max_chars < 1:
            raise SteerError(
                f"checker got timeout={timeout}, workers={workers}, max_chars={max_chars}; "
                "expected all above 0"
            )
        self.timeout, self.workers, self.max_chars = timeout, workers, max_chars
        self._cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._pool: pebble.ProcessPool | None = None
        self._lock = threading.Lock()
        self._answered = False  # whether any worker ever gave an answer

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. A later `check` starts new ones."""
        with self._lock:
            self._drop_pool()

    def check(
        self,
        completions: Sequence[str],
        answers: Sequence[str | Sequence[str]],
        extract: Callable[[str], str | None] = extract_boxed,
    ) -> list[Verdict]:
        """One verdict per completion, against the reference answer at the same place: a text, or several of
        which any is right. Where none is matched the verdict is that on the first.

        `extract` takes the answer out of a completion: `extract_boxed`, or
        `steer.tasks.lenient.extract_lenient`. Answers that time out or crash a worker count as wrong, with
        one warning per call. Raises SteerError for lists of different lengths and when workers cannot start
        at all.
        """
        if len(completions) != len(answers):
            raise SteerError(
                f"{len(completions)} completions and {len(answers)} reference answers; "
                "expected one answer each"
            )
        golds = [_golds(answer) for answer in answers]
        if (empty := next((i for i, some in enumerate(golds) if not some), None)) is not None:
            raise SteerError(f"completion {empty} has no reference answer; give at least one")
        extracted = [extract(completion) for completion in completions]
        rows = [
            [(gold, given, self._cheap(gold, given)) for gold in some]
            for some, given in zip(golds, extracted, strict=True)
        ]
        # what only sympy can tell, of answers that are not right already; in order, each once
        left = {
            (gold, given or ""): None
            for row in rows
            if not any(verdict and verdict.correct for _, _, verdict in row)
            for gold, given, verdict in row
            if verdict is None
        }
        with self._lock:
            known = {pair: self._cache[pair] for pair in left if pair in self._cache}
            known.update(self._grade([pair for pair in left if pair not in known]))
            for pair in known:
                if pair in self._cache:
                    self._cache.move_to_end(pair)
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return [
            _best([verdict or known.get((gold, given or "")) for gold, given, verdict in row]) for row in rows
        ]

    def _cheap(self, gold: str, answer: str | None) -> Verdict | None:
        if answer is None or not answer.strip():
            return Verdict(False, None, "no_answer")
        if len(answer) > self.max_chars:
            same = answer.strip() == gold.strip()
            return Verdict(same, answer, "exact" if same else "too_long")
        verdict, how = _cheap(gold, answer)
        return None if verdict is None else Verdict(verdict, answer, how)

    def _grade(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Verdict]:
        graded: dict[tuple[str, str], Verdict] = {}
        problems: list[str] = []
        timeouts = 0
        start, size = 0, 4 * self.workers
        while start < len(pairs):
            chunk = pairs[start : start + size]
            start += size
            # a batch full of pathological answers must not take its length times the timeout
            hurried = timeouts >= _PATIENCE
            outcomes = self._run(chunk, self.timeout / 5 if hurried else self.timeout)
            for pair, outcome in zip(chunk, outcomes, strict=True):
                if isinstance(outcome, bool):
                    verdict = Verdict(outcome, pair[1], "symbolic")
                else:
                    timed_out = isinstance(outcome, FutureTimeout)
                    timeouts += timed_out
                    problems.append("timeout" if timed_out else f"{type(outcome).__name__}: {outcome}")
                    verdict = Verdict(False, pair[1], "timeout" if timed_out else "crash")
                graded[pair] = verdict
                if not (hurried and verdict.how == "timeout"):  # it might have passed with its full time
                    self._cache[pair] = verdict
            # larger chunks keep the workers busier, smaller ones notice timeouts sooner
            size = (4 if timeouts else min(2 * size // self.workers, 16)) * self.workers
        if problems:
            log.warning(
                "%d of %d answers count as wrong unchecked (%d timeouts, %d crashes; first: %s)",
                len(problems),
                len(pairs),
                timeouts,
                len(problems) - timeouts,
                " ".join(problems[0].split())[:200],
            )
        return graded

    def _run(self, pairs: list[tuple[str, str]], limit: float) -> list[bool | BaseException]:
        """Outcome of each pair in the workers. A pair whose worker died is tried once more."""
        outcomes: list[bool | BaseException] = [BrokenProcessPool("not run")] * len(pairs)
        todo = list(range(len(pairs)))
        for _ in range(2):
            for place, outcome in zip(todo, self._attempt([pairs[i] for i in todo], limit), strict=True):
                outcomes[place] = outcome
            todo = [i for i in todo if isinstance(outcomes[i], BrokenProcessPool | pebble.ProcessExpired)]
            if not todo:
                break
        self._answered |= any(isinstance(o, bool | FutureTimeout) for o in outcomes)
        if not self._answered and len(todo) == len(pairs):
            raise SteerError(
                f"the answer checker's worker processes die before they answer ({outcomes[0]}); guard "
                'your script\'s entry point with if __name__ == "__main__": and see if math-verify imports'
            )
        return outcomes

    def _attempt(self, pairs: list[tuple[str, str]], limit: float) -> list[bool | BaseException]:
        pool = self._live_pool()
        try:
            futures: list[Any] = [pool.schedule(_symbolic, args=pair, timeout=limit) for pair in pairs]
        except RuntimeError as error:  # the pool broke just now
            self._drop_pool()
            return [BrokenProcessPool(str(error))] * len(pairs)
        # every answer gets its limit from the pool; this is for a pool that no longer does anything
        deadline = time.monotonic() + _START_SECONDS + (limit + 5) * len(pairs)
        pending = set(futures)
        while pending and pool.active and time.monotonic() < deadline:
            pending = wait(pending, timeout=0.5).not_done
        if pending:
            wait(pending, timeout=0.5)  # a pool that broke hands out its errors a moment later
            self._drop_pool()
        outcomes: list[bool | BaseException] = []
        for future in futures:
            if not future.done():
                outcomes.append(BrokenProcessPool("the worker pool stopped"))
            else:
                failure = future.exception()
                outcomes.append(bool(future.result()) if failure is None else failure)
        return outcomes

    def _live_pool(self) -> pebble.ProcessPool:
        if self._pool is not None and not self._pool.active:
            self._drop_pool()
        if self._pool is None:
            # never fork: this process has torch's threads and perhaps a GPU
            forkserver = "forkserver" in multiprocessing.get_all_start_methods()
            context: Any = multiprocessing.get_context("forkserver" if forkserver else "spawn")
            if forkserver:
                # imported once in the server, so that replacing a killed worker is cheap
                context.set_forkserver_preload(["__main__", __name__, "math_verify"])
            # workers are renewed now and then: sympy's caches grow into the memory cap
            self._pool = pebble.ProcessPool(
                self.workers, max_tasks=2000, initializer=_start_worker, context=context
            )
        return self._pool

    def _drop_pool(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

"""
Reward without labels: the most frequent answer of a group stands for the right one (TTRL, arXiv 2504.16084).
"""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from steer.tasks.grading import MathGrader, extract_boxed

log = logging.getLogger("steer")

# Updates in a row after which a collapse is told, and the mean agreement that counts as one.
UPDATES, AGREEMENT = 5, 0.95

# Sums and products of plain numbers that are still to do, such as 97 + 27.
_NUMBER = r"[\s$()]*-?[\d.,]+[\s$()]*"
_CALCULATION = re.compile(rf"{_NUMBER}(?:(?:[-+*]|\\times|\\cdot|\\div){_NUMBER})+")


class Seen(NamedTuple):
    """One update: mean agreement, different answers in a group, and the share of texts with an answer."""

    agreement: float
    distinct: float
    answered: float


class Majority:
    """
    1.0 for an answer that equals the most frequent one of its group, 0.0 for any other and for none.

    A group is the run of completions of one prompt. Answers are compared as `grader` compares them with a
    reference answer, so that 0.5 and one half are votes for the same. Candidates are tried in the order of
    how often they are written in the same way, then of where they are first; each takes the votes of those
    that equal it. Of equal numbers of votes the earlier candidate wins. The winner is then the reference
    answer that the group is graded with. An unfinished calculation (97 + 27) is no candidate, and neither is
    the word that the prompt has in its own box ("Give the answer as \\boxed{answer}."): otherwise a policy
    would win by repeating the question.

    Logs `majority/agreement` (the share of a group that agrees with its winner), `majority/distinct` (answers
    written differently in a group) and `majority/answered` (the share of texts with an answer). Warns once
    where the groups agree on nearly everything for `UPDATES` calls and give fewer different answers than at
    first, and once where no text has an answer for as long. It reads no column of the data set.
    """

    __name__ = "majority"
    # Every call must have all samples of a prompt; the trainer checks that.
    whole_groups = True

    def __init__(self, grader: MathGrader) -> None:
        self.grader = grader
        self.first: Seen | None = None
        self.recent: deque[Seen] = deque(maxlen=UPDATES)
        self.told: set[str] = set()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        answers = [extract_boxed(text_of(completion)) for completion in completions]
        runs = [(prompt, len(list(run))) for prompt, run in groupby(prompts)]
        sizes = [size for _, size in runs]
        groups, start = [], 0
        for size in sizes:
            groups.append(answers[start : start + size])
            start += size
        winners = self._winners(groups, [_boxed_word(prompt) for prompt, _ in runs])
        golds = [winner for winner, size in zip(winners, sizes, strict=True) for _ in range(size)]
        voted = [i for i, gold in enumerate(golds) if gold is not None and answers[i] is not None]
        right = self._equal([golds[i] or "" for i in voted], [answers[i] or "" for i in voted])
        rewards = [0.0] * len(answers)
        for i, agrees in zip(voted, right, strict=True):
            rewards[i] = float(agrees)
        self._watch(groups, rewards, columns.get("log_metric"))
        if log_extra := columns.get("log_extra"):
            log_extra("majority_answer", [gold or "" for gold in golds])
        return rewards

    def _winners(
        self, groups: Sequence[Sequence[str | None]], words: Sequence[str | None]
    ) -> list[str | None]:
        """The most frequent answer of each group; None where there is no candidate."""
        candidates = [
            [a for a in group if a is not None and a.strip() != word and self._candidate(a)]
            for group, word in zip(groups, words, strict=True)
        ]
        # equal counts stay in the order in which they were met first
        left = [Counter(group).most_common() for group in candidates]
        best: list[tuple[str | None, int]] = [(None, 0)] * len(groups)
        while asked := [i for i, rest in enumerate(left) if sum(n for _, n in rest) > best[i][1]]:
            pairs = [(i, other) for i in asked for other in left[i][1:]]
            same = self._equal([left[i][0][0] for i, _ in pairs], [answer for _, (answer, _) in pairs])
            votes = {i: left[i][0][1] for i in asked}
            rest: dict[int, list[tuple[str, int]]] = {i: [] for i in asked}
            for (i, other), equal in zip(pairs, same, strict=True):
                if equal:
                    votes[i] += other[1]
                else:
                    rest[i].append(other)
            for i in asked:
                if votes[i] > best[i][1]:
                    best[i] = (left[i][0][0], votes[i])
                left[i] = rest[i]
        return [answer for answer, _ in best]

    def _candidate(self, answer: str) -> bool:
        known = answer.strip() and len(answer) <= self.grader.max_chars
        return bool(known) and _CALCULATION.fullmatch(answer) is None

    def _equal(self, golds: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [verdict.correct for verdict in self.grader.check(answers, golds, str)]

    def _watch(
        self,
        groups: Sequence[Sequence[str | None]],
        rewards: Sequence[float],
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        if not groups:
            return
        given = [[a for a in group if a is not None and a.strip()] for group in groups]
        count = len(rewards)
        seen = Seen(
            sum(rewards) / count,
            sum(len(set(group)) for group in given) / len(given),
            sum(map(len, given)) / count,
        )
        if log_metric:
            for name, value in seen._asdict().items():
                log_metric(f"majority/{name}", value)
        self.first = self.first or seen
        self.recent.append(seen)
        if len(self.recent) < UPDATES:
            return
        distinct = sum(one.distinct for one in self.recent) / UPDATES
        agreement = min(one.agreement for one in self.recent)
        if all(one.answered == 0 for one in self.recent):
            self._warn(
                "empty",
                f"majority: no sample of the last {UPDATES} updates has an answer in a box, so that every "
                "reward is 0; use another template, longer answers, or a reward for the form beside it",
            )
        elif agreement >= AGREEMENT and distinct < self.first.distinct:
            self._warn(
                "agreed",
                f"majority: the samples of a prompt agree ({agreement:.0%} or more in the last {UPDATES} "
                f"updates, {distinct:.1f} different answers where there were {self.first.distinct:.1f}): "
                "this reward teaches nothing more, and they may agree on what is wrong; compare the held-out "
                "score, and stop earlier or lower the learning rate",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self.told:
            log.warning("warning: %s", message)
        self.told.add(what)


def _boxed_word(prompt: Any) -> str | None:
    """The word in the last box of a prompt, text or messages; None where there is none, or a number."""
    text = prompt if isinstance(prompt, str) else "".join(str(turn.get("content")) for turn in prompt)
    boxed = (extract_boxed(text) or "").strip()
    return boxed if boxed and not re.search(r"\d", boxed) else None


def text_of(completion: Any) -> str:
    """
    The text of a completion given as a string or as messages: that of the last one, where the model wrote it.
    The result of a tool that nothing follows is no answer.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    content = last.get("content") if last.get("role", "assistant") == "assistant" else ""
    if isinstance(content, list):  # content blocks, as multimodal chats have them
        content = "".join(block.get("text", "") for block in content)
    return content or ""

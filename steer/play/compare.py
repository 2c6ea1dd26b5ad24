"""
A model and its steered self: what both answer, and what the vectors change in each token's probability.

Nothing here is kept between calls, so that several users can ask at once: a conversation, its settings and
its mix of vectors are arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.artifact import Artifact
from steer.errors import SteerError
from steer.generation.decoding import CachedRows, PlainRows, Rows, inputs
from steer.generation.sampler import Sampling, draw_token, uniforms
from steer.generation.verify import fast_paths
from steer.mixture import BASE, Mix, Mixer
from steer.models import check_context
from steer.prompt import PromptSpec
from steer.sites import input_device
from steer.stop_tokens import stop_token_ids
from steer.tasks.prompts import Question, format_prompt, prompt_ids

# Ways to put a message that need no artifact.
CHAT, TEXT = "plain chat", "plain text"


@dataclass(frozen=True)
class TokenChange:
    """
    A token of an answer: its text, and its log-probability (nats) after what comes before it, in the base
    model and with the vectors.
    """

    text: str
    base: float
    steered: float

    @property
    def change(self) -> float:
        return self.steered - self.base


@dataclass(frozen=True)
class NextToken:
    """A token that may come next: its text, and its probability in the base model and with the vectors."""

    text: str
    base: float
    steered: float


class Comparison:
    """
    A model with sets of vectors in it.

    Args:
        model: the base model, without vectors. It stays the base model outside of calls.
        tokenizer: of the model.
        artifacts: the sets, by name.

    Raises:
        SteerError: vectors for a model of another shape, and a model whose completions have no probability
            (`steer.generation.verify`).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, artifacts: Mapping[str, Artifact]
    ):
        self.model, self.tokenizer = model, tokenizer
        self._cached = fast_paths(model).sampler is None
        self.mixer = Mixer(model)
        for name, artifact in artifacts.items():
            self.mixer.add(name, artifact, tokenizer)
        model.requires_grad_(False)
        self.stops = stop_token_ids(tokenizer, model.generation_config)
        # By label, in the order of preference: as the sets were trained, and as it is.
        self._prompts = _labelled({name: artifact.config.prompt for name, artifact in artifacts.items()})
        self.ways = [*self._prompts, *([CHAT] if tokenizer.chat_template else []), TEXT]

    def prompt(self, message: str, history: Sequence[tuple[str, str]], way: str) -> list[int]:
        """
        The token ids that an answer to `message` continues.

        Args:
            message: of the user.
            history: the earlier messages of the user, each with the model's answer.
            way: how messages are put to the model, one of `ways`. A prompt of training puts each message as
                it puts a problem, and the history as worked examples.

        Raises:
            SteerError: an unknown way, an empty message, or a chat template that refuses the conversation.
        """
        if way not in self.ways:
            raise SteerError(f"prompt {way!r} is unknown; choose one of {', '.join(self.ways)}")
        if not message.strip():
            raise SteerError("the message is empty; write something")
        if way == TEXT:
            text = "".join(f"{asked}{answer}\n" for asked, answer in history) + message
            return prompt_ids(self.tokenizer, [text])[0]
        if way == CHAT:
            turns: list[dict[str, str]] = []
            for asked, answer in history:
                turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            question: Question = [*turns, {"role": "user", "content": message}]
            text = format_prompt(question, self.tokenizer)
        else:
            spec = self._prompts[way]
            earlier = tuple((asked, spec.prefix + answer) for asked, answer in history)
            text = format_prompt(message, self.tokenizer, replace(spec, examples=spec.examples + earlier))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def sampling(self, max_new_tokens: float, temperature: float) -> Sampling:
        """
        How answers are drawn; they end where the model's answers end. SteerError for a length that is no
        whole number.
        """
        if max_new_tokens != int(max_new_tokens):
            raise SteerError(f"an answer of {max_new_tokens} tokens cannot be: give a whole number")
        return Sampling(int(max_new_tokens), self.stops, temperature)

    def check_length(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """SteerError where a prompt does not fit into the model's context with the longest answer."""
        check_context(self.model.config, len(prompt), sampling.max_new_tokens, "an answer length of at most")

    def answer(
        self, prompt: Sequence[int], mix: Mix, sampling: Sampling, seed: int = 0
    ) -> Iterator[list[int]]:
        """
        The answer after each new token: token ids, the one that ends it included.

        Args:
            prompt: token ids.
            mix: the vectors; `BASE` for none.
            sampling: as `sampling` makes it.
            seed: of the random numbers, where the temperature is not 0.

        Raises:
            SteerError: a prompt that does not fit into the model's context with the longest answer.
        """
        self.check_length(prompt, sampling)
        device = input_device(self.model)
        noise = uniforms([0], sampling.max_new_tokens, seed, 0).to(device)
        rows: Rows = (
            CachedRows(self.model) if self._cached else PlainRows(self.model, self.mixer.prompt_length)
        )
        answer: list[int] = []
        token = torch.empty(0)
        for column in range(sampling.max_new_tokens):
            # Entered for each token anew: between two the caller may go on in another thread.
            with torch.no_grad(), self.mixer.active(mix):
                logits = rows.step(token) if answer else rows.read([prompt])
                token, _ = draw_token(
                    logits, sampling.temperature, sampling.warpers(), noise[:, column].to(logits.device)
                )
            answer = [*answer, int(token)]
            yield answer
            if answer[-1] in sampling.eos_token_ids:
                return

    def side_by_side(
        self, base: Sequence[int], steered: Sequence[int], mix: Mix, sampling: Sampling, seed: int = 0
    ) -> Iterator[tuple[list[int], list[int]]]:
        """
        Both answers after each new token, from the same random numbers: the base model's, then the other.

        Args:
            base: the prompt of the base model, whose history may differ from the other's.
            steered: the prompt with the vectors.
            mix, sampling, seed: as in `answer`.
        """
        both = [self.answer(base, BASE, sampling, seed), self.answer(steered, mix, sampling, seed)]
        now: list[list[int]] = [[], []]
        while True:
            new = [next(answers, None) for answers in both]
            if new == [None, None]:
                return
            now = [after or before for before, after in zip(now, new, strict=True)]
            yield now[0], now[1]

    def changes(self, prompt: Sequence[int], answer: list[int], mix: Mix) -> list[TokenChange]:
        """What the vectors change in the log-probability of each token of an answer to a prompt."""
        if not answer:
            return []
        target = torch.tensor(answer)
        found = []
        for condition in (BASE, mix):
            logits = self._logits([*prompt, *answer], len(prompt), len(answer) + 1, condition)[:-1]
            found.append(torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1).tolist())
        return [TokenChange(*token) for token in zip(self.pieces(answer), *found, strict=True)]

    def next_tokens(
        self, prompt: Sequence[int], answer: Sequence[int], mix: Mix, top: int = 10
    ) -> list[NextToken]:
        """
        The tokens most likely to come after an answer's tokens so far, in the base model or with the vectors,
        the most likely in either first.

        Args:
            prompt: token ids.
            answer: token ids that follow; none for the first token of the answer.
            mix: the vectors.
            top: how many.
        """
        base, steered = (
            torch.softmax(self._logits([*prompt, *answer], len(prompt), 1, condition)[0], -1)
            for condition in (BASE, mix)
        )
        best = torch.maximum(base, steered)
        ids = best.topk(min(top, len(best))).indices.tolist()
        return [NextToken(self._name(i), base[i].item(), steered[i].item()) for i in ids]

    @torch.no_grad()
    def _logits(self, ids: list[int], prompt: int, last: int, mix: Mix) -> torch.Tensor:
        """Logits after each of the last tokens in one plain pass: (last, vocabulary), float32, on the CPU."""
        device = input_device(self.model)
        row = torch.tensor([ids], device=device)
        kept = torch.arange(len(ids) - last, len(ids), device=device)
        with self.mixer.active(mix), self.mixer.prompt_length(prompt):
            wanted = inputs(self.model, row, torch.ones_like(row), logits_to_keep=kept)
            logits = self.model(**wanted, use_cache=False).logits
        return logits[0, -last:].float().cpu()

    def text(self, answer: list[int]) -> str:
        """An answer as text, without the token that ends it and other special tokens."""
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def pieces(self, answer: list[int]) -> list[str]:
        """
        The text that each token adds. Of a character that several tokens make up, the last has the whole, the
        others have none.
        """
        pieces: list[str] = []
        start = 0  # the first token whose text has not come out yet
        for end in range(1, len(answer) + 1):
            # from a token before, since some tokenizers drop the space before the first
            before = str(self.tokenizer.decode(answer[max(start - 1, 0) : start]))
            text = str(self.tokenizer.decode(answer[max(start - 1, 0) : end]))[len(before) :]
            whole = not text.endswith("\ufffd") or end == len(answer)
            pieces.append(text if whole else "")
            start = end if whole else start
        return pieces

    def _name(self, token: int) -> str:
        """The text of one token; as the vocabulary writes it where it is a part of a character."""
        text = str(self.tokenizer.decode([token]))
        if text and "\ufffd" not in text:
            return text
        return str(self.tokenizer.convert_ids_to_tokens([token])[0])


def _labelled(trained: Mapping[str, PromptSpec | None]) -> dict[str, PromptSpec]:
    """The different prompts of sets by label, which names the first set of each where two look the same."""
    first: dict[str, PromptSpec] = {}
    for name, prompt in trained.items():
        if prompt is not None and prompt not in first.values():
            first[name] = prompt
    looks = [str(prompt) for prompt in first.values()]
    return {
        f"as in training{f' of {name}' if looks.count(str(prompt)) > 1 else ''}: {prompt}": prompt
        for name, prompt in first.items()
    }

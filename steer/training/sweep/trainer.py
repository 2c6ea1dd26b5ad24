"""
`PopulationTrainer`: many independent runs of `SteeringGRPOTrainer` on one frozen model, at once.

Each member has what a run of its own would have: vectors, learning rates, seed, rewards, optimizer, schedule,
logs. Shared are the model and its forward passes, whose rows each carry their member. A member draws the same
problems with the same random numbers as alone and gets the same gradient, so that it becomes what it becomes
alone, up to the order in which floats are summed.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import isfinite, isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from steer.errors import SteerError
from steer.files import replace_file
from steer.generation import allocator, cpu
from steer.generation.completion import Completion
from steer.generation.decoding import pad_left
from steer.generation.sampler import Sampling, rollout, uniforms
from steer.generation.scoring import add_group_scoring
from steer.generation.verify import fast_attention, fast_paths
from steer.identity import tokenizer_checksum
from steer.stop_tokens import stop_token_ids
from steer.tasks.prompts import prompt_ids
from steer.training.dynamic_sampling import UpdateSamples
from steer.training.loss import importance_weights, token_losses
from steer.training.mismatch import check_mismatch, distance
from steer.training.sweep.batch import Batch, judge, score
from steer.training.sweep.member import Member, agreed, check_model, check_supported
from steer.vector_sets import BASE, Population

if TYPE_CHECKING:
    from steer.engine.sweep_sampler import EngineSampler

# Rows drawn at once where nothing is said: a member's own, or those of several small ones.
SAMPLE_ROWS = 128


class PopulationTrainer:
    """
    Train `members` on `problems` (a data set with a column `prompt`, and what the rewards read). They must
    agree in all settings of `SHARED`. State is kept in `state_file`, written every `save_steps` rounds. Where
    `engine` is set (`steer.engine.sweep_sampler`), it samples. `validate` is called with a member after each
    of its updates.
    """

    engine: EngineSampler | None = None
    validate: Callable[[Member], None] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        members: Sequence[Member],
        problems: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        state_file: Path | None = None,
    ):
        self.model, self.tokenizer, self.problems = model, tokenizer, problems
        self.state_file = state_file
        self.args = agreed([member.args for member in members])
        for member in members:
            check_supported(member.args)
        check_model(model, self.args)
        if model.device.type == "cpu":
            cpu.prepare()
        add_fused_lm_head(model, temperature=self.args.temperature, outputs=("log_probs", "entropy"))
        add_group_scoring(model, self.args.temperature)
        model.eval()
        self._paths = fast_paths(model)
        self.population = Population(model)
        num_hidden_layers = self.population.num_hidden_layers
        # Neighbours in depth share a batch, and with it the layer at which its graph begins.
        self.members = sorted(members, key=lambda m: m.steering.resolve_layers(num_hidden_layers)[0])
        checksum = tokenizer_checksum(tokenizer)
        for member in self.members:
            vectors = self.population.add(member.name, member.steering)
            vectors.config.tokenizer_checksum = checksum
            member.prepare(vectors, len(problems))
        self._number = {name: i for i, name in enumerate(self.population.sets)}
        self.others: dict[str, dict[str, Any]] = {}  # states in the file of members that are not trained now
        self.eos_token_ids = stop_token_ids(tokenizer, model.generation_config)

    # ---- the loop

    def train(self, until: int | None = None) -> None:
        """Every member to its end, or to `until` updates. Goes on from the state that was loaded."""

        def left(member: Member) -> int:
            return max(0, min(member.steps, until or member.steps) - member.step) if member.active else 0

        if self.model.device.type == "cpu":
            allocator.return_freed_memory()
        total = sum(min(m.steps, until or m.steps) for m in self.members if m.stopped is None)
        label = f"training {sum(map(bool, map(left, self.members)))} members"
        bar = tqdm(
            total=total,
            initial=total - sum(map(left, self.members)),
            unit="update",
            desc=label,
            disable=self.args.disable_tqdm,
        )
        rounds = 0
        with bar:
            while running := [member for member in self.members if left(member)]:
                start, busy_start = time.perf_counter(), time.process_time()
                allocator.limit_kept_memory(self.model.device)
                tokens = self.update(running)
                seconds, busy = time.perf_counter() - start, time.process_time() - busy_start
                # of each its share, so that the members' seconds add up to the population's
                shares = {"step_time": seconds / len(running), "seconds/cpu": busy / len(running)}
                for member in running:
                    member.log[-1] |= shares
                    if self.validate is not None:
                        self.validate(member)
                rounds += 1
                rewards = [r for m in running if (r := m.log[-1]["reward"]) is not None] or [nan]
                bar.set_postfix(
                    {
                        "members": len(running),
                        "reward": f"{sum(rewards) / len(rewards):.2f}",
                        "best": f"{max(rewards):.2f}",
                        "tok/s": f"{tokens / seconds:.0f}",
                    },
                    refresh=False,
                )
                bar.update(len(running))
                due = self.args.save_strategy != "no" and rounds % max(int(self.args.save_steps), 1) == 0
                if self.state_file and due:
                    self.save()
        if self.state_file and rounds:
            self.save()

    def update(self, members: Sequence[Member]) -> int:
        """One update of each of `members`. Returns the number of tokens that were sampled."""
        draws = [(member, member.draw()) for member in members]
        for member in members:
            member.metrics.clear()
        if self.engine is not None:
            self.engine.sync({member.name: member.vectors for member in members})
        tokens = 0
        while wanting := [(m, draw, problems) for m, draw in draws if (problems := draw.wanted())]:
            tokens += self._round(wanting)
        batches = []
        for member, draw in draws:
            prompts, completions = ([row[i] for row in draw.rows] for i in (0, 1))
            member.metrics.update({name: [value] for name, value in draw.metrics().items()})
            batches.append(
                judge(member, prompts, completions, draw.scores, self.tokenizer, self.eos_token_ids)
            )
        self._gradients(batches)
        for batch in batches:
            self._apply(batch)
        return tokens

    # ---- samples

    def _round(self, wanting: Sequence[tuple[Member, UpdateSamples, list[int]]]) -> int:
        """Sample and score what each member wants next. Returns the number of tokens that were sampled."""
        members = [member for member, _, _ in wanting]
        group = self.args.num_generations
        columns = [self.problems[[p for p in own for _ in range(group)]] for _, _, own in wanting]
        prompts = [prompt_ids(self.tokenizer, own["prompt"]) for own in columns]
        rows = [range(d.drawn, d.drawn + len(own)) for (_, d, _), own in zip(wanting, prompts, strict=True)]
        sample = self._draw if self.engine else self._sample
        drawn = sample(members, prompts, rows)
        for i, (member, draw, _) in enumerate(wanting):
            scored = score(member, columns[i], drawn[i], self.tokenizer, first=not draw.drawn)
            draw.add(list(zip(prompts[i], drawn[i], strict=True)), scored)
        return sum(len(one.ids) for group in drawn for one in group)

    def _draw(
        self, members: Sequence[Member], prompts: Sequence[list[list[int]]], rows: Sequence[range]
    ) -> list[list[Completion]]:
        """By the engine. `rows`: of each member, the numbers of its rows among those of the update."""
        assert self.engine is not None
        names = [m.name for m, ids in zip(members, prompts, strict=True) for _ in ids]
        seeds = [
            int(np.random.SeedSequence([m.args.seed, m.step, row]).generate_state(1)[0])
            for m, own in zip(members, rows, strict=True)
            for row in own
        ]
        drawn = self.engine.sample(names, [row for own in prompts for row in own], seeds)
        return _grouped(drawn, [len(own) for own in prompts])

    def _sample(
        self, members: Sequence[Member], prompts: Sequence[list[list[int]]], rows: Sequence[range]
    ) -> list[list[Completion]]:
        """By the model itself. `rows`: of each member, the numbers of its rows among those of the update."""
        args = self.args
        sampling = Sampling(
            args.max_completion_length,
            self.eos_token_ids,
            args.temperature,
            args.top_k,
            args.top_p,
            args.min_p,
        )
        noise = torch.cat(
            [
                uniforms(own, sampling.max_new_tokens, member.args.seed, member.rollout_step)
                for member, own in zip(members, rows, strict=True)
            ]
        )
        flat = [ids for own in prompts for ids in own]
        owner = self._owner(members, [len(own) for own in prompts])
        size = args.sample_rows or max(len(prompts[0]), SAMPLE_ROWS)
        drawn: list[Completion] = []
        for part in _parts(len(flat), size):
            with self.population.rows(owner[part]) as owners:
                drawn += rollout(self.model, flat[part], sampling, noise[part], owners=owners)
        return _grouped(drawn, [len(ids) for ids in prompts])

    def _owner(self, members: Sequence[Member], counts: Sequence[int]) -> torch.Tensor:
        numbers = [self._number[member.name] for member in members]
        return torch.tensor(numbers).repeat_interleave(torch.tensor(counts))

    # ---- gradients

    def _gradients(self, batches: Sequence[Batch]) -> None:
        """
        The gradient of every member's loss, in batches of `per_device_train_batch_size` rows: each reaches no
        parameter but its own, so the losses are added up. Rows come by the lowest layer that is trained.
        """
        for batch in batches:
            for parameter in batch.member.vectors.parameters():
                parameter.grad = torch.zeros_like(parameter)
        every = [(batch, row) for batch in batches for row in batch.kept]
        for part in _parts(len(every), self.args.per_device_train_batch_size):
            self._backward(every[part])

    def _backward(self, rows: Sequence[tuple[Batch, int]]) -> None:
        device = self.model.device
        prompt_ids, prompt_mask = pad_left([b.prompts[i] for b, i in rows], device)
        completions = [b.completions[i].ids for b, i in rows]
        longest = max(map(len, completions))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in completions], device=device)
        weight = torch.stack([_fit(b.weights[i], longest) for b, i in rows]).to(device)
        owner = torch.tensor([self._number[b.member.name] for b, _ in rows])
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": ids,
            "completion_mask": (weight > 0).long(),
        }
        logp, entropy = self._score(owner, inputs)
        reference = None
        if any(batch.member.args.beta for batch, _ in rows):
            with torch.no_grad():
                reference, _ = self._score(torch.full_like(owner, BASE), inputs)
        losses = []
        start = 0
        for _, run in groupby(rows, key=lambda row: id(row[0])):
            mine = [*run]
            part = slice(start, start := start + len(mine))
            known = None if reference is None else reference[part]
            losses.append(self._loss(mine, logp[part], entropy[part], weight[part], known))
        loss = torch.stack(losses).sum()
        if loss.requires_grad:  # not when every token of these rows is masked out
            loss.backward()

    def _loss(
        self,
        rows: Sequence[tuple[Batch, int]],
        logp: torch.Tensor,
        entropy: torch.Tensor,
        weight: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss of some rows of one member, from (rows, tokens); what is logged of them is added up."""
        batch, args, totals = rows[0][0], rows[0][0].member.args, rows[0][0].totals
        seen = (weight > 0).float()
        advantages = torch.stack([batch.advantages[i] for _, i in rows]).to(logp.device)
        weights = None
        drawn = [batch.completions[i].logps for _, i in rows] if self.engine else []
        if drawn and drawn[0] is not None:  # by an engine whose log-probabilities compare with these
            told = torch.stack([_fit(torch.tensor(logps), logp.shape[1]) for logps in drawn])
            told = told.to(logp.device)
            apart, compared = distance(logp.detach(), told, seen)
            totals["engine/mean"] += apart
            totals["engine/tokens"] += compared
            if args.vllm_importance_sampling_correction:
                weights, limited = importance_weights(logp.detach(), told, seen, args)
                totals["engine/limited_tokens"] += limited.sum().item()
                totals["engine/limited_sequences"] += limited.any(1).sum().item()
        terms = token_losses(logp, advantages, seen, args, reference=reference, weights=weights)
        loss = (terms.loss * weight).sum()
        totals["rows"] += seen.any(1).sum().item()
        totals["tokens"] += seen.sum().item()
        totals["loss"] += loss.item()
        totals["entropy"] += (entropy * seen).sum().item()
        if terms.kl is not None:
            totals["kl"] += (terms.kl.detach() * seen).sum().item()
        return loss

    def _score(
        self, owner: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = self._paths.scoring()
        # Rows that are read whole are padded on the right.
        lengths = inputs["prompt_mask"].sum(1)
        columns = inputs["prompt_ids"].shape[1] if options["share"] else lengths
        with (
            fast_attention(self.model),
            self.population.prompt_length(columns),
            self.population.rows(owner) as owners,
        ):
            scored = self.model(score_group=True, owners=owners, **options, **inputs)
        return scored.log_probs, scored.entropy.detach()

    def _apply(self, batch: Batch) -> None:
        """Clip and step, and write the log. A number that is not finite stops the member where it was."""
        member, args = batch.member, batch.member.args
        parameters = member.vectors.parameters()
        limit = args.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        log = member.metrics
        if "engine/mean" in batch.totals:
            apart = batch.totals["engine/mean"] / max(batch.totals["engine/tokens"], 1)
            log["engine/mean"] = [apart]
            if isfinite(norm) or not isnan(apart):  # else the member has diverged, which ends it alone
                check_mismatch(apart, member.step + 1, args, member.name)
        rate = member.scheduler.get_last_lr()[0]
        before = member.vectors.tensors()
        if isfinite(norm):
            member.watch.on_step_begin()
            member.watch.on_pre_optimizer_step()
            member.optimizer.step()
            member.watch.on_optimizer_step()
            member.scheduler.step()
        if not isfinite(norm) or not all(bool(p.isfinite().all()) for p in parameters):
            member.vectors.set_tensors(before)
            what = "vectors" if isfinite(norm) else "gradient"
            member.stopped = f"diverged: the {what} of update {member.step + 1} would not be finite"
        member.optimizer.zero_grad()
        member.step += 1
        totals = batch.totals
        for name in ("entropy", "kl", "engine/limited_tokens", "engine/limited_sequences"):
            if name in totals:
                of = totals["rows" if name.endswith("sequences") else "tokens"]
                log[name] = [totals[name] / max(of, 1)]
        known = {name: sum(values) / len(values) for name, values in log.items()}
        numbers = {"loss": totals["loss"], "grad_norm": norm, "learning_rate": rate, **known}
        member.log.append(
            {"step": member.step, **{k: v if isfinite(v) else None for k, v in numbers.items()}}
        )

    # ---- state

    def save(self) -> None:
        """Write the state of all members at once: the file is one whole round of the population."""
        assert self.state_file is not None
        for member in self.members:
            member.watch.on_save()
        buffer = io.BytesIO()
        torch.save({**self.others, **{member.name: member.state() for member in self.members}}, buffer)
        try:
            replace_file(self.state_file, buffer.getvalue())
        except OSError as error:
            raise SteerError(
                f"cannot write {self.state_file}: {error.strerror}; make room and start again, the run goes "
                "on from the state before"
            ) from error

    def load(self, states: dict[str, dict[str, Any]]) -> None:
        """Put members where they were; those that `states` does not have begin."""
        for member in self.members:
            if member.name in states:
                member.restore(states[member.name])
        own, names = self.state_file and self.state_file.name, self._number
        self.others = {n: s for n, s in states.items() if n not in names and s["file"] == own}


def _grouped(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """`flat` cut into runs of `counts`."""
    left = iter(flat)
    return [[next(left) for _ in range(count)] for count in counts]


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _fit(row: torch.Tensor, length: int) -> torch.Tensor:
    """`row` cut or filled with zeros to `length`."""
    return torch.nn.functional.pad(row, (0, max(0, length - len(row))))[:length]

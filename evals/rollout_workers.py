"""
One sampler in a process of its own: `python -m evals.rollout_workers VARIANT FOLDER INPUTS` answers requests,
one a line of JSON, until its input ends. See `evals.rollouts`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from steer.generation.completion import Completion

VARIANTS = ("torch", "vllm", "vllm-eager", "vllm-int8", "vllm-int8-eager")
# Of vLLM on a CPU, where the user has not set them. The engine is in this process, whose CPU time is counted.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


class Sampler(Protocol):
    def sample(self, prompts: list[list[int]], tokens: int, seed: int, stop: list[int]) -> list[Completion]:
        """
        One completion of each prompt at temperature 1, of `tokens` tokens or up to one of `stop`. vLLM has no
        `seed` of a call, and draws by its engine's own.
        """


class TorchSampler:
    """steer's own sampler, with the model that a trainer has."""

    def __init__(self, folder: Path, dtype: str, vectors: dict[int, torch.Tensor]):
        import steer
        from steer.artifact import from_vectors
        from steer.generation import cpu
        from steer.models import load_model

        self.model = load_model(str(folder), dtype=dtype)
        steer.load(from_vectors(vectors, self.model), self.model)
        cpu.prepare()

    def sample(self, prompts: list[list[int]], tokens: int, seed: int, stop: list[int]) -> list[Completion]:
        from steer.generation.sampler import Sampling, rollout, uniforms

        noise = uniforms(range(len(prompts)), tokens, seed, 0)
        return rollout(self.model, prompts, Sampling(tokens, tuple(stop)), noise)

    @torch.no_grad()
    def log_probs(self, prompt: list[int], completion: list[int]) -> torch.Tensor:
        """(tokens,) of the completion."""
        from steer.generation.verify import fast_attention

        ids = torch.tensor([prompt + completion])
        with fast_attention(self.model):
            logits = self.model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0, :-1]
        chosen = ids[0, len(prompt) :, None]
        return logits.float().log_softmax(-1).gather(1, chosen)[:, 0]


class VllmSampler:
    """vLLM with the vectors pushed into it."""

    def __init__(self, folder: Path, dtype: str, vectors: dict[int, torch.Tensor], eager: bool, length: int):
        from vllm import LLM

        from steer import engine

        self.llm: Any = LLM(
            str(folder),
            dtype=dtype,
            enforce_eager=eager,
            skip_tokenizer_init=True,
            max_model_len=length,
            logprobs_mode="processed_logprobs",
        )
        engine.push(self.llm, vectors)

    def sample(self, prompts: list[list[int]], tokens: int, seed: int, stop: list[int]) -> list[Completion]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=1.0,
            max_tokens=tokens,
            ignore_eos=not stop,
            stop_token_ids=stop,
            logprobs=0,
            detokenize=False,
        )
        asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = [output.outputs[0] for output in self.llm.generate(asked, params, use_tqdm=False)]
        return [
            Completion(
                list(output.token_ids),
                output.finish_reason != "length",
                [
                    at[token].logprob
                    for token, at in zip(output.token_ids, output.logprobs or [], strict=True)
                ],
            )
            for output in outputs
        ]


def cpu_seconds() -> float:
    """Processor time of this process and of the compilers that it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def resident() -> float:
    """GB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def answer(sampler: Any, inputs: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """
    `{"tokens", "seed"}` samples and answers with `cpu` and `wall` seconds; with `"save"` it samples every
    other row, up to a stop token, and keeps the samples; `{"score"}` answers with the differences to them.
    """
    if "score" in asked:
        kept = torch.load(asked["score"], weights_only=True)
        rows = zip(kept["prompts"], kept["ids"], kept["logps"], strict=True)
        return {
            "differences": [
                (sampler.log_probs(prompt, ids) - torch.tensor(logps)).tolist() for prompt, ids, logps in rows
            ]
        }
    prompts, stop = inputs["prompts"], []
    if "save" in asked:
        prompts, stop = prompts[::2], inputs["stop"]
    cpu, wall = cpu_seconds(), time.perf_counter()
    made = sampler.sample(prompts, asked["tokens"], asked["seed"], stop)
    spent = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
    if "save" in asked:
        drawn = {"prompts": prompts, "ids": [one.ids for one in made], "logps": [one.logps for one in made]}
        torch.save(drawn, asked["save"])
    else:
        assert all(len(one.ids) == asked["tokens"] for one in made), "a row ended early"
    return spent | {"tokens": sum(len(one.ids) for one in made), "resident GB": resident()}


def main() -> None:
    # What libraries print goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    variant, folder = sys.argv[1], Path(sys.argv[2])
    inputs = torch.load(sys.argv[3], weights_only=True)
    vectors, dtype = inputs["vectors"], inputs["dtype"]
    sampler: Sampler
    if variant == "torch":
        sampler = TorchSampler(folder, dtype, vectors)
    else:
        sampler = VllmSampler(folder, dtype, vectors, variant.endswith("-eager"), inputs["length"])
    sampler.sample(inputs["prompts"][:2], 4, 0, [])
    told = {"start cpu": cpu_seconds(), "resident GB": resident(), "threads": torch.get_num_threads()}
    print(json.dumps(told), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(sampler, inputs, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

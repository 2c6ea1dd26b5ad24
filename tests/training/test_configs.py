"""The YAML files under `recipes`: each parses, has its paper's numbers, and fits the launcher it names."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from helpers.launching import run_folder, run_here
from helpers.paths import ROOT
from trl import GRPOConfig

from steer import artifact
from steer.cli import train
from steer.models import fast_dtype
from steer.tasks.prompts import TEMPLATES
from steer.tasks.reward_loading import reward_names
from steer.tasks.rewards import REWARDS
from steer.tasks.tools import TOOLS
from steer.training.arguments import PopulationArguments
from steer.training.run_settings import RunSettings
from steer.training.sweep.grid import members
from steer.training.sweep.member import check_supported
from steer.weights import BUNDLED

RECIPES = ROOT / "recipes"
OTHERS = ("sae-", "compare-", "gate-", "layer-sweep-", "seeds-")  # of other recipes, with tests of their own
CONFIGS = sorted(p for p in (RECIPES / "configs").glob("*.yaml") if not p.name.startswith(OTHERS))
LAUNCHERS = sorted((RECIPES / "accelerate").glob("*.yaml"))
SOURCES = {"arithmetic", "gsm8k", "math", "deepscaler", "math500", "none", "runs/demo"}


class Run(NamedTuple):
    model: str
    rate: float
    samples: int
    prompts: int  # of one update, on all devices
    tokens: int  # published length, prompt included
    steps: int = 314  # 0 where the length of the run is given in epochs
    epochs: float = 3.0  # transformers' own default where steps decide
    advantage: str = "loo"
    beta: float = 0.0


def precursor(model: str, rate: float, samples: int, epochs: int) -> Run:
    return Run(model, rate, samples, 16, 1024, 0, epochs, "group", 0.01)


# arXiv 2509.06608 and 2505.18706, and the settings files of their authors
PUBLISHED = {
    "deepscaler-qwen2.5-math-7b": Run("Qwen/Qwen2.5-Math-7B", 1e-3, 16, 128, 4096),
    "deepscaler-qwen2.5-math-7b-single-layer": Run("Qwen/Qwen2.5-Math-7B", 3e-3, 16, 128, 4096),
    "deepscaler-llama-3.1-8b-instruct": Run("meta-llama/Llama-3.1-8B-Instruct", 8e-5, 16, 128, 8192),
    "deepscaler-llama-3.1-8b-instruct-single-layer": Run(
        "meta-llama/Llama-3.1-8B-Instruct", 5e-4, 16, 128, 8192
    ),
    "deepscaler-llama-3.1-8b": Run("meta-llama/Llama-3.1-8B", 3e-4, 64, 128, 8192),
    "deepscaler-qwen2.5-1.5b": Run("Qwen/Qwen2.5-1.5B", 1e-3, 64, 128, 8192),
    "deepscaler-qwen2.5-7b": Run("Qwen/Qwen2.5-7B", 1e-3, 16, 128, 8192),
    "deepscaler-qwen2.5-14b": Run("Qwen/Qwen2.5-14B", 5e-4, 16, 128, 8192),
    "deepscaler-olmo2-7b-sft": Run("allenai/OLMo-2-1124-7B-SFT", 5e-5, 16, 128, 4096),
    "gsm8k-qwen2.5-1.5b": precursor("Qwen/Qwen2.5-1.5B", 5e-4, 64, 3),
    "gsm8k-qwen2.5-math-1.5b": precursor("Qwen/Qwen2.5-Math-1.5B", 2e-3, 16, 3),
    "gsm8k-llama-3.1-8b": precursor("meta-llama/Llama-3.1-8B", 5e-4, 64, 2),
    "gsm8k-llama-3.1-8b-instruct": precursor("meta-llama/Llama-3.1-8B-Instruct", 3e-4, 16, 3),
    "math-qwen2.5-1.5b": precursor("Qwen/Qwen2.5-1.5B", 5e-4, 64, 3),
    "math-qwen2.5-math-1.5b": precursor("Qwen/Qwen2.5-Math-1.5B", 1e-3, 16, 3),
    "math-llama-3.1-8b": precursor("meta-llama/Llama-3.1-8B", 5e-4, 64, 2),
    "math-llama-3.1-8b-instruct": precursor("meta-llama/Llama-3.1-8B-Instruct", 1e-4, 16, 3),
}
OURS = {"demo", "demo-sft", "demo-dpo", "gsm8k-qwen2.5-coder-1.5b", "calculator"}
# other objectives: what is theirs, and a number that their updates log
PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0, "scale_rewards": "batch"}, "cispo_clip_ratio"),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
            "scale_rewards": "group",
        },
        "clip_ratio/region_mean",
    ),
    "dapo": (
        {
            "loss_type": "dapo",
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "mask_truncated_completions": True,
            "scale_rewards": "group",
        },
        "clip_ratio/high_mean",
    ),
}

# layers (first, last) -> rate, as published
SINGLE_LAYER = {
    "deepscaler-qwen2.5-math-7b-single-layer": [
        (0, 0, 3e-3), (1, 1, 7e-3), (2, 2, 5e-3), (3, 7, 7e-3), (8, 17, 1e-2), (18, 18, 3e-2), (19, 20, 5e-2),
        (21, 22, 1e-1), (23, 24, 1e-2), (25, 27, 1e-1),
    ],
    "deepscaler-llama-3.1-8b-instruct-single-layer": [
        (0, 3, 5e-4), (4, 7, 7e-4), (8, 10, 1e-3), (11, 11, 2e-3), (12, 12, 1e-3), (13, 13, 2e-3),
        (14, 14, 1e-3), (15, 24, 2e-3), (25, 28, 5e-3), (29, 30, 7e-3), (31, 31, 5e-3),
    ],
}  # fmt: skip


@pytest.fixture
def parse(tmp_path):
    """The settings that the recipe's own command line makes of a config file, on the CPU."""

    def settings(config: Path, *overrides: str):
        where = ["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu", "true"]
        found = train.parse([*where, *overrides])
        return found.run, found.steering, found.training

    yield settings
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # on a machine with a GPU, later tests must not inherit use_cpu


def header(config: Path) -> str:
    return "".join(line[1:] for line in config.read_text().splitlines(True) if line.startswith("#"))


def launcher(config: Path) -> Path:
    """The launcher file that a config's header names."""
    found = re.findall(r"--config_file (\S+)", header(config))
    assert found and len(set(found)) == 1
    return RECIPES.parent / found[0]


def named(path: Path) -> str:
    return path.stem


def test_every_config_is_accounted_for():
    assert {c.stem for c in CONFIGS} == {*PUBLISHED, *OURS, *PRESETS}


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_config_parses_and_names_things_that_exist(config, parse):
    run, steering, training = parse(config)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", run.model) or run.model in BUNDLED
    wanted = yaml.safe_load(config.read_text())["model_dtype"]
    assert wanted in ("bfloat16", "fast")
    assert run.model_dtype == (fast_dtype() if wanted == "fast" else wanted)
    assert run.template in TEMPLATES
    assert set(reward_names(run.rewards)) <= set(REWARDS)
    assert set(run.tools) <= set(TOOLS) and not (run.tools and run.examples)
    assert {run.train_data, run.eval_data or "none", *run.exclude} <= SOURCES
    assert steering.dtype == "float32"
    assert not training.bf16  # the base has its precision already; autocast would only add casts
    assert yaml.safe_load(config.read_text())["output_dir"] == f"runs/{config.stem}"


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_numbers_are_numbers(config):
    values = chain.from_iterable(
        value if isinstance(value, list) else [value] for value in yaml.safe_load(config.read_text()).values()
    )
    text = [value for value in values if isinstance(value, str)]
    assert not [value for value in text if re.fullmatch(r"[\d.]+e[+-]?\d+", value)]  # YAML reads 1e-3 as text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name, parse):
    config, expected = RECIPES / "configs" / f"{name}.yaml", PUBLISHED[name]
    run, steering, training = parse(config)
    devices = load_config_from_file(str(launcher(config))).num_processes
    per_device = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert run.model == expected.model
    assert run.rewards == ["correct"]
    assert training.learning_rate == pytest.approx(expected.rate)
    assert training.num_generations == expected.samples
    assert per_device * devices == expected.prompts * expected.samples
    assert max(training.max_steps, 0) == expected.steps
    assert training.num_train_epochs == expected.epochs
    assert (training.advantage, training.beta) == (expected.advantage, expected.beta)
    assert training.use_bias_correction_kl == (expected.beta == 0)  # where there is a KL term, it is plain k3
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.999, 0.0)
    assert training.importance_sampling_level == "token" and not training.mask_truncated_completions
    assert (training.scale_rewards, training.loss_type, training.num_iterations) == ("none", "dapo", 1)
    assert (training.epsilon, training.temperature, training.top_p) == (0.2, 1.0, 1.0)
    assert (training.max_grad_norm, training.warmup_steps) == (2.0, 0.03)
    assert training.lr_scheduler_type == "constant_with_warmup"
    # the rest of the published length is left to the prompt, at about four characters a token
    prompt = expected.tokens - training.max_completion_length
    assert 0 < prompt <= 512
    assert run.max_problem_chars <= 4 * prompt
    assert ("math500" in run.exclude) == (run.train_data != "gsm8k")
    assert steering.layers == ("0" if name in SINGLE_LAYER else "all")


@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.stem.startswith("demo")], ids=named)
def test_header_gives_the_command_and_the_devices(config):
    devices = re.search(r"^ On (one|\d+) GPUs?", header(config), re.M)
    assert devices
    assert int(devices[1].replace("one", "1")) == load_config_from_file(str(launcher(config))).num_processes
    assert f"--config recipes/configs/{config.name}" in header(config)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_their_source_and_settings_of_trl(name, parse):
    config, (expected, _) = RECIPES / "configs" / f"{name}.yaml", PRESETS[name]
    training = parse(config)[2]
    assert re.search(r"Source: arXiv \d{4}\.\d{5}", header(config))
    assert {key: getattr(training, key) for key in expected} == expected
    assert expected.keys() <= {f.name for f in fields(GRPOConfig)}
    assert (training.beta, training.advantage) == (0, "group")
    assert training.steps_per_generation == 4 * training.gradient_accumulation_steps
    assert training.generation_batch_size == 64 * training.num_generations


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train(name, tmp_path, build_tiny, tiny_tokenizer):
    """One generation of a tiny model and its four updates; the later ones are off-policy, and clip."""
    base = run_folder(tmp_path, build_tiny, tiny_tokenizer, 1)
    small = {
        "model": base / "model", "model_dtype": "float32", "train_data": base / "train.jsonl",
        "eval_data": "none", "max_completion_length": 6, "num_generations": 4, "learning_rate": 0.3,
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "steps_per_generation": 4,
        "rewards": "random", "reward_weights": 1.0, "mask_truncated_completions": "false",
        "max_steps": 4, "save_steps": 4, "use_cpu": "true", "output_dir": tmp_path / "run", "warmup_steps": 0,
    }  # fmt: skip
    words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    run_here(RECIPES / "grpo_steer.py", "--config", str(RECIPES / "configs" / f"{name}.yaml"), *words)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    values = [row[PRESETS[name][1]] for row in state["log_history"] if PRESETS[name][1] in row]
    assert len(values) == 4
    assert values[0] == 0, "the samples are the policy's own"
    if name == "gspo":
        assert max(values) > 0
    norms = artifact.read(tmp_path / "run" / "vectors").by_layer()
    assert all(0 < vector.norm() < 1e3 for vector in norms.values())


@pytest.mark.parametrize("name", SINGLE_LAYER)
def test_single_layer_configs_hold_the_published_rates(name, parse):
    expected = {i: rate for first, last, rate in SINGLE_LAYER[name] for i in range(first, last + 1)}
    _, _, training = parse(RECIPES / "configs" / f"{name}.yaml")[:3]
    assert training.layer_rates(list(expected), len(expected)) == pytest.approx(expected)


@pytest.mark.parametrize("name", SINGLE_LAYER)
def test_single_layer_configs_are_populations_of_the_published_batch(name):
    config = RECIPES / "configs" / f"{name}.yaml"
    (given,) = re.findall(r"layer_sweep.py .*?(?=\n [A-Z])", header(config), re.S)
    arguments = given.replace("\\\n", " ").split()[1:]
    arguments += ["--use_cpu", "true"]
    settings = RunSettings.parse("layer_sweep", arguments=arguments, population=PopulationArguments)
    expected = {i: rate for first, last, rate in SINGLE_LAYER[name] for i in range(first, last + 1)}
    found = members(settings, len(expected), arguments)
    assert [m.steering.layers for m in found] == [str(layer) for layer in expected]
    assert [m.training.learning_rate for m in found] == pytest.approx(list(expected.values()))
    assert {m.training.generation_batch_size for m in found} == {PUBLISHED[name].prompts * 16}
    for member in found:
        check_supported(member.training)


@pytest.mark.parametrize("path", LAUNCHERS, ids=named)
def test_launcher_config_is_one_of_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # anything else would round the vectors
    assert config.num_processes >= config.num_machines >= 1
    flags = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(flags)


def test_launcher_kinds():
    have = {p.stem: load_config_from_file(str(p)) for p in LAUNCHERS}
    kinds = {name: (c.distributed_type.value, c.num_processes, c.num_machines) for name, c in have.items()}
    assert kinds == {
        "cpu": ("NO", 1, 1),
        "cpu-2": ("MULTI_GPU", 2, 1),
        "gpu": ("NO", 1, 1),
        "ddp": ("MULTI_GPU", 8, 1),
        "multi-node": ("MULTI_GPU", 16, 2),
        "fsdp2": ("FSDP", 8, 1),
        "multi-node-fsdp2": ("FSDP", 16, 2),
        "deepspeed-zero2": ("DEEPSPEED", 8, 1),
        "deepspeed-zero3": ("DEEPSPEED", 8, 1),
    }
    assert {name for name, c in have.items() if c.use_cpu} == {"cpu", "cpu-2"}
    assert have["fsdp2"].fsdp_config["fsdp_version"] == 2
    for stage in (2, 3):
        assert have[f"deepspeed-zero{stage}"].deepspeed_config["zero_stage"] == stage
    for name in ("multi-node", "multi-node-fsdp2"):
        assert have[name].main_process_ip is None  # comes from the command line


CLUSTER = RECIPES / "accelerate" / "cluster"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=named)
def test_cluster_scripts_are_bash_and_name_files_that_exist(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    found = set(re.findall(r"recipes/[\w./-]+", text)) - {"recipes/configs/NAME.yaml", "recipes/configs."}
    assert found
    for name in found:
        assert (RECIPES.parent / name).exists(), name


def test_the_kubernetes_job_is_the_published_run():
    documents = {d["kind"]: d for d in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())}
    job = documents["Job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    words = container["args"][0].replace('"$JOB_COMPLETION_INDEX"', "1").split()
    assert words[:2] == ["accelerate", "launch"]
    launch = launch_command_parser().parse_args(words[2:])
    assert launch.num_machines == job["completions"] == job["parallelism"]
    assert launch.num_processes == launch.num_machines * container["resources"]["limits"]["nvidia.com/gpu"]
    assert launch.training_script == "recipes/grpo_steer.py"
    arguments = [*launch.training_script_args, "--use_cpu", "true"]
    settings = RunSettings.parse("grpo_steer", arguments=arguments)
    run, training = settings.run, settings.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert rows * launch.num_processes == 128 * 16
    served = {d["kind"]: d for d in yaml.safe_load_all((CLUSTER / "vllm.yaml").read_text())}["Deployment"]
    (server,) = served["spec"]["template"]["spec"]["containers"]
    assert server["command"] == ["vllm", "serve", run.model]
    assert {"name": "VLLM_SERVER_DEV_MODE", "value": "1"} in server["env"]

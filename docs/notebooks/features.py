# %% [markdown]
# # SAE features of the change
#
# What do vectors change, in parts? A sparse autoencoder trained on the *differences* that the vectors make
# in the residual stream (a DiffSAE) splits the change into features. This script trains a very small one on
# a few completions. `python -m evals.sae diff` does it at full size.

# %%
from steer.threads import prepare_environment

prepare_environment()  # before torch is imported

from pathlib import Path

import steer
from steer.generation.sampler import Sampling, rollout, uniforms
from steer.models import load_model, load_tokenizer
from steer.sae import SAEConfig
from steer.sae.activations import Reader
from steer.sae.cache import HeldActivations
from steer.sae.evaluate import quality
from steer.sae.features import GradedCompletion, analyse, read_completions
from steer.sae.intervene import answer_without
from steer.sae.schedule import TrainConfig
from steer.sae.trainer import SAETrainer
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.grading import extract_boxed
from steer.tasks.prompts import format_prompt

name = "smollm2-135m-instruct"
model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
vectors = steer.load(Path(steer.__file__).parents[1] / "evals/results/demo/vectors", model)

# %% [markdown]
# ## Completions, right and wrong
#
# Eight answers of the steered model to each of 12 problems, at a high temperature so that some are wrong.

# %%
problems = Arithmetic("+*", digits=1, problems=12, heldout=0.4).generate("heldout")
texts = [format_prompt(p["problem"], tokenizer, vectors.config.prompt) for p in problems]
questions = tokenizer(texts, add_special_tokens=False)["input_ids"]
asked = [(ids, p["answer"]) for ids, p in zip(questions, problems) for _ in range(8)]
sampling = Sampling(16, (tokenizer.eos_token_id,), temperature=1.3)
noise = uniforms(range(len(asked)), sampling.max_new_tokens, seed=0, step=0)
ids = [completion.ids for completion in rollout(model, [prompt for prompt, _ in asked], sampling, noise)]


def right(written, answer):
    """Whether the box holds the answer, or works it out: `5 * 9 = 45`."""
    box = extract_boxed(tokenizer.decode(written, skip_special_tokens=True)) or ""
    return box.split("=")[-1].strip() == answer


completions = [
    GradedCompletion(list(prompt), list(written), right(written, answer))
    for (prompt, answer), written in zip(asked, ids)
]
print(f"{len(completions)} completions, {sum(c.correct for c in completions)} right")

# %% [markdown]
# ## A DiffSAE
#
# `Reader` reads the residual stream after layer 20, steered minus base, at every generated token.

# %%
reader = Reader(model, layer=20, what="difference")
differences = read_completions(reader, completions)
config = SAEConfig(d_in=differences.shape[1], d_sae=64, k=4)
epochs, batch = 30, 128
training = TrainConfig(
    tokens=len(differences) // batch * batch * epochs, batch_size=batch, dead_after=len(differences), lr=2e-3
)
stream = HeldActivations(differences, reader.describe(), epochs=epochs)
sae = SAETrainer({"diff": config}, stream, training).train()["diff"]
found = quality(sae, [differences])
print(f"{len(differences)} differences; 4 of 64 features explain {found.explained[4]:.0%} of their variance")

# %% [markdown]
# ## Which features go with right answers
#
# For each feature: in how many right and wrong completions it fires, and which tokens its direction
# promotes. `q` is the p-value of a test within prompts, corrected for the number of features.

# %%
features = analyse(sae, reader, tokenizer, completions, rows=differences)
for feature in features[:5]:
    print(
        f"feature {feature.index:2}  in {feature.right:.0%} of right, {feature.wrong:.0%} of wrong answers, "
        f"q = {feature.q:.2g}, promotes {feature.promotes[:3]}"
    )

# %% [markdown]
# ## Take features away
#
# Ablate one feature, or all of them, while the steered model answers greedily.

# %%
golds = [p["answer"] for p in problems]


def accuracy(without):
    written = answer_without(sae, reader, without, questions, sampling.max_new_tokens, sampling.eos_token_ids)
    return sum(map(right, written, golds)) / len(golds)


steered, one, none = accuracy([]), accuracy([features[0].index]), accuracy(range(64))
print(
    f"steered {steered:.2f}, without feature {features[0].index} {one:.2f}, without all features {none:.2f}"
)
assert none < steered

# %% [markdown]
# A feature that fires in right answers need not cause them. At full size ([results](../results.md), "What
# vectors change") no single feature made a difference, and all of them together did.

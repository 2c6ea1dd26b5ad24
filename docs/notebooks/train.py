# %% [markdown]
# # Train and use a vector
#
# One vector in one layer of SmolLM2-135M-Instruct, trained by reinforcement learning for a few updates with
# a reward of our own. It takes under a minute on two CPU cores. Real runs are longer and use the command
# line; the steps are the same.

# %%
from steer.threads import prepare_environment

prepare_environment()  # before torch is imported

from datasets import Dataset

import steer
from steer.models import load_model, load_tokenizer
from steer.tasks.prompts import format_prompt
from steer.training import SteeringGRPOConfig, SteeringGRPOTrainer

name = "smollm2-135m-instruct"
model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)

# %% [markdown]
# ## Problems and prompts
#
# A data set with a column `prompt`, which the model reads, and any columns that the reward needs.
# A `PromptSpec` says how a problem is put, here in the model's chat template.

# %%
prompt = steer.PromptSpec(template="boxed_short")
numbers = range(2, 10)
sums = [{"problem": f"What is {a} + {b}?", "answer": str(a + b)} for a in numbers for b in numbers]
data = Dataset.from_list(
    [{**row, "prompt": format_prompt(row["problem"], tokenizer, prompt)} for row in sums]
)
print(data[0]["prompt"])

# %% [markdown]
# ## A reward
#
# Any function in trl's form: it gets the completions and the columns of the data set, and returns a number
# for each. This one looks at the form alone: the answer should begin with a box.

# %%


def begins_with_box(completions, **columns):
    opening = r"$\boxed{"
    return [sum(text.startswith(opening[:n]) for n in (1, 3, len(opening))) / 3 for text in completions]


# %% [markdown]
# ## Train
#
# `SteeringGRPOTrainer` attaches the vector and freezes everything else.

# %%
args = SteeringGRPOConfig(
    "runs/notebook",
    max_steps=5,
    learning_rate=0.4,  # of a single vector; all layers together need less
    num_generations=8,
    per_device_train_batch_size=24,
    max_completion_length=8,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = SteeringGRPOTrainer(
    model,
    begins_with_box,
    args,
    steer.SteeringConfig(layers=8, prompt=prompt),  # the artifact keeps the prompt
    train_dataset=data,
    processing_class=tokenizer,
)
vectors = trainer.vectors
print(vectors)
trainer.train()
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print("reward by update:", *(f"{reward:.2f}" for reward in rewards))

# %% [markdown]
# ## Use
#
# With the vector, without it, and at half its strength:

# %%
inputs = tokenizer(data[0]["prompt"], add_special_tokens=False, return_tensors="pt")


def answer():
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


steered = answer()
with vectors.disabled():
    base = answer()
vectors.scale = 0.5
half = answer()
vectors.scale = 1.0
for label, text in (("steered", steered), ("base", base), ("half", half)):
    print(f"{label:8} {text!r}")

# %% [markdown]
# ## Save, take out, load again

# %%
folder = vectors.save("runs/notebook/vectors")
print(*sorted(file.name for file in folder.iterdir()))
steer.detach(model)
assert answer() == base
steer.load(folder, model)
assert answer() == steered
assert rewards[-1] > rewards[0]

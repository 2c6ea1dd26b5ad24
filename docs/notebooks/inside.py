# %% [markdown]
# # Look inside a vector
#
# The vectors of the demo (30 layers of SmolLM2-135M-Instruct, trained to answer one-digit sums and products
# in a box) come with the repository. Which tokens do they promote, and when do they act? `steer lens
# report` answers more, with controls; this script shows the Python functions below it.

# %%
from steer.threads import prepare_environment

prepare_environment()  # before torch is imported

from pathlib import Path

import steer
from steer.lens.conditions import BASE, Condition
from steer.lens.logit_lens import logit_lens
from steer.lens.sampling import complete
from steer.lens.subject import Subject
from steer.lens.token_shift import token_shift
from steer.models import load_model, load_tokenizer
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.grading import extract_boxed

name = "smollm2-135m-instruct"
model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
vectors = steer.load(Path(steer.__file__).parents[1] / "evals/results/demo/vectors", model)
norms = vectors.norms()
print(f"{len(norms)} vectors, {min(norms.values()):.2f} to {max(norms.values()):.2f} long")

# %% [markdown]
# ## Which tokens a vector promotes by itself
#
# The logit lens multiplies each vector with the model's unembedding.

# %%
lens = logit_lens(model, tokenizer, vectors.added(), top=5)
for layer in (0, 15, 26, 28, 29):
    print(f"layer {layer:2}  promotes {lens.top_tokens[layer]}")

# %% [markdown]
# The last layers promote the opening of `$\boxed{answer}$`, which is how answers should be written. The
# vectors of early layers name no such token: what they do passes through the layers above.
#
# ## When the vectors act
#
# A `Subject` is a model with its vectors and the prompt that they were trained with. The steered model
# answers a few held-out problems; along these answers, the next-token distributions with and without the
# vectors are compared.

# %%
subject = Subject(vectors, tokenizer, vectors.config.prompt, max_new_tokens=16)
problems = Arithmetic("+*", digits=1, problems=8, heldout=0.4).generate("heldout")
steered = Condition(frozenset(subject.layers))
base_rows, rows = complete(subject, subject.rows(problems), [BASE, steered])
for label, row in (("base", base_rows[0]), ("steered", rows[0])):
    print(f"{label:8} {subject.answers([row])[0]!r}")

shift = token_shift(subject, rows)
print("first token gains:", [(token, round(change, 2)) for token, _, change in shift.top[:3]])
print("first token loses:", [(token, round(change, 2)) for token, _, change in shift.bottom[:3]])
print(f"share of the whole change on the first token: {shift.first_share:.2f}")

# %% [markdown]
# ## Is the first token enough?
#
# Force the opening of the box on the base model, without any vector, and count the right answers.

# %%


def accuracy(rows):
    """Share of right answers; an answer may be worked out in its box: `5 * 9 = 45`."""
    boxes = [extract_boxed(text) or "" for text in subject.answers(rows)]
    return sum(box.split("=")[-1].strip() == p["answer"] for box, p in zip(boxes, problems)) / len(problems)


(forced_rows,) = complete(subject, subject.rows(problems, forced=r"$\boxed{"), [BASE])
print(f"base {accuracy(base_rows):.2f}, steered {accuracy(rows):.2f}")
print(f"base with the opening forced {accuracy(forced_rows):.2f}: {subject.answers(forced_rows[:1])[0]!r}")
assert accuracy(rows) > accuracy(forced_rows)

# %% [markdown]
# It is not: most of the effect comes after the opening. On eight problems the numbers are rough. `steer
# lens report` uses more problems and compares with random vectors, shuffled layers and mean differences.

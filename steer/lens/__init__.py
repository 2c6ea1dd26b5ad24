"""
What trained vectors do to a model: the mechanistic half of "Small Vectors, Big Effects" (arXiv 2509.06608).

A `subject.Subject` is a model with vectors in it, its tokenizer and the prompt format. Each
analysis is a function of a subject that returns plain data with `to_dict()` and `plot(path)`:

- `logit_lens`: which tokens a vector promotes and suppresses by itself; `scripts` counts writing systems
- `jacobian`: the same through the average derivative of the layers above
- `token_shift`: whose probability changes, and where; what a forced opening gives without any vector
- `patching`: through which attention, MLP, head or residual path the effect reaches the output
- `decomposition`: the change of the last stream as a sum over components
- `persistence`: whether the change survives the layers above; `directions`: the vectors themselves
- `spectrum`: singular values and stable rank of the set; `entropy`: at certain or uncertain tokens
- `downstream`: which tokens a vector promotes by way of all later layers
- `conventions`: the logit lens and Diff-Diff as the published code has them
- `composition`: pairs, leave-one-out, scales; `pair_correlation`: what goes with a good pair
- `transfer_matrix`: several models
- `scale_maps`: how much of an adaptive vector each token of a text gets
- `controls`: random, shuffled and mean-difference vectors, for whatever is claimed; `random_sets`: many

All of them run base and steered conditions as conditions of one batch (`conditions`, `passes`, `sampling`)
with exact hooks on the unmodified model. `report` does everything and writes one page.
"""

from steer.extras import require

require("steer.lens", "lens")

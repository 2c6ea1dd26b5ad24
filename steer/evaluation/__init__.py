"""Benchmarks: ask a model and its variants the same problems, grade, store, score and compare."""

from steer.extras import require

require("evaluation", "train")

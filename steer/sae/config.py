"""
`SAEConfig`: the shape of a sparse autoencoder and what it is trained for, and what that costs in parameters
and FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite, nan
from typing import Any

from steer.errors import SteerError

ENCODERS = {
    "dense": "one row of weights per feature",
    "kron": "heads of m + n rows; feature (i, j) of a head is sqrt(p_i q_j) (KronSAE, arXiv 2505.22255)",
}
ACTIVATIONS = {
    "topk": "the k largest features of each token (arXiv 2406.04093)",
    "batchtopk": "the k x tokens largest of a batch; a fixed threshold after training (arXiv 2412.06410)",
    "jumprelu": "every feature above a learned threshold of its own (arXiv 2407.14435)",
}
LOSSES = {
    "reconstruction": "the squared error with all active features",
    "hierarchical": "the mean squared error over prefixes of the active features, strongest first "
    "(HierarchicalTopK, arXiv 2505.24473)",
    "matryoshka": "the sum of the squared errors of nested dictionaries, the first features of the "
    "dictionary alone (arXiv 2503.17547)",
}
INTERACTIONS = {
    "mand": "sqrt(p q) where both are positive, else 0",
    "relu_product": "relu(p) relu(q)",
    "product": "p q where that is positive, so two negative factors make a feature too",
}
# Shares of the dictionary at which Matryoshka's prefixes end, as in its authors' code.
MATRYOSHKA = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
BIASES = {
    "tied": "the decoder's bias is taken off before encoding",
    "free": "the encoder reads the input as it is",
}


@dataclass
class SAEConfig:
    """
    One sparse autoencoder: x_hat = W_dec^T f(x) + b_dec with f sparse and the rows of W_dec of unit norm.
    """

    d_in: int = field(metadata={"help": "Width of the activations."})
    d_sae: int = field(metadata={"help": "Number of features, the dictionary's size."})
    k: int = field(default=50, metadata={"help": "Active features per token; for jumprelu, the target."})
    encoder: str = field(
        default="dense", metadata={"help": "; ".join(f"{k} = {v}" for k, v in ENCODERS.items()) + "."}
    )
    heads: int | None = field(
        default=None, metadata={"help": "kron: number of heads h; d_sae = heads * m * n. Filled in."}
    )
    m: int = field(default=2, metadata={"help": "kron: first factor of a head, m <= n << d_in."})
    n: int = field(default=4, metadata={"help": "kron: second factor of a head."})
    interaction: str = field(
        default="mand",
        metadata={
            "help": "kron: a feature of its p and q. "
            + "; ".join(f"{k} = {v}" for k, v in INTERACTIONS.items())
            + "."
        },
    )
    activation: str = field(
        default="topk", metadata={"help": "; ".join(f"{k} = {v}" for k, v in ACTIVATIONS.items()) + "."}
    )
    loss: str = field(
        default="reconstruction", metadata={"help": "; ".join(f"{k} = {v}" for k, v in LOSSES.items()) + "."}
    )
    prefixes: list[int] | None = field(
        default=None,
        metadata={
            "help": "hierarchical: lengths of the prefixes of the active features; default: 1, 2, ..., k. "
            "matryoshka: sizes of the nested dictionaries, the last one d_sae; default: 1/32, 3/32, 7/32, "
            "15/32 "
            "and all of d_sae."
        },
    )
    bias: str = field(
        default="tied", metadata={"help": "; ".join(f"{k} = {v}" for k, v in BIASES.items()) + "."}
    )
    source: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Where the activations come from: model, layer, site, data. Filled in."},
    )

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k", "m", "n"):
            check_count(name, getattr(self, name))
        for name, known in (
            ("encoder", ENCODERS),
            ("activation", ACTIVATIONS),
            ("loss", LOSSES),
            ("bias", BIASES),
            ("interaction", INTERACTIONS),
        ):
            if getattr(self, name) not in known:
                raise SteerError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}"
                )
        if self.k > self.d_sae:
            raise SteerError(
                f"k={self.k} is more than the dictionary's d_sae={self.d_sae}; choose a smaller k"
            )
        if self.encoder == "kron":
            self._check_kron()
        elif self.heads is not None:
            raise SteerError(f"heads={self.heads} with a dense encoder; drop it or choose encoder='kron'")
        elif self.interaction != "mand":
            raise SteerError(
                f"interaction={self.interaction!r} with a dense encoder; drop it or choose encoder='kron'"
            )
        if self.loss == "hierarchical" and self.activation != "topk":
            raise SteerError(f"loss='hierarchical' needs activation='topk', got {self.activation!r}")
        if self.loss == "matryoshka":
            self._check_matryoshka()
        elif self.prefixes is not None:
            if self.loss == "reconstruction":
                raise SteerError(
                    "prefixes were given with loss='reconstruction'; choose loss='hierarchical' or "
                    "'matryoshka'"
                )
            self.prefixes = check_prefixes(self.prefixes, self.k, "k")

    def _check_kron(self) -> None:
        if self.m > self.n:
            raise SteerError(f"kron: m={self.m} is more than n={self.n}; KronSAE needs m <= n: swap them")
        if self.n >= self.d_in:
            raise SteerError(
                f"kron: n={self.n} is not far below the width d_in={self.d_in}; choose a smaller n"
            )
        size = self.m * self.n
        if self.d_sae % size:
            near = max(size, round(self.d_sae / size) * size)
            raise SteerError(
                f"kron: d_sae={self.d_sae} is not a multiple of m*n={self.m}*{self.n}={size}; try "
                f"d_sae={near}"
            )
        if self.heads is not None and self.heads != self.d_sae // size:
            raise SteerError(
                f"kron: heads={self.heads} with m={self.m}, n={self.n} makes {self.heads * size} features, "
                f"not d_sae={self.d_sae}; give heads={self.d_sae // size} or none"
            )
        self.heads = self.d_sae // size

    def _check_matryoshka(self) -> None:
        if self.activation == "jumprelu":
            raise SteerError(
                "loss='matryoshka' needs activation='batchtopk' or 'topk', got 'jumprelu', whose thresholds "
                "are trained on the whole dictionary"
            )
        head = self.m * self.n if self.encoder == "kron" else 1
        if self.prefixes is None:
            sizes = (max(head, int(share * self.d_sae) // head * head) for share in MATRYOSHKA)
            self.prefixes = sorted(set(sizes))
        self.prefixes = check_prefixes(self.prefixes, self.d_sae, "d_sae")
        if self.prefixes[-1] != self.d_sae:
            raise SteerError(
                f"matryoshka: the last of prefixes={self.prefixes} must be the whole dictionary, "
                f"d_sae={self.d_sae}: features behind it would never be trained; add it"
            )
        cut = [size for size in self.prefixes if size % head]
        if cut:
            raise SteerError(
                f"matryoshka: the prefix of {cut[0]} features cuts a head of KronSAE in two; give "
                "multiples of "
                f"m*n={self.m}*{self.n}={head}"
            )

    @property
    def rows(self) -> int:
        """Rows of the encoder's matrix: d_sae, or h(m + n) for KronSAE."""
        return self.d_sae if self.heads is None else self.heads * (self.m + self.n)

    @property
    def stated_k(self) -> int | None:
        """`k`; None for a JumpReLU of another tool, whose file does not say it."""
        return None if (self.source or {}).get("k", self.k) is None else self.k

    @property
    def variant(self) -> str:
        """The activation with its `k`, in words."""
        return self.activation if self.stated_k is None else f"{self.activation} with k={self.k}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in field order."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAEConfig:
        """The inverse of `to_dict`; unknown and missing fields are refused by name."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            known = ", ".join(f.name for f in fields(cls))
            raise SteerError(f"SAE config has unknown fields {', '.join(unknown)}; known are {known}")
        missing = [name for name in ("d_in", "d_sae") if name not in values]
        if missing:
            raise SteerError(f"SAE config lacks {', '.join(missing)}; every SAE has a d_in and a d_sae")
        return cls(**values)


def check_prefixes(prefixes: Sequence[int], most: int, name: str) -> list[int]:
    """Prefixes, ascending and distinct; SteerError unless each is a whole number from 1 to `most`, `name`."""
    wrong = [p for p in prefixes if isinstance(p, bool) or not isinstance(p, int) or not 1 <= p <= most]
    if wrong or not prefixes:
        raise SteerError(
            f"prefixes={list(prefixes)!r} must be whole numbers from 1 to {name}={most}, at least one"
        )
    return sorted(set(prefixes))


def encoder_parameters(config: SAEConfig) -> int:
    """
    Weights of the encoder without its bias: F d, or h(m + n) d for KronSAE (arXiv 2505.22255, section 3).
    """
    return config.rows * config.d_in


def encoder_flops(config: SAEConfig) -> int:
    """Multiply-adds of the encoder per token, forward: dF, or d h(m + n) + m n h for KronSAE."""
    post_latents = config.d_sae if config.encoder == "kron" else 0
    return encoder_parameters(config) + post_latents


def forward_flops(config: SAEConfig) -> int:
    """
    Multiply-adds per token, forward: the encoder's and k d of the decoder, as the KronSAE paper counts them.

    The loss changes nothing of it: HierarchicalTopK and Matryoshka add the same k rows one after the other.
    What their prefixes add is elementwise, as the squared error is, and is not counted.
    """
    return encoder_flops(config) + config.k * config.d_in


def check_count(name: str, value: Any) -> None:
    """SteerError unless `value` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SteerError(f"{name}={value!r} is not a whole number from 1")


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> None:
    """SteerError unless `value` is a finite number from `low` to `high`."""
    number = nan if isinstance(value, bool) or not isinstance(value, (int, float)) else value
    if not isfinite(number) or not low <= number <= high:
        limit = f" to {high:g}" if isfinite(high) else " upwards"
        raise SteerError(f"{name}={value!r} is not a number from {low:g}{limit}")

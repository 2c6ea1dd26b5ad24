"""
`SAE`: one module for every variant. An encoder (dense, or the Kronecker heads of KronSAE), a sparse
activation (TopK, BatchTopK, JumpReLU) and a decoder whose rows have unit norm.

Shapes: tokens x (tokens, d_in); features (tokens, d_sae). Parameters: `encoder.weight` (rows, d_in) and
`encoder.bias` (rows,), with rows = d_sae or h(m + n); `W_dec` (d_sae, d_in); `b_dec` (d_in,); and
`log_threshold` (d_sae,) for JumpReLU. `steer.sae.kron` says how KronSAE's features and rows are ordered.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from steer import hub
from steer.errors import SteerError
from steer.sae import own
from steer.sae.config import SAEConfig
from steer.sae.jumprelu import jump
from steer.sae.kron import Heads
from steer.sae.sparse import Selection, chosen, combine, interact, top_k

# Elements of (tokens, features) that are held at once on a CPU: they stay in its cache between two
# operations.
CHUNK = 1 << 22
# BatchTopK looks at this many times k features of each token before it looks at more.
CANDIDATES = 4


@dataclass(frozen=True)
class Active:
    """The active features of each token: `values` (tokens, k), largest first, and where they are."""

    values: Tensor
    where: Selection

    @property
    def indices(self) -> Tensor:
        """(tokens, k); entries whose value is 0 are not active."""
        return self.where.indices


class SAE(nn.Module):
    """A sparse autoencoder as `config` describes it. Raises SteerError for inputs of another width."""

    def __init__(self, config: SAEConfig, device: torch.device | str | None = None, seed: int = 0):
        super().__init__()
        self.cfg = config
        self.encoder = nn.Linear(config.d_in, config.rows, device=device)
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in, device=device))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, device=device))
        if config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((config.d_sae,), log(0.1), device=device))
        self.threshold: Tensor  # BatchTopK's after training; below 0 while none has been measured
        self.register_buffer("threshold", torch.tensor(-1.0, device=device))
        self._start(seed)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], revision: str | None = None, token: str | None = None
    ) -> SAE:
        """
        An SAE in steer's own format. `steer.sae.load_sae` also reads the files of other tools.

        Args:
            name_or_path: folder or hub id.
            revision: branch, tag or commit of a hub id.
            token: for private repositories, by default that of `hf auth login`.

        Returns:
            The SAE on the CPU, in the precision it was saved in and in eval mode.

        Raises:
            SteerError: when there is none, or it is damaged or not consistent.
        """
        return cls.from_state(*own.read(name_or_path, revision, token))

    @classmethod
    def from_state(cls, config: SAEConfig, state: dict[str, Tensor], where: os.PathLike[str]) -> SAE:
        """
        An SAE from its config and tensors.

        Args:
            config: what the SAE is.
            state: tensors by the names of `state_dict()`; `threshold` may be missing.
            where: what the message of an error names.

        Returns:
            The SAE in the precision of `W_dec` and in eval mode.

        Raises:
            SteerError: when a tensor is missing or unexpected, or has another shape than the config asks for.
        """
        size = config.d_sae, config.d_in
        stored = tuple(state["W_dec"].shape) if "W_dec" in state else "missing"
        if stored != size:  # before a module of that size is made: a false setting must not fill the memory
            raise SteerError(f"{where}: W_dec is {stored}, its settings ask for {size}")
        sae = cls(config)
        state = {"threshold": sae.threshold, **state}
        shapes = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
        for name in sorted({*shapes, *state}):
            have = tuple(state[name].shape) if name in state else "missing"
            if have != shapes.get(name):
                raise SteerError(
                    f"{where}: {name} is {have}, its settings ask for {shapes.get(name, 'none')}"
                )
        sae.to(state["W_dec"].dtype).load_state_dict(state)
        return sae.eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """
        Write the SAE in steer's own format, with a model card. `steer.sae.save_sae` writes others.

        Args:
            save_directory: the folder, made if missing; an SAE in it is replaced.

        Returns:
            The folder.

        Raises:
            SteerError: when the folder cannot be written.
        """
        return own.write(save_directory, self.cfg, self.state_dict())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload sparse autoencoder",
    ) -> str:
        """
        Upload the SAE to a model repository, which is created if missing, as one commit. The model card in
        the repository is replaced.

        Args:
            repo_id: such as "user/name"; `SAE.from_pretrained(repo_id)` loads it from there.
            private: whether a repository that is created is private, by default as the account says.
            token: with write access, by default that of `hf auth login`.
            commit_message: the title of the commit.

        Returns:
            The address of the commit.

        Raises:
            SteerError: when the hub refuses or cannot be reached.
        """
        return hub.push(
            lambda folder, name: own.write(folder, self.cfg, self.state_dict(), name),
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
        )

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """
        Dense: random unit rows, the encoder equal to the decoder. Kron: encoder N(0, 1/(2F)) and the decoder
        C[i, j] = P_i + Q_j of each head, to unit norm (arXiv 2505.22255, appendix H).
        """
        rows = torch.randn(self.encoder.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.encoder.bias.zero_()
        if self.cfg.encoder == "kron":
            self.encoder.weight.copy_(rows / sqrt(2 * self.cfg.d_sae))
            p, q = self.kron.factors(self.encoder.weight)
            self.W_dec.copy_((p[:, :, None] + q[:, None, :]).flatten(0, 2))
            self.normalise_decoder()
        else:
            self.W_dec.copy_(rows)
            self.normalise_decoder()
            self.encoder.weight.copy_(self.W_dec)

    @torch.no_grad()
    def start_from(self, sample: Tensor) -> None:
        """
        Fit what a sample (tokens, d_in) decides: `b_dec` is its geometric median, a free encoder bias begins
        as the tied one would be, and JumpReLU thresholds begin where k features are active on average.
        """
        self.check_input(sample)
        self.b_dec.copy_(geometric_median(sample))
        if self.cfg.bias == "free":
            self.encoder.bias.copy_(-(self.encoder.weight @ self.b_dec))
        if self.cfg.activation == "jumprelu":
            z = self.latents(sample).flatten()
            rank = max(1, round(z.numel() * (1 - self.cfg.k / self.cfg.d_sae)))
            self.log_threshold.fill_(z.kthvalue(rank).values.clamp(min=1e-3).log())

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring every row of `W_dec` to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """
        Make an SAE for inputs x into one for inputs x * factor: biases and thresholds scale with the
        features, the matrices stay. This folds a fitted normalisation away. Where a feature is a product,
        both of its factors grow with the root of `factor` instead.
        """
        if self.cfg.interaction == "mand":
            self.encoder.bias.mul_(factor)
        else:
            self.encoder.weight.div_(sqrt(factor))
            self.encoder.bias.mul_(sqrt(factor))
        self.b_dec.mul_(factor)
        if self.threshold >= 0:
            self.threshold.mul_(factor)
        if self.cfg.activation == "jumprelu":
            self.log_threshold.add_(log(factor))

    # --- encoding

    @property
    def kron(self) -> Heads:
        """The heads of a KronSAE."""
        return Heads(self.cfg.d_sae // (self.cfg.m * self.cfg.n), self.cfg.m, self.cfg.n)

    @property
    def shift(self) -> Tensor | None:
        """What is taken off the input before encoding: the decoder's bias where it is tied."""
        return self.b_dec if self.cfg.bias == "tied" else None

    def active(self, x: Tensor, low_precision: bool = False) -> Active:
        """
        The active features of x (tokens, d_in), with gradients (JumpReLU is trained through `latents`). In
        training mode BatchTopK chooses among the batch and measures its threshold.

        low_precision: the matrix product in bfloat16; gradients stay in the parameters' precision.
        """
        self.check_input(x)
        if self.cfg.activation == "topk":
            return self.strongest(x, self.cfg.k, low_precision=low_precision)
        if self.cfg.activation == "batchtopk" and self.training:
            return self._active_of_batch(x, low_precision)
        features = self.dense_features(x)
        most = max(1, int((features > 0).sum(1).max()))
        values, indices = features.topk(most)
        return Active(values, Selection(indices, self.cfg.d_sae))

    def strongest(
        self, x: Tensor, k: int, among: Tensor | None = None, low_precision: bool = False
    ) -> Active:
        """The k strongest features of each token, of all or of those in `among` (n,); with gradients."""
        size = self.cfg.d_sae if among is None else len(among)
        rows = max(64, CHUNK // size) if x.device.type == "cpu" else len(x)
        with torch.no_grad():
            selections = [self._choose(part, k, among, low_precision) for part in x.split(rows)]
            values, indices, places = (torch.cat(parts) for parts in zip(*selections, strict=True))
        where = Selection(indices, self.cfg.d_sae)
        used = where if self.cfg.encoder == "dense" else Selection(places, self.cfg.rows)
        values = values.to(self.encoder.weight.dtype)
        if torch.is_grad_enabled():
            values = chosen(values, x, self.encoder.weight, self.encoder.bias, self.shift, used)
        if used is where:
            return Active(values.relu(), where)
        p, q = values.chunk(2, 1)
        return Active(interact(p, q, self.cfg.interaction), where)

    def _choose(
        self, x: Tensor, k: int, among: Tensor | None, low_precision: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Of each token the encoder's outputs for its k strongest features, the features, and the encoder's
        rows: (tokens, k) each, or for KronSAE outputs and rows (tokens, 2k), those of p before those of q.
        """
        if self.cfg.encoder == "dense":
            values, best = top_k(self.pre_activations(x, among, low_precision), k)
            best = best if among is None else among[best]
            return values, best, best
        outputs = self.pre_activations(x, None, low_precision)
        signed = self.cfg.interaction == "product"
        factors = outputs if signed else outputs.relu()
        if among is None:
            p_rows, q_rows = self.kron.strongest_pairs(factors, k, signed)
            best = self.kron.features(p_rows, q_rows)
        else:
            p_row, q_row = self.kron.rows(among)
            best = among[top_k(factors[:, p_row] * factors[:, q_row], k)[1]]
            p_rows, q_rows = self.kron.rows(best)
        rows = torch.cat([p_rows, q_rows], 1)
        return outputs.gather(1, rows), best, rows

    def pre_activations(self, x: Tensor, rows: Tensor | None = None, low_precision: bool = False) -> Tensor:
        """The encoder's outputs W (x - shift) + b, (tokens, rows), of all of its rows or of `rows` (n,)."""
        weight: Tensor = self.encoder.weight
        bias: Tensor = self.encoder.bias
        if rows is not None:
            weight, bias = weight[rows], bias[rows]
        shifted = x if self.shift is None else x - self.shift
        if low_precision:
            return linear(shifted.bfloat16(), weight.bfloat16(), bias.bfloat16())
        return linear(shifted, weight, bias)

    def _active_of_batch(self, x: Tensor, low_precision: bool) -> Active:
        """The k x tokens strongest features of the batch; a token's unused places hold zeros."""
        budget = self.cfg.k * len(x)
        width = min(CANDIDATES * self.cfg.k, self.cfg.d_sae)
        while True:
            active = self.strongest(x, width, low_precision=low_precision)
            values = active.values.detach()
            least = values.flatten().topk(budget).values[-1]
            kept = (values >= least) & (values > 0)
            if width == self.cfg.d_sae or not kept[:, -1].any():
                break  # no token has more active features than were looked at
            width = min(CANDIDATES * width, self.cfg.d_sae)
        if kept.any():
            smallest = values[kept].min()
            self.threshold.copy_(smallest if self.threshold < 0 else self.threshold.lerp(smallest, 0.01))
        most = max(1, int(kept.sum(1).max()))
        where = Selection(active.indices[:, :most].contiguous(), self.cfg.d_sae)
        return Active((active.values * kept)[:, :most], where)

    def latents(self, x: Tensor) -> Tensor:
        """
        All features (tokens, d_sae) before the activation chooses, with gradients: W(x - shift) + b, or the
        interaction of every pair of a head.
        """
        outputs = self.pre_activations(x)
        if self.cfg.encoder == "dense":
            return outputs
        p_row, q_row = self.kron.rows(torch.arange(self.cfg.d_sae, device=x.device))
        return interact(outputs[:, p_row], outputs[:, q_row], self.cfg.interaction)

    def dense_features(self, x: Tensor) -> Tensor:
        """Features (tokens, d_sae) by the rule used after training: TopK, or a threshold."""
        self.check_input(x)
        if self.cfg.activation == "topk":
            active = self.active(x)
            dense = torch.zeros(len(x), self.cfg.d_sae, dtype=active.values.dtype, device=x.device)
            return dense.scatter(1, active.indices, active.values)
        z = self.latents(x)
        if self.cfg.activation == "jumprelu":
            return jump(z, self.log_threshold.exp())
        if self.threshold < 0:
            raise SteerError(
                "this BatchTopK SAE has no threshold yet; train it, or call .train() to use a batch"
            )
        return z * ((z >= self.threshold) & (z > 0))

    def check_input(self, x: Tensor) -> None:
        """SteerError when x is not (tokens, d_in)."""
        if x.dim() != 2 or x.shape[1] != self.cfg.d_in:
            raise SteerError(
                f"activations of shape {tuple(x.shape)} for an SAE of width d_in={self.cfg.d_in}; expected "
                "(tokens, d_in): use the layer, site and model that it was trained on"
            )

    # --- decoding

    def decode_active(self, active: Active) -> Tensor:
        """Reconstructions (tokens, d_in) from active features, with gradients."""
        return combine(active.values, self.W_dec, active.where) + self.b_dec

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., d_sae) of activations (..., d_in)."""
        return self.dense_features(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, features: Tensor) -> Tensor:
        """Reconstructions (..., d_in) from features (..., d_sae)."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions (..., d_in) of activations (..., d_in)."""
        flat = x.reshape(-1, x.shape[-1])
        if self.cfg.activation == "topk":
            return self.decode_active(self.active(flat)).view(x.shape)
        return self.decode(self.dense_features(flat)).view(x.shape)

    # --- names that SAEBench and other tools read

    @property
    def W_enc(self) -> Tensor:
        """(d_in, d_sae) of a dense encoder, (d_in, h(m + n)) of KronSAE."""
        return self.encoder.weight.T

    @property
    def b_enc(self) -> Tensor:
        return self.encoder.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device


def geometric_median(points: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point (width,) of least mean distance to `points` (count, width), by Weiszfeld's iteration."""
    median = points.mean(0)
    for _ in range(steps):
        weights = 1 / (points - median).norm(dim=1).clamp(min=1e-12)
        before, median = median, (weights[:, None] * points).sum(0) / weights.sum()
        if (median - before).norm() <= tolerance * median.norm():
            break
    return median

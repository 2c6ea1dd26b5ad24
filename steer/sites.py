"""
Where a vector can stand: finds the decoder layers of a causal language model, and the module behind each
site.

Layers are found by structure: the list of modules that each hold an attention module and that lives next to
the input embeddings. Within a layer, `resid_mid` is found by running three tokens through the model and
watching which module's output is added to the residual stream, so sandwich norms (Gemma, OLMo2) and parallel
blocks (GPT-NeoX) need no table of architectures. What is found is checked by `steer.probe`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from steer.errors import SteerError
from steer.hooks import Site, hidden_in, hidden_out, hooked
from steer.names import canonical

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where `model` takes its token ids: the device of its input embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.device


@dataclass(frozen=True)
class Decoder:
    """
    The stack of decoder layers. `backbone` is the module whose forward runs them, `name` the list's name in
    the plain model, without what wraps it.
    """

    backbone: nn.Module
    layers: nn.ModuleList
    name: str
    hidden_size: int

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)


def find_decoder(model: nn.Module) -> Decoder:
    """
    The decoder layers of any decoder-only causal LM; SteerError says which modules were seen when there are
    none.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SteerError(
            f"{type(model).__name__} is an encoder-decoder; steering vectors need a decoder-only causal LM"
        )
    if _is_encoder(model):
        raise SteerError(
            f"{type(model).__name__} is an encoder; steering vectors need a decoder-only causal LM"
        )
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(n, m) for n, m in lists if len(m) and all(_children(layer, _ATTENTION) for layer in m)]
    if len(stacks) > 1:  # with a vision tower beside it, the language model's stack is by the embeddings
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        stacks = [(n, m) for n, m in stacks if any(c is embeddings for c in _parent(model, n).children())]
    if len(stacks) != 1:
        seen = ", ".join(f"{n} ({len(m)} x {type(m[0]).__name__})" for n, m in lists if len(m))
        children = ", ".join(name for name, _ in model.named_children())
        raise SteerError(
            f"{type(model).__name__} has no single stack of decoder layers with attention in it; "
            f"seen: {seen or 'no module lists'}; top-level modules: {children or 'none'}"
        )
    name, layers = stacks[0]
    hidden_size = getattr(model.config.get_text_config(), "hidden_size", None)  # type: ignore[union-attr, operator]
    if hidden_size is None:
        raise SteerError(
            f"the config of {type(model).__name__} has no hidden_size: it is made of several models of "
            "different hidden sizes; attach to the one that holds the layers"
        )
    return Decoder(_parent(model, name), layers, canonical(name), hidden_size)


def _is_encoder(model: nn.Module) -> bool:
    """BERT and its like, whose attention modules look as a decoder's do."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = getattr(model, "config", None)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def find_sites(decoder: Decoder, layers: list[int], site: str) -> list[Site]:
    """The module behind `site` in each of `layers`; SteerError when the architecture has no such place."""
    blocks = [decoder.layers[index] for index in layers]
    if site == "resid_post":
        return [Site(block) for block in blocks]
    if site == "resid_pre":
        return [Site(block, on_input=True) for block in blocks]
    kind = _MLP if site == "mlp_out" else _ATTENTION
    names = [_children(block, kind) for block in blocks]
    for index, block, found in zip(layers, blocks, names, strict=True):
        if len(found) != 1:
            seen = ", ".join(name for name, _ in block.named_children())
            raise SteerError(f"site={site!r} needs one such module in layer {index}; its modules are {seen}")
    if site == "resid_mid":
        added = _added_to_residual(decoder, layers, [found[0] for found in names])
        return [Site(block.get_submodule(name)) for block, name in zip(blocks, added, strict=True)]
    return [Site(block.get_submodule(found[0])) for block, found in zip(blocks, names, strict=True)]


def find_down_projections(decoder: Decoder, layers: list[int]) -> list[tuple[nn.Module, int]]:
    """
    The MLP's last matrix in each of `layers`, which writes into the residual stream, and the size of its
    input; SteerError where there is not one, as in a mixture of experts.
    """
    found = []
    for index, site in zip(layers, find_sites(decoder, layers, "mlp_out"), strict=True):
        writer = last_writer(site.module, decoder.hidden_size)
        experts = any("expert" in name for name, _ in site.module.named_modules())
        if experts or writer is None:
            raise SteerError(
                f"layer {index}'s {type(site.module).__name__} has no single down-projection; adaptive "
                "vectors need a dense MLP: use kind='constant'"
            )
        found.append(writer)
    return found


def last_writer(module: nn.Module, hidden_size: int) -> tuple[nn.Module, int] | None:
    """The last matrix in `module` that writes `hidden_size` numbers, and how many it reads, or None."""
    found: dict[str, tuple[nn.Module, int]] = {}
    for name, part in module.named_modules():
        size = _matrix_size(part)
        inside = any(name.startswith(f"{outer}.") for outer in found if outer)  # an adapter's own matrices
        if size and size[1] == hidden_size and not inside:
            found[name] = part, size[0]
    return list(found.values())[-1] if found else None


def _matrix_size(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantised ones included; None for other modules."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features  # type: ignore[return-value]
    return tuple(module.weight.shape) if type(module).__name__ == "Conv1D" else None  # type: ignore


_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn|moe")
_NOT_A_SUBLAYER = re.compile(r"norm|dropout|(^|_)ln")


def _children(layer: nn.Module, kind: re.Pattern[str]) -> list[str]:
    names = [name for name, module in layer.named_children() if not isinstance(module, nn.Dropout)]
    return [name for name in names if kind.search(name) and not _NOT_A_SUBLAYER.search(name)]


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


@contextmanager
def probing(backbone: nn.Module) -> Iterator[torch.Tensor]:
    """
    Inside, a forward pass of `backbone` over the token ids that are given, (1, 3), leaves no trace in the
    model: no dropout, no gradients, no compiled graph, the random state and the modules' modes as they were.
    """
    if not hasattr(backbone, "get_input_embeddings"):
        raise SteerError(
            f"the decoder layers lie in a {type(backbone).__name__}, which takes no token ids; "
            "steering vectors need a model whose layers lie in the module that embeds the tokens"
        )
    embeddings: Any = backbone.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(1, 4, device=embeddings.weight.device)[None]  # 0 is often padding
    training = [module for module in backbone.modules() if module.training]
    devices = {p.device for p in backbone.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            backbone.eval()
            yield ids
    finally:
        for module in training:
            module.training = True


def _added_to_residual(decoder: Decoder, layers: list[int], attention: list[str]) -> list[str]:
    """
    By layer, the name of the child whose output the block adds to the residual stream after `attention`: the
    attention module, or the norm that follows it in a sandwich block. Both are recognised by tensor identity
    in one forward pass.
    """
    blocks = [_Block(decoder.layers[index], name) for index, name in zip(layers, attention, strict=True)]
    with hooked(*(handle for block in blocks for handle in block.watch())), probing(decoder.backbone) as ids:
        decoder.backbone(ids, use_cache=False)
    return [block.added(index) for index, block in zip(layers, blocks, strict=True)]


class _Block:
    """One decoder layer in a forward pass: what each of its modules read and wrote."""

    def __init__(self, block: nn.Module, attention: str):
        self.block, self.attention = block, attention
        self.input: Any = None
        self.reads: dict[str, torch.Tensor] = {}
        self.writes: dict[str, torch.Tensor] = {}
        self.whole = False  # the attention is given the stream as well, to add it itself: Bloom

    def watch(self) -> list[Any]:
        handles = [self.block.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for name, module in self.block.named_children():
            handles.append(module.register_forward_hook(partial(self._note, name), with_kwargs=True))
        return handles

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.input = hidden_in(args, kwargs)

    def _note(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given, made = hidden_in(args, kwargs), hidden_out(output)
        if isinstance(given, torch.Tensor) and isinstance(made, torch.Tensor):
            self.reads[name], self.writes[name] = given, made
        if name == self.attention and any(value is self.input for value in args[1:]):
            self.whole = True

    def added(self, index: int) -> str:
        kind = f"site='resid_mid' does not exist in layer {index}, a {type(self.block).__name__}"
        if self.attention not in self.reads:
            raise SteerError(
                f"{kind}: a forward pass does not call its {self.attention} with hidden states; use "
                "resid_post"
            )
        if self.whole:
            raise SteerError(f"{kind}: its attention adds the residual stream itself; use resid_post")
        reads, writes = self.reads, self.writes
        mlp = next((name for name in _children(self.block, _MLP) if name in reads), None)
        if mlp is None:
            raise SteerError(f"{kind}: no one module of it is the MLP; use resid_post")
        before_mlp = [name for name in writes if reads[mlp] is writes[name]]
        mlp_reads = reads[before_mlp[0]] if before_mlp else reads[mlp]
        if mlp_reads is self.input or mlp_reads is reads[self.attention]:
            raise SteerError(
                f"{kind}: attention and MLP read the same residual stream in parallel; use resid_post or "
                "attn_out"
            )
        # A module fed with exactly the attention's output (a post-norm) is what the residual addition sees
        # instead.
        after = (name for name in reads if name != self.attention and reads[name] is writes[self.attention])
        return next(after, self.attention)

"""
Where a vector can be: finds the decoder layers of a causal language model, and the module behind each
site.

Layers are found by structure: the list of blocks nearest to the input embeddings in the tree of modules,
whatever they mix tokens with: attention, a state space, a convolution. Within a layer, `resid_mid` is found
by running three tokens through the model and watching which module's output is added to the residual stream,
so sandwich norms (Gemma, OLMo2) and parallel blocks (GPT-NeoX) need no table of architectures. What is found
is checked by `steer.probe`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from steer.errors import SteerError
from steer.hooks import Site, Streams, hidden_in, hidden_out, hooked
from steer.names import canonical

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where `model` takes its token ids: the device of its input embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.device


@dataclass(frozen=True)
class Decoder:
    """
    The stack of decoder layers. `backbone` is the module whose forward embeds tokens and runs the layers,
    `holder` the one that holds their list (the same one in most models), `name` the list's name in the plain
    model, without what wraps it.
    """

    backbone: nn.Module
    holder: nn.Module
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
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = _nearest(model, [n for n, m in lists if all(map(_is_block, m))])
    if len(stacks) != 1:
        seen = ", ".join(f"{n} ({len(m)} x {type(m[0]).__name__})" for n, m in lists)
        children = ", ".join(name for name, _ in model.named_children())
        raise SteerError(
            f"{type(model).__name__} has no single stack of decoder layers next to its token embeddings; "
            f"seen: {seen or 'no module lists'}; top-level modules: {children or 'none'}"
        )
    name, backbone = stacks[0]
    hidden_size = getattr(model.config.get_text_config(), "hidden_size", None)  # type: ignore[union-attr, operator]
    if hidden_size is None:
        raise SteerError(
            f"the config of {type(model).__name__} has no hidden_size: it is made of several models of "
            "different hidden sizes; attach to the one that holds the layers"
        )
    layers: Any = model.get_submodule(name)
    holder = model.get_submodule(name.rpartition(".")[0])
    return Decoder(model.get_submodule(backbone), holder, layers, canonical(name), hidden_size)


def _is_block(module: nn.Module) -> bool:
    """Whether `module` is made of other modules, as a decoder layer is; a list of matrices is not a stack."""
    return any(True for _ in module.children())


def _nearest(model: nn.Module, lists: list[str]) -> list[tuple[str, str]]:
    """
    The names of those of `lists` that are nearest to the token embeddings, each with the name of the smallest
    module that holds both. A vision tower beside the language model, and lists inside of layers, are farther.
    """
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    place = next((name for name, module in model.named_modules() if module is embeddings), None)
    if place is None:
        return []
    by_distance: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for name in lists:
        above, beside = place.split(".")[:-1], name.split(".")[:-1]
        shared = 0
        while shared < min(len(above), len(beside)) and above[shared] == beside[shared]:
            shared += 1
        steps = len(above) - shared, len(beside) - shared
        by_distance.setdefault(steps, []).append((name, ".".join(above[:shared])))
    return by_distance[min(by_distance)] if by_distance else []


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
    lacking = [index for index, matches in zip(layers, names, strict=True) if len(matches) != 1]
    if lacking:
        what = "MLP" if site == "mlp_out" else "attention module"
        children = ", ".join(name for name, _ in decoder.layers[lacking[0]].named_children())
        have = [i for i, block in enumerate(decoder.layers) if len(_children(block, kind)) == 1]
        raise SteerError(
            f"site={site!r} needs one {what} in each steered layer, and layers {_listed(lacking)} do not "
            f"have one; the modules of layer {lacking[0]} are {children}; "
            + (f"layers of this model that have one: {_listed(have)}" if have else "use resid_post")
        )
    if site == "resid_mid":
        added = _added_to_residual(decoder, layers, [matches[0] for matches in names])
        return [Site(block.get_submodule(name)) for block, name in zip(blocks, added, strict=True)]
    return [Site(block.get_submodule(matches[0])) for block, matches in zip(blocks, names, strict=True)]


def find_steered(decoder: Decoder, layers: list[int], site: str) -> list[Site]:
    """`find_sites` for vectors: where there are several residual streams, each is steered."""
    sites = find_sites(decoder, layers, site)
    streams = find_streams(decoder) if site in ("resid_pre", "resid_post") else None
    return [replace(place, streams=streams) for place in sites]


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def find_streams(decoder: Decoder) -> Streams | None:
    """
    The residual streams that the layers are given, in a pass that ends at the first layer; None for one
    stream, for what is not a residual stream, and where the weights are not at hand.
    """
    if out_of_reach(decoder.backbone):
        return None
    shapes: list[tuple[int, ...]] = []

    def end(module: nn.Module, args: tuple, kwargs: dict) -> None:
        shapes.append(tuple(hidden_in(args, kwargs).shape))
        raise _End

    with (
        hooked(decoder.layers[0].register_forward_pre_hook(end, prepend=True, with_kwargs=True)),
        probing(decoder.backbone) as ids,
        suppress(_End),
    ):
        decoder.backbone(ids.repeat(2, 1), use_cache=False)
    size, rows = decoder.hidden_size, (2, ids.shape[1])
    match shapes[0] if shapes else ():
        case (*first, width) if tuple(first) == rows and width % size == 0 and width > size:
            return Streams(width // size, None)
        case (*first, count, width) if (tuple(first), width) == (rows, size):
            return Streams(count, 2)
        case (count, *rest, width) if (tuple(rest), width) == (rows, size):
            return Streams(count, 0)
    return None


class _End(Exception):
    """Ends a pass whose rest is not needed."""


def find_down_projections(decoder: Decoder, layers: list[int]) -> list[tuple[nn.Module, int]]:
    """
    The MLP's last matrix in each of `layers`, which writes into the residual stream, and the size of its
    input; SteerError where there is not one, as in a mixture of experts.
    """
    downs = []
    for index, site in zip(layers, find_sites(decoder, layers, "mlp_out"), strict=True):
        writer = last_writer(site.module, decoder.hidden_size)
        experts = any("expert" in name for name, _ in site.module.named_modules())
        if experts or writer is None:
            raise SteerError(
                f"layer {index}'s {type(site.module).__name__} has no single down-projection; adaptive "
                "vectors need a dense MLP: use kind='constant'"
            )
        downs.append(writer)
    return downs


def last_writer(module: nn.Module, hidden_size: int) -> tuple[nn.Module, int] | None:
    """The last matrix in `module` that writes `hidden_size` numbers, and how many it reads, or None."""
    writers: dict[str, tuple[nn.Module, int]] = {}
    for name, part in module.named_modules():
        size = matrix_size(part)
        inside = any(name.startswith(f"{outer}.") for outer in writers if outer)  # an adapter's own matrices
        if size and size[1] == hidden_size and not inside:
            writers[name] = part, size[0]
    return list(writers.values())[-1] if writers else None


def matrix_size(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantised ones included; None for other modules."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features  # type: ignore[return-value]
    return tuple(module.weight.shape) if type(module).__name__ == "Conv1D" else None  # type: ignore


_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_forward|ffn|moe", re.IGNORECASE)
_NOT_A_SUBLAYER = re.compile(r"norm|dropout|(^|_)ln|hc$|hyper_connection", re.IGNORECASE)
# Children whose class says what they are: layers of several kinds have them under one name.
_ANY_MIXER = re.compile(r"mixer|temporal_block")


def _children(layer: nn.Module, kind: re.Pattern[str]) -> list[str]:
    names = []
    for name, module in layer.named_children():
        says = type(module).__name__ if _ANY_MIXER.fullmatch(name) else name
        if kind.search(says) and not _NOT_A_SUBLAYER.search(name) and not isinstance(module, nn.Dropout):
            names.append(name)
    return names


def out_of_reach(module: nn.Module) -> bool:
    """
    Whether a forward pass would not see the weights: they are on the meta device (unless accelerate brings
    them where a module runs), or this process holds a shard of them.
    """
    return any(
        hasattr(parameter, "ds_id")
        or hasattr(parameter, "full_tensor")
        or (parameter.is_meta and not hasattr(part, "_hf_hook"))
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
    )


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

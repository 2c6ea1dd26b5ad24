"""
Where a vector can stand: finds the decoder layers of a causal language model, and the module behind each
site.

Layers are found by structure: the list of modules that each hold an attention module and that lives next to
the input embeddings. Within a layer, `resid_mid` is found by running one token through the first block and
watching which module's output is added to the residual stream, so sandwich norms (Gemma, OLMo2) and parallel
blocks (GPT-NeoX) need no table of architectures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from steer.errors import SteerError


@dataclass(frozen=True)
class Decoder:
    """
    The stack of decoder layers. `trunk` is the module whose forward runs them, `name` the list's name in the
    model.
    """

    trunk: nn.Module
    layers: nn.ModuleList
    name: str
    width: int

    @property
    def depth(self) -> int:
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
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return Decoder(_parent(model, name), layers, name, config.hidden_size)


def _is_encoder(model: nn.Module) -> bool:
    """BERT and its like, whose attention modules look as a decoder's do."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = getattr(model, "config", None)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


@dataclass(frozen=True)
class Site:
    """
    The module to hook in one layer; whether its input is steered instead of its output, and whether a vector
    that changes the output reads the input.
    """

    module: nn.Module
    on_input: bool = False
    with_input: bool = False


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
        added = _added_to_residual(decoder, layers[0], names[0][0])
        return [Site(block.get_submodule(added)) for block in blocks]
    return [Site(block.get_submodule(found[0])) for block, found in zip(blocks, names, strict=True)]


def find_down_projections(decoder: Decoder, layers: list[int]) -> list[tuple[nn.Module, int]]:
    """
    The MLP's last matrix in each of `layers`, which writes into the residual stream, and the width of its
    input; SteerError where there is not one, as in a mixture of experts.
    """
    found = []
    for index, site in zip(layers, find_sites(decoder, layers, "mlp_out"), strict=True):
        sizes = [(module, _matrix_size(module)) for module in site.module.modules()]
        writers = [(module, size[0]) for module, size in sizes if size and size[1] == decoder.width]
        experts = any("expert" in name for name, _ in site.module.named_modules())
        if experts or not writers:
            raise SteerError(
                f"layer {index}'s {type(site.module).__name__} has no single down-projection; adaptive "
                "vectors need a dense MLP: use kind='constant'"
            )
        found.append(writers[-1])
    return found


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


class _Stop(Exception):
    """Ends the probing forward pass after the block that was watched."""


def _added_to_residual(decoder: Decoder, index: int, attention: str) -> str:
    """
    Name of the child whose output the block adds to the residual stream after attention: the attention
    module, or the norm that follows it in a sandwich block. Both are recognised by tensor identity in a
    one-token forward pass.
    """
    block = decoder.layers[index]
    reads: dict[str, torch.Tensor] = {}
    writes: dict[str, torch.Tensor] = {}
    block_input: list[torch.Tensor] = []
    whole: list[str] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        block_input.append(args[0] if args else kwargs["hidden_states"])

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            made = output[0] if isinstance(output, tuple) else output
            if isinstance(given, torch.Tensor) and isinstance(made, torch.Tensor):
                reads[name], writes[name] = given, made
            if any(value is block_input[0] for value in args[1:]):  # Bloom's: it adds the stream itself
                whole.append(name)

        return hook

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        raise _Stop

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    handles += [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in block.named_children()]
    embeddings = decoder.trunk.get_input_embeddings()  # type: ignore[operator]
    token = torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)
    try:
        with torch.no_grad():
            decoder.trunk(token, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    mlp = next((name for name in _children(block, _MLP) if name in reads), None)
    before_mlp = [n for n in writes if mlp and reads[mlp] is writes[n]]
    mlp_reads = reads[before_mlp[0]] if before_mlp else reads.get(mlp) if mlp else None
    if attention in whole:
        raise SteerError(
            f"site='resid_mid' does not exist in {type(block).__name__}: its attention adds the residual "
            "stream itself; use resid_post"
        )
    if mlp_reads is None or mlp_reads is block_input[0] or mlp_reads is reads[attention]:
        raise SteerError(
            f"site='resid_mid' does not exist in {type(block).__name__}: attention and MLP read the "
            "same residual "
            "stream in parallel; use resid_post or attn_out"
        )
    # A module fed with exactly the attention's output (a post-norm) is what the residual addition sees
    # instead.
    return next((n for n in reads if n != attention and reads[n] is writes[attention]), attention)

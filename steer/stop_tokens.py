"""The tokens that end an answer, and greedy answers: one rule for training, evaluation, lens and engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_ANSWER = "Forty-two."


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """
    The ids of the tokens that end an answer, ascending: those of the model's generation config, the
    tokenizer's end-of-sequence token, and the token with which the chat template ends the assistant's turn.

    None of the three holds for every model: Llama 3 lists three tokens in its generation config, the
    tokenizer of a base model knows no end of turn, and models converted from GGUF have no generation config.

    Args:
        tokenizer: the tokenizer of the model.
        generation_config: `model.generation_config`; None where the model has none.

    Returns:
        The ids, each once; empty where nothing ends an answer but its length.
    """
    listed = generation_config.eos_token_id if generation_config is not None else None
    ids = [*listed] if isinstance(listed, (list, tuple)) else [listed]
    ids += [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return tuple(sorted({int(i) for i in ids if i is not None}))


def greedy_config(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    max_new_tokens: int,
    pad_token_id: int | None = None,
) -> GenerationConfig:
    """
    Plain greedy decoding for `model.generate`, as steer's own sampler and vLLM decode: whatever penalties the
    model's `generation_config` asks for are left out. `pad_token_id` of None is the model's.
    """
    from transformers import GenerationConfig

    # what is left unset here, `generate` takes from the model
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids(tokenizer, generation_config)) or None,
        pad_token_id=pad_token_id,
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the special token after the assistant's last turn in the chat template; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a chat template is a program, and may refuse or fail in any way
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    special = {token: i for token, i in tokenizer.get_added_vocab().items() if rest.startswith(token)}
    return special[max(special, key=len)] if special else None

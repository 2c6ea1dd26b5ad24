"""The Gradio page over `steer.play.compare`. Whatever a user sets is an argument of each call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

# Read when Gradio is imported: nothing is sent to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from steer.errors import SteerError
from steer.mixture import Mix
from steer.play import views
from steer.play.compare import Comparison, TokenChange

SIDES = ("Base", "With vectors")
_ON_CLICK = """
element.addEventListener('click', event => {
  const token = event.target.closest('[data-token]');
  if (token) trigger('click', {token: Number(token.dataset.token)});
});
"""


@dataclass(frozen=True)
class Side:
    """One side of a turn: the prompt and the answer as token ids, the answer as text and by token."""

    prompt: list[int]
    answer: list[int]
    text: str
    tokens: list[TokenChange] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """A message of the user, and the answers of both sides."""

    message: str
    sides: tuple[Side, Side]


def build_page(
    comparison: Comparison,
    title: str,
    about: str,
    messages: Sequence[str] = (),
    strengths: Mapping[str, float] | None = None,
) -> gr.Blocks:
    """
    The page.

    Args:
        comparison: the model with its vectors.
        title: the heading.
        about: what the vectors are, in Markdown.
        messages: examples to send.
        strengths: where the sliders stand first, by set; 1 where nothing is said.
    """
    names, layers = list(comparison.mixer.sets), comparison.mixer.layers
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        turns: Any = gr.State([])
        chosen: Any = gr.State((1, 0))  # the side and the token of the last turn that the table is about
        gr.Markdown(f"# {title}\n\n{about}")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    chats = []
                    for name, empty in zip(SIDES, _chats([]), strict=True):
                        with gr.Column(min_width=280):
                            gr.Markdown(f"### {name}")
                            chats.append(gr.HTML(empty, js_on_load=_ON_CLICK, apply_default_css=False))
                gr.HTML(views.legend(), apply_default_css=False)
                with gr.Row():
                    message = gr.Textbox(
                        label="Message", lines=1, max_lines=8, autofocus=True, scale=5, min_width=240
                    )
                    send = gr.Button("Send", variant="primary", min_width=90)
                with gr.Row():
                    again = gr.Button("Answer again", min_width=90, size="sm")
                    stop = gr.Button("Stop", min_width=90, size="sm")
                    clear = gr.Button("Clear", min_width=90, size="sm")
                if messages:
                    gr.Examples([[text] for text in messages], inputs=message, label="Examples")
            with gr.Column(scale=2, min_width=300):
                sliders = [
                    gr.Slider(
                        -2, 4, (strengths or {}).get(name, 1), step=0.1, label=f"Strength of {name}",
                        info="times the saved scale; 0 is off",
                    )
                    for name in names
                ]  # fmt: skip
                gr.Markdown("### Next token")
                table = gr.HTML(views.next_token_table([], ""), apply_default_css=False)
                with gr.Accordion("Layers", open=False):
                    with gr.Row():
                        every = gr.Button("All", size="sm", min_width=60)
                        none = gr.Button("None", size="sm", min_width=60)
                    boxes = gr.CheckboxGroup(
                        layers, value=layers, label="Steered layers", elem_id="layers",
                        info="A layer that is off adds nothing, in any set.",
                    )  # fmt: skip
                with gr.Accordion("Prompt and sampling", open=False):
                    way = gr.Radio(comparison.ways, value=comparison.ways[0], label="How messages are put")
                    length = gr.Slider(1, 512, 64, step=1, label="Longest answer (tokens)")
                    heat = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="the same on both sides")

        settings = [way, length, heat, seed, boxes, *sliders]
        shown = [*chats, turns, chosen]

        def answer(text: str, before: list[Turn], *given: Any) -> Iterator[Any]:
            with _errors():
                for turn in _answers(comparison, text, before, *given):
                    yield (*_chats([*before, turn]), [*before, turn], (1, 0), "")

        def answer_again(before: list[Turn], *given: Any) -> Iterator[Any]:
            with _errors():
                if not before:
                    raise SteerError("there is no message to answer again; send one")
                for turn in _answers(comparison, before[-1].message, before[:-1], *given):
                    yield (*_chats([*before[:-1], turn]), [*before[:-1], turn], (1, 0))

        def next_tokens(before: list[Turn], chosen: tuple[int, int], *given: Any) -> str:
            if not before:
                return views.next_token_table([], "")
            side, column = chosen
            prompt, answer = before[-1].sides[side].prompt, before[-1].sides[side].answer[:column]
            with _errors():
                found = comparison.next_tokens(prompt, answer, _mix(comparison, *given[4:]))
            return views.next_token_table(found, "".join(comparison.pieces(answer)))

        def choose(side: int) -> Any:
            def chosen(before: list[Turn], event: gr.EventData) -> Any:
                place = (side, int(event.token))
                return (*_chats(before, place), place)

            return chosen

        quiet: Any = {"show_progress": "hidden"}
        private: Any = {**quiet, "api_visibility": "private"}
        # One conversation has one run: a pending one is not sent twice, and ends where the other begins.
        sending: Any = [send.click, message.submit]
        sent = gr.on(
            sending, answer, [message, turns, *settings], [*shown, message], api_name="answer",
            trigger_mode="once", **quiet,
        )  # fmt: skip
        repeated = again.click(
            answer_again, [turns, *settings], shown, api_name="answer_again", cancels=[sent], **quiet
        )
        gr.on(sending, None, cancels=[repeated], api_visibility="private")
        runs = [sent, repeated]
        table_needs = [turns, chosen, *settings]
        for event in runs:
            event.success(next_tokens, table_needs, table, **private)
        stop.click(None, cancels=runs, api_visibility="private")
        clear.click(
            lambda: (*_chats([]), [], (1, 0), "", views.next_token_table([], "")), None,
            [*shown, message, table], api_name="clear", cancels=runs,
        )  # fmt: skip
        for side, chat in enumerate(chats):
            chat.click(choose(side), [turns], [*chats, chosen], **private).success(
                next_tokens, table_needs, table, **private
            )
        every.click(lambda: layers, None, boxes, api_visibility="private")
        none.click(lambda: [], None, boxes, api_visibility="private")
        for slider in sliders:
            slider.release(next_tokens, table_needs, table, trigger_mode="always_last", **private)
        boxes.change(
            next_tokens, table_needs, table, api_name="probabilities", trigger_mode="always_last", **quiet
        )
    return page


def launch(page: gr.Blocks, host: str, port: int | None, block: bool = True) -> str:
    """
    Serve the page, on this machine alone.

    Args:
        page: of `build_page`.
        host: address to listen at.
        port: port, None for the first free one from 7860.
        block: return only when the server ends.

    Returns:
        The address of the page.

    Raises:
        SteerError: the port is taken, or the address is none of this machine's.
    """
    try:
        _, address, _ = page.queue(default_concurrency_limit=4).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            css=views.style(),
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise SteerError(
            f"cannot serve at {host}:{port or ''} ({error}); give another --port or --host"
        ) from error
    print(f"steer play: {address} (Ctrl+C ends it)", flush=True)
    if block:
        page.block_thread()
    return address


def _mix(comparison: Comparison, layers: list[int], *strengths: float) -> Mix:
    return Mix(dict(zip(comparison.mixer.sets, strengths, strict=True)), frozenset(layers))


def _answers(
    comparison: Comparison,
    message: str,
    before: list[Turn],
    way: str,
    length: int,
    temperature: float,
    seed: int | None,
    *given: Any,
) -> Iterator[Turn]:
    """The turn after each new token; in the end with the changes of the tokens."""
    mix = _mix(comparison, *given)
    base, steered = (
        comparison.prompt(message, [(turn.message, turn.sides[side].text) for turn in before], way)
        for side in range(2)
    )
    sampling = comparison.sampling(length, temperature)
    for prompt in (base, steered):  # before the message is part of the conversation
        comparison.check_length(prompt, sampling)
    sides = [Side(base, [], ""), Side(steered, [], "")]
    yield Turn(message, (sides[0], sides[1]))
    # an emptied field is None
    for answers in comparison.side_by_side(base, steered, mix, sampling, int(seed or 0)):
        sides = [
            Side(prompt, ids, comparison.text(ids))
            for prompt, ids in zip((base, steered), answers, strict=True)
        ]
        yield Turn(message, (sides[0], sides[1]))
    coloured = [replace(side, tokens=comparison.changes(side.prompt, side.answer, mix)) for side in sides]
    yield Turn(message, (coloured[0], coloured[1]))


def _chats(turns: Sequence[Turn], marked: tuple[int, int] | None = None) -> tuple[str, str]:
    """Both conversations as HTML; `marked` is the side and the token of the last answer that stands out."""
    shown = []
    for side, name in enumerate(SIDES):
        bubbles = []
        for turn in turns:
            answer = turn.sides[side]
            bubbles += [views.Bubble(turn.message, user=True), views.Bubble(answer.text, answer.tokens)]
        at = marked[1] if marked and marked[0] == side else None
        shown.append(views.conversation(bubbles, name, at))
    return shown[0], shown[1]


@contextmanager
def _errors() -> Iterator[None]:
    """A mistake of the user's is a message on the page."""
    try:
        yield
    except SteerError as error:
        raise gr.Error(escape(str(error)), title="Not possible", print_exception=False) from error

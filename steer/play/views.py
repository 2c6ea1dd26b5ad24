"""What `steer.play.compare` returns, as HTML. What people and models write is text there, never markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from markupsafe import Markup

from steer.pages import asset, render_page
from steer.play.compare import NextToken, TokenChange

# Nats at which a colour is full: a token e^3, twenty times, as likely or as unlikely.
FULL = 3.0


@dataclass(frozen=True)
class Bubble:
    """A message in a conversation: its text, or its tokens where their changes are known."""

    text: str = ""
    tokens: Sequence[TokenChange] = ()
    user: bool = False


def style() -> str:
    """The style sheet of the page."""
    return str(asset("play.css"))


def conversation(bubbles: Sequence[Bubble], name: str, marked: int | None = None) -> Markup:
    """
    One side of the comparison.

    Args:
        bubbles: the messages.
        name: of the side, for screen readers.
        marked: a token of the last message that stands out.
    """
    last = len(bubbles) - 1
    shown = [
        {
            "user": bubble.user,
            "text": bubble.text,
            "tokens": [
                _token(token, number, place == last and number == marked)
                for number, token in enumerate(bubble.tokens)
            ],
            "last": place == last,
        }
        for place, bubble in enumerate(bubbles)
    ]
    return Markup(render_page("play_chat", name=name, bubbles=shown))


def next_token_table(tokens: Sequence[NextToken], after: str) -> Markup:
    """
    The probabilities of the next token.

    Args:
        tokens: what is in the table.
        after: the text of the answer that it follows.
    """
    rows = [
        {
            "text": visible(token.text),
            "base": token.base,
            "steered": token.steered,
            "base_text": percent(token.base),
            "steered_text": percent(token.steered),
        }
        for token in tokens
    ]
    return Markup(render_page("play_next", rows=rows, after=visible(after[-60:]), cut=len(after) > 60))


def legend() -> Markup:
    """What the colours of the tokens mean."""
    return Markup(render_page("play_legend", full=f"{FULL:g}", times=f"{exp(FULL):.0f}"))


def _token(token: TokenChange, number: int, marked: bool) -> dict[str, object]:
    base, steered = percent(exp(token.base)), percent(exp(token.steered))
    return {
        "text": token.text,
        "number": number,
        "up": token.change >= 0,
        "share": round(min(abs(token.change) / FULL, 1.0), 2),
        "marked": marked,
        "title": f"{visible(token.text)}  base {base}, with vectors {steered} ({token.change:+.2f} nats)",
    }


def visible(text: str) -> str:
    """Text with signs for its line breaks, tabs, and the spaces at its ends."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" ")) if inner else len(text)
    return "␣" * left + inner + "␣" * (len(text) - left - len(inner))


def percent(probability: float) -> str:
    """A probability for people: 12.3%, 0.04%, <0.01%."""
    if probability < 0.0001:
        return "<0.01%"
    return f"{probability:.1%}" if probability >= 0.001 else f"{probability:.2%}"

"""The HTML of the page: what models and people write stays text, colours and bars follow the numbers."""

from __future__ import annotations

from xml.etree import ElementTree

from steer.play.compare import NextToken, TokenChange
from steer.play.views import Bubble, conversation, legend, next_token_table, percent, style, visible

EVIL = "<script>alert(1)</script>\"'&<|im_end|>"


def tree(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def test_what_is_written_is_text() -> None:
    tokens = [TokenChange(EVIL, -1.0, -2.0)]
    bubbles = [Bubble(EVIL, user=True), Bubble(EVIL), Bubble(tokens=tokens)]
    for html in (conversation(bubbles, EVIL, 0), next_token_table([NextToken(EVIL, 0.5, 0.1)], EVIL)):
        assert "<script" not in html
        assert EVIL in "".join(tree(html).itertext())
        assert not [node for node in tree(html).iter() if node.tag == "script"]
    span = tree(conversation(bubbles, "x")).find(".//span")
    assert span is not None and span.get("title", "").startswith(EVIL)


def test_colours_follow_the_change() -> None:
    tokens = [TokenChange("a", -1.0, -1.0), TokenChange("b", -4.0, -1.0), TokenChange("c", -0.1, -9.0),
              TokenChange("d", -2.0, -3.5)]  # fmt: skip
    spans = tree(conversation([Bubble("asked", user=True), Bubble(tokens=tokens)], "base", 2)).findall(
        ".//span"
    )
    assert [span.text for span in spans] == ["a", "b", "c", "d"]
    assert [span.get("style") for span in spans] == [f"--share: {x}" for x in ("0.0", "1.0", "1.0", "0.5")]
    assert ["sp-up" in span.get("class", "") for span in spans] == [True, True, False, False]
    assert ["sp-marked" in span.get("class", "") for span in spans] == [False, False, True, False]
    assert [span.get("data-token") for span in spans] == ["0", "1", "2", "3"]
    assert spans[1].get("title") == "b  base 1.8%, with vectors 36.8% (+3.00 nats)"


def test_tokens_of_earlier_answers_cannot_be_clicked() -> None:
    answer = Bubble(tokens=[TokenChange("a", -1.0, -1.0)])
    spans = tree(conversation([answer, Bubble("?", user=True), answer], "base", 0)).findall(".//span")
    assert [span.get("data-token") for span in spans] == [None, "0"]
    assert ["sp-marked" in span.get("class", "") for span in spans] == [False, True]


def test_answers_keep_their_spaces_and_line_breaks() -> None:
    html = conversation([Bubble("  two\n\nlines "), Bubble(tokens=[TokenChange(" \n", 0, 0)])], "base")
    bubbles = [node for node in tree(html).iter() if "sp-model" in node.get("class", "")]
    assert ["".join(node.itertext()) for node in bubbles] == ["  two\n\nlines ", " \n"]


def test_the_table_has_a_row_a_token() -> None:
    html = next_token_table([NextToken(" 5", 0.25, 0.00004), NextToken("\n", 0.0004, 1.0)], "so far")
    rows = tree(html).findall(".//tbody/tr")
    assert [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in rows] == [
        ["␣5", "25.0%", "<0.01%"],
        ["⏎", "0.04%", "100.0%"],
    ]
    bars = [span.get("style") for span in rows[0].iter("span") if span.get("style")]
    assert bars == ["--share: 0.2500", "--share: 0.0000"]
    assert "After so far" in "".join(tree(html).itertext())
    assert "First token" in next_token_table([NextToken("a", 1, 1)], "")
    assert "Send a message" in next_token_table([], "")


def test_numbers_and_spaces_for_people() -> None:
    assert [percent(x) for x in (1, 0.123, 0.001, 0.0004, 0)] == [
        "100.0%",
        "12.3%",
        "0.1%",
        "0.04%",
        "<0.01%",
    ]
    assert [visible(x) for x in (" a b ", "\n\t", "  ", "")] == ["␣a b␣", "⏎⇥", "␣␣", ""]
    assert "factor of 20" in legend() and ".sp-up" in style()

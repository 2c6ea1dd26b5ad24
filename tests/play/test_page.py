"""
The page itself, where Gradio is installed (`make interop-play`): driven through its API by gradio_client, and
through Chromium where there is one.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.steering import fill, message

import steer
from steer import Artifact, SteerError, SteeringConfig

pytest.importorskip("gradio", reason="Gradio is not installed")

from gradio_client import Client
from gradio_client.exceptions import AppError

from steer.mixture import BASE, Mix
from steer.play.compare import TEXT, Comparison
from steer.play.page import build_page, launch

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
# How messages are put, the longest answer, temperature, seed, layers: then the strengths of one and two.
SETTINGS = (TEXT, 12, 0, 0, [0, 1, 2])


@pytest.fixture
def comparison(build_tiny: Any, tiny_tokenizer: Any) -> Comparison:
    model = build_tiny("llama", initializer_range=0.3)
    sets = {}
    for seed, name in enumerate(("one", "two")):
        vectors = fill(steer.attach(model, SteeringConfig()), 0.3, seed)
        sets[name] = Artifact(vectors.config, vectors.tensors())
        steer.detach(model)
    return Comparison(model, tiny_tokenizer, sets)


@pytest.fixture
def address(comparison: Comparison) -> Iterator[str]:
    page = build_page(comparison, "Tiny", "Two random sets.", ["1+1?"], {"two": 0.0})
    yield launch(page, "127.0.0.1", None, block=False)
    page.close()


def expected(comparison: Comparison, text: str, mix: Mix) -> str:
    """The text of an answer with its special tokens, as the page shows it."""
    *_, answer = comparison.answer(comparison.prompt(text, [], TEXT), mix, comparison.sampling(12, 0.0))
    return str(comparison.tokenizer.decode(answer))


def bubbles(html: str) -> list[str]:
    nodes = ElementTree.fromstring(f"<div>{html}</div>").iter()
    return ["".join(node.itertext()) for node in nodes if "sp-bubble" in node.get("class", "")]


def test_the_page_through_its_api(comparison: Comparison, address: str) -> None:
    client = Client(address, verbose=False)
    mix = Mix({"one": 1.5, "two": -1.0})
    base, steered, cleared = client.predict("1+1?", *SETTINGS, 1.5, -1.0, api_name="/answer")
    assert bubbles(base) == ["1+1?", expected(comparison, "1+1?", BASE)]
    assert bubbles(steered) == ["1+1?", expected(comparison, "1+1?", mix)]
    assert bubbles(base) != bubbles(steered) and cleared == ""
    table = client.predict(*SETTINGS, 1.5, -1.0, api_name="/probabilities")
    rows = ElementTree.fromstring(f"<div>{table}</div>").findall(".//tbody/tr")
    first = comparison.next_tokens(comparison.prompt("1+1?", [], TEXT), [], mix)
    assert len(rows) == len(first) == 10
    off = (*SETTINGS[:4], [], 1.5, -1.0)
    again = client.predict(*off, api_name="/answer_again")
    assert bubbles(again[1]) == bubbles(again[0]) == bubbles(base)
    with pytest.raises(AppError, match="the message is empty; write something"):
        client.predict(" ", *SETTINGS, 1, 1, api_name="/answer")
    with pytest.raises(AppError, match="give a whole number"):
        client.predict("1+1?", TEXT, 2.5, *SETTINGS[2:], 1, 1, api_name="/answer")
    client.predict(api_name="/clear")
    with pytest.raises(AppError, match="do not fit the context"):  # and is not in the conversation then
        client.predict("1" * 5000, *SETTINGS, 1, 1, api_name="/answer")
    assert bubbles(client.predict("1+1?", *SETTINGS, 1, 1, api_name="/answer")[0]) == bubbles(base)
    _, _, _, table = client.predict(api_name="/clear")
    assert "Send a message" in table
    with pytest.raises(AppError, match="no message to answer again"):
        client.predict(*off, api_name="/answer_again")


def test_an_emptied_seed_is_zero(comparison: Comparison, address: str) -> None:
    client = Client(address, verbose=False)
    given = (*SETTINGS[:3], None, *SETTINGS[4:])
    base, _, _ = client.predict("1+1?", *given, 1.5, -1.0, api_name="/answer")
    assert bubbles(base) == ["1+1?", expected(comparison, "1+1?", BASE)]


def test_two_users_at_once_have_vectors_and_conversations_of_their_own(
    comparison: Comparison, address: str
) -> None:
    clients = [Client(address, verbose=False) for _ in range(2)]
    asked = [("1+1?", 1.0, 0.0), ("2*3=", 0.0, 2.0)]

    def ask(user: int) -> list[str]:
        text, *strengths = asked[user]
        return bubbles(clients[user].predict(text, *SETTINGS, *strengths, api_name="/answer")[1])

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ask, range(2)))
    for (text, one, two), got in zip(asked, found, strict=True):
        assert got == [text, expected(comparison, text, Mix({"one": one, "two": two}))]


def test_one_conversation_has_one_run(comparison: Comparison) -> None:
    events = list(build_page(comparison, "Tiny", "").fns.values())
    sent, repeated = (next(e for e in events if e.api_name == name) for name in ("answer", "answer_again"))
    assert sorted(event for _, event in sent.targets) == ["click", "submit"]
    assert sent.trigger_mode == repeated.trigger_mode == "once"
    for one, other in ((sent, repeated), (repeated, sent)):
        for target in one.targets:
            assert any(other._id in event.cancels for event in events if target in event.targets)


def test_a_port_that_is_taken_is_one_line(comparison: Comparison) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        page = build_page(comparison, "Tiny", "")
        with pytest.raises(SteerError, match=r"cannot serve at 127.0.0.1.* another --port") as error:
            launch(page, "127.0.0.1", taken.getsockname()[1], block=False)
        message(error)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(address: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.get_by_label("Message").fill(EVIL)
        page.get_by_role("button", name="Send", exact=True).click()
        page.wait_for_selector("[data-token]")
        assert page.locator(".sp-user").first.inner_text() == EVIL
        page.wait_for_selector(".sp-next tbody tr")
        assert page.locator(".sp-next tbody tr").count() == 10
        before = page.locator(".sp-next").inner_text()
        page.locator(".sp-scroll").nth(1).locator("[data-token]").nth(3).click()
        page.wait_for_selector(".sp-after code")
        assert page.locator(".sp-next").inner_text() != before
        assert page.locator(".sp-marked").count() == 1
        page.get_by_role("button", name="Clear", exact=True).click()
        page.wait_for_selector(".sp-empty")
        page.get_by_role("button", name="Send", exact=True).click()
        page.get_by_text("the message is empty").wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert width <= 390, "the page is wider than a phone"
    assert faults == []
    hosts = {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))}
    assert hosts == {address.split("/")[2]}, "the page asks other hosts"

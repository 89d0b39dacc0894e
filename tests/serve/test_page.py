"""The chat page: its headers, and itself in a Chromium where there is one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from glm4runtime.engine.request import Delta, Request
from glm4runtime.text.answers import ToolCall
from glm4serve import Settings, create_app, page
from glm4serve.keys import Keys
from tests.helpers.asgi import ask
from tests.helpers.fake_engine import FakeEngine, words
from tests.helpers.live import live
from tests.serve.conftest import Serve

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a-key-of-some-length"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script> [a](javascript:alert(1))'
ANSWER = f"""## Adding in Python

Use **`sum`**, see [the manual](https://docs.example/sum) or *think*:

1. take a list
2. add it up
   - ints
   - floats

| a | b |
|---|---|
| 1 | 2 |

```python
def add(numbers: list[int]) -> int:
    return sum(numbers)  # <b>not bold</b>
```

{HOSTILE}
"""
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_nothing_but_our_files_runs(serve: Serve) -> None:
    """No other origin, no inline code, and the page needs no key although the API does."""
    app, _ = serve(words("x"), Settings(keys=Keys({KEY: "ann"})))
    for path in page.PATHS:
        response = ask(app, path)
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
        # Addresses of others stand in patterns alone.
        assert not re.findall(r"(?:src|href|from|import|url\()\s*=?\s*[\"'(]?(?:https?:)?//", response.text), path
        for unsafe in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "localStorage"):
            assert unsafe not in response.text, path
    html = ask(app, "/").text
    assert not re.findall(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", html)
    for file in re.findall(r"(?:src|href)=\"(/[^\"]*)", html):
        assert file in page.PATHS
    assert ask(app, "/v1/models").status_code == 401
    shipped = {entry.name for entry in resources.files(page).iterdir() if Path(entry.name).suffix in (".js", ".css")}
    assert shipped == {Path(path).name for path in page.PATHS if path != "/"}


def test_it_can_be_left_out(serve: Serve) -> None:
    app, _ = serve(words("x"), Settings(page=False, keys=Keys({KEY: "ann"})))
    for path in page.PATHS:
        assert ask(app, path).status_code == 401
        assert ask(app, path, headers={"x-api-key": KEY}).status_code == 404


def script(request: Request) -> list[Delta]:
    """An answer by what was said last."""
    assert request.messages is not None
    last = request.messages[-1]
    if last["role"] == "tool":
        return words(f"It is {last['content']}.")
    if last["content"] == "on and on":
        return words(*["on and "] * 400)
    if last["content"] == "for ever":
        return words(*["and "] * 100_000)
    if request.tools:
        return [Delta(tool_calls=(ToolCall("weather", {"city": "Köln"}),), tokens=(1,), finish_reason="tool_calls")]
    if last["content"] == "add":
        pieces = [ANSWER[at : at + 9] for at in range(0, len(ANSWER), 9)]
        return [Delta(thought="They want <i>sums</i>.", tokens=(1,)), *words(*pieces)]
    return words("You said: ", last["content"])


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(script, pause=0.005)


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with live(create_app({"m": engine}, Settings(keys=Keys({KEY: "ann"})))) as url:  # type: ignore[dict-item]
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Page]:
    """The page, with its key; what it complains of fails the test."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    complaints: list[str] = []
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda told: complaints.append(told.text) if "Security Policy" in told.text else None)
    opened.goto(address)
    opened.get_by_label("API key").fill(KEY)  # it was asked for
    opened.get_by_label("API key").press("Tab")
    expect(opened.get_by_label("Model")).to_have_value("m")
    yield opened
    assert not complaints
    context.close()


def say(tab: Page, text: str) -> None:
    tab.get_by_label("Message", exact=True).fill(text)
    tab.get_by_label("Message", exact=True).press("Enter")


def test_an_answer_is_shown_and_harms_nobody(tab: Page) -> None:
    say(tab, "add")
    answer = tab.locator("#log > .assistant")
    expect(answer.get_by_text(re.compile(r"\d+ tokens, [\d.]+ tok/s"))).to_be_visible()
    assert tab.title() == "Chat" and not answer.locator("img, script, b, i").count()
    assert '<img src=x onerror="document.title=1"><script>' in answer.inner_text()
    assert "[a](javascript:alert(1))" in answer.inner_text()
    [link] = answer.locator("a").all()
    assert (link.get_attribute("href"), link.get_attribute("rel")) == (
        "https://docs.example/sum",
        "noopener noreferrer",
    )
    assert answer.locator("pre code").inner_text().splitlines()[1] == "    return sum(numbers)  # <b>not bold</b>"
    assert answer.locator("h4").inner_text() == "Adding in Python"
    assert answer.locator("li").count() == 4 and answer.locator("li li").count() == 2
    assert answer.locator("strong code").inner_text() == "sum" and answer.locator("em").inner_text() == "think"
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    thought = answer.locator(".thought")
    assert thought.get_attribute("open") is None and not thought.get_by_text("They want").is_visible()
    thought.locator("summary").click()
    expect(thought.get_by_text("They want <i>sums</i>.")).to_be_visible()
    assert tab.get_by_role("status").inner_text().startswith("## Adding")  # told to screen readers, once, at its end
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out on a phone


def test_an_answer_is_stopped_and_what_was_said_is_edited(tab: Page, engine: FakeEngine) -> None:
    say(tab, "on and on")
    expect(tab.locator("#log").get_by_text("on and on and")).to_be_visible()
    tab.get_by_role("button", name="Stop").click()
    expect(tab.locator("#log").get_by_text("stopped")).to_be_visible()
    expect(tab.get_by_label("Message", exact=True)).to_be_focused()
    tab.get_by_role("button", name="Edit").click()
    tab.get_by_label("Your message").fill("hello")
    tab.get_by_role("button", name="Send again").click()
    expect(tab.locator("#log").get_by_text("You said: hello")).to_be_visible()
    assert tab.locator("#log > li").count() == 2
    asked = len(engine.requests)
    tab.get_by_role("button", name="Regenerate").click()
    expect(tab.locator("#log").get_by_text("You said: hello")).to_be_visible()
    expect(tab.get_by_role("button", name="Regenerate")).to_be_visible()
    assert len(engine.requests) == asked + 1
    assert engine.requests[-1].messages == [{"role": "user", "content": "hello"}]
    say(tab, "and")
    expect(tab.locator("#log").get_by_text("You said: and")).to_be_visible()
    assert engine.requests[-1].messages is not None and len(engine.requests[-1].messages) == 3
    deadline = tab.evaluate("performance.now()") + 10_000
    while engine.running and tab.evaluate("performance.now()") < deadline:
        tab.wait_for_timeout(20)
    assert not engine.running  # the stopped one ended, too


def test_keys_alone(tab: Page) -> None:
    """The focus is never lost with a button that goes, and Escape in a message that is edited stops no answer."""
    tab.get_by_label("Message", exact=True).fill("for ever")
    tab.get_by_role("button", name="Send", exact=True).press("Enter")
    expect(tab.get_by_role("button", name="Stop")).to_be_focused()
    tab.get_by_role("button", name="Edit").first.press("Enter")
    tab.get_by_label("Your message").press("Escape")
    expect(tab.get_by_role("button", name="Edit").first).to_be_focused()
    expect(tab.get_by_role("button", name="Stop")).to_be_visible()
    tab.get_by_role("button", name="Stop").focus()
    tab.keyboard.press("Escape")
    expect(tab.locator("#log").get_by_text("stopped")).to_be_visible()
    expect(tab.get_by_label("Message", exact=True)).to_be_focused()


def test_results_stand_behind_their_call(tab: Page, engine: FakeEngine) -> None:
    """Also those that are given after something else was said."""
    tab.get_by_label("Tools").fill(json.dumps(TOOLS))
    say(tab, "weather")
    expect(tab.get_by_label("What weather gave")).to_be_visible()
    tab.get_by_label("Tools").fill("")
    say(tab, "and now?")
    expect(tab.locator("#log").get_by_text("You said: and now?")).to_be_visible()
    tab.get_by_label("What weather gave").fill("rainy")
    tab.get_by_role("button", name="Send results").click()
    expect(tab.locator("#log").get_by_text("It is rainy.")).to_be_visible()
    messages = engine.requests[-1].messages
    assert messages is not None and [message["role"] for message in messages] == ["user", "assistant", "tool"]


def test_a_call_and_its_result(tab: Page) -> None:
    tab.get_by_label("Tools").fill(json.dumps(TOOLS))
    say(tab, "weather")
    expect(tab.locator(".call summary")).to_have_text("Calls weather")
    assert json.loads(tab.locator(".call code").inner_text()) == {"city": "Köln"}
    tab.get_by_label("What weather gave").fill("rainy")
    tab.get_by_role("button", name="Send results").click()
    expect(tab.locator("#log").get_by_text("It is rainy.")).to_be_visible()


def test_errors_are_told_and_the_key_stays_in_the_tab(tab: Page) -> None:
    say(tab, "word " * 600)
    expect(tab.get_by_role("alert")).to_contain_text("a slot holds 512")
    assert tab.evaluate("[sessionStorage.getItem('key'), localStorage.length, document.cookie]") == [KEY, 0, ""]
    tab.get_by_role("button", name="New chat").click()
    assert not tab.locator("#log > li").count()
    tab.get_by_label("API key").fill("another")
    tab.get_by_label("API key").press("Tab")
    say(tab, "hi")
    expect(tab.get_by_role("alert")).to_contain_text("API key")
    expect(tab.get_by_label("API key")).to_be_focused()

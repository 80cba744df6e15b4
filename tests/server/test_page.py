"""The page in a browser: Chromium without a window, as Debian's package `chromium` brings it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
pytest.importorskip("httpx")

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from anymamba import Engine
from tests.server.conftest import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
SETTINGS = {"model": "plain", "temperature": 0, "top_p": 1, "max_tokens": 12, "system": ""}
Opens = Callable[..., Page]
expect.set_options(timeout=30_000)  # of a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as program:
        found = program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Opens]:
    """Opens the page in a browser that knows nothing but these settings.

    At the end there may have been no error in its console, and no request elsewhere, but for
    those with an expected word.
    """
    contexts, wrong = [], []

    def open_page(at: str = address, expected: tuple[str, ...] = (), **settings: Any) -> Page:
        context = browser.new_context(viewport={"width": 1000, "height": 700})
        contexts.append(context)
        kept = json.dumps(json.dumps(SETTINGS | settings))
        context.add_init_script(f"localStorage['anymamba:settings'] ??= {kept}")
        page = context.new_page()

        def note(text: str, is_wrong: bool = True) -> None:
            if is_wrong and not any(word in text for word in expected):
                wrong.append(text)

        page.on("console", lambda message: note(message.text, message.type == "error"))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("request", lambda found: note(found.url, not found.url.startswith(at)))
        page.goto(f"{at}/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def say(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def finished(page: Page, messages: int) -> list[str]:
    """The texts of the messages, once there are so many and none is being written."""
    expect(page.locator("article")).to_have_count(messages)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    return page.locator("article .text").all_text_contents()


def asked(page: Page, act: Callable[[], object]) -> dict[str, Any]:
    """What the page asks the server when something is done."""
    with page.expect_request(re.compile("completions$")) as found:
        act()
    body: dict[str, Any] = found.value.post_data_json
    return body


def test_an_answer_is_the_engine_s(opened: Opens, engine: Engine) -> None:
    page = opened()
    say(page, "ROMEO:")
    texts = finished(page, 2)
    assert texts == ["ROMEO:", engine.generate("ROMEO:", max_new_tokens=12).text]
    facts = page.locator("article .facts").last.text_content() or ""
    assert re.search(
        r"12 tokens · \d+ per second · first after .*s · .* · cut at max tokens", facts
    )


def test_a_second_turn_comes_from_the_cache(opened: Opens) -> None:
    page = opened(model="m", system="You are a bard.")
    request = asked(page, lambda: say(page, "Speak of love."))
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    finished(page, 2)
    request = asked(page, lambda: say(page, "And of war."))
    answer = request["messages"][2]["content"]
    finished(page, 4)
    assert [message["role"] for message in request["messages"][1:]] == ["user", "assistant", "user"]
    facts = page.locator("article .facts").last.text_content() or ""
    cached, read = map(int, re.findall(r"(\d+) from the cache, (\d+) read", facts)[0])
    assert cached == len("system: You are a bard.\nuser: Speak of love.\nassistant:")
    assert read == len(f" {answer}\nuser: And of war.\nassistant:")


def test_stopping_frees_the_server_and_keeps_the_text(opened: Opens, address: str) -> None:
    page = opened(max_tokens=100_000)
    say(page, "ROMEO:")
    written = page.locator("article.assistant[aria-busy=true] .text")
    expect(written).to_have_text(re.compile(r"\w+ \w+"))  # a part of the answer is there
    page.keyboard.press("Escape")
    expect(page.locator("article.assistant .facts")).to_contain_text("stopped")
    assert len(finished(page, 2)[1]) > 3
    while httpx.get(f"{address}/health", timeout=30).json()["running"]:
        page.wait_for_timeout(10)
    page.get_by_role("button", name="Send").click()  # nothing more said: it goes on
    expect(written).to_have_text(re.compile(r"\w"))  # an answer stopped before that is not kept
    page.get_by_role("button", name="Stop").click()
    finished(page, 3)


def test_branches(opened: Opens) -> None:
    page = opened(temperature=1)
    say(page, "ROMEO:")
    first = finished(page, 2)[1]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("article.assistant .versions")).to_have_text("2 of 2")
    second = finished(page, 2)[1]
    assert first != second
    say(page, " Yes.")
    finished(page, 4)
    page.locator("article").nth(1).get_by_role("button", name="Previous version").click()
    assert finished(page, 2)[1] == first
    request = asked(page, lambda: say(page, " No."))
    assert request["prompt"] == f"ROMEO:{first} No."
    finished(page, 4)

    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("The message's text").fill("JULIET:")
    request = asked(page, lambda: page.get_by_role("button", name="Send as a new version").click())
    assert request["prompt"] == "JULIET:"
    finished(page, 2)
    branch = page.get_by_role("combobox", name="Branch")
    expect(branch.locator("option")).to_have_count(3)
    branch.select_option(index=0)
    assert finished(page, 4)[:3] == ["ROMEO:", second, " Yes."]

    page.locator("article").nth(1).get_by_role("button", name="Branch from here").click()
    expect(page.locator("article")).to_have_count(2)
    request = asked(page, lambda: say(page, " Perhaps."))
    assert request["prompt"] == f"ROMEO:{second} Perhaps."
    finished(page, 4)
    page.reload()
    assert finished(page, 4)[2] == " Perhaps."
    expect(branch.locator("option")).to_have_count(4)


def test_an_answer_can_be_rewritten(opened: Opens) -> None:
    page = opened(model="m")
    say(page, "Who are you?")
    finished(page, 2)
    page.locator("article.assistant").get_by_role("button", name="Edit").click()
    page.get_by_label("The message's text").fill("The bard.")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant .facts")).to_have_text("written by you")
    request = asked(page, lambda: say(page, "So?"))
    assert request["messages"][1] == {"role": "assistant", "content": "The bard."}
    finished(page, 4)


def test_by_the_keyboard_alone(opened: Opens) -> None:
    page = opened(temperature=1)
    press, kind = page.keyboard.press, page.keyboard.type
    expect(page.get_by_role("combobox", name="Model").locator("option")).to_have_count(3)
    kind("ROMEO:")
    press("Shift+Enter")
    kind("O")
    press("Enter")
    first = finished(page, 2)
    assert first[0] == "ROMEO:\nO"
    press("Alt+ArrowUp")
    expect(page.get_by_role("article", name="plain, message 2")).to_be_focused()
    press("r")
    expect(page.locator("article.assistant .versions")).to_have_text("2 of 2")
    finished(page, 2)
    press("Alt+ArrowUp")
    press("ArrowLeft")
    expect(page.get_by_role("article", name="plain, message 2, version 1 of 2")).to_be_focused()
    assert finished(page, 2) == first
    press("ArrowUp")
    press("e")
    kind("!")
    press("Enter")
    assert finished(page, 2)[0] == "ROMEO:\nO!"
    press("Alt+s")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.get_by_label("Temperature").press("ControlOrMeta+a")
    kind("3")
    press("Enter")  # too high: the dialog stays, and the browser says why
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    press("ControlOrMeta+a")
    kind("0.5")
    press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    press("Escape")
    expect(page.get_by_label("Your message")).to_be_focused()
    kind("?")
    assert asked(page, lambda: press("Enter"))["temperature"] == 0.5
    finished(page, 4)
    press("Alt+k")
    expect(page.get_by_role("dialog", name="Shortcuts")).to_be_visible()
    press("Escape")
    press("Alt+n")
    expect(page.locator("article")).to_have_count(0)


def test_tab_reaches_every_control_in_order(opened: Opens) -> None:
    page = opened()
    say(page, "ROMEO:")
    finished(page, 2)
    page.locator(".skip").focus()
    names = []
    while "Send" not in names and len(names) < 30:
        name = "document.activeElement.ariaLabel ?? document.activeElement.textContent"
        names.append(page.evaluate(name).strip())
        page.keyboard.press("Tab")
    assert names == [
        "Skip to the message field", "New conversation", "ROMEO:", "Delete: ROMEO:", "Export",
        "Import", "Shortcuts", "Model", "Settings", "plain, message 2", "Edit", "Regenerate",
        "Branch from here", "Copy", "Your message", "Send",
    ]  # fmt: skip


def test_every_control_has_a_name(opened: Opens) -> None:
    page = opened()
    say(page, "ROMEO:")
    finished(page, 2)
    page.get_by_role("button", name="Regenerate").click()
    finished(page, 2)
    roles = {"button", "textbox", "combobox", "spinbutton", "radio", "link", "article", "dialog"}
    tree = page.context.new_cdp_session(page)
    seen = set()
    for shortcut in ("Escape", "Alt+s", "Alt+k"):
        page.keyboard.press("Escape")
        page.keyboard.press(shortcut)
        for node in tree.send("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if role in roles and not node["ignored"]:
                seen.add(role)
                assert node["name"]["value"].strip(), node
    assert seen == roles


def test_a_screen_reader_hears_answers_and_not_tokens(opened: Opens) -> None:
    page = opened(max_tokens=60)
    page.evaluate(
        """() => {
            window.heard = [];
            const status = document.querySelector("[role=status]");
            const note = () => status.textContent && heard.push(status.textContent);
            new MutationObserver(note).observe(status, {childList: true});
        }"""
    )
    say(page, "ROMEO:")
    texts = finished(page, 2)
    expect(page.get_by_role("status")).to_contain_text("finished")
    heard = page.evaluate("heard")
    assert heard[-1] == f"The answer is finished. {texts[1]}"
    assert len(heard) <= 2
    assert page.locator("[aria-live], [role=log], [role=alert] article").count() == 0


def test_at_360_pixels_nothing_sticks_out(opened: Opens) -> None:
    page = opened(model="m")
    page.set_viewport_size({"width": 360, "height": 640})

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        scroller = page.locator("#scroller")
        assert scroller.evaluate("place => place.scrollWidth - place.clientWidth") == 0
        sides = "[...document.querySelectorAll('button, select, textarea, input, article')]"
        boxes = page.evaluate(f"{sides}.map(e => e.getBoundingClientRect().toJSON())")
        shown = [box for box in boxes if box["width"] > 1]
        assert shown
        assert all(box["left"] >= 0 and box["right"] <= 360 for box in shown)

    check()
    answer_with(page, "W" * 300 + "\n```python\n" + "x = " * 100 + "\n```\nend")
    say(page, "W" * 200)
    finished(page, 2)
    page.get_by_role("button", name="Regenerate").click()
    finished(page, 2)
    check()
    page.get_by_role("button", name="Conversations").click()
    check()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Conversations")).to_be_focused()
    for shortcut in ("Alt+s", "Alt+k"):
        page.keyboard.press(shortcut)
        check()
        page.keyboard.press("Escape")


def answer_with(page: Page, text: str) -> None:
    """Let the server say something, in events that cut characters and lines anywhere."""
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/chat/completions", lambda route: route.fulfill(body=body))


def test_what_a_model_says_stays_text(opened: Opens) -> None:
    page = opened(model="m")
    evil = "<img src=x onerror=alert(1)>"
    answer_with(page, f"a `b<i>` **c** {evil}\n```html\n<script>{evil}</script>\n```\n# d é")
    say(page, evil)
    finished(page, 2)
    answer = page.locator("article.assistant .text")
    assert answer.locator("pre").text_content() == f"<script>{evil}</script>"
    assert answer.locator("p code").text_content() == "b<i>"
    assert answer.locator("p").all_text_contents() == [f"a b<i> c {evil}", "# d é"]
    assert page.locator("#messages :is(img, script, i)").count() == 0


def test_no_other_host_is_asked(opened: Opens) -> None:
    page = opened(expected=("Content Security Policy", "TrustedHTML", "example.invalid"))
    refused = page.evaluate(
        """async () => {
            const found = [];
            const note = (event) => found.push(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", note);
            await fetch("https://example.invalid/").catch(() => {});
            new Image().src = "https://example.invalid/a.png";
            try { document.body.innerHTML = "<p>"; } catch {}
            await new Promise((done) => setTimeout(done, 50));
            return found;
        }"""
    )
    assert sorted(refused) == ["connect-src", "img-src", "require-trusted-types-for"]


def test_light_and_dark(opened: Opens) -> None:
    page = opened()
    ground = "getComputedStyle(document.body).backgroundColor"

    def is_dark() -> bool:
        return max(map(int, re.findall(r"\d+", page.evaluate(ground))[:3])) < 80

    page.emulate_media(color_scheme="light")
    assert not is_dark()
    page.emulate_media(color_scheme="dark")
    assert is_dark()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("radio", name="Light").check()
    page.get_by_role("button", name="Done").click()
    assert not is_dark()
    page.reload()
    assert not is_dark()
    page.emulate_media(reduced_motion="reduce")
    cursor = "getComputedStyle(document.body, '::after').animationName"
    assert page.evaluate(cursor) == "none"


def test_the_key_is_asked_for_and_not_kept(opened: Opens, engine: Engine) -> None:
    with serving(engine, api_key="sesame") as address:
        page = opened(address, expected=("401",))
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        expect(page.locator("#error")).to_contain_text("The server needs its API key")
        key.fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#error")).to_be_empty()
        say(page, "ROMEO:")
        finished(page, 2)
        page.reload()
        expect(page.get_by_role("combobox", name="Model")).to_have_value("plain")
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        page.get_by_role("button", name="Settings").click()
        key.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#error")).to_contain_text("The server needs its API key")


def test_errors_are_told_in_words(opened: Opens) -> None:
    page = opened(expected=("Failed to load resource",), max_tokens=2_000_000)
    error = page.get_by_role("alert")
    say(page, "ROMEO:")
    expect(error).to_contain_text("max_tokens is 2000000, expected a whole number from 1")
    assert finished(page, 1) == ["ROMEO:"]  # no empty answer is left
    page.route("**/completions", lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    expect(error).to_contain_text("The server does not answer. Is it still running?")
    half = 'data: {"choices": [{"text": "But"}]}\n\n'
    page.route("**/completions", lambda route: route.fulfill(body=half))
    page.get_by_role("button", name="Try again").click()
    expect(error).to_contain_text("The connection was lost")
    assert finished(page, 2)[1] == "But"
    told = f"{half}data: {json.dumps({'error': {'message': 'the server shuts down'}})}\n\n"
    page.route("**/completions", lambda route: route.fulfill(body=told))
    page.get_by_role("button", name="Try again").click()
    expect(error).to_contain_text("the server shuts down")
    page.get_by_role("button", name="Dismiss").click()
    expect(error).to_be_empty()


def test_conversations_are_kept_exported_and_imported(opened: Opens, tmp_path: Path) -> None:
    page = opened(temperature=1)
    say(page, "ROMEO:")
    finished(page, 2)
    page.get_by_role("button", name="Regenerate").click()
    texts = finished(page, 2)
    page.keyboard.press("Alt+n")
    say(page, "JULIET:")
    finished(page, 2)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    assert len(json.loads(file.read_text())["conversations"]) == 2

    other = opened()
    other.locator("#file").set_input_files(file)
    other.get_by_role("button", name="ROMEO:", exact=True).click()
    assert finished(other, 2) == texts
    expect(other.locator("article.assistant .versions")).to_have_text("2 of 2")
    other.on("dialog", lambda dialog: dialog.accept())
    other.get_by_role("button", name="Delete: ROMEO:").click()
    expect(other.locator("article")).to_have_count(0)
    expect(other.locator("#list li")).to_have_count(1)

    damaged = json.loads(file.read_text())
    damaged["conversations"][0]["nodes"][0]["parent"] = "nobody"
    for content, told in (("{}", "not an export"), (json.dumps(damaged), "is damaged")):
        file.write_text(content)
        other.locator("#file").set_input_files(file)
        expect(other.get_by_role("alert")).to_contain_text(told)
    expect(other.locator("#list li")).to_have_count(1)

"""The page at `/` in a real browser, used by keyboard: Debian's Chromium, headless."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from sdrt.cli import main
from sdrt.runtime.samplers import SAMPLERS

from .browser import Browser, browsing, executable
from .server import Server, serving, until
from .test_images_api import drawn
from .test_life import ENDLESS, asking, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import sdrt

PROMPT = "a large red star on a blue background"
AT_WORK = "document.getElementById('status').innerText === 'At work.'"
READY = "document.getElementById('status').innerText === 'Ready.'"
DONE = "document.getElementById('status').innerText.startsWith('Done')"
REFUSED = "!document.getElementById('error').hidden"
FIELDS = ("prompt", "negative", "model", "sampler", "steps", "guidance", "width", "height", "seed", "make")

ATTEMPTS = (
    "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))",
    "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')",
    "document.body.setAttribute('onclick', 'window.owned = 1'); document.body.click()",
    "eval('window.owned = 1')",
)
"""What would run if the page's policy allowed it."""


class Page:
    """The page, opened anew."""

    def __init__(self, browser: Browser, place: Path, server: Server) -> None:
        self.browser, self.server = browser, server
        self.downloads = place / "downloads"
        browser.messages.clear()
        browser.open(f"{server.url}/")
        # What was said and shown meanwhile is told by the page itself.
        browser.evaluate(
            "(() => { window.said = []; window.seen = []; const status = document.getElementById('status');"
            "new MutationObserver(() => said.push(status.innerText)).observe(status, {childList: true});"
            "const picture = document.getElementById('picture');"
            "picture.addEventListener('load', () => seen.push(picture.alt)); })()"
        )

    def fill(self, **fields: str) -> None:
        """Type into fields, in the order in which Tab comes to them."""
        for name, value in fields.items():
            if name == "sampler":
                self.browser.tab_to(name)
                self.browser.choose(SAMPLERS[value].label)
            else:
                self.browser.replace(name, value)

    def saved(self) -> bytes:
        """Take the PNG, and give the file."""
        for path in self.downloads.iterdir():
            path.unlink()
        self.browser.tab_to("save")
        self.browser.press("Enter")
        until("the picture is saved", lambda: list(self.downloads.glob("*.png")), within_s=20)
        (path,) = self.downloads.iterdir()
        return path.read_bytes()

    def error(self) -> str:
        """What the page complains of."""
        return self.browser.text("#error")

    def pixels(self) -> Any:
        """What is seen, height x width x 3."""
        drawing = (
            "(() => { const picture = document.getElementById('picture');"
            "const canvas = document.createElement('canvas');"
            "[canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];"
            "const context = canvas.getContext('2d'); context.drawImage(picture, 0, 0);"
            "return [canvas.height, canvas.width,"
            " [...context.getImageData(0, 0, canvas.width, canvas.height).data]]; })()"
        )
        height, width, values = self.browser.evaluate(drawing)
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(place: Path) -> Iterator[Browser]:
    program = executable()
    if program is None:
        pytest.skip("there is no Chromium to open the page with: apt-get install chromium")
    with browsing(program, place) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, place: Path, server: Server) -> Page:
    return Page(browser, place, server)


@pytest.fixture(scope="module")
def narrow(home: Path) -> Iterator[Server]:
    """A server that makes one picture at a time, and lets one wait."""
    with serving(home, "--at-once", "1", "--queue", "1") as opened:
        yield opened.wait_until_ready()


def test_type_a_prompt_press_enter_watch_and_take_the_png(
    page: Page, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = page.browser
    browser.until(READY)
    assert browser.focused() == "prompt"
    browser.type(PROMPT)
    browser.press("Enter")
    browser.until(DONE)
    seed = re.fullmatch(r"Done in [\d.]+ s, seed (\d+)\.", browser.text("#status"))
    assert seed
    assert [said for said in browser.evaluate("said") if said != "Ready."][:-1] == [
        "Waiting for the server.",
        "At work.",
        *(f"Picture {number} on the way." for number in (1, 2, 3)),
    ]
    browser.until("seen.length === 4")
    assert browser.evaluate("seen") == [f"Unfinished picture: {PROMPT}"] * 3 + [PROMPT]

    monkeypatch.setenv("SDRT_HOME", str(home))
    path = tmp_path / "star.png"
    assert main(["run", PROMPT, "--bundle", "demo", "--steps", "20", "--seed", seed[1], "-o", str(path)]) == 0
    assert page.saved() == path.read_bytes()
    with Image.open(path) as image:
        np.testing.assert_array_equal(page.pixels(), np.asarray(image))
        assert browser.text("#settings") == image.info["parameters"]
    assert browser.messages == []


def test_every_setting_reaches_the_picture(page: Page, pipe: sdrt.Pipeline) -> None:
    fields = {"prompt": "a grün ring", "negative": "blue", "sampler": "dpmpp_2m", "steps": "6", "guidance": "4.5"}
    page.fill(**fields, width="96", height="64", seed=str(2**64 - 1))
    page.browser.press("Enter")
    page.browser.until(DONE)
    settings = {"sampler": "dpmpp_2m", "num_inference_steps": 6, "guidance_scale": 4.5, "seed": 2**64 - 1}
    expected = drawn(pipe, "a grün ring", negative_prompt="blue", width=96, height=64, **settings)
    assert page.saved() == expected
    assert f"Seed: {2**64 - 1}, Size: 96x64" in page.browser.text("#settings")
    assert page.browser.text("#settings").startswith("a grün ring\nNegative prompt: blue\n")


def test_a_prompt_beyond_latin_letters(page: Page) -> None:
    page.fill(prompt="ein Stern ★ 星", steps="1")
    page.browser.press("Enter")
    page.browser.until(DONE)
    assert page.browser.text("#settings").startswith("ein Stern ★ 星\nSteps: 1, ")


def test_the_same_seed_once_more(page: Page) -> None:
    page.fill(prompt=PROMPT, steps="2")
    page.browser.press("Enter")
    page.browser.until(DONE)
    first = page.saved()
    page.browser.tab_to("keep")
    page.browser.press("Enter")
    assert page.browser.focused() == "prompt"
    page.browser.press("Enter")
    page.browser.until("said.filter(each => each.startsWith('Done')).length === 2")
    assert page.saved() == first


def test_tab_goes_through_all_that_can_be_set_and_each_has_a_name(page: Page) -> None:
    passed = [page.browser.focused()]
    while passed[-1] != FIELDS[-1]:
        page.browser.press("Tab")
        passed.append(page.browser.focused())
    assert tuple(passed) == FIELDS
    nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"textbox", "combobox", "spinbutton", "button", "progressbar", "figure", "status"}
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in roles]
    assert len(named) >= len(FIELDS)
    assert [role for role, name in named if not name and role != "status"] == []
    assert page.browser.evaluate("[...document.querySelectorAll('#sampler option')].map(each => each.value)") == [
        "",
        *SAMPLERS,
    ]


def test_shift_and_enter_is_a_new_line_and_an_empty_prompt_is_none(page: Page) -> None:
    page.browser.press("Enter")
    assert page.browser.evaluate("document.querySelector(':invalid').id")
    page.browser.type("a red star")
    page.browser.press("Enter", shift=True)
    page.browser.type("on black")
    assert page.browser.evaluate("document.getElementById('prompt').value") == "a red star\non black"
    page.fill(height="64")
    page.browser.press("Enter")
    assert page.browser.evaluate("document.getElementById('height').validationMessage").startswith("Give both")
    assert set(page.browser.evaluate("said")) <= {"Ready."}, "nothing was asked of the server"


@pytest.mark.parametrize("how", ["Escape", "the button"])
def test_cancelling_stops_the_server(page: Page, how: str) -> None:
    page.fill(prompt=PROMPT, sampler="ddpm", steps="1000")
    page.browser.press("Enter")
    page.browser.until(AT_WORK)
    until("it runs", lambda: running(page.server) == 1)
    if how == "Escape":
        page.browser.press("Escape")
    else:
        page.browser.tab_to("cancel")
        page.browser.press("Enter")
    page.browser.until("document.getElementById('status').innerText === 'Cancelled.'")
    until("it has stopped", lambda: running(page.server) == 0, within_s=10)
    steps = page.server.figure("sdrt_steps_total")
    time.sleep(0.2)
    assert page.server.figure("sdrt_steps_total") == steps
    assert page.browser.focused() == "prompt"
    assert page.browser.evaluate("document.getElementById('save').checkVisibility()") is False
    page.fill(steps="2")
    page.browser.press("Enter")
    page.browser.until(DONE)


def test_a_refusal_is_shown_in_the_servers_words(page: Page) -> None:
    page.fill(prompt=PROMPT, width="9992", height="9992")
    page.browser.press("Enter")
    page.browser.until(REFUSED)
    assert page.error() == "size is 9992x9992: expected at most 256x256, or the same area"
    page.fill(width="64", height="64", steps="1")
    page.browser.press("Enter")
    page.browser.until(DONE)
    assert page.browser.evaluate(REFUSED) is False


def test_a_full_queue_is_told_with_when_to_come_back(browser: Browser, place: Path, narrow: Server) -> None:
    page = Page(browser, place, narrow)
    with ExitStack() as stack:
        for waiting in (0, 1):
            stack.enter_context(asking(narrow, **ENDLESS))
            until("it is there", lambda: running(narrow) + narrow.figure("sdrt_queue_depth") == 1 + waiting)  # noqa: B023
        page.fill(prompt=PROMPT)
        browser.press("Enter")
        browser.until(REFUSED)
        assert re.fullmatch(r"1 pictures wait and there are 1 places: try again later \(in \d+ s\)", page.error())


def test_a_server_that_loads_and_one_that_has_ended(browser: Browser, place: Path, home: Path) -> None:
    with serving(home) as server:
        page = Page(browser, place, server)
        browser.until("document.getElementById('status').innerText === 'The models are being loaded.'", within_s=5)
        browser.type(PROMPT)
        browser.press("Enter")
        browser.until(REFUSED)
        assert page.error() == "the models are being loaded: try again in a moment (in 5 s)"
        browser.until(READY)
        server.process.kill()
        server.process.wait()
        browser.press("Enter")
        browser.until("document.getElementById('error').innerText.startsWith('The server does not answer')")


def test_a_server_that_ends_in_the_middle(browser: Browser, place: Path, home: Path) -> None:
    with serving(home) as server:
        page = Page(browser, place, server.wait_until_ready())
        page.fill(prompt=PROMPT, sampler="ddpm", steps="1000")
        browser.press("Enter")
        browser.until(AT_WORK)
        server.process.kill()
        browser.until(REFUSED)
        assert page.error() == "The server ended before the picture was done."


def test_a_key_is_asked_for_and_kept_nowhere(browser: Browser, place: Path, home: Path) -> None:
    with serving(home, SDRT_API_KEY="open-sesame") as server:
        until("it is ready", lambda: server.get("/readyz")[0] == 200)
        page = Page(browser, place, server)
        browser.until(REFUSED)
        assert page.error().startswith("the key is missing or wrong")
        assert browser.focused() == "key"
        browser.type("open-sesam")
        browser.press("Tab")
        browser.until(REFUSED)
        assert browser.evaluate("document.getElementById('model').options.length") == 0
        browser.replace("key", "open-sesame")
        browser.press("Tab")
        browser.until("document.getElementById('model').options.length === 1")
        assert browser.evaluate(REFUSED) is False
        page.fill(prompt=PROMPT, steps="2")
        browser.press("Enter")
        browser.until(DONE)
        kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert browser.evaluate(kept) == [0, 0, "", f"{server.url}/"]
        browser.open(f"{server.url}/?")
        browser.until(REFUSED)
        assert browser.evaluate("document.getElementById('key').value") == ""


def test_nothing_but_the_page_itself_is_run_or_loaded(page: Page) -> None:
    """The browser holds to the policy: what a prompt or a model's name may smuggle in does nothing."""
    loaded = page.browser.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
    assert loaded
    assert {name for name in loaded if not name.startswith((page.server.url, "data:"))} == set()
    page.browser.evaluate(
        "window.refused = []; document.addEventListener('securitypolicyviolation', "
        "event => refused.push(event.effectiveDirective))"
    )
    for attempt in ATTEMPTS:
        page.browser.evaluate(f"(() => {{ try {{ {attempt} }} catch (error) {{ return String(error) }} }})()")
    assert page.browser.evaluate("fetch('https://example.com').then(() => 'loaded', () => 'failed')") == "failed"
    page.browser.until("refused.includes('connect-src')")
    assert page.browser.evaluate("window.owned") is None
    assert page.browser.evaluate("refused").count("require-trusted-types-for") == len(ATTEMPTS)


def test_its_policy_names_what_it_is_made_of(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/", timeout=60) as answer:
        given = answer.headers["content-security-policy"]
        assert answer.headers.get_content_type() == "text/html"
        assert answer.headers["x-content-type-options"] == "nosniff"
    directives = dict(each.split(" ", 1) for each in given.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", directives[kind])
    assert "unsafe" not in given


def test_the_document_describes_it(server: Server) -> None:
    described = json.loads(server.get("/openapi.json")[1])["paths"]["/"]["get"]
    assert described["responses"]["200"]["content"] == {"text/html": {"schema": {"type": "string"}}}
    assert server.get("/")[1].startswith("<!doctype html>")
    assert "{{" not in server.get("/")[1]

"""A headless Chromium, driven through the pipe that its DevTools protocol is spoken over: no driver, no port.

The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "End": (35, ""), "Backspace": (8, "")}
_SHIFT = 8


def executable() -> str | None:
    """Where there is one on this machine."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab.

    Attributes
    ----------
    messages
        What the page has logged, and what of it the browser refused or failed to run.

    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number = 0
        self._buffer = b""
        self._session: str | None = None
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Give a command and wait for what comes of it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith("Browser."):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> Any:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], PATIENCE_S)[0], "the browser says nothing"
            read = os.read(self._answers, 1 << 20)
            assert read, "the browser has ended"
            self._buffer += read
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}:
            self.messages.append(json.dumps(message["params"]))
        return message

    def open(self, url: str) -> None:
        """Go to a page."""
        assert "errorText" not in self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Give the value of an expression in the page, whose policy holds for it too; a promise is waited for."""
        options = {"returnByValue": True, "awaitPromise": True, "allowUnsafeEvalBlockedByCSP": False}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str, within_s: float = PATIENCE_S) -> None:
        """Wait until an expression holds."""
        end = time.monotonic() + within_s
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"waited {within_s:g} s for {expression}: {self.text('body')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Give the text that is seen of an element."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def focused(self) -> str:
        """Give the id of the element that the keyboard goes to."""
        return str(self.evaluate("document.activeElement.id"))

    def type(self, text: str) -> None:
        """Type characters, as a keyboard or an input method does."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key."""
        code, produced = _KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": _SHIFT if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=produced, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def choose(self, label: str) -> None:
        """Choose from the list that the keyboard goes to, by typing what the choice begins with."""
        for character in label:
            self.call("Input.dispatchKeyEvent", type="keyDown", key=character, text=character)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def tab_to(self, name: str) -> None:
        """Press Tab until the keyboard goes to the element with that id."""
        passed = []
        while self.focused() != name:
            passed.append(self.focused())
            assert passed.count(passed[-1]) < 3, f"Tab goes round {passed} and never to {name}"
            self.press("Tab")

    def replace(self, name: str, text: str) -> None:
        """Go to a field and type something else into it."""
        self.tab_to(name)
        self.evaluate("document.activeElement.select()")
        self.type(text)

    def screenshot(self, width: int, height: int, *, dark: bool = False) -> bytes:
        """Give a PNG of the page in a window of that size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@contextmanager
def browsing(program: str, place: Path) -> Iterator[Browser]:
    """Run a browser with an empty profile in `place`, where also goes what it saves, and end it.

    Its sandbox needs what containers do not have, and it opens nothing but the tests' own pages.
    """
    downloads = place / "downloads"
    downloads.mkdir(parents=True)
    reads, commands = os.pipe()
    answers, writes = os.pipe()
    options = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={place / 'profile'}"]
    # The pipes have to be 3 and 4, which here may be other files.
    starter = f'exec "$0" "$@" 3<&{reads} 4>&{writes}'
    process = subprocess.Popen(
        ["bash", "-c", starter, program, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(reads, writes),
        env={**os.environ, "HOME": str(place)},
    )
    os.close(reads)
    os.close(writes)
    try:
        browser = Browser(commands, answers)
        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        yield browser
    finally:
        os.close(commands)  # at which it ends by itself
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers)

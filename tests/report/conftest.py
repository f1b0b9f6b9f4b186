"""A headless Chromium, driven by its DevTools protocol over a pipe, which needs no package."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
PATIENCE = 240.0  # seconds; machines that test are busy
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
Message = dict[str, Any]


class Browser:
    """One page in one browser, and all that it said."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._session: str | None = None
        self._last = 0
        self._unread = b""
        self.events: list[Message] = []

    def open(self, page: Path, *, dark: bool = False) -> None:
        """Show a file and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        self._wait(lambda: bool(self.told("Page.loadEventFired")))

    def call(self, method: str, **params: Any) -> Message:
        """Send a command and give its result."""
        self._last += 1
        message: Message = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                result: Message = answer["result"]
                return result

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        self._wait(lambda: bool(self.evaluate(script)))
        return self.evaluate(script)

    def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def told(self, method: str) -> list[Message]:
        """What events of a kind said."""
        return [event["params"] for event in self.events if event["method"] == method]

    def complaints(self) -> list[Message]:
        """Errors, and all that was written to the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [told for kind in kinds for told in self.told(kind)]

    def requested(self) -> list[str]:
        """Addresses that were asked for, but for data in the page itself."""
        urls = [event["request"]["url"] for event in self.told("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.call("Browser.close")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _wait(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < end, "the browser did not get there in time"
            self.call("Runtime.evaluate", expression="0")  # takes in what is told meanwhile
            time.sleep(0.05)

    def _read(self) -> Message:
        while b"\0" not in self._unread:
            more = os.read(self._answers, 1 << 20)
            assert more, "the browser ended"
            self._unread += more
        line, self._unread = self._unread.split(b"\0", 1)
        message: Message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser of the test's own, which takes commands on its file 3 and answers on 4."""
    if BROWSER is None:
        pytest.skip("NO BROWSER: the page is checked as text alone; install chromium")
    takes, commands = os.pipe()
    answers, gives = os.pipe()
    # Out of the way of 3 and 4, which either may be.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (takes, gives)]
    os.close(takes)
    os.close(gives)
    process = subprocess.Popen(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--window-size=1100,800", "--remote-debugging-pipe"),
            f"--user-data-dir={tmp_path / 'profile'}",
        ],
        close_fds=False,
        preexec_fn=lambda: [os.dup2(end, place) for end, place in zip(ends, (3, 4), strict=True)],
        stderr=subprocess.DEVNULL,
    )
    for end in ends:
        os.close(end)
    started = Browser(commands, answers)
    try:
        yield started
        started.close()
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(answers)

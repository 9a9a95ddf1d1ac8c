"""A headless Chromium that tests drive through its debugging pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TIMEOUT_S = 60.0
# Chromium reads commands from 3 and writes answers to 4; the other ends must not lie there.
_READS, _WRITES, _FIRST_FREE = 3, 4, 10


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page.

    Args:
        path: The program.
        folder: For its profile and log.
    """

    def __init__(self, path: str, folder: Path) -> None:
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        flags += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # It refuses to be root with one.
        child_reads, self._to = _pipe()
        self._from, child_writes = _pipe()
        log = str(folder / "chromium.log")
        self._pid = os.posix_spawn(
            path,
            [path, *flags, "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, child_reads, _READS),
                (os.POSIX_SPAWN_DUP2, child_writes, _WRITES),
            ],
            setpgroup=0,
        )
        for end in (child_reads, child_writes):
            os.close(end)
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page anew, on a screen of that size, and forget what earlier ones did."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        # From page to page of one file only the fragment would change.
        self.call("Page.navigate", url="about:blank")
        self.wait_for("location.href === 'about:blank'")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, as JSON can hold it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"not true after {_TIMEOUT_S:g} s: {expression}"
            time.sleep(0.02)

    def mouse(self, selector: str, *kinds: str) -> None:
        """Send mouse events of these kinds to the middle of the first element that matches."""
        place = self._middle(selector)
        for kind in kinds:
            button = {"button": "none"} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **button, **place)

    def click(self, selector: str) -> None:
        self.mouse(selector, "mouseMoved", "mousePressed", "mouseReleased")

    def tap(self, selector: str) -> None:
        """Touch the middle of the first element that matches, and lift the finger."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self._middle(selector)])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def choose(self, label: str, value: str) -> None:
        """Choose an option of the control with that label, as a reader would."""
        self.evaluate(
            "(() => { const control = [...document.querySelectorAll('.control')]"
            f".find((one) => one.firstChild.textContent === {json.dumps(label)}).lastChild;"
            f" control.value = {json.dumps(value)};"
            " control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input')); })()"
        )

    def complaints(self) -> list[str]:
        """Everything that a page without a fault does not do: messages, exceptions, refusals, dialogs."""
        self.evaluate("new Promise((done) => setTimeout(done, 50))")  # Let what is under way arrive.
        kinds = (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        )
        return [json.dumps(event) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Addresses that were asked for."""
        events = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in events]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save what can be seen, or the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser and the processes that it started."""
        for end in (self._to, self._from):
            os.close(end)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _middle(self, selector: str) -> dict[str, float]:
        return dict(
            self.evaluate(
                f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
                " one.scrollIntoView({block: 'center'}); const box = one.getBoundingClientRect();"
                " return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
            )
        )

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._unread:
            readable, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"Chromium did not answer within {_TIMEOUT_S:g} s"
            piece = os.read(self._from, 1 << 16)
            assert piece, "Chromium has ended"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for end in (read, write)]
    for end in (read, write):
        os.close(end)
    return moved[0], moved[1]

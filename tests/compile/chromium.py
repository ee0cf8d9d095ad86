"""A headless Chromium that a test looks at pages with, over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--force-color-profile=srgb --remote-debugging-pipe"
).split()


class Browser:
    """One page. problems: what its console complained of."""

    def __init__(self, write: int, read: int):
        self._write, self._read, self._rest = write, read, b""
        self._number = 0
        self.problems: list[str] = []
        self.loads: list[str] = []
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        told = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = told["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int = 900, mobile: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=path.resolve().as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() "
                 ": addEventListener('load', done))")  # fmt: skip
        self.frames()

    def frames(self) -> None:
        """Let what was asked for be drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        told = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, button: str = "none") -> None:
        held = {"clickCount": 1, "button": button} if button != "none" else {}
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held,
                 buttons=int(button == "left" and kind != "mouseReleased"))  # fmt: skip

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def ask(self, method: str, **given: Any) -> Any:
        return self._ask(method, given, self._session)

    def _ask(self, method: str, given: dict[str, Any], session: str | None = None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (told := self._next()).get("id") != self._number:
            self._note(told)
        assert "error" not in told, (method, told["error"])
        return told["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, "chromium has gone"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def _note(self, told: dict[str, Any]) -> None:
        method, given = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(given["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.problems.append(str(given["args"]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.problems.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.loads.append(given["request"]["url"])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in the folder; skips without one."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium")
    ours, theirs = os.pipe(), os.pipe()  # what it reads, what it writes

    def wire() -> None:
        """Chromium reads from descriptor 3 and writes to 4."""
        reads, writes = os.dup(ours[0]), os.dup(theirs[1])
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    child = subprocess.Popen(
        [program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"], preexec_fn=wire,
        close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(ours[0])
    os.close(theirs[1])
    try:
        yield Browser(ours[1], theirs[0])
    finally:
        child.terminate()
        child.wait(10)
        os.close(ours[1])
        os.close(theirs[0])

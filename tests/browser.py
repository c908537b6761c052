"""A headless Chromium, driven over a pipe by the DevTools protocol: pages as a person at a screen would get them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# What a page looks like once all its sounds are known: how long they are, what sticks out, in which colours.
LOOK = """(async () => {
  const players = [...document.querySelectorAll("audio")];
  const ready = player => player.readyState >= 1 ||
    new Promise(done => player.addEventListener("loadedmetadata", done));
  await Promise.all(players.map(ready));
  const wide = [...document.querySelectorAll("body *")].filter(element =>
    !element.closest(".table, svg, .chart") && element.getBoundingClientRect().right > innerWidth + 1);
  return {
    durations: players.map(player => player.duration),
    widths: players.map(player => player.getBoundingClientRect().width),
    pictures: [...document.images].map(image => image.naturalWidth),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide: wide.map(element => element.outerHTML.slice(0, 80)),
    colours: [document.body, document.querySelector("h1")].map(e => [
      getComputedStyle(e).backgroundColor, getComputedStyle(e).color]),
  };
})()"""
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --mute-audio "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe --hide-scrollbars "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"  # a microphone that beeps
).split()


class Browser:
    """One page. `problems` collects what the console says, exceptions, and what the page tried to load and could not.

    Args:
      process: the browser.
      write, read: descriptors that messages go to and come from.
    """

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int):
        self._process, self._write, self._read = process, write, read
        self._buffer, self._number, self._session = b"", 0, None
        self.problems: list[str] = []
        self._loaded = False
        self._home = "file:"  # what a page may ask for
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser is silent")
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, event = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.problems.append(str(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(event["entry"]))
        elif method == "Network.requestWillBeSent" and not event["request"]["url"].startswith(("data:", self._home)):
            self.problems.append(f"asks for {event['request']['url']}")
        return message

    def open(self, page: Path | str, *, width: int = 1_200, height: int = 900, dark: bool = False) -> None:
        """Opens a file, or an address of this machine, as a phone if it is narrow, and waits until it has loaded."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded, self._home = False, page if isinstance(page, str) else "file:"
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not self._loaded:
            self._next()

    def evaluate(self, script: str) -> Any:
        """What a script gives, or what its promise does; as if a person had just clicked."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile in `folder`; skips the test where there is no Chromium."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on the path (Debian: apt-get install chromium)")
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()

    def give() -> None:  # the browser reads from descriptor 3 and writes to 4
        read, write = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(read, 3)
        os.dup2(write, 4)

    command = [
        found,
        *_FLAGS,
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={folder / 'profile'}",
    ]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            command, preexec_fn=give, close_fds=False, stdout=log, stderr=log, start_new_session=True
        )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(process, ours_out, ours_in)
    finally:
        os.close(ours_out)
        os.close(ours_in)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

"""Headless Chromium through its DevTools pipe, with the standard library alone.

One browser serves many pages. It can reach no network, and what a page asks for, says on its
console, throws or is refused by its policy is kept in `Tab.events`.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"),
    # Not even a name is looked up.
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", "about:blank"),
)
_SECONDS = 60


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """A running Chromium; a context manager."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4. Copies far above both, so
        # that neither of the pipe's own numbers is overwritten while they are put in place.
        self.output = os.open(profile / "output.txt", os.O_WRONLY | os.O_CREAT, 0o600)
        self.pid = os.posix_spawn(
            program,
            [program, f"--user-data-dir={profile / 'profile'}", *_ARGUMENTS],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, to_browser, 103),
                (os.POSIX_SPAWN_DUP2, from_browser, 104),
                (os.POSIX_SPAWN_DUP2, 103, 3),
                (os.POSIX_SPAWN_DUP2, 104, 4),
                (os.POSIX_SPAWN_CLOSE, 103),
                (os.POSIX_SPAWN_CLOSE, 104),
                (os.POSIX_SPAWN_DUP2, self.output, 1),
                (os.POSIX_SPAWN_DUP2, self.output, 2),
            ],
            setsid=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.rest, self.number = b"", 0
        self.tabs: dict[str, Tab] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.write_end)
        os.close(self.read_end)
        os.close(self.output)
        try:
            os.killpg(self.pid, signal.SIGKILL)
        finally:
            os.waitpid(self.pid, 0)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a DevTools method and return its answer; events on the way go to their tabs."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_end, data) :]
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        """Return the next message; an event is also kept by the tab that it is of."""
        until = time.monotonic() + _SECONDS
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read_end], [], [], max(0, until - time.monotonic()))
            data = os.read(self.read_end, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("Chromium says nothing any more.")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        tab = self.tabs.get(message.get("sessionId", ""))
        if tab is not None and "method" in message:
            tab.events.append((message["method"], message["params"]))
        return message

    def open(self, page: Path, *, scripts: bool = True, policy: bool = True) -> Tab:
        """Open a file in a tab and wait until it has loaded; as if without scripts, or policy."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        answer = self.call("Target.attachToTarget", targetId=target, flatten=True)
        tab = Tab(self, target, answer["sessionId"])
        self.tabs[tab.session] = tab
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(1280)
        tab.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        tab.call("Page.setBypassCSP", enabled=not policy)
        tab.call("Page.navigate", url=page.as_uri())
        while not tab.saw("Page.loadEventFired"):
            self.receive()
        return tab


class Tab:
    """A page in the browser.

    Attributes
    ----------
    events : list of (str, dict)
        What DevTools reported of the page, in order.
    """

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.browser, self.target, self.session = browser, target, session
        self.events: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def saw(self, method: str) -> list[dict[str, Any]]:
        """Return the events of a kind so far."""
        return [event for name, event in self.events if name == method]

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page, which its policy does not hinder."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def emulate(self, medium: str = "", **features: str) -> None:
        """Set the medium, such as print, and features, such as prefers_color_scheme="dark"."""
        chosen = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", media=medium, features=chosen)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key, as a keyboard does."""
        known = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **known)
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def troubles(self) -> list[str]:
        """Return what the console, exceptions and refusals of the policy said."""
        self.evaluate("new Promise(done => setTimeout(done, 20))")
        return [
            *(str(event["entry"]["text"]) for event in self.saw("Log.entryAdded")),
            *(str(event["args"]) for event in self.saw("Runtime.consoleAPICalled")),
            *(str(event["exceptionDetails"]) for event in self.saw("Runtime.exceptionThrown")),
        ]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for, but for those inside the page."""
        asked = [str(e["request"]["url"]) for e in self.saw("Network.requestWillBeSent")]
        return [url for url in asked if not url.startswith("data:")]

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Save the page as a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """Return the page as it is printed on A4."""
        answer = self.call(
            "Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False
        )
        return base64.b64decode(answer["data"])

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

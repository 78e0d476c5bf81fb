"""The server's page in a real browser: asks something, looks for coloured tokens and figures, and takes pictures.

    python bench/page.py --out /tmp/page            # needs Chromium
    python bench/page.py --model mimo-nano

At a desktop's and a phone's width: types a prompt, presses the button, waits for the comparison with plain decoding, and
checks that drafts of more than one depth are coloured, that the figures are there, that both texts are the same, and that
nothing is wider than the window. The pictures are for people to look at.
"""

import asyncio
import base64
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

import click
import websockets
from common import ROOT, conditions, require_commit, run

from mtp_engine.config import DEFAULT_MODEL

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
ASK = """
(() => {
  document.getElementById("compare").checked = true;
  document.getElementById("tokens").value = "60";
  document.getElementById("prompt").value = "Why is the sky blue?";
  document.getElementById("send").click();
})()
"""
FOUND = """
var distinct = (of) => [...new Set([...document.querySelectorAll(".answer .token[data-depth]")].map(of))];
JSON.stringify({
  verdict: document.querySelector(".verdict")?.textContent ?? "",
  failed: [...document.querySelectorAll(".failed")].map((each) => each.textContent),
  tokens: document.querySelectorAll(".answer .token").length,
  depths: distinct((each) => each.dataset.depth).sort(),
  colours: distinct((each) => getComputedStyle(each).backgroundColor),
  stats: [...document.querySelectorAll(".stats")].map((each) => each.textContent),
  model: document.getElementById("model").textContent,
  overflow: document.documentElement.scrollWidth - window.innerWidth,
})
"""


@final
class Browser:
    """A tab, spoken to over the DevTools protocol."""

    def __init__(self, channel: Any) -> None:
        self._channel, self._number = channel, 0

    async def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        await self._channel.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            reply = json.loads(await self._channel.recv())
            if reply.get("id") == self._number:
                if "error" in reply:
                    raise SystemExit(f"{method}: {reply['error']['message']}")
                return reply["result"]

    async def evaluate(self, expression: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=expression))["result"].get("value")


@contextmanager
def process(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield started
    finally:
        started.terminate()
        started.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def get(url: str) -> Any:
    """What is there, as soon as it is."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return json.loads(reply.read() or b"null")
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"nothing answers at {url}")


async def look(
    devtools: str, page: str, size: tuple[int, int], picture: Path, *, phone: bool, dark: bool
) -> dict[str, Any]:
    async with websockets.connect(devtools, max_size=None) as channel:
        tab = Browser(channel)
        await tab.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=phone
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await tab.call("Emulation.setEmulatedMedia", features=scheme)
        await tab.call("Page.navigate", url=page)
        await asyncio.sleep(1)
        await tab.evaluate(ASK)
        found: dict[str, Any] = {}
        for _ in range(300):
            await asyncio.sleep(0.2)
            found = json.loads(await tab.evaluate(FOUND))
            if found["verdict"] or found["failed"]:
                break
        shot = await tab.call("Page.captureScreenshot", format="png")
        picture.write_bytes(base64.b64decode(shot["data"]))
        return found


def right(found: dict[str, Any]) -> bool:
    figures = re.compile(r"[\d.]+ tokens a step · [\d.]+ tokens/s · \d+ tokens in \d+ steps")
    return (
        "the same text" in found["verdict"]
        and not found["failed"]
        and len(found["depths"]) > 1
        and len(found["colours"]) == len(found["depths"])
        and len(found["stats"]) == 2
        and all(map(figures.match, found["stats"]))
        and found["overflow"] <= 0
    )


@click.command()
@click.option("--model", default=DEFAULT_MODEL)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Where the pictures go.")
@click.option("--browser", default="chromium")
def main(model: str, out: Path | None, browser: str) -> None:
    commit = require_commit()
    port, debugging = free_port(), free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out = out or folder
        out.mkdir(parents=True, exist_ok=True)
        serve = [sys.executable, "-m", "mtp_engine.cli", "serve", "--model", model, "--port", str(port), "--quiet"]
        stack.enter_context(process(serve))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        stack.enter_context(process([browser, *flags, f"--remote-debugging-port={debugging}", "about:blank"]))
        get(f"http://127.0.0.1:{port}/version")
        seen = {}
        for name, size in SIZES.items():
            tabs = get(f"http://127.0.0.1:{debugging}/json")
            devtools = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            picture = out / f"{name}.png"
            work = look(
                devtools, f"http://127.0.0.1:{port}/", size, picture, phone=name == "phone", dark=name == "phone"
            )
            seen[name] = asyncio.run(work)
    passed = {name: right(found) for name, found in seen.items()}
    click.echo(json.dumps({"bench": "page", "model": model, "right": passed, "seen": seen, **conditions(commit)}))
    raise SystemExit(not all(passed.values()))


if __name__ == "__main__":
    run(main)

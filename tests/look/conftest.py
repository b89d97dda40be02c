"""Checkpoints to look at, and a headless browser, driven through its debugging port with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from weightsmith.weights import Weights

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def program() -> str | None:
    """The browser's path, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Socket:
    """The part of the WebSocket protocol that a client of one local server needs."""

    def __init__(self, host: str, port: int, path: str):
        self._socket = socket.create_connection((host, port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        self._file = self._socket.makefile("rb")
        assert b" 101 " in self._file.readline()
        while self._file.readline().strip():
            pass

    def send(self, text: str) -> None:
        data, mask = text.encode(), os.urandom(4)
        size = len(data)
        length = struct.pack("!B", 0x80 | size) if size < 126 else struct.pack("!BH", 0xFE, size)
        if size > 0xFFFF:
            length = struct.pack("!BQ", 0xFF, size)
        stretched = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(data, "big") ^ int.from_bytes(stretched, "big")).to_bytes(size, "big")
        self._socket.sendall(b"\x81" + length + mask + masked)

    def receive(self) -> str:
        whole = b""
        while True:
            first, second = self._file.read(2)
            size = second & 0x7F
            if size >= 126:
                size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
            data = self._file.read(size)
            if first & 0x0F <= 1:  # text, or more of it
                whole += data
                if first & 0x80:
                    return whole.decode()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Browser:
    """A browser with one page; everything the page complains of is in ``complaints``."""

    def __init__(self, width: int = 1280, height: int = 800, dark: bool = False):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        flags += ["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]
        flags += [f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(
            [program() or "", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.complaints: list[str] = []
        self._number = 0
        port = self._port()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            page = next(one for one in json.load(answer) if one["type"] == "page")
        self._socket = Socket("127.0.0.1", port, "/" + page["webSocketDebuggerUrl"].split("/", 3)[3])
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.shape(width, height, dark)

    def _port(self) -> int:
        place = Path(self._folder.name) / "DevToolsActivePort"
        for _ in range(600):
            if place.exists() and (lines := place.read_text().splitlines()):
                return int(lines[0])
            assert self._process.poll() is None, "the browser ended at once"
            time.sleep(0.05)
        raise TimeoutError("the browser did not open its debugging port")

    def shape(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window, and whether the reader prefers a dark page."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the debugging protocol, and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.receive())
            self._hear(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _hear(self, message: dict[str, Any]) -> None:
        what, told = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"])[:2000])
        elif what == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif what == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(told["args"])[:2000])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript (awaited, if it is a promise)."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < end, f"never true: {expression}; complaints: {self.complaints}"
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        """A key on the keyboard, by its DOM name."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **({"text": text} if text else {}))

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: str | Path, whole: bool = False) -> None:
        """The page as a PNG file."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
        except (OSError, ValueError, AssertionError):
            self._process.terminate()
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


@pytest.fixture
def browser():
    """A headless browser; the test is skipped where there is none."""
    if program() is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    with Browser() as one:
        yield one


@pytest.fixture
def first():
    """Two layers, a tie, a NaN, codes, a name that is markup, and files."""
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(20, 8, generator=generator)
    tensors = {"model.embed.weight": embed}
    for layer in range(2):
        tensors[f"model.layers.{layer}.up.weight"] = torch.randn(16, 8, generator=generator).bfloat16()
        tensors[f"model.layers.{layer}.norm.weight"] = torch.ones(8)
    tensors |= {"head.weight": embed, "broken": torch.tensor([1.0, float("nan"), float("inf"), 0.0])}
    tensors |= {"<img src=x onerror=alert(1)>.steps": torch.tensor(3), "empty": torch.zeros(0, 4)}
    files = {"config.json": b'{"a": "<script>alert(1)</script>"}', "vocab.dat": b"\0\1"}
    return Weights.of(tensors).with_files(files)


@pytest.fixture
def second(first):
    """The same with one matrix moved, one of another shape, one gone and one new."""
    moved = first["model.layers.1.up.weight"].float() * 1.5
    other = {"model.layers.1.up.weight": moved.bfloat16(), "broken": torch.ones(5), "new": torch.ones(2)}
    return first.drop("*.steps") | other

"""``weightsmith look``: the address, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import weightsmith
from weightsmith.cli import _look
from weightsmith.weights import Weights

SOURCE = str(Path(weightsmith.__file__).parents[1])


@pytest.fixture
def started():
    """The command in a process of its own, and its first line."""
    running = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "weightsmith", "look", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": SOURCE},
        )
        running.append(process)
        return process, process.stdout.readline()

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_json_and_a_clean_end(started, model, tuned, sent):
    process, line = started(model, tuned, "--json")
    found = json.loads(line)
    assert found["url"] == f"http://127.0.0.1:{found['port']}/?token={found['token']}"
    asked = urllib.request.Request(
        f"http://127.0.0.1:{found['port']}/api/checkpoints", headers={"Authorization": f"Bearer {found['token']}"}
    )
    with urllib.request.urlopen(asked, timeout=20) as answer:
        titles = [one["title"] for one in json.load(answer)["checkpoints"]]
    assert titles == [str(model), str(tuned)]
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_it_ends_while_it_computes(started, tmp_path):
    generator = torch.Generator().manual_seed(0)
    Weights.of({"w": torch.randn(2500, 2500, generator=generator)}).save(tmp_path / "wide.npz")
    process, line = started(tmp_path / "wide.npz", "--json")
    found = json.loads(line)
    asked = urllib.request.Request(
        f"http://127.0.0.1:{found['port']}/api/tensor?of=0&tensor=0&kind=spectrum",
        headers={"Authorization": f"Bearer {found['token']}"},
    )
    for _ in range(200):
        with urllib.request.urlopen(asked, timeout=20) as answer:
            state = json.load(answer)
        if state.get("total") and state["done"] == state["total"]:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0


def test_words(started, model):
    process, line = started(model, "--no-browser")
    assert line == f"{model}: 4 tensors, 928 B\n"
    while "http" not in (line := process.stdout.readline()):
        assert line
    assert line.strip().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "stopped\n"
    assert process.returncode == 0


def test_trouble(run, tmp_path):
    assert run("look", tmp_path / "nowhere")[0] == 2
    assert run("look")[0] == 2
    assert run("look", tmp_path, "--port", 70000)[0] == 2


def test_a_browser_needs_a_desktop(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_look.sys, "platform", "linux")
    assert not _look.has_desktop()
    monkeypatch.setenv("DISPLAY", ":0")
    assert _look.has_desktop()
    monkeypatch.setattr(_look.sys, "platform", "darwin")
    assert _look.has_desktop()
    monkeypatch.setenv("SSH_CONNECTION", "1 2 3 4")
    assert not _look.has_desktop()

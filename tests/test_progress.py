"""Progress: every byte is counted once, by whoever listens."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
import torch

from weightsmith import progress
from weightsmith.weights import Weights, open


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_listener_hears_the_end() -> None:
    events: list[progress.Event] = []
    with progress.listening(events.append), progress.task("work", 10) as advance:
        for _ in range(10):
            advance(1)
    assert (events[-1].label, events[-1].done, events[-1].total, events[-1].unit) == ("work", 10, 10, "steps")
    assert [event.done for event in events] == sorted(event.done for event in events)


def test_reports_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[progress.Event] = []
    with progress.listening(events.append), progress.task("work", 100_000) as advance:
        for _ in range(99_999):
            advance(1)
        assert len(events) < 50
        advance(1)
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    events.clear()
    with progress.listening(events.append), progress.task("work", 5) as advance:
        for _ in range(5):
            advance(1)
    assert [event.done for event in events] == [1, 2, 3, 4, 5]


def test_threads_lose_nothing_and_never_talk_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    inside, seen = threading.Lock(), []

    def listen(event: progress.Event) -> None:
        assert inside.acquire(blocking=False)
        seen.append(event.done)
        inside.release()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with progress.listening(listen), progress.task("work", 8000) as advance:
            threads = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert seen == list(range(1, 8001))


def test_saving_counts_every_byte_once(tmp_path: Path) -> None:
    weights = Weights.of(
        {"a": torch.ones(3000), "b": torch.ones(5, dtype=torch.int8), "tied": (t := torch.ones(7)), "to": t}
    )
    for threads in (1, 3):
        events: list[progress.Event] = []
        with progress.listening(events.append):
            weights.save(tmp_path / f"{threads}.safetensors", threads=threads)
        assert events[-1].done == events[-1].total == weights.nbytes == 12033
        assert events[-1].unit == "bytes"
        assert str(threads) in events[-1].label
    assert open(tmp_path / "1.safetensors").ties == {"to": "tied"}


def test_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.task("work", 2) as advance:
        advance(2)
    captured = capsys.readouterr()
    assert captured.out + captured.err == "", "nothing is said where there is no terminal"
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "MOMENT", 0.0)
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    with progress.silent(), progress.task("work", 2) as advance:
        advance(1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("unit", ["bytes", "steps"])
def test_a_bar_on_a_terminal(unit: progress.Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    with progress.task("quick", 2, unit) as advance:
        advance(1)
        advance(1)
    assert terminal.getvalue() == "", "what is over in a moment shows no bar"
    monkeypatch.setattr(progress, "MOMENT", 0.0)
    with progress.task("slow work", 3000, unit) as advance:
        for _ in range(3):
            advance(1000)
    assert "slow work" in terminal.getvalue()


def test_listeners_are_restored() -> None:
    outer: list[progress.Event] = []
    with progress.listening(outer.append):
        with pytest.raises(RuntimeError), progress.silent():
            raise RuntimeError
        with progress.task("after", 1) as advance:
            advance(1)
    assert [event.label for event in outer] == ["after"]

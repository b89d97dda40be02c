"""One small hook through which every long loop says how far it is.

On a terminal a bar is drawn for work that takes longer than a moment; elsewhere nothing is said.
A program that wants to know more sets a listener::

    with weightsmith.progress.listening(lambda event: print(event.label, event.done, event.total)):
        weights.save("out")
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

MOMENT = 1.0  # seconds before a bar appears
OFTEN = 0.1  # seconds between two reports

Unit = Literal["bytes", "steps"]


@dataclass(frozen=True)
class Event:
    """How far a task is."""

    label: str
    done: int
    total: int
    unit: Unit
    seconds: float


Listener = Callable[[Event], None]
_listener: ContextVar[Listener | None] = ContextVar("weightsmith_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send progress to ``listener`` instead of a bar."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def silent() -> Iterator[None]:
    """No bars and no events."""
    with listening(lambda event: None):
        yield


@contextmanager
def task(label: str, total: int, unit: Unit = "steps") -> Iterator[Callable[[int], None]]:
    """Yields ``advance(amount)`` for a loop of ``total`` steps or bytes."""
    listener = _listener.get()
    bar = None if listener is not None or not sys.stderr.isatty() else _Bar()
    report = listener or bar or (lambda event: None)
    started = last = time.monotonic()
    done = 0
    lock = threading.Lock()  # workers advance side by side; a listener is never called twice at once

    def advance(amount: int) -> None:
        nonlocal done, last
        with lock:
            done += amount
            now = time.monotonic()
            if now - last >= OFTEN or done >= total:
                last = now
                report(Event(label, done, total, unit, now - started))

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    """A rich progress bar that appears once a task has lasted a moment."""

    def __init__(self) -> None:
        self._progress = None
        self._task = None

    def __call__(self, event: Event) -> None:
        if self._progress is None:
            if event.seconds < MOMENT or event.done >= event.total:
                return
            self._open(event)
        self._progress.update(self._task, completed=event.done)  # type: ignore[union-attr,arg-type]

    def _open(self, event: Event) -> None:
        from rich import progress
        from rich.console import Console

        amount = (
            [progress.DownloadColumn(), progress.TransferSpeedColumn()]
            if event.unit == "bytes"
            else [progress.MofNCompleteColumn()]
        )
        columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *amount]
        self._progress = progress.Progress(
            *columns, progress.TimeRemainingColumn(), console=Console(stderr=True), transient=True
        )
        self._task = self._progress.add_task(event.label, total=event.total)
        self._progress.start()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

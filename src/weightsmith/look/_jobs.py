"""Computations that somebody waits for: few at once, the rest in line, each can be called off."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, field
from typing import Literal

from weightsmith import progress
from weightsmith.errors import Error

AT_ONCE = 2
"""Computations at a time."""

MOST_WAITING = 64
"""Computations in line; more are refused."""

MEMORY = 2**31
"""Bytes that the computations under way may need together; one that alone needs more is refused."""

KEPT = 2**25
"""Bytes of results that are kept for who asks again."""

MOST_KEPT = 10_000
"""Results, however small (a failure is one)."""

PATIENCE = 120.0
"""Seconds after which a computation that nobody has asked about is called off."""

Work = Generator[None, None, bytes]
"""A computation. Where it yields, others that are more urgent go first."""


class Stopped(Exception):
    """The computation was called off."""


class Busy(Error):
    """Too much is in line already."""


@dataclass
class Job:
    """One computation, and how far it is."""

    key: Hashable
    work: Work
    cost: int
    patient: bool
    """Goes behind all that are not."""
    number: int
    state: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    done: int = 0
    total: int = 0
    label: str = ""
    result: bytes = b""
    error: Exception | None = None
    stopping: bool = False
    asked: float = field(default_factory=time.monotonic)

    def heard(self, event: progress.Event) -> None:
        """Called while the work goes on; ends it where it was called off."""
        if self.stopping:
            raise Stopped
        self.label, self.done, self.total = event.label, event.done, event.total


class Jobs:
    """Runs computations on `AT_ONCE` threads and keeps their results within a budget.

    >>> def work():
    ...     return b"42"
    ...     yield
    >>> jobs = Jobs()
    >>> while (job := jobs.ask("answer", work)).state != "done":
    ...     time.sleep(0.01)
    >>> job.result
    b'42'
    >>> jobs.stop()
    """

    def __init__(self, memory: int = MEMORY, kept: int = KEPT):
        self.memory, self.kept = memory, kept
        self._active: dict[Hashable, Job] = {}
        self._over: OrderedDict[Hashable, Job] = OrderedDict()
        self._held = 0  # bytes of results in _over
        self._using = 0  # bytes that running jobs need
        self._working = 0  # threads that compute
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._closed = False
        for index in range(AT_ONCE):
            threading.Thread(target=self._serve, name=f"look-{index}", daemon=True).start()

    def ask(self, key: Hashable, work: Callable[[], Work], cost: int = 0, patient: bool = False) -> Job:
        """The job of this key: finished lately, under way, or begun now.

        Raises:
            Error: it needs more memory than there is for all of them.
            Busy: too many are in line.
        """
        with self._changed:
            over = self._over.get(key)
            if over is not None:
                self._over.move_to_end(key)
                if over.state == "failed":
                    self._forget(key)  # told once; who asks again has it tried again
                return over
            job = self._active.get(key)
            if job is None or job.stopping:
                if cost > self.memory:
                    needed = f"{cost / 2**30:.1f} GiB at once; the page computes with {self.memory / 2**30:.1f} GiB"
                    raise Error(f"this needs {needed}. `weightsmith show --spectra --pattern NAME` has no such limit")
                if len(self._active) >= MOST_WAITING:
                    raise Busy("too many computations are in line; wait, or call some off")
                job = self._active[key] = Job(key, work(), cost, patient, next(self._numbers))
                self._changed.notify_all()
            job.asked = time.monotonic()
            return job

    def place(self, job: Job) -> int:
        """How many are before it in line."""
        with self._changed:
            rank = (job.patient, job.number)
            return sum(one.state == "waiting" and (one.patient, one.number) < rank for one in self._active.values())

    def cancel(self, number: int) -> bool:
        """Call a job off; whether it was there. One that computes ends at its next chunk."""
        with self._changed:
            job = next((one for one in self._active.values() if one.number == number), None)
            if job is not None:
                self._call_off(job)
            return job is not None

    def sweep(self) -> None:
        """Call off what nobody has asked about for long."""
        with self._changed:
            for job in list(self._active.values()):
                if time.monotonic() - job.asked > PATIENCE:
                    self._call_off(job)

    def stop(self) -> None:
        """Call everything off; nothing is begun any more."""
        with self._changed:
            self._closed = True
            for job in list(self._active.values()):
                self._call_off(job)
            self._changed.notify_all()

    def idle(self, seconds: float) -> bool:
        """Whether nothing is computed any more, after so many seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._working, seconds)

    def _call_off(self, job: Job) -> None:
        job.stopping = True
        if job.state == "waiting":
            job.state = "stopped"
            self._active.pop(job.key, None)

    def _next(self) -> Job | None:
        waiting = [job for job in self._active.values() if job.state == "waiting"]
        for job in sorted(waiting, key=lambda job: (job.patient, job.number)):
            if not self._working or self._using + job.cost <= self.memory:
                return job
        return None

    def _serve(self) -> None:
        while True:
            with self._changed:
                while (job := self._next()) is None and not self._closed:
                    self._changed.wait()
                if self._closed or job is None:
                    return
                job.state = "running"
                self._using += job.cost
                self._working += 1
            result, error = self._step(job)
            with self._changed:
                self._using -= job.cost
                self._working -= 1
                if result is None and error is None and not job.stopping:
                    job.state = "waiting"  # it yielded
                else:
                    self._finish(job, result, error)
                self._changed.notify_all()

    def _step(self, job: Job) -> tuple[bytes | None, Exception | None]:
        try:
            with progress.listening(job.heard):
                next(job.work)
        except StopIteration as finished:
            return finished.value, None
        except Exception as error:
            return None, error
        return None, None

    def _finish(self, job: Job, result: bytes | None, error: Exception | None) -> None:
        if self._active.get(job.key) is job:
            del self._active[job.key]
        job.work.close()
        if result is not None:
            job.state, job.result = "done", result
        elif job.stopping:
            job.state = "stopped"
            return
        else:
            job.state, job.error = "failed", error
            if error is not None:
                traceback.clear_frames(error.__traceback__)  # they hold what was read
        self._forget(job.key)
        self._over[job.key] = job
        self._held += len(job.result)
        while (self._held > self.kept or len(self._over) > MOST_KEPT) and len(
            self._over
        ) > AT_ONCE:  # who waits for the newest must find it
            self._forget(next(iter(self._over)))

    def _forget(self, key: Hashable) -> None:
        job = self._over.pop(key, None)
        if job is not None:
            self._held -= len(job.result)

"""Computations in line: how many at once, who goes first, who is called off."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from weightsmith import progress
from weightsmith.errors import Error
from weightsmith.look import _jobs
from weightsmith.look._jobs import Busy, Jobs


@pytest.fixture
def jobs():
    made = Jobs()
    yield made
    made.stop()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Gate:
    """Work that waits to be let through."""

    def __init__(self, result=b"x"):
        self.begun, self.open, self.result = threading.Event(), threading.Event(), result

    def __call__(self):
        self.begun.set()
        self.open.wait(10)
        return self.result
        yield


def test_two_at_a_time_and_the_rest_in_order(jobs):
    gates = [Gate() for _ in range(5)]
    asked = [jobs.ask(i, gate) for i, gate in enumerate(gates)]
    until(lambda: gates[0].begun.is_set() and gates[1].begun.is_set())
    time.sleep(0.05)
    assert [job.state for job in asked] == ["running", "running", "waiting", "waiting", "waiting"]
    assert [jobs.place(job) for job in asked[2:]] == [0, 1, 2]
    gates[1].open.set()
    until(gates[2].begun.is_set)
    assert not gates[3].begun.is_set()
    for gate in gates:
        gate.open.set()
    until(lambda: all(job.state == "done" for job in asked))


def test_a_result_is_computed_once(jobs):
    calls = []

    def work():
        calls.append(1)
        return b"result"
        yield

    until(lambda: jobs.ask("key", work).state == "done")
    assert jobs.ask("key", work).result == b"result"
    assert len(calls) == 1


def test_results_are_kept_within_a_budget():
    jobs = Jobs(kept=1000)
    for index in range(10):
        until(lambda index=index: jobs.ask(index, Gate2(300)).state == "done")
    assert jobs._held <= 1000
    assert list(jobs._over) == [7, 8, 9]
    until(lambda: jobs.ask("large", Gate2(5000)).state == "done")  # found by who waits for it all the same
    jobs.stop()


class Gate2:
    def __init__(self, size):
        self.size = size

    def __call__(self):
        return b"x" * self.size
        yield


def test_what_waits_is_called_off_at_once(jobs):
    gates = [Gate() for _ in range(3)]
    asked = [jobs.ask(i, gate) for i, gate in enumerate(gates)]
    assert jobs.cancel(asked[2].number)
    assert asked[2].state == "stopped"
    assert not jobs.cancel(asked[2].number)
    for gate in gates:
        gate.open.set()
    until(lambda: asked[1].state == "done")
    assert not gates[2].begun.is_set()


def test_what_runs_is_called_off_at_its_next_step(jobs):
    reached = []

    def work():
        with progress.task("long", 1000) as advance:
            for step in range(1000):
                time.sleep(0.02)
                advance(1)
                reached.append(step)
        return b""
        yield

    job = jobs.ask("long", work)
    until(lambda: job.done > 0)
    assert (job.label, job.total) == ("long", 1000)
    jobs.cancel(job.number)
    until(lambda: job.state == "stopped")
    assert len(reached) < 100
    assert jobs.ask("long", Gate2(1)) is not job  # and can be asked for again


def test_the_patient_let_others_go_first(jobs):
    order, go = [], threading.Event()

    def survey():
        for step in range(6):
            go.wait(10)
            time.sleep(0.02)
            order.append(step)
            yield
        return b""

    def urgent():
        order.append("urgent")
        return b""
        yield

    patient = [jobs.ask(f"survey {i}", survey, patient=True) for i in range(2)]
    until(lambda: all(job.state == "running" for job in patient))
    asked = jobs.ask("urgent", urgent)
    go.set()
    until(lambda: all(job.state == "done" for job in (asked, *patient)))
    assert order.index("urgent") <= 2


def test_errors_are_told_once_and_tried_again(jobs):
    def work():
        raise ValueError("no")
        yield

    job = jobs.ask("key", work)
    until(lambda: job.state == "failed")
    assert str(jobs.ask("key", work).error) == "no"
    until(lambda: jobs.ask("key", Gate2(1)).state == "done")


def test_a_failure_holds_nothing_of_what_was_read(jobs):
    class Large:
        pass

    held = []

    def work():
        large = Large()
        held.append(weakref.ref(large))
        raise ValueError("no")
        yield

    until(lambda: jobs.ask("key", work).state == "failed")
    assert [one() for one in held] == [None]


def test_failures_that_nobody_asks_about_again_are_forgotten(monkeypatch):
    monkeypatch.setattr(_jobs, "MOST_KEPT", 5)
    jobs = Jobs()
    for index in range(12):
        until(lambda index=index: jobs.ask(index, Gate2(0)).state == "done")
    assert list(jobs._over) == [7, 8, 9, 10, 11]
    jobs.stop()


def test_memory():
    jobs = Jobs(memory=100)
    gates = [Gate(), Gate()]
    asked = [jobs.ask(i, gate, cost=60) for i, gate in enumerate(gates)]
    until(gates[0].begun.is_set)
    time.sleep(0.05)
    assert not gates[1].begun.is_set()
    gates[0].open.set()
    until(gates[1].begun.is_set)
    gates[1].open.set()
    until(lambda: asked[1].state == "done")
    with pytest.raises(Error, match="at once"):
        jobs.ask("large", Gate(), cost=101)
    jobs.stop()


def test_the_line_has_an_end(jobs, monkeypatch):
    monkeypatch.setattr(_jobs, "MOST_WAITING", 3)
    gates = [Gate() for _ in range(3)]
    for i, gate in enumerate(gates):
        jobs.ask(i, gate)
    with pytest.raises(Busy):
        jobs.ask("more", Gate())
    for gate in gates:
        gate.open.set()


def test_what_nobody_asks_about_is_called_off(jobs, monkeypatch):
    gates = [Gate() for _ in range(3)]
    asked = [jobs.ask(i, gate) for i, gate in enumerate(gates)]
    monkeypatch.setattr(_jobs, "PATIENCE", 0.05)
    jobs.sweep()
    assert asked[2].state == "waiting"
    time.sleep(0.1)
    jobs.sweep()
    assert asked[2].state == "stopped"
    for gate in gates:
        gate.open.set()


def test_idle(jobs):
    gate = Gate()
    job = jobs.ask("key", gate)
    until(gate.begun.is_set)
    assert not jobs.idle(0.05)
    jobs.stop()
    assert not jobs.idle(0.05)  # called off, and still at it
    gate.open.set()
    assert jobs.idle(5)
    assert job.state in ("done", "stopped")

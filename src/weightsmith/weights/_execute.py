"""Many small pieces of work on a few threads, with bounded memory.

A *job* is a generator: it yields lists of calls that may run side by side, is sent their results in
order, and yields again. So a method that must see all of a tensor before it can write any of it
reads like a straight line of code, while the pieces of several tensors share the threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from weightsmith.errors import Error
from weightsmith.weights._lazy import CHUNK, Lazy, Piece, Reduction, Scratch, all_nodes, entire_inputs, reductions_of


@dataclass
class Call:
    """A piece of work, and the bytes it holds while it runs. It is called with the seat of its thread."""

    function: Callable[[Any], Any]
    cost: int = 0


@dataclass
class Wait:
    """A job yields this to pause until another job has solved the reduction."""

    reduction: Reduction


Job = Generator[list[Call] | Wait, Any, None]


@dataclass
class _Running:
    job: Job
    results: list[Any] = field(default_factory=list)
    missing: int = 0


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Seat(Protocol):
    """What a thread keeps from call to call: its `Scratch`, or a process that works for it."""

    def next_unit(self) -> None: ...


def run(
    jobs: Iterable[Job],
    threads: int | None = None,
    memory: int | None = None,
    seats: Callable[[], Seat] = Scratch,
    stop: Callable[[], None] | None = None,
) -> None:
    """Drive jobs to their end. Jobs start in the given order, when the threads run short of calls.

    Args:
        jobs: an iterator is fine: it is advanced only when there is room.
        threads: workers; each computes with one PyTorch thread.
        memory: bytes that the calls under way may hold together. A call that alone needs more runs alone.
        seats: makes what each thread hands to its calls.
        stop: called after an error, so that the calls under way end soon.

    Raises:
        whatever a call raises first; the others are given up.
    """
    threads = threads or default_threads()
    local = threading.local()

    def work(call: Call) -> Any:
        if not hasattr(local, "seat"):
            local.seat = seats()
        try:
            return call.function(local.seat)
        finally:
            local.seat.next_unit()

    with _one_torch_thread_each(), ThreadPoolExecutor(threads, "weightsmith", _single) as pool:
        try:
            _drive(iter(jobs), lambda call: pool.submit(work, call), threads, memory)
        except BaseException:
            if stop is not None:
                stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _drive(jobs: Iterator[Job], submit: Callable[[Call], Future[Any]], threads: int, memory: int | None) -> None:
    ready: deque[tuple[_Running, int, Call]] = deque()
    parked: list[tuple[_Running, Reduction]] = []
    flying: dict[Future[Any], tuple[_Running, int, Call]] = {}
    held = 0
    more = True

    def advance(running: _Running, sent: Any) -> None:
        while True:
            try:
                step = running.job.send(sent)
            except StopIteration:
                return
            if isinstance(step, Wait):
                parked.append((running, step.reduction))
                return
            if step:
                running.results, running.missing = [None] * len(step), len(step)
                ready.extend((running, index, call) for index, call in enumerate(step))
                return
            sent = []

    while True:
        for waiting in [one for one in parked if one[1].done]:
            parked.remove(waiting)
            advance(waiting[0], None)
        while more and len(ready) < threads:
            job = next(jobs, None)
            if job is None:
                more = False
            else:
                advance(_Running(job), None)
        while ready and len(flying) < 2 * threads:
            cost = ready[0][2].cost
            if flying and memory is not None and held + cost > memory:
                break
            item = ready.popleft()
            held += cost
            flying[submit(item[2])] = item
        if not flying:
            if any(one[1].done for one in parked):
                continue
            if parked:
                raise RuntimeError("a job waits for a reduction that no job solves")
            return
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            running, index, call = flying.pop(future)
            held -= call.cost
            running.results[index] = future.result()
            running.missing -= 1
            if not running.missing:
                advance(running, running.results)


@contextmanager
def _one_torch_thread_each() -> Iterator[None]:
    # PyTorch keeps one number for threads yet to come; leave it as it was.
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _single() -> None:
    torch.set_num_threads(1)


Batched = Callable[[Sequence[Piece], int], list[Call]]
"""Pieces of a pass and the cost of each -> calls, each of which returns a list of totals."""


def solving(nodes: Iterable[Lazy], under_way: dict[int, Reduction], batched: Batched | None = None) -> Job:
    """The part of a job that makes sure all reductions under ``nodes`` are solved.

    ``under_way`` is shared by the jobs of a run: who finds a reduction there waits for it.
    """
    for node in nodes:
        for reduction in reductions_of(node):
            yield from _solve(reduction, under_way, batched)


def _solve(reduction: Reduction, under_way: dict[int, Reduction], batched: Batched | None = None) -> Job:
    if reduction.done:
        return
    if id(reduction) in under_way:
        yield Wait(reduction)
        return
    under_way[id(reduction)] = reduction
    cost = reduction_cost(reduction)
    passes = reduction.passes()
    calls = next(passes, None)
    while calls is not None:
        if batched is None:
            results = yield [Call(call, cost) for call in calls]
        else:
            results = [one for totals in (yield batched(calls, cost)) for one in totals]
        try:
            calls = passes.send(results)
        except StopIteration:
            calls = None


def solve_all(reductions: Iterable[Reduction], threads: int | None = None, memory: int | None = None) -> None:
    """Solve several reductions side by side (they may rest on others)."""
    under_way: dict[int, Reduction] = {}

    def job(reduction: Reduction) -> Job:
        yield from solving((node for item in reduction.items for node in item.nodes), under_way)
        yield from _solve(reduction, under_way)

    run((job(reduction) for reduction in reductions), threads, memory)


def reduction_cost(reduction: Reduction) -> int:
    """About how many bytes are held while one chunk of a pass is computed."""
    return max((sum(working_set(node) for node in all_nodes(item)) for item in reduction.items), default=0)


def working_set(node: Lazy) -> int:
    """About how many bytes are held while one chunk of ``node`` is computed."""
    leaves, stack, largest, entire, seen = 0, [node], 0, 0, set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        inner = list(item.inputs())
        leaves += not inner
        largest = max(largest, min(max(CHUNK, item.grain), max(item.spec.numel, 1)) * max(item.spec.dtype.itemsize, 4))
        entire += sum(whole.spec.numel * max(whole.spec.dtype.itemsize, 4) for whole in entire_inputs(item))
        stack += inner
    return largest * (leaves + 4) + entire


def as_bytes(size: int | str | None, option: str = "memory") -> int | None:
    """A size in bytes from a number or a word: ``"512MB"``, ``"5GB"``, ``"1GiB"``.

    >>> as_bytes("512MB"), as_bytes("1GiB"), as_bytes(7)
    (512000000, 1073741824, 7)
    """
    if size is None or isinstance(size, int):
        value = size
    elif not isinstance(size, str):
        raise Error(f"{option}: {size!r} is no size; write 5GB, 512MB, 1GiB or a whole number of bytes")
    else:
        word = size.strip().lower()
        digits = word.rstrip("bikmgt ")
        scale = word[len(digits) :].strip()
        scales = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
        scales |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)} | {p: 1000**i for i, p in enumerate("kmgt", 1)}
        try:
            value = int(float(digits) * scales[scale])
        except (ValueError, KeyError, OverflowError):
            raise Error(f"{option}: {size!r} is no size; write 5GB, 512MB, 1GiB or a number of bytes") from None
    if value is not None and value <= 0:
        raise Error(f"{option} must be positive, got {size!r}")
    return value

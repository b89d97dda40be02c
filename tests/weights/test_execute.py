"""The executor: order, errors, memory, and PyTorch's threads as they were."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.weights import Entire, Inputs, Reduction, Scratch, Spec, Weights, apply, as_bytes, solve_all
from weightsmith.weights._execute import Call, Job, Wait, default_threads, run, working_set
from weightsmith.weights._lazy import CHUNK, Pass


def calls(*functions: Callable[[], Any], cost: int = 0) -> list[Call]:
    return [Call(lambda scratch, f=f: f(), cost) for f in functions]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_back_in_order(threads: int) -> None:
    got: list[list[int]] = []

    def job(n: int) -> Job:
        def slow(i: int) -> int:
            time.sleep(0.001 * ((i * 7) % 5))
            return 10 * n + i

        first = yield calls(*(lambda i=i: slow(i) for i in range(8)))
        assert first == [10 * n + i for i in range(8)]
        assert (yield []) == []
        got.append((yield calls(lambda: sum(first))))

    run((job(n) for n in range(4)), threads)
    assert sorted(got) == [[sum(10 * n + i for i in range(8))] for n in range(4)]


@pytest.mark.parametrize("kind", [Error, ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_in_a_call_stops_the_others(kind: type[BaseException]) -> None:
    ran: list[int] = []

    def fail() -> None:
        time.sleep(0.01)
        raise kind("oh")

    def job(n: int) -> Job:
        yield calls(fail if n == 3 else lambda: ran.append(n))

    with pytest.raises(kind, match="oh"):
        run((job(n) for n in range(100_000)), 2)
    assert len(ran) < 50_000
    assert not [t for t in threading.enumerate() if t.name.startswith("weightsmith")]


def test_an_error_in_a_job_is_raised() -> None:
    def job() -> Job:
        yield calls(lambda: 1)
        raise Error("between")

    with pytest.raises(Error, match="between"):
        run([job()], 2)


def test_the_keyboard_stops_it() -> None:
    def job() -> Job:
        yield calls(*(lambda: time.sleep(0.01) for _ in range(3000)))

    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    began = time.monotonic()
    main = threading.main_thread().ident
    assert main
    timer = threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run([job()], 2)
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(("memory", "most"), [(100, 2), (250, 5), (49, 1), (None, 16), (1, 1)])
def test_memory_bounds_what_runs_together(memory: int | None, most: int) -> None:
    now = highest = 0
    lock = threading.Lock()

    def held() -> None:
        nonlocal now, highest
        with lock:
            now += 1
            highest = max(highest, now)
        time.sleep(0.002)
        with lock:
            now -= 1

    def job() -> Job:
        yield calls(*[held] * 10, cost=50)

    run((job() for _ in range(4)), 8, memory)
    assert 1 <= highest <= most
    if most > 1:
        assert highest > 1


def test_memory_is_given_back() -> None:
    met = []

    def pair() -> Job:
        meeting = threading.Barrier(2, timeout=20)  # passes only if both run at once
        yield calls(*[lambda: met.append(meeting.wait())] * 2, cost=50)

    run((pair() for _ in range(30)), 2, 100)
    assert len(met) == 60


def test_jobs_are_drawn_only_when_there_is_room() -> None:
    drawn = finished = 0

    def job() -> Job:
        nonlocal finished
        yield calls(lambda: None)
        finished += 1

    def all_jobs() -> Iterator[Job]:
        nonlocal drawn
        for _ in range(500):
            drawn += 1
            assert drawn - finished < 20
            yield job()

    run(all_jobs(), 2)
    assert (drawn, finished) == (500, 500)


def test_torch_threads_are_left_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        inside: list[int] = []

        def job() -> Job:
            yield calls(*(lambda: inside.append(torch.get_num_threads()) for _ in range(6)))

        run([job()], 2)
        assert inside == [1] * 6
        assert torch.get_num_threads() == 3

        def broken() -> Job:
            yield calls(lambda: 1 / 0)

        with pytest.raises(ZeroDivisionError):
            run([broken()], 2)
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


def test_each_thread_has_its_scratch_and_drops_what_it_kept() -> None:
    owners: dict[int, set[str]] = {}

    def call(scratch: Scratch) -> None:
        assert not scratch.memo
        assert not scratch.kept
        scratch.memo[1] = scratch.kept[1] = 1
        owners.setdefault(id(scratch), set()).add(threading.current_thread().name)
        time.sleep(0.001)

    def job() -> Job:
        yield [Call(call)] * 20

    run([job()], 3)
    assert all(len(names) == 1 for names in owners.values())


def slow_total(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)
    return x.sum()


def test_waiting_for_what_another_job_solves() -> None:
    node = Weights.of({"a": torch.ones(10)}).node("a")
    order: list[str] = []

    def solver() -> Generator[Pass, Any, float]:
        total = yield Pass(slow_total)
        order.append("solved")
        return float(total)

    reduction = Reduction([Inputs((node,), "element")], solver)

    def waiting() -> Job:
        yield Wait(reduction)
        order.append("went on")
        assert reduction.done

    def working() -> Job:
        passes = reduction.passes()
        step: Any = next(passes)
        while True:
            results = yield [Call(one) for one in step]
            try:
                step = passes.send(results)
            except StopIteration:
                return

    run([waiting(), waiting(), working()], 2)
    assert order == ["solved", "went on", "went on"]
    with pytest.raises(RuntimeError, match="no job solves"):
        run([waiting()] if not reduction.done else [_wait_for(Reduction([Inputs((node,), "element")], solver))], 1)


def _wait_for(reduction: Reduction) -> Job:
    yield Wait(reduction)


def test_an_error_while_solving_is_raised() -> None:
    node = Weights.of({"a": torch.ones(10)}).node("a")

    def solver() -> Generator[Pass, Any, float]:
        yield Pass(torch.sum)
        raise Error("no solution")

    with pytest.raises(Error, match="no solution"):
        solve_all([Reduction([Inputs((node,), "element")], solver)], threads=2)


def test_working_set_grows_with_what_is_held() -> None:
    small = Weights.of({"a": torch.ones(10)}).node("a")
    assert working_set(small) < 1000
    weights = Weights({"a": _Wide(Spec((3000, 1000), torch.float32)), "b": _Wide(Spec((3000, 1000), torch.float32))})
    by_row = apply(torch.neg, weights.node("a"), unit="row")
    by_tensor = apply(torch.neg, weights.node("a"), unit="tensor")
    whole = apply(lambda x, y: x, weights.node("a"), Entire(weights.node("b")), unit="row")
    assert CHUNK * 4 <= working_set(by_row) < 12_000_000 < working_set(by_tensor)
    assert working_set(whole) >= 12_000_000


class _Wide:
    grain = 1

    def __init__(self, spec: Spec):
        self.spec = spec

    def read(self, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        raise AssertionError

    def inputs(self) -> tuple[()]:
        return ()

    def identity(self) -> object:
        return None


@pytest.mark.parametrize(
    ("word", "size"),
    [("512MB", 512_000_000), ("5 GB", 5_000_000_000), ("1GiB", 2**30), ("7", 7), ("1.5kb", 1500), ("2m", 2_000_000),
     (" 3TiB ", 3 * 2**40), (12, 12), (None, None), ("1e6", 1_000_000)],
)  # fmt: skip
def test_sizes(word: Any, size: int | None) -> None:
    assert as_bytes(word) == size


@pytest.mark.parametrize("word", ["", "MB", "5XB", "-5MB", "0", 0, -1, "nan", "inf", 2.5, "1.2.3GB", "0.1"])
def test_sizes_that_are_none(word: Any) -> None:
    with pytest.raises(Error, match="shard"):
        as_bytes(word, "shard")


def test_default_threads() -> None:
    assert default_threads() >= 1

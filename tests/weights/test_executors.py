"""Saving with several processes: the bytes that threads write, whatever dies on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith import progress
from weightsmith.cli import main
from weightsmith.cli._rooms import _methods
from weightsmith.errors import Error, FormatError, MissingPackage, OutputError
from weightsmith.weights import (
    Weights,
    _bench,
    _crew,
    _execute,
    _lazy,
    _processes,
    _ray,
    _save,
    _staging,
    _travel,
    apply,
    open,
)
from weightsmith.weights._bench import Bench, Order, Totalling, Writing
from weightsmith.weights._lazy import Held, Inputs, Moved, Reduction, Scratch, single
from weightsmith.weights._spec import Spec

processes = {"executor": "processes", "workers": 2}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where it can be: these tests wait for the disk often."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 10**9):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as place:
        yield Path(place)


def fingerprint(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def tensors(seed: int, size: int = 30) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"layers.{i}.w": torch.randn(size + i, 17, generator=generator).bfloat16() for i in range(3)}
    return made | {"norm": torch.randn(11, generator=generator), "count": torch.tensor(3), "none": torch.zeros(0, 4)}


@pytest.fixture
def sources(tmp_path: Path) -> list[Weights]:
    for seed in range(4):
        Weights.of(tensors(seed)).save(tmp_path / f"m{seed}.safetensors")
    return [open(tmp_path / f"m{seed}.safetensors") for seed in range(4)]


class Here:
    """A worker without a process, to look at what it is sent."""

    orders: list[Order]
    dies: Callable[[Order], bool]

    def __init__(self) -> None:
        self.bench = Bench()

    def ask(self, message: bytes) -> bytes:
        order = pickle.loads(message)
        type(self).orders.append(order)
        if type(self).dies(order):
            raise _crew.Died("killed by a test")
        return self.bench.answer(message)

    def stop(self) -> None: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Here]]:
    Here.orders, Here.dies = [], staticmethod(lambda order: False)  # type: ignore[assignment]
    before = torch.get_num_threads()
    monkeypatch.setattr(_processes, "Process", Here)
    yield Here
    torch.set_num_threads(before)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[_processes.Process]:
    """Every worker process that is started."""
    made: list[_processes.Process] = []

    class Known(_processes.Process):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(_processes, "Process", Known)
    return made


PARTS = """
import os, signal, time

def slow(x, seconds=0.0, parent=0):
    if os.getpid() != parent:
        time.sleep(seconds)
    return x * 2

def deadly(x, parent=0):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 2

def broken(x):
    raise ZeroDivisionError("oh")

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__("odd")

def odd(x):
    raise Odd(1, 2)
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Functions that other processes can import."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "parts_of_a_test.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(folder))
    import parts_of_a_test  # type: ignore[import-not-found]

    yield parts_of_a_test
    del sys.modules["parts_of_a_test"]


# The bytes

CASES: dict[str, Callable[[list[Weights]], Weights]] = {
    "copy": lambda m: m[0],
    "cast": lambda m: m[0].cast("fp16"),
    "mean": lambda m: ws.merge.mean(m[1:]),
    "ties": lambda m: ws.merge.ties(m[1:], m[0], density=0.4),
    "model_stock": lambda m: ws.merge.model_stock(m[1:], m[0]),
    "dare": lambda m: ws.merge.dare_ties(m[1:], m[0], density=0.5, seed=3),
    "slerp": lambda m: ws.merge.slerp(m[:2], t=0.3),
    "two reductions, one on the other": lambda m: ws.merge.model_stock(
        [ws.merge.ties(m[1:], m[0], density=0.4), m[1]], m[0]
    ),
    "one threshold for all": lambda m: ws.prune.magnitude(m[0].select("layers*"), sparsity=0.3, scope="global"),
    "several outputs": lambda m: ws.quantize.rtn(m[0].select("layers*"), bits=4),
    "in memory": lambda m: ws.merge.ties([Weights.of(tensors(1)), m[2]], Weights.of(tensors(0)), density=0.5),
    "strides": lambda m: (
        Weights.of({"t": torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).t()[::2]}) * 2
    ),
    "tied": lambda m: (m[0] | {"alias": m[0]["norm"]}).map(torch.neg),
    "whole": lambda m: m[0].select("layers*").map(torch.softmax, unit="row", options={"dim": lambda name: -1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_pieces")
def test_the_bytes_of_threads(
    case: str, sources: list[Weights], tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_travel, "INLINE", 100)
    CASES[case](sources).save(tmp_path / "threads", threads=2)
    for workers, memory in [(1, None), (3, 1), (5, "1GB")]:
        place = tmp_path / f"{workers}"
        events: list[progress.Event] = []
        with progress.listening(events.append):
            CASES[case](sources).save(place, executor="processes", workers=workers, memory=memory)
        assert fingerprint(place) == fingerprint(tmp_path / "threads")
        assert events[-1].done == events[-1].total
    assert here.orders
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("format", ["safetensors", "pt", "npz"])
def test_real_processes_and_every_format(
    format: str, sources: list[Weights], tmp_path: Path, started: list[_processes.Process]
) -> None:
    merged = ws.merge.ties(sources[1:], sources[0], density=0.4).cast("fp32") | {
        "large": torch.randn(1500, 700, generator=torch.Generator().manual_seed(0)).t()
    }
    merged.save(tmp_path / "threads", format=format)
    ties = ws.merge.ties(sources[1:], sources[0], density=0.4).cast("fp32")
    (ties | {name: merged[name] for name in ["large"]}).save(tmp_path / "many", format=format, **processes)
    expected, found = open(tmp_path / "threads"), open(tmp_path / "many")
    for name in expected:
        assert torch.equal(found[name], expected[name])
    assert 1 <= len(started) <= 2
    assert all(worker.process.poll() is not None for worker in started)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("small_pieces")
def test_a_reduction_that_tensors_share_is_solved_once(
    sources: list[Weights], tmp_path: Path, here: type[Here]
) -> None:
    pruned = ws.prune.magnitude(sources[0].select("layers*"), sparsity=0.3, scope="global")
    pruned.save(tmp_path / "a", **processes)
    passes: dict[bytes, list[tuple[int, int, int]]] = {}
    for order in here.orders:
        if isinstance(order.do, Totalling):
            passes.setdefault(order.do.wanted, []).extend(order.do.units)
    elements = sum(spec.numel for spec in pruned.specs.values())
    assert all(len(units) == len(set(units)) for units in passes.values())
    sample, whole = (sum(last - first for _, first, last in units) for units in passes.values())
    assert sample < whole == elements


@pytest.mark.usefixtures("small_pieces")
def test_what_was_sent_is_not_sent_again(sources: list[Weights], tmp_path: Path, here: type[Here]) -> None:
    ws.merge.model_stock(sources[1:], sources[0]).save(tmp_path / "a", executor="processes", workers=1)
    sent = [key for order in here.orders for key in order.new]
    assert len(sent) == len(set(sent))
    assert [order.opening is not None for order in here.orders] == [True] + [False] * (len(here.orders) - 1)
    assert {key[0] for key in sent} == {"group", "item", "value"}


def test_several_units_travel_together(tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_lazy, _save):
        monkeypatch.setattr(module, "UNIT", 10)
    Weights.of({"a": torch.zeros(1000)}).save(tmp_path / "a.safetensors", **processes)
    sizes = [len(order.do.units) for order in here.orders]
    assert sum(sizes) == 100
    assert max(sizes) == _crew.TOGETHER


def test_only_sums_of_integers_are_made_by_a_worker() -> None:
    whole, half = torch.tensor([2**60, 1]), torch.tensor([0.1])
    assert torch.equal(_bench._folded([whole, whole, whole])[0], 3 * whole)
    assert len(_bench._folded([whole] * 3)) == 1
    assert len(_bench._folded([half] * 3)) == 3
    assert len(_bench._folded([(whole, half)] * 3)) == 3
    (folded,) = _bench._folded([(whole, whole)] * 3)
    assert torch.equal(folded[1], 3 * whole)
    assert _bench._folded([0.1, 0.2]) == [0.1, 0.2]
    assert _bench._folded([]) == []


def test_chunks_end_where_they_end_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_lazy, _execute, _save):
        monkeypatch.setattr(module, "CHUNK", module.CHUNK)
    before = torch.get_num_threads()
    Bench()._open(_bench.Opening("", (), 99))
    assert {module.CHUNK for module in (_lazy, _execute, _save)} == {99}
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


# Workers that die


@pytest.mark.usefixtures("small_pieces")
def test_a_worker_that_dies_is_replaced(sources: list[Weights], tmp_path: Path, here: type[Here]) -> None:
    CASES["model_stock"](sources).save(tmp_path / "threads")
    turns = iter(range(10_000))
    here.dies = staticmethod(lambda order: next(turns) % 4 == 2)  # type: ignore[assignment]
    CASES["model_stock"](sources).save(tmp_path / "many", **processes)
    assert fingerprint(tmp_path / "many") == fingerprint(tmp_path / "threads")
    assert sum(order.opening is not None for order in here.orders) > 5


def test_killed_processes(
    sources: list[Weights], tmp_path: Path, started: list[_processes.Process], parts: Any
) -> None:
    options = {"seconds": 0.05, "parent": 0}
    weights = Weights.of({f"t{i}": torch.full((1000,), float(i)) for i in range(40)})
    killed: set[int] = set()

    def kill(event: progress.Event) -> None:
        alive = [worker.process.pid for worker in started if worker.process.poll() is None]
        if event.done and len(killed) < 2 and alive and alive[0] not in killed:
            killed.add(alive[0])
            os.kill(alive[0], signal.SIGKILL)

    with progress.listening(kill):
        weights.map(parts.slow, options=options).save(tmp_path / "a.safetensors", **processes)
    assert len(killed) == 2
    assert len(started) >= 4
    for name, tensor in weights.items():
        assert torch.equal(open(tmp_path / "a.safetensors")[name], tensor * 2)


def test_a_piece_that_kills_every_worker(tmp_path: Path, started: list[_processes.Process], parts: Any) -> None:
    Weights.of({"fine": torch.ones(400_000), "bad": torch.ones(10)}).save(tmp_path / "in.safetensors")
    options = {"parent": os.getpid()}

    def made() -> Weights:
        source = open(tmp_path / "in.safetensors")
        return source.select("fine") | source.select("bad").map(parts.deadly, options=options)

    with pytest.raises(OutputError, match=r"tensor bad: .* die \(killed by SIGKILL\), 4 times.*resume=True"):
        made().save(tmp_path / "out", executor="processes", workers=1)
    assert len(started) == 4
    assert all(worker.process.poll() is not None for worker in started)
    assert made().save(tmp_path / "out", resume=True).resumed == 1
    assert torch.equal(open(tmp_path / "out")["bad"], torch.full((10,), 2.0))


def test_the_keyboard_stops_all_and_leaves_something_to_resume(
    tmp_path: Path, started: list[_processes.Process], parts: Any
) -> None:
    Weights.of({f"t{i}": torch.full((10,), float(i)) for i in range(50)}).save(tmp_path / "in.safetensors")
    weights = open(tmp_path / "in.safetensors").map(parts.slow, options={"seconds": 0.1, "parent": os.getpid()})
    main = threading.main_thread().ident
    assert main
    seen: list[progress.Event] = []

    def stop(event: progress.Event) -> None:
        seen.append(event)
        if len(seen) == 6:
            signal.pthread_kill(main, signal.SIGINT)

    began = time.monotonic()
    with progress.listening(stop), pytest.raises(KeyboardInterrupt):
        weights.save(tmp_path / "out", **processes)
    assert time.monotonic() - began < 30
    assert started
    assert all(worker.process.poll() is not None for worker in started)
    saved = weights.save(tmp_path / "out", resume=True)
    assert 3 <= saved.resumed < 50
    for name, tensor in open(tmp_path / "in.safetensors").items():
        assert torch.equal(open(tmp_path / "out")[name], tensor * 2)
    assert not list(tmp_path.glob("*.partial"))


PARENT = """
import sys, os, threading
sys.path.insert(0, sys.argv[1])
import torch, parts_of_a_test, weightsmith as ws
from weightsmith import progress
from weightsmith.weights import _processes
real = _processes.Process
class Known(real):
    def __init__(self):
        super().__init__()
        print("worker", self.process.pid, flush=True)
_processes.Process = Known
weights = ws.open(sys.argv[2]).map(parts_of_a_test.slow, options={"seconds": 0.05, "parent": 0})
with progress.listening(lambda event: print("done", event.done, flush=True)):
    weights.save(sys.argv[3], executor="processes", workers=2, resume="r" in sys.argv[4:])
"""


def test_workers_end_with_their_parent(tmp_path: Path, parts: Any) -> None:
    """Its script has no ``if __name__ == "__main__"``, and needs none."""
    Weights.of({f"t{i}": torch.full((10,), float(i)) for i in range(40)}).save(tmp_path / "in.safetensors")
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(tmp_path / "code"), str(tmp_path / "in.safetensors")]
    command.append(str(tmp_path / "out.safetensors"))
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers: set[int] = set()
    done = 0
    assert parent.stdout
    for line in parent.stdout:
        word, number = line.split()
        if word == "worker":
            workers.add(int(number))
        elif int(number) > 0:
            done += 1
        if done >= 5:
            break
    parent.kill()
    parent.communicate()
    assert len(workers) == 2
    limit = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < limit
        time.sleep(0.05)
    subprocess.run([*command, "r"], check=True, stdout=subprocess.DEVNULL)
    for name, tensor in open(tmp_path / "in.safetensors").items():
        assert torch.equal(open(tmp_path / "out.safetensors")[name], tensor * 2)
    assert not list(tmp_path.glob("*.partial"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
    except OSError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False


# The journal


def test_only_what_a_worker_has_reported_is_noted(
    sources: list[Weights], tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_lazy, _save):
        monkeypatch.setattr(module, "UNIT", 32)
    real, left = os.pwrite, [40]

    def fills(descriptor: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    doubled = sources[0] * 2
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fills)
        with pytest.raises(OutputError, match=r"the disk is full; .*resume=True"):
            doubled.save(tmp_path / "out", **processes)
    noted = _staging._journal(tmp_path / "out.partial" / "journal")[1]
    written = [(order.do.number, unit) for order in here.orders if isinstance(order.do, Writing)
               for unit in order.do.units]  # fmt: skip
    assert 0 < len(noted) < len(written)
    assert noted <= set(written)
    here.orders.clear()
    assert doubled.save(tmp_path / "out", resume=True, **processes).resumed == len(noted)
    again = {(order.do.number, unit) for order in here.orders if isinstance(order.do, Writing)
             for unit in order.do.units}  # fmt: skip
    assert not again & noted
    doubled.save(tmp_path / "threads")
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "threads")


def test_a_worker_on_another_machine_syncs_before_it_reports(
    sources: list[Weights], tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread().name.startswith("weightsmith_"):  # a worker's; the journal has its own
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    sources[0].save(tmp_path / "near", **processes)
    assert not synced
    monkeypatch.setattr(_crew, "machine", lambda: "elsewhere")
    here.orders.clear()
    sources[0].save(tmp_path / "far", **processes)
    assert len(synced) == len([order for order in here.orders if isinstance(order.do, Writing)])


# What travels and what does not


def test_what_lives_in_this_process_alone(
    sources: list[Weights], tmp_path: Path, started: list[_processes.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    before = set(tmp_path.iterdir())
    node = sources[0].node("norm")
    cases: list[tuple[Weights, str]] = [
        (Weights.of({"x": torch.ones(3)}).map(lambda x: x + 1), r'tensor x: .*lambda.*executor="threads".*cloudpickle'),
        (Weights({"x": apply(torch.neg, node, reduction=None, options={}) , "y": apply(
            lambda x: x, node)}), "tensor y: cannot be computed in another process"),
        (Weights({"x": apply(_plus, node, spec=node.spec, reduction=Reduction(
            [Inputs((apply(lambda x: x, node),), "element")], lambda: single(torch.sum, float)))}), "tensor x: "),
        (Weights.of({"x": torch.ones(3, device="meta")}), "tensor x: is on the meta device"),
        (Weights({"x": Moved(node, torch.device("cuda", 1))}), r"tensor x: is computed on cuda:1.*threads"),
        (Weights.of({"x": torch.ones(3)}).map(_Unsendable().call), "tensor x: cannot be computed"),
    ]  # fmt: skip
    for weights, message in cases:
        with pytest.raises(Error, match=message):
            weights.save(tmp_path / "out", **processes)
    assert set(tmp_path.iterdir()) == before
    assert not started


def _plus(x: Tensor, solved: float = 0.0) -> Tensor:
    return x + solved


class _Unsendable:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def call(self, x: Tensor) -> Tensor:
        return x


def test_what_the_rooms_make_travels(sources: list[Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method that has a command: kernels, solvers and what they hold are found by name on the other side."""
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    values = {"sparsity": 0.5, "bits": 4, "weight": [0.4, 0.6], "density": 0.5, "seed": 1}
    matrices = [model.select("layers.*") for model in sources]
    checked: set[str] = set()
    for method in _methods():
        room = importlib.import_module(f"weightsmith.{method.room}")
        first, *others = method.public
        wanted = [p.name for p in others if p.default is None and p.name not in ("base", *values)]
        if wanted:
            continue  # a score function, statistics: they need more than files
        options = {p.name: values[p.name] for p in others if p.default is None and p.name in values}
        base = {"base": matrices[0]} if any(p.name == "base" for p in others) else {}
        models: Any = matrices[1:3] if "Sequence" in first.annotation else matrices[1]
        try:
            made = room.METHODS[method.name](models, **base, **options)
        except Error:
            continue  # another number of models
        plan = _save.planned(made, str(tmp_path / "out"), None)
        crew = _crew.Crew("processes", 2, [], tmp_path / "held")
        crew.check(plan.groups)
        for group in plan.groups:
            for reduction in (one for node in group.nodes for one in _lazy.reductions_of(node)):
                passes = reduction.passes()
                for piece in next(passes, ())[:1]:
                    crew.packer.pack(piece.wanted)
                passes.close()
        checked.add(f"{method.room}.{method.name}")
    assert {"merge.mean", "merge.ties", "merge.model_stock", "prune.magnitude", "quantize.rtn"} <= checked
    assert len(checked) >= 20


def test_closures_travel_with_cloudpickle(tmp_path: Path) -> None:
    pytest.importorskip("cloudpickle", reason="needs cloudpickle, which comes with ray")
    amount = 3.0
    weights = Weights.of({"x": torch.arange(5.0)}).map(lambda x: x * amount)
    weights.save(tmp_path / "a.safetensors", **processes)
    assert torch.equal(open(tmp_path / "a.safetensors")["x"], torch.arange(5.0) * 3)
    with pytest.raises(Error, match=r"tensor x: cannot be computed in another process .*threads"):
        Weights.of({"x": torch.ones(3)}).map(_Unsendable().call).save(tmp_path / "b", **processes)


def test_tensors_in_memory_are_sent_or_written_once(
    tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_travel, "INLINE", 1000)
    written: list[Path] = []
    real = _travel._write
    monkeypatch.setattr(_travel, "_write", lambda held, path: (written.append(path), real(held, path)))
    large = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    held = {"small": torch.ones(7), "large": large, "flipped": large.t(), "bool": large > 0, "half": large.bfloat16()}
    weights = Weights.of(held)
    both = weights.rename(lambda name: f"a.{name}").map(_same, weights.rename(lambda name: f"a.{name}"))
    (weights | both).save(tmp_path / "a.safetensors", **processes)
    for name, tensor in held.items():
        assert torch.equal(open(tmp_path / "a.safetensors")[name], tensor)
        assert torch.equal(open(tmp_path / "a.safetensors")[f"a.{name}"], tensor)
    assert len(written) == 4
    assert all(path.parent.name == "held" and not path.exists() for path in written)


def _same(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x == y, x, torch.zeros_like(x))


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(2.5), torch.zeros(0, 3), torch.randn(4, 3).t(), torch.randn(3, dtype=torch.complex64).conj(),
     torch.tensor([True, False]), torch.arange(6, dtype=torch.uint8)[::2], torch.randn(3).to(torch.float8_e4m3fn)],
)  # fmt: skip
def test_tensors_travel(tensor: Tensor, tmp_path: Path) -> None:
    packer = _travel.Packer(tmp_path / "held")
    for thing in (tensor, Held(tensor)):
        packed = packer.pack(thing)
        found = pickle.loads(packed.data)
        found = found.whole() if isinstance(found, Held) else found
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        view = torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype
        assert torch.equal(found.view(view), tensor.resolve_conj().view(view))
    assert not (tmp_path / "held").exists()


def test_a_view_of_a_large_tensor_travels_without_the_rest(tmp_path: Path) -> None:
    large = torch.zeros(10**6)
    assert len(_travel.Packer(tmp_path).pack(large[:5]).data) < 1000
    assert len(_travel.Packer(tmp_path).pack(Held(large[:5])).data) < 1000
    assert len(_travel.Packer(tmp_path).pack(Held(large), trial=True).data) < 1000


def test_a_chain_that_can_be_computed_can_travel(tmp_path: Path, here: type[Here]) -> None:
    limit = sys.getrecursionlimit()
    weights = Weights.of({"a": torch.zeros(5)})
    for _ in range(120):
        weights = weights + 1
    weights.save(tmp_path / "a.safetensors", **processes)
    assert open(tmp_path / "a.safetensors")["a"].tolist() == [120.0] * 5
    for _ in range(2000):
        weights = weights + 1
    with pytest.raises(Error, match="tensor a: more steps follow one another"):
        weights.save(tmp_path / "b.safetensors", **processes)
    assert sys.getrecursionlimit() == limit


def test_a_file_must_be_the_same_on_the_other_side(sources: list[Weights], tmp_path: Path, here: type[Here]) -> None:
    doubled = sources[0] * 2
    os.utime(tmp_path / "m0.safetensors", ns=(1, 1))
    with pytest.raises(Error, match=r"m0\.safetensors: has changed since it was opened"):
        doubled.save(tmp_path / "out", **processes)
    (tmp_path / "m0.safetensors").unlink()
    with pytest.raises(Error, match=r"m0\.safetensors: No such file .*where a part of the work is done"):
        doubled.save(tmp_path / "out", **processes)
    assert not list(tmp_path.glob("out*"))


def test_paths_are_relative_to_where_they_were_opened(
    sources: list[Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = open("m0.safetensors")
    weights.save("deep/out.safetensors", **processes)
    assert torch.equal(open("deep/out.safetensors")["norm"], sources[0]["norm"])


# Errors of the work itself


def test_errors_are_those_of_threads(sources: list[Weights], tmp_path: Path, parts: Any) -> None:
    wrong = Weights.of({"fine": torch.ones(5), "big": torch.full((300_000,), 1e6)}).cast("fp16")
    with pytest.raises(Error, match=r"tensor big: the value 1e\+06 does not fit in float16"):
        wrong.save(tmp_path / "new", **processes)
    with pytest.raises(ZeroDivisionError, match="oh") as caught:
        sources[0].select("norm").map(parts.broken, spec=Spec((11,), torch.float32)).save(tmp_path / "new", **processes)
    assert caught.value.__notes__[0] == "while computing the tensor norm"
    assert "parts_of_a_test.py" in caught.value.__notes__[1]
    with pytest.raises(RuntimeError, match="Odd: odd"):
        sources[0].select("norm").map(parts.odd, spec=Spec((11,), torch.float32)).save(tmp_path / "new", **processes)
    os.truncate(tmp_path / "m0.safetensors", 5000)
    with pytest.raises(Error, match=r"m0.safetensors: ends at byte 5000"):
        sources[0].save(tmp_path / "new", **processes)
    assert not list(tmp_path.glob("new*"))


def test_a_format_error_keeps_its_kind(tmp_path: Path) -> None:
    for error in (FormatError("f: ends early"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), Error("x")):
        well, found = pickle.loads(_bench._pickled_error(error))
        assert not well
        assert type(found) is type(error)
        assert getattr(found, "errno", None) == getattr(error, "errno", None)


def test_options_are_checked_first(tmp_path: Path) -> None:
    weights = Weights.of({"a": torch.ones(2)})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"executor": "process"}, r"unknown executor 'process' \(did you mean 'processes'\?\)"),
        ({"executor": "processes", "workers": 0}, "workers must be at least 1, got 0"),
        ({"executor": "processes", "threads": 2}, "say workers="),
        ({"workers": 2}, "say threads="),
        ({"executor": "processes", "memory": "much"}, "is no size"),
    ]
    for options, message in cases:
        with pytest.raises(Error, match=message):
            weights.save(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_memory_is_shared_out(tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch) -> None:
    now = highest = 0
    lock = threading.Lock()
    real = Here.ask

    def ask(self: Here, message: bytes) -> bytes:
        nonlocal now, highest
        with lock:
            now += 1
            highest = max(highest, now)
        time.sleep(0.01)
        try:
            return real(self, message)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(Here, "ask", ask)
    weights = Weights.of({f"t{i}": torch.ones(200_000) for i in range(12)}) * 2
    cost = max(group.cost for group in _save.grouped(weights))
    weights.save(tmp_path / "a", executor="processes", workers=4, memory=2 * cost)
    assert highest == 2
    highest = 0
    weights.save(tmp_path / "b", executor="processes", workers=4)
    assert highest > 2


def test_a_remote_target(sources: list[Weights], tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="needs fsspec")
    sources[0].save("memory://executors/a.safetensors", **processes)
    assert torch.equal(open("memory://executors/a.safetensors")["norm"], sources[0]["norm"])


def test_from_a_shell(sources: list[Weights], tmp_path: Path, here: type[Here]) -> None:
    models = [str(tmp_path / f"m{i}.safetensors") for i in range(3)]
    for name, line in {
        "ties": ["merge", "ties", *models[1:], "--base", models[0]],
        "convert": ["convert", models[0], "--dtype", "fp16"],
    }.items():
        assert main([*line, "-o", str(tmp_path / f"{name}0")]) == 0
        assert not here.orders
        assert main([*line, "--executor", "processes", "--workers", "2", "-o", str(tmp_path / f"{name}1")]) == 0
        assert here.orders
        assert fingerprint(tmp_path / f"{name}0") == fingerprint(tmp_path / f"{name}1")
        here.orders.clear()
    assert main(["convert", models[0], "-o", str(tmp_path / "x"), "--workers", "2"]) == 2


def test_ray_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r'pip install "weightsmith\[ray\]"'):
        Weights.of({"a": torch.ones(2)}).save(tmp_path / "out", executor="ray")
    assert not list(tmp_path.iterdir())


def test_seats_of_threads_are_scratches() -> None:
    seen: list[object] = []

    def job() -> Any:
        yield [_execute.Call(seen.append)] * 3

    _execute.run([job()], 1)
    assert all(isinstance(seat, Scratch) for seat in seen)
    assert len(seen) == 3

"""Saving: whole or not at all, never over an input, the same bytes whatever the machine does meanwhile."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from weightsmith import progress
from weightsmith.errors import Error, FormatError, OutputError
from weightsmith.weights import Weights, _execute, _lazy, _save, _staging, open
from weightsmith.weights._lazy import Inputs, Output, Reduction, Spec, Work, apply, single


def some(seed: int = 0, size: int = 1000, count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(size + i, generator=generator) for i in range(count)}


def fingerprint(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where it can be: a disk takes its time to sync, and these tests ask for it hundreds of times."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * 10**9):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as place:
        yield Path(place)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose units are many."""
    Weights.of(some(size=3_000, count=6)).save(tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, chunk=100, unit=500)


def cut(monkeypatch: pytest.MonkeyPatch, chunk: int, unit: int) -> None:
    for module in (_lazy, _save, _execute):
        monkeypatch.setattr(module, "CHUNK", chunk)
    for module in (_lazy, _save):
        monkeypatch.setattr(module, "UNIT", unit)


class Failing:
    """Stands for `os.pwrite`: the disk is full after so many writes."""

    def __init__(self, after: int, error: int = errno.ENOSPC):
        self.left, self.error, self.real = after, error, os.pwrite
        self.lock = threading.Lock()

    def __call__(self, descriptor: int, data: Any, offset: int) -> int:
        with self.lock:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.error, os.strerror(self.error))
        return self.real(descriptor, data, offset)


# Places


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    weights = Weights.of(some())
    saved = weights.save(tmp_path / "deep" / "a.safetensors")
    assert saved.files == ("a.safetensors",)
    assert saved.tensors == 4
    assert saved.nbytes == (tmp_path / "deep" / "a.safetensors").stat().st_size
    assert saved.resumed == 0
    assert weights.save(tmp_path / "folder").files == ("model.safetensors",)
    (tmp_path / "there").mkdir()
    weights.save(tmp_path / "there")
    for place in ("deep/a.safetensors", "folder", "there"):
        assert torch.equal(open(tmp_path / place)["t3"], some()["t3"])
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("sizes", [[5], [5, 5], [0, 50], [50, 0], [50], [10, 10], [10, 11], [0, 0], [7, 7, 7]])
def test_shards_are_laid_out_once(sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = _save._safetensors.layout
    monkeypatch.setattr(_save._safetensors, "layout", lambda *given: calls.append(1) or real(*given))
    weights = Weights.of({f"t{i}": torch.zeros(size, dtype=torch.int8) for i, size in enumerate(sizes)})
    layout = _save.laid_out(weights, "safetensors", "model.safetensors", 20)
    assert len(calls) == 1
    for file in layout.files:  # an index carries the lineage where there is one
        assert (b"weightsmith.lineage" in file.fixed[0][1]) == (len(layout.files) == 1)


def test_a_taken_place_is_not_touched(tmp_path: Path) -> None:
    weights = Weights.of(some())
    (tmp_path / "a.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place in ("a.safetensors", "folder", "dangling"):
        with pytest.raises(OutputError, match="exists; choose another place, or overwrite=True"):
            weights.save(tmp_path / place)
    with pytest.raises(OutputError, match="without weights in it"):
        weights.save(tmp_path / "folder", overwrite=True)
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder, and would be replaced by the other kind"):
        weights.save(tmp_path / "dir.safetensors", overwrite=True)
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "folder", "dangling", "dir.safetensors"}


def test_bad_options_leave_nothing(tmp_path: Path) -> None:
    weights = Weights.of(some())
    for options, message in [
        ({"format": "onnx"}, "cannot write the format 'onnx'"), ({"format": "pt"}, "the name says safetensors"),
        ({"threads": 0}, "threads must be at least 1"), ({"memory": "much"}, "memory: 'much' is no size"),
        ({"memory": "0"}, "must be positive"), ({"memory": "infMB"}, "is no size"), ({"memory": 1.5}, "is no size"),
    ]:  # fmt: skip
        with pytest.raises(Error, match=message):
            weights.save(tmp_path / "a.safetensors", **options)  # type: ignore[arg-type]
    with pytest.raises(Error, match="cannot write gguf"):
        weights.save(tmp_path / "a.gguf")
    with pytest.raises(Error, match="no tensors to save"):
        Weights({}).save(tmp_path / "a.safetensors")
    with pytest.raises(Error, match=r"a folder cannot be called \.pt"):
        weights.save(f"{tmp_path}/a.pt/")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        weights.save(tmp_path / "file" / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_inputs_are_never_written_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(source)
    doubled = open(source) * 2
    (tmp_path / "link.safetensors").symlink_to(source)
    os.link(source, tmp_path / "hard.safetensors")
    (tmp_path / "linked").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for place in (source, "in.safetensors", "./linked/in.safetensors", "link.safetensors", "hard.safetensors"):
        with pytest.raises(OutputError, match="is an input of this save"):
            doubled.save(place, overwrite=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source)
    (tmp_path / "alias").symlink_to(folder)
    for place in (folder, tmp_path / "alias"):
        with pytest.raises(OutputError, match="holds an input of this save"):
            (open(folder) * 2).save(place, overwrite=True)
    assert (folder / "model.safetensors").is_symlink()
    assert fingerprint(source) == before
    assert not list(tmp_path.glob("*.partial"))


def test_an_input_of_a_reduction_or_a_companion_is_an_input(source: Path, tmp_path: Path) -> None:
    weights = open(source)
    total = Reduction([Inputs((weights.node("t0"),), "element")], lambda: single(torch.sum, float))
    lead = Weights.of(some())
    node = apply(lambda x, solved=0.0: x + solved, lead.node("t1"), reduction=total)
    with pytest.raises(OutputError, match="is an input"):
        Weights({"a": node}).save(source, overwrite=True)
    folder = tmp_path / "m"
    Weights.of(some()).with_files({"config.json": b"{}"}).save(folder)
    with pytest.raises(OutputError, match="holds an input"):
        Weights.of(some(1)).with_files(open(folder).files).save(folder, overwrite=True)


def test_what_grows_beside_the_target_is_not_an_input_to_be_swept_away(tmp_path: Path) -> None:
    Weights.of(some()).save(tmp_path / "out.partial" / "whole" / "model.safetensors")
    weights = open(tmp_path / "out.partial" / "whole")
    with pytest.raises(OutputError, match="holds an input"):
        weights.save(tmp_path / "out")
    assert torch.equal(open(tmp_path / "out.partial" / "whole")["t0"], some()["t0"])


def test_overwriting_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "m"
    Weights.of(some(0)).with_files({"config.json": b"old", "tokenizer.json": b"old"}).save(place, max_shard_size=4500)
    assert len(list(place.glob("*.safetensors"))) == 4
    keep = {"notes.txt": "mine", "runs/log.txt": "mine", "runs/deep/x.safetensors": "mine", "optimizer.pt": "mine"}
    for name, text in keep.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (place / "pytorch_model.bin").write_text("stale")
    (place / "link").symlink_to("notes.txt")
    (place / "far").symlink_to(tmp_path)
    Weights.of(some(1)).with_files({"config.json": b"new"}).save(place, overwrite=True)
    assert torch.equal(open(place)["t2"], some(1)["t2"])
    for name, text in keep.items():
        assert (place / name).read_text() == text
    assert (place / "tokenizer.json").read_text() == "old"
    assert (place / "config.json").read_text() == "new"
    assert os.readlink(place / "link") == "notes.txt"
    assert os.readlink(place / "far") == str(tmp_path)
    assert [p.name for p in place.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (place / "pytorch_model.bin").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


def test_overwriting_through_a_link_replaces_the_link(tmp_path: Path) -> None:
    Weights.of(some(0)).save(tmp_path / "real")
    (tmp_path / "latest").symlink_to("real")
    Weights.of(some(1)).save(tmp_path / "latest", overwrite=True)
    assert torch.equal(open(tmp_path / "latest")["t0"], some(1)["t0"])
    assert torch.equal(open(tmp_path / "real")["t0"], some(0)["t0"])
    assert {p.name for p in tmp_path.iterdir()} == {"real", "latest"}


def test_without_atomic_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_staging, "_exchange", lambda made, target: False)
    Weights.of(some(0)).save(tmp_path / "m")
    Weights.of(some(1)).save(tmp_path / "m", overwrite=True)
    assert torch.equal(open(tmp_path / "m")["t0"], some(1)["t0"])
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


def test_a_place_taken_while_it_was_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _staging.sync_tree
    for name in ("a.safetensors", "folder"):

        def late(made: Path, name: str = name) -> None:
            real(made)
            place = tmp_path / name
            if name == "folder":
                place.mkdir()
                place = place / "x"
            place.write_text("theirs")

        monkeypatch.setattr(_staging, "sync_tree", late)
        with pytest.raises(OutputError, match="the new one is whole at"):
            Weights.of(some()).save(tmp_path / name)
    assert (tmp_path / "a.safetensors").read_text() == "theirs"
    assert (tmp_path / "folder" / "x").read_text() == "theirs"
    assert torch.equal(open(tmp_path / "a.safetensors.partial" / "whole" / "a.safetensors")["t0"], some()["t0"])


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written to"):
        Weights.of(some()).save(tmp_path / "a.safetensors")
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["access", "mkdir", "open"])
def test_a_file_system_that_refuses(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    if call == "access":
        monkeypatch.setattr(os, "access", lambda *_: False)
    elif call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match=r"cannot (be written to|write beside)"):
        Weights.of(some()).save(tmp_path / "a.safetensors")


def test_no_room_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = _save.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_save.shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(OutputError, match=r"needs 2\d,\d{3} bytes, the disk has 5,000 free"):
        Weights.of(some()).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# Interruptions


@pytest.mark.parametrize("place", ["a.safetensors", "folder"])
@pytest.mark.usefixtures("small_units")
def test_a_full_disk_can_be_continued(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = open(source) * 2
    weights.save(tmp_path / "whole" / place)
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", Failing(40))
        with pytest.raises(OutputError, match=r"the disk is full; .*resume=True") as caught:
            weights.save(tmp_path / place)
    assert isinstance(caught.value.__cause__, OSError)
    assert not (tmp_path / place).exists()
    units = sum(len(g.units) for g in _save.grouped(weights))
    # Another object from the same file goes on: it is the same save.
    saved = (open(source) * 2).save(tmp_path / place, resume=True)
    assert 0 < saved.resumed < units
    assert set(fingerprint(tmp_path / place).values()) == set(fingerprint(tmp_path / "whole" / place).values())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("small_units")
def test_resumed_units_are_not_computed_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[progress.Event] = []
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", Failing(60))
        with pytest.raises(OutputError):
            (open(source) * 2).save(tmp_path / "a.safetensors", threads=1)
    monkeypatch.setattr(os, "pwrite", counting := Failing(10**9))
    with progress.listening(events.append):
        saved = (open(source) * 2).save(tmp_path / "a.safetensors", resume=True)
    # Units of 500 in chunks of 100: five writes each, and one more for the header.
    assert saved.resumed >= 10
    chunks = sum(-(-(last - first) // 100) for g in _save.grouped(open(source)) for first, last in g.units)
    assert 10**9 - counting.left <= chunks - 4 * saved.resumed + 1
    assert events[-1].done == events[-1].total == open(source).nbytes


@pytest.mark.usefixtures("small_units")
def test_resuming_something_else_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", Failing(40))
        with pytest.raises(OutputError):
            (open(source) * 2).save(tmp_path / "a.safetensors")
    for other in (open(source) * 3, open(source).cast("bf16"), open(source).drop("t0") * 2, open(source) + 2):
        with pytest.raises(OutputError, match="a save of something else"):
            other.save(tmp_path / "a.safetensors", resume=True)
    os.utime(source, ns=(1, 1))
    with pytest.raises(OutputError, match="a save of something else"):
        (open(source) * 2).save(tmp_path / "a.safetensors", resume=True)
    assert (tmp_path / "a.safetensors.partial" / "whole").exists(), "a refusal destroys nothing"
    (open(source) * 3).save(tmp_path / "a.safetensors")
    assert torch.equal(open(tmp_path / "a.safetensors")["t1"], open(source)["t1"] * 3)
    assert not list(tmp_path.glob("*.partial"))


def test_values_in_memory_resume_within_the_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 100, 500)
    weights = Weights.of(some())
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", Failing(20))
        with pytest.raises(OutputError):
            weights.map(torch.neg).save(tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match="inputs in memory"):
        Weights.of(some()).map(torch.neg).save(tmp_path / "a.safetensors", resume=True)
    assert weights.map(torch.neg).save(tmp_path / "a.safetensors", resume=True).resumed > 0


def test_resume_with_nothing_to_resume(tmp_path: Path) -> None:
    saved = Weights.of(some()).save(tmp_path / "a.safetensors", resume=True)
    assert saved.resumed == 0
    assert torch.equal(open(tmp_path / "a.safetensors")["t0"], some()["t0"])


@pytest.mark.parametrize("journal", ["", "torn", "whole gone", "file gone", "wrong size"])
@pytest.mark.usefixtures("small_units")
def test_a_journal_is_not_believed_without_its_files(
    journal: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", Failing(100))
        with pytest.raises(OutputError):
            (open(source) * 2).save(tmp_path / "m")
    place = tmp_path / "m.partial"
    if journal in ("", "torn"):
        (place / "journal").write_text((place / "journal").read_text()[: 7 if journal else 0])
    elif journal == "whole gone":
        shutil.rmtree(place / "whole")
    elif journal == "file gone":
        (place / "whole" / "model.safetensors").unlink()
    else:
        os.truncate(place / "whole" / "model.safetensors", 5000)
    assert (open(source) * 2).save(tmp_path / "m", resume=True).resumed == 0
    for name, tensor in open(source).items():
        assert torch.equal(open(tmp_path / "m")[name], tensor * 2)


def test_a_torn_line_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("mark\n0 1\n0 2\n1")
    assert _staging._journal(path) == ("mark", {(0, 1), (0, 2)})
    journal = _staging.Journal(path, [])
    journal.add((2, 3))
    journal.close(note=True)
    assert _staging._journal(path) == ("mark", {(0, 1), (0, 2), (2, 3)})


def test_an_old_output_is_never_taken_for_a_half_made_new_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the exchange: the staging place then holds the old output."""
    real = _staging.Journal.close
    monkeypatch.setattr(_staging.Journal, "close", lambda self, note: real(self, note=True))
    for place in ("m", "m.safetensors"):
        Weights.of(some(9, 3000, 6)).save(tmp_path / place)
        with monkeypatch.context() as killed:
            killed.setattr(_staging.Staging, "discard", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                (open(source) * 2).save(tmp_path / place, overwrite=True, resume=True)
        (open(source) * 2).save(tmp_path / place, overwrite=True, resume=True)
        for name, tensor in open(source).items():
            assert torch.equal(open(tmp_path / place)[name], tensor * 2)


def test_an_error_in_the_values_leaves_nothing(tmp_path: Path) -> None:
    Weights.of({"a": torch.zeros(2)}).save(tmp_path / "old")
    old = fingerprint(tmp_path / "old")
    wrong = Weights.of({"fine": torch.ones(5), "big": torch.full((300_000,), 1e6)}).cast("fp16")
    for overwrite in (False, True):
        with pytest.raises(Error, match=r"tensor big: the value 1e\+06 does not fit in float16") as caught:
            wrong.save(tmp_path / ("old" if overwrite else "new"), overwrite=overwrite)
        assert caught.value.__cause__ is not caught.value

    def broken(x: torch.Tensor) -> torch.Tensor:
        if x.sum() == 0:
            raise ZeroDivisionError("oh")
        return x

    with pytest.raises(ZeroDivisionError) as fault:
        Weights.of({"a": torch.zeros(2)}).map(broken).save(tmp_path / "new")
    assert fault.value.__notes__ == ["while computing the tensor a"]
    assert fingerprint(tmp_path / "old") == old
    assert {p.name for p in tmp_path.iterdir()} == {"old"}


def test_values_on_the_meta_device_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Error, match="tensor a: is on the meta device"):
        Weights.of({"a": torch.ones(2, device="meta")}).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


SECONDS = float(os.environ.get("WEIGHTSMITH_KILLS", "4"))  # of killing, for each kind of output

SERVER = """
import os, sys, torch, weightsmith as ws
from weightsmith.weights import _lazy, _open, _save, _staging
_lazy.CHUNK = _save.CHUNK = 2**12
_lazy.UNIT = _save.UNIT = 2**14
_staging.SYNC_SECONDS = 0.005
torch.set_num_threads(1)
print("ready", flush=True)

def save(source, target, flags):
    try:
        weights = ws.open(source) * 2
        saved = weights.save(target, overwrite="o" in flags, resume="r" in flags, max_shard_size=700_000)
        return f"saved {saved.resumed}"
    except BaseException as error:
        return f"failed {type(error).__name__}: {error}".replace("\\n", " ")

for line in sys.stdin:
    source, target, flags, at = line.split()
    pid = os.fork()  # a process of its own for each save, without the seconds that importing takes
    if not pid:
        import time
        time.sleep(max(float(at) - time.time(), 0))
        print(save(source, target, flags), flush=True)
        os._exit(0)
    print(pid, flush=True)
    if os.waitpid(pid, 0)[1]:
        print("killed", flush=True)
"""


class Server:
    """Saves in processes that can be killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def ask(self, source: Path, target: Path, flags: str, at: float = 0.0) -> int:
        """Start a save, at a time; the id of its process."""
        assert self.process.stdin
        self.process.stdin.write(f"{source} {target} {flags} {at}\n")
        self.process.stdin.flush()
        return int(self.answer())

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made = [Server() for _ in range(2)]
    assert [server.answer() for server in made] == ["ready"] * 2
    yield made
    for server in made:
        server.process.kill()
        server.process.communicate()


def test_killed_at_any_moment(servers: list[Server], tmp_path: Path) -> None:
    """SIGKILL again and again: the place holds the old one or the new one, and a resume gives the same bytes."""
    chance = random.Random(0)
    path = tmp_path / "in.safetensors"
    Weights.of(some(0, 100_000, 5)).save(path)
    for kind in ("folder", "a.safetensors"):
        (open(path) * 2).save(tmp_path / "want" / kind, max_shard_size=700_000)
        want, target = fingerprint(tmp_path / "want" / kind), tmp_path / kind
        Weights.of(some(5, 100, 2)).save(target)
        old = fingerprint(target)
        resumed = killed = 0
        span, began = 0.2, time.monotonic()
        # On a busy machine it takes longer until enough kills have hit something.
        while (spent := time.monotonic() - began) < 20 * SECONDS and (
            killed < 5 or resumed < 1 or (spent < SECONDS and (killed < 15 * SECONDS or resumed < SECONDS))
        ):
            asked = time.monotonic()
            pid = servers[0].ask(path, target, "or")
            if chance.random() < 0.8:
                time.sleep(chance.random() * span)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            said = servers[0].answer()
            if said.startswith("saved") and chance.random() < 0.5:
                span = 0.8 * span + 0.3 * (time.monotonic() - asked)
            now = fingerprint(target)
            assert now in (old, want), f"after {killed} kills: {said}"
            assert len(open(target)) in (2, 5), "whatever happened, it can be opened"
            killed += said == "killed"
            if now == want:
                resumed += said.startswith("saved") and int(said.split()[1]) > 0
                if said == "killed":  # after the last step: what is left in the staging place must not mislead
                    assert servers[0].ask(path, target, "or")
                    assert servers[0].answer().startswith("saved")
                    assert fingerprint(target) == want
                shutil.rmtree(target) if target.is_dir() else target.unlink()
                Weights.of(some(5, 100, 2)).save(target)
        assert killed >= 5
        assert resumed >= 1
        (open(path) * 2).save(target, overwrite=True, max_shard_size=700_000)
        assert fingerprint(target) == want
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors", "want", "folder", "a.safetensors"}


def test_interrupted_by_the_keyboard(servers: list[Server], tmp_path: Path) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out"
    Weights.of(some(0, 400_000, 5)).save(path)
    pid = servers[0].ask(path, out, "-")
    journal, deadline = tmp_path / "out.partial" / "journal", time.monotonic() + 20
    while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count("\n") > 3):
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    if servers[0].answer().startswith("failed KeyboardInterrupt"):
        assert not out.exists()
        servers[0].ask(path, out, "r")
        assert int(servers[0].answer().split()[1]) > 0
    assert torch.equal(open(out)["t0"], open(path)["t0"] * 2)
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors", "out"}


# Several at once


def test_several_processes_one_winner(servers: list[Server], tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    Weights.of(some(0, 60_000, 4)).save(path)
    for turn in range(8):
        target = tmp_path / (f"out{turn}" if turn % 2 else f"out{turn}.safetensors")
        at = time.time() + 0.05
        for server in servers:
            server.ask(path, target, "-", at)
        said = sorted(server.answer() for server in servers)
        assert [s.split()[0] for s in said] == ["failed", "saved"]
        assert "OutputError" in said[0]
        assert "another process is saving" in said[0] or "exists" in said[0]
        assert torch.equal(open(target)["t3"], open(path)["t3"] * 2)
    assert not list(tmp_path.glob("*.partial"))


def test_several_threads_one_winner(tmp_path: Path) -> None:
    weights = Weights.of(some())
    for turn in range(15):
        target, said = tmp_path / f"out{turn}", []
        gate = threading.Barrier(4)

        def one(target: Path = target, said: list[str] = said, gate: threading.Barrier = gate) -> None:
            gate.wait()
            try:
                weights.save(target, threads=1)
                said.append("saved")
            except OutputError as error:
                said.append(str(error))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(said) == 4
        assert said.count("saved") == 1, said
        assert all("another process is saving" in s or "exists" in s for s in said if s != "saved")
    assert not list(tmp_path.glob("*.partial"))


# The bytes


def mixture(source: Path) -> Weights:
    a, b = open(source), Weights.of(some(3, 3_000, 6))
    merged = a * 0.3 + b.cast("bf16") * {"t1": 2.0, "*": 0.5} - 1
    wide = Weights.of({"matrix": torch.randn(60, 50, generator=torch.Generator().manual_seed(1)).t()})
    rows = wide.map(lambda x: x.softmax(-1), unit="row")
    return merged.cast("bf16") | rows | {"number": torch.tensor(3), "empty": torch.zeros(0, 5)} | {"same": b["t0"]}


def test_bytes_depend_on_nothing_but_the_weights(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = mixture(source)
    seen = set()
    for number, (threads, chunk, unit, memory) in enumerate(
        [(1, 2**17, 2**20, None), (2, 2**17, 2**20, "1MB"), (5, 100, 500, 1), (2, 333, 2000, "2GB"), (1, 20, 7000, 1)]
    ):
        cut(monkeypatch, chunk, unit)
        weights.save(tmp_path / f"{number}.safetensors", threads=threads, memory=memory)
        seen |= set(fingerprint(tmp_path / f"{number}.safetensors").values())
        for name in weights:
            assert torch.equal(open(tmp_path / f"{number}.safetensors")[name], weights[name])
    assert len(seen) == 1


def test_outputs_of_one_computation_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 64, 256)
    calls: list[int] = []
    source = torch.randn(30, 32)

    def split(x: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(x))
        scale = x.abs().amax(1)
        return {"codes": (x / scale[:, None] * 127).round().to(torch.int8), "scale": scale}

    inputs = Inputs((Weights.of({"w": source}).node("w"),), "row")
    work = Work(split, inputs, {"codes": Spec((30, 32), torch.int8), "scale": Spec((30,), torch.float32)})
    weights = Weights({"w.codes": Output(work, "codes"), "w.scale": Output(work, "scale")})
    weights.save(tmp_path / "a.safetensors", threads=2)
    assert sum(calls) == 30
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    whole = split(source)
    assert torch.equal(read["w.codes"], whole["codes"])
    assert torch.equal(read["w.scale"], whole["scale"])


MEASURE = """
import resource, sys, torch, weightsmith as ws
torch.ones(100_000).to(torch.bfloat16).sum()
a, b = ws.open(sys.argv[1]), ws.open(sys.argv[1])
work = {"merge": lambda: a * 0.5 + b * 0.5, "copy": lambda: a, "cast": lambda: a.cast("bf16")}[sys.argv[3]]()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work.save(sys.argv[2], memory="64MB", threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["merge", "cast"])
def test_memory_is_bounded(kind: str, tmp_path: Path) -> None:
    """400 MB in, at most 64 MB in flight."""
    each = 2 * 10**8
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [each // 4], "data_offsets": [i * each, (i + 1) * each]} for i in range(2)
    }
    header = json.dumps(entries).encode()
    with (tmp_path / "in.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * each)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), kind]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "out.safetensors").unlink()
    assert int(run.stdout) * 1024 < 64_000_000


@pytest.fixture
def file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_limit")
def test_a_file_size_limit_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="resume=True"):
        Weights.of(some()).save(tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        weights = Weights.of(some(size=20_000))
        weights.save(disk / "fits.safetensors")
        (disk / "ballast").write_bytes(bytes(500_000))
        with pytest.raises(OutputError, match=r"needs .* bytes, the disk has"):
            weights.save(disk / "b.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            usage = _save.shutil.disk_usage(disk)
            patch.setattr(_save.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
            with pytest.raises(OutputError, match="the disk is full"):
                weights.save(disk / "b.safetensors")
        (disk / "ballast").unlink()
        weights.save(disk / "b.safetensors", resume=True)
        assert fingerprint(disk / "b.safetensors").popitem()[1] == fingerprint(disk / "fits.safetensors").popitem()[1]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_damaged_input_stops_the_save(source: Path, tmp_path: Path) -> None:
    weights = open(source) * 2
    os.truncate(source, source.stat().st_size - 100)
    with pytest.raises(FormatError, match=r"tensor t.: .*in.safetensors: ends at byte|in.safetensors"):
        weights.save(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors"}

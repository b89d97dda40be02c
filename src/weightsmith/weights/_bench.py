"""The other side of an executor: a process that is told what to compute and writes it to its place.

It is sent nodes, computes units of work on one thread, and answers each message with one. It makes
no decisions: which units, in which order, and what is noted as finished is for who sends.
"""

from __future__ import annotations

import functools
import os
import pickle
import platform
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.weights import _execute, _lazy, _save
from weightsmith.weights._files import LocalFile
from weightsmith.weights._lazy import Pass, Scratch, added, total_over
from weightsmith.weights._travel import Unpacker, pack_result

Key = tuple[Any, ...]
"""``("group", number)``, ``("item", reduction, index)`` or ``("value", reduction)``."""


@dataclass(frozen=True)
class Opening:
    """What a worker is told first.

    Attributes:
        machine: of who sends. A worker on another syncs what it has written before it says so.
        outputs: the files that tensors are written to.
    """

    machine: str
    outputs: tuple[str, ...]
    chunk: int


@dataclass(frozen=True)
class Writing:
    """Compute units of a group and write them."""

    number: int
    units: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    """File and offset of each output."""


@dataclass(frozen=True)
class Totalling:
    """Make a pass of a reduction over some of its units."""

    number: int
    wanted: bytes
    units: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Order:
    """One message: nodes and results that the worker has not seen yet, and what to do."""

    do: Writing | Totalling
    new: dict[Key, bytes] = field(default_factory=dict)
    opening: Opening | None = None


class Solved:
    """Stands for a reduction where only its result is needed."""

    items: Sequence[Any] = ()
    done = True

    def __init__(self, bench: Bench, number: int):
        self._bench, self._number = bench, number

    def value(self) -> Any:
        return self._bench.thing(("value", self._number))


class Bench:
    """A worker's tools: open files, nodes, results of reductions."""

    def __init__(self) -> None:
        self._opening = Opening("", (), _lazy.CHUNK)
        self._sync = False
        self._packed: dict[Key, bytes] = {}
        self._things: dict[Key, Any] = {}
        self._files: dict[Sequence[Any], LocalFile] = {}
        self._outputs: dict[int, int] = {}
        self._scratch = Scratch()

    def answer(self, message: bytes) -> bytes:
        """Do what a pickled `Order` says; ``(True, result)`` or ``(False, error)``, pickled."""
        try:
            return pack_result((True, self._done(pickle.loads(message))))
        except BaseException as error:
            return _pickled_error(error)
        finally:
            self._scratch.next_unit()

    def _done(self, order: Order) -> Any:
        if order.opening is not None:
            self._open(order.opening)
        self._packed |= order.new
        if isinstance(order.do, Writing):
            return self._write(order.do)
        return self._total(order.do)

    def _open(self, opening: Opening) -> None:
        torch.set_num_threads(1)
        self._opening = opening
        self._sync = opening.machine != machine()
        for module in (_lazy, _execute, _save):  # results depend on where chunks end
            vars(module)["CHUNK"] = opening.chunk

    def thing(self, key: Key) -> Any:
        """Something that was sent, unpacked when it is first needed."""
        if key not in self._things:
            self._things[key] = self._unpacked(self._packed.pop(key))
        return self._things[key]

    def _unpacked(self, data: bytes) -> Any:
        return Unpacker(data, self._known).load()

    def _known(self, pid: Sequence[Any]) -> Any:
        kind, *rest = pid
        if kind == "solved":
            return Solved(self, rest[0])
        if pid not in self._files:
            self._files[pid] = _same_file(*rest)
        return self._files[pid]

    def _write(self, wanted: Writing) -> None:
        group = self.thing(("group", wanted.number))
        writers = [(self._output(file), offset) for file, offset in wanted.places]
        for unit in wanted.units:
            _save.write_unit(group, unit, writers, self._scratch)
        if self._sync:
            for descriptor in {descriptor for descriptor, _ in writers}:
                os.fsync(descriptor)

    def _output(self, index: int) -> int:
        if index not in self._outputs:
            path = self._opening.outputs[index]
            try:
                self._outputs[index] = os.open(path, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
            except FileNotFoundError:
                raise Error(
                    f"{path} is not there on {platform.node()}: the output must be on a file system that all machines "
                    "of the cluster share, under the same path"
                ) from None
        return self._outputs[index]

    def _total(self, wanted: Totalling) -> list[Any]:
        asked: Pass = self._unpacked(wanted.wanted)
        results = []
        for index, first, last in wanted.units:
            item, offset = self.thing(("item", wanted.number, index))
            results.append(total_over(asked.function, item, offset, first, last, self._scratch))
        return results if asked.each else _folded(results)


def _folded(results: list[Any]) -> list[Any]:
    """One sum for several where their order cannot matter: integers. Histograms are large."""
    parts = [part for result in results for part in (result if isinstance(result, tuple) else (result,))]
    exact = all(isinstance(part, Tensor) and not (part.is_floating_point() or part.is_complex()) for part in parts)
    return [functools.reduce(added, results, None)] if exact and results else results


def _same_file(path: str, name: str, size: int, modified: int) -> LocalFile:
    try:
        file = LocalFile(path)
    except Error as error:
        raise Error(f"{error} (on {platform.node()}, where a part of the work is done)") from None
    if (file.size, file.modified) != (size, modified):
        raise Error(f"{name}: has changed since it was opened (another size or time); open it again")
    file.name = name
    return file


def machine() -> str:
    """Equal for processes that see what the others have written without waiting for a disk."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}"


def _pickled_error(error: BaseException) -> bytes:
    if not isinstance(error, Error):
        error.add_note("in a worker process:\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip())
    try:
        data = pack_result((False, error))
        pickle.loads(data)  # some can be pickled, and not be made again
        return data
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        return pack_result((False, told))


def serve(descriptor: int) -> None:
    """Answer the messages that come through a socket until its other end is gone."""
    from multiprocessing.connection import Connection

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    connection, bench = Connection(descriptor), Bench()
    try:
        while True:
            connection.send_bytes(bench.answer(connection.recv_bytes()))
    except (EOFError, OSError):
        sys.stdout.flush()
        os._exit(0)

"""Nodes and results on their way to another process, and back.

A node is a small tree of descriptions, so it travels as a pickle; three things in it do not go as
they are. A file goes as its path and is opened again on the other side, where it must be the same.
A reduction is solved once, here, and its result goes. A tensor in memory that is not small is
written to a file first, which every worker maps.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.weights._files import LocalFile
from weightsmith.weights._lazy import Held, Moved, Reduction, Scratch, Stored, as_buffer
from weightsmith.weights._spec import Spec

INLINE = 2**20
"""Bytes of a tensor in memory that travels with its node."""

THREADS = 'use executor="threads"'


@dataclass(frozen=True)
class Packed:
    """A pickle, and the numbers of the reductions whose results it takes to use it."""

    data: bytes
    needs: tuple[int, ...]


class Packer:
    """Makes pickles for other processes; knows the reductions by number.

    Args:
        folder: where tensors in memory are written. It is made when the first is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.reductions: list[Reduction] = []
        self._numbers: dict[int, int] = {}
        self._spooled: dict[int, tuple[Held, Stored]] = {}
        self._lock = threading.RLock()

    def number(self, reduction: Reduction) -> int:
        """By which number a reduction is known on the other side."""
        with self._lock:
            if id(reduction) not in self._numbers:
                self._numbers[id(reduction)] = len(self.reductions)
                self.reductions.append(reduction)
            return self._numbers[id(reduction)]

    def pack(self, thing: object, trial: bool = False) -> Packed:
        """A pickle of nodes, functions or results.

        Args:
            trial: only find out whether it can be made; no tensor is copied.

        Raises:
            Error: something in it lives in this process alone.
        """
        with self._lock, _deeper():
            try:
                return self._packed(_Plain, thing, trial)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                reason = str(error)
            try:
                import cloudpickle
            except ImportError:
                raise Error(
                    f"cannot be computed in another process ({reason}); {THREADS}, name the function at the top of a "
                    "module, or install cloudpickle"
                ) from None
            kind = type("_Cloud", (_Rules, cloudpickle.Pickler), {})
            try:
                return self._packed(kind, thing, trial)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise Error(f"cannot be computed in another process ({error}); {THREADS}") from None

    def _packed(self, kind: Callable[..., Any], thing: object, trial: bool) -> Packed:
        file = io.BytesIO()
        pickler = kind(file, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.packer, pickler.trial, pickler.needs = self, trial, {}
        pickler.dump(thing)
        return Packed(file.getvalue(), tuple(pickler.needs))

    def clear(self) -> None:
        """Remove what was written for the workers."""
        self._spooled.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def spooled(self, held: Held) -> Stored:
        """A tensor in memory as one in a file."""
        if id(held) not in self._spooled:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / str(len(self._spooled))
            _write(held, path)
            self._spooled[id(held)] = held, Stored(LocalFile(path), 0, held.spec)
        return self._spooled[id(held)][1]


@contextmanager
def _deeper() -> Iterator[None]:
    """A chain of steps takes several times as many frames to pickle as to compute; what can be computed can travel."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _FRAMES))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


_FRAMES = 4000  # of about a kilobyte each: well within the stack of a thread


def _write(held: Held, path: Path) -> None:
    step = max(2**22 // held.grain, 1) * held.grain
    scratch = Scratch()
    with open(path, "wb") as file:
        for start in range(0, held.spec.numel, step):
            values = held.read(start, min(start + step, held.spec.numel), scratch)
            file.write(as_buffer(values.contiguous().view(-1)))


class _Rules:
    """What goes in another form than pickle would give it."""

    packer: Packer | None = None
    trial = False
    needs: dict[int, None]

    def persistent_id(self, obj: Any) -> Any:
        if self.packer is None:
            return None
        if isinstance(obj, LocalFile):
            return "file", os.path.abspath(obj.path), obj.name, obj.size, obj.modified
        if isinstance(obj, Reduction):
            number = self.packer.number(obj)
            self.needs[number] = None
            return "solved", number
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Held):
            return self._held(obj)
        if isinstance(obj, Tensor):
            if obj.device.type != "cpu" and self.packer is not None:
                raise Error(f"rests on a tensor on {obj.device}, which other processes do not see; {THREADS}")
            if type(obj) is Tensor and obj.layout == torch.strided and not obj.requires_grad and not obj.is_meta:
                return _tensor, (self._values(obj), obj.dtype, tuple(obj.shape))
        if isinstance(obj, Moved) and obj.device.type != "cpu":
            raise Error(f"is computed on {obj.device}, which other processes do not share; {THREADS}")
        if isinstance(obj, types.FunctionType | type) and obj.__module__ == "__main__" and isinstance(self, _Plain):
            raise pickle.PicklingError(f"{obj.__qualname__} is a part of the running script")
        inherited = getattr(super(), "reducer_override", None)
        return NotImplemented if inherited is None else inherited(obj)

    def _held(self, held: Held) -> Any:
        device = held.tensor.device
        if held.tensor.is_meta:
            raise Error("is on the meta device: it has a shape and no values")
        if device.type != "cpu" or hasattr(held.tensor, "full_tensor"):
            raise Error(f"is in the memory of this process alone ({device}); {THREADS}, or save it first")
        if held.spec.nbytes > INLINE and not self.trial and self.packer is not None:
            return _itself, (self.packer.spooled(held),)
        return _held, (self._values(held.tensor), held.spec)

    def _values(self, tensor: Tensor) -> bytes:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        return b"" if self.trial else bytes(as_buffer(tensor.contiguous().view(-1)))


class _Plain(_Rules, pickle.Pickler):
    pass


def _itself(value: Any) -> Any:
    return value


def _tensor(values: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not values:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(dtype).reshape(shape)


def _held(values: bytes, spec: Spec) -> Held:
    return Held(_tensor(values, spec.dtype, spec.shape))


class Unpacker(pickle.Unpickler):
    """Reads what a `Packer` made. The pickles come from the process that started this one, and from nobody else."""

    def __init__(self, data: bytes, known: Callable[[Sequence[Any]], Any]):
        super().__init__(io.BytesIO(data))
        self.known = known

    def persistent_load(self, pid: Any) -> Any:
        return self.known(pid)


def pack_result(result: object) -> bytes:
    """What a worker found, for the process that asked."""
    file = io.BytesIO()
    _Plain(file, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    return file.getvalue()

"""Bytes at offsets: the one thing every file format needs of local and remote storage.

Reads go through ``pread`` into a caller's buffer, so that memory stays bounded and a file that
shrinks under us is an error, not a crash of the process.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import threading
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError


class Bytes(Protocol):
    """A readable run of bytes with a name for messages."""

    name: str
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on; an error if there are not enough."""
        ...

    def view(self, offset: int, nbytes: int) -> Tensor:
        """The bytes as a uint8 tensor of its own memory: mapped where possible, else read."""
        ...

    def identity(self) -> object:
        """What changes when the content does (JSON-able), or None if that cannot be told."""
        ...


class LocalFile:
    """A file on this machine, opened on first use and shared by threads."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.name = str(path)
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise Error(f"{self.name}: {error.strerror or error}") from None
        if not stat.S_ISREG(status.st_mode):
            raise Error(f"{self.name}: not a regular file")
        self.size = status.st_size
        self._key = (status.st_dev, status.st_ino)
        self.modified = status.st_mtime_ns
        self._descriptor = -1
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def descriptor(self) -> int:
        if self._descriptor < 0:
            with self._lock:
                if self._descriptor < 0:
                    self._descriptor = self._opened()
        return self._descriptor

    def _opened(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise Error(f"{self.name}: {error.strerror}") from None
        if not self.same_file(os.fstat(descriptor)):
            os.close(descriptor)
            raise Error(f"{self.name}: another file has taken its name meanwhile; open it again")
        return descriptor

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done, wanted = 0, len(buffer)
        while done < wanted:
            got = os.preadv(self.descriptor(), [buffer[done:]], offset + done)
            if got == 0:
                raise FormatError(f"{self.name}: ends at byte {offset + done}, {wanted - done} bytes early")
            done += got

    def view(self, offset: int, nbytes: int) -> Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        descriptor = self.descriptor()  # the file that was opened, even if its name has since gone to another
        size = os.fstat(descriptor).st_size
        if offset + nbytes > size:  # asked each time: touching a map beyond the end would kill the process
            raise FormatError(f"{self.name}: ends at byte {size}, before byte {offset + nbytes}")
        with self._lock:
            if self._map is None:
                # A private copy-on-write map: a caller who writes to the tensor never reaches the file.
                self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        if offset + nbytes > len(self._map):
            raise FormatError(f"{self.name}: has grown since it was opened; open it again")
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)

    def identity(self) -> object:
        return [str(self.path.resolve()), self.size, self.modified]

    def same_file(self, status: os.stat_result) -> bool:
        return self._key == (status.st_dev, status.st_ino)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def __reduce__(self) -> tuple[type[LocalFile], tuple[str]]:
        return LocalFile, (str(self.path),)


def read_bytes(file: Bytes, offset: int, nbytes: int) -> bytes:
    """``nbytes`` bytes from ``offset`` on. For headers and other small runs."""
    if offset < 0 or nbytes < 0 or offset + nbytes > file.size:
        raise FormatError(f"{file.name}: wanted bytes {offset} to {offset + nbytes}, the file has {file.size}")
    buffer = bytearray(nbytes)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def content_of(carried: bytes | Bytes) -> bytes:
    """A file that travels beside the tensors, whole."""
    return carried if isinstance(carried, bytes) else read_bytes(carried, 0, carried.size)


def check_json(raw: bytes, where: str) -> None:
    """Refuse JSON that would need many times its size in memory, before it is parsed.

    An entry of a tensor has 3 brackets and 4 colons in at least 51 bytes. What is denser than that
    over a megabyte is no list of tensors, but a bomb of empty lists.
    """
    brackets, colons = len(raw) // 16, len(raw) // 12
    if len(raw) < 1_000_000 or (raw.count(b"[") + raw.count(b"{") <= brackets and raw.count(b":") <= colons):
        return
    for part in _OUTSIDE.finditer(raw):  # brackets in words do not count
        first, last = part.span(1)
        brackets -= raw.count(b"[", first, last) + raw.count(b"{", first, last)
        colons -= raw.count(b":", first, last)
        if brackets < 0 or colons < 0:
            raise FormatError(f"{where}: its {len(raw):,} bytes of JSON describe no tensors, and would fill the memory")


_OUTSIDE = re.compile(rb'([^"]*+)(?:"(?:[^"\\]|\\.)*+")?', re.DOTALL)


class Folder(Protocol):
    """A folder of files, here or far away."""

    name: str

    def names(self) -> list[str]:
        """Relative paths (``/`` between parts) of the files in it and in its subfolders, sorted."""
        ...

    def file(self, name: str) -> Bytes: ...


class LocalFolder:
    """A folder on this machine. Links inside it are followed (model caches are made of them)."""

    DEEPEST = 3

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.name = str(path)

    def names(self) -> list[str]:
        found: list[str] = []
        for folder, folders, files in os.walk(self.path):
            depth = len(Path(folder).relative_to(self.path).parts)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and depth < self.DEEPEST)
            found += [Path(folder, f).relative_to(self.path).as_posix() for f in files if not f.startswith(".")]
        return sorted(found)

    def file(self, name: str) -> LocalFile:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            checked_name(name, self.name)
        return LocalFile(self.path / name)


def checked_name(name: str, where: str) -> str:
    """A relative path that stays in its folder, or an error: file names found in files are not trusted."""
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts or ":" in parts[0]:
        raise FormatError(f"{where}: names the file {name!r}, which is outside its folder")
    return name


def is_remote(path: str) -> bool:
    """Whether a path is an address (``s3://...``), to be reached through fsspec.

    >>> is_remote("s3://bucket/model"), is_remote("models/a")
    (True, False)
    """
    return "://" in path

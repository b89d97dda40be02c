"""Files far away: read in ranges, and written so that a half-sent checkpoint never looks like a whole one.

Everything goes through fsspec, so that one page of code serves object stores, web servers and
remote disks. A file system that can rename is written to under another name first. An object store
cannot rename, but shows an object only when all of it has arrived; there the file that makes a
folder a checkpoint (its index, or its only file of weights) is sent last.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError, MissingPackage, OutputError, missing
from weightsmith.progress import task
from weightsmith.weights._files import LocalFolder, checked_name
from weightsmith.weights._lazy import as_buffer

PIECE = 2**26
"""Bytes of one request at most: fsspec hands over a copy, which should stay small beside the tensor."""

_STAMPS = ("ETag", "etag", "checksum", "md5Hash", "sha256", "LastModified", "last_modified", "mtime", "created")


class RemoteFile:
    """A file at an address, read in ranges by any number of threads.

    Args:
        url: what fsspec understands: ``s3://bucket/key``, ``https://...``, ``memory://...``.

    Raises:
        Error: it is not there, may not be read, or is no file.
        MissingPackage: fsspec, or its part for this kind of address, is not installed.
    """

    def __init__(self, url: str):
        system, path = _connected(url)
        self._begin(system, path, shown(url))

    @classmethod
    def _at(cls, system: Any, path: str, name: str) -> RemoteFile:
        file = cls.__new__(cls)
        file._begin(system, path, name)
        return file

    def _begin(self, system: Any, path: str, name: str) -> None:
        self._system, self._path, self.name = system, path, name
        with _named(name):
            info = system.info(path)
        if info.get("type") == "directory":
            raise Error(f"{name}: a folder, not a file")
        if info.get("size") is None:
            raise Error(f"{name}: the server does not say how long this file is; fetch it first")
        self.size = int(info["size"])
        self._stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), None)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for first in range(0, len(buffer), PIECE):
            piece = buffer[first : first + PIECE]
            piece[:] = self._range(offset + first, len(piece))

    def _range(self, start: int, nbytes: int) -> bytes:
        if start + nbytes > self.size:
            raise FormatError(f"{self.name}: ends at byte {self.size}, before byte {start + nbytes}")
        with _named(self.name):
            found = self._system.cat_file(self._path, start=start, end=start + nbytes)
        if len(found) > nbytes:
            raise Error(f"{self.name}: the server sends whole files, not ranges of them; fetch it first")
        if len(found) < nbytes:
            raise FormatError(f"{self.name}: ends at byte {start + len(found)}, {nbytes - len(found)} bytes early")
        return found

    def view(self, offset: int, nbytes: int) -> Tensor:
        values = torch.empty(nbytes, dtype=torch.uint8)
        self.read_into(offset, as_buffer(values))
        return values

    def identity(self) -> object:
        return None if self._stamp is None else [self.name, self.size, self._stamp]

    def __reduce__(self) -> tuple[Callable[..., RemoteFile], tuple[Any, str, str]]:
        return RemoteFile._at, (self._system, self._path, self.name)


class RemoteFolder:
    """A folder, or what passes for one in an object store: the keys that begin with its name."""

    def __init__(self, url: str):
        self._system, self._path = _connected(url)
        self._path = self._path.rstrip("/")
        self.name = shown(url).rstrip("/")

    def names(self) -> list[str]:
        with _named(self.name):
            found = self._system.find(self._path, maxdepth=LocalFolder.DEEPEST + 1)
        names = [path[len(self._path) :].lstrip("/") for path in found]
        return sorted(name for name in names if name and not any(part.startswith(".") for part in name.split("/")))

    def file(self, name: str) -> RemoteFile:
        name = checked_name(name, self.name)
        return RemoteFile._at(self._system, f"{self._path}/{name}", f"{self.name}/{name}")


def find(url: str) -> RemoteFile | RemoteFolder:
    """The file or the folder at an address.

    Raises:
        Error: nothing is there, or it may not be looked at.
    """
    system, path = _connected(url)
    with _named(shown(url)):
        system.invalidate_cache()
        if system.isfile(path):
            return RemoteFile(url)
        if system.isdir(path):
            return RemoteFolder(url)
        system.info(path)  # says why
    raise Error(f"{shown(url)}: neither a file nor a folder")


def shown(url: str) -> str:
    """An address for messages and records, without the passwords and signatures that may be in it.

    >>> shown("https://me:secret@example.org/model.gguf?signature=abc")
    'https://example.org/model.gguf'
    """
    return re.sub(r"://[^/@]*@", "://", url).partition("?")[0]


def _connected(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise missing("fsspec", "remote", f"reading or writing {shown(url)}") from None
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise MissingPackage(f"{shown(url)}: {error}") from None
    except Exception as error:  # each file system raises its own kind
        raise Error(f"{shown(url)}: {_words(error, url)}") from error


@contextmanager
def _named(name: str, kind: type[Error] = Error) -> Iterator[None]:
    """What goes wrong at an address, as an error that names it."""
    try:
        yield
    except Error:
        raise
    except FileNotFoundError:
        raise kind(f"{name}: no such file or folder") from None
    except PermissionError as error:
        raise kind(f"{name}: not allowed ({_words(error)})") from error
    except NotImplementedError:
        raise kind(f"{name}: this kind of address cannot do that (it may be for reading only)") from None
    except Exception as error:  # each file system raises its own kind
        raise kind(f"{name}: {_words(error)}") from error


def _words(error: Exception, url: str = "") -> str:
    text = str(error).replace(url, shown(url)) if url else str(error)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text)[:300] or type(error).__name__


# Writing


def upload(local: Path, url: str, overwrite: bool = False) -> None:
    """Send a finished file or folder to an address, so that it is there whole or does not look whole.

    Where files can be renamed, a new target appears in one step. Elsewhere, and when a folder is
    replaced, the file that makes the folder a checkpoint is removed first and sent last: a failure
    leaves a folder that cannot be mistaken for a checkpoint (the old one is then gone). A folder
    keeps those of its files that are no part of a checkpoint.

    Args:
        local: a file, or a folder with its subfolders.
        url: the address that it shall have.
        overwrite: whether a checkpoint may stand there.

    Raises:
        OutputError: something stands there, or the sending failed; the message names the address.
    """
    name = shown(url).rstrip("/")
    system, path = _connected(url)
    path = path.rstrip("/")
    files = _sources(local)
    with _named(name, OutputError):
        system.invalidate_cache()
        there = _check_target(system, path, name, local.is_dir(), overwrite)
    total = sum(source.stat().st_size for source in files.values())
    with task(f"sending {name}", total, "bytes") as advance:
        if local.is_file():
            _send_alone(system, local, path, name, advance)
        elif there or not _renames(system):
            _send_in_order(system, files, there, path, name, advance)
        else:
            _send_aside(system, files, path, name, advance)


def check(url: str, is_folder: bool, overwrite: bool = False) -> None:
    """An error where `upload` would refuse to begin.

    Raises:
        OutputError: something stands there, or it may not be looked at.
    """
    name = shown(url).rstrip("/")
    system, path = _connected(url)
    with _named(name, OutputError):
        _check_target(system, path.rstrip("/"), name, is_folder, overwrite)


def _sources(local: Path) -> dict[str, Path]:
    """Name in the target -> file here."""
    if local.is_file():
        return {"": local}
    found = {p.relative_to(local).as_posix(): p for p in sorted(local.rglob("*")) if p.is_file()}
    if not found:
        raise Error(f"{local}: nothing to send" if local.is_dir() else f"{local}: no such file or folder")
    return found


def _check_target(system: Any, path: str, name: str, is_folder: bool, overwrite: bool) -> list[str]:
    """The names that stand in the way of a folder, if they may be replaced."""
    info = _info(system, path)
    if info is None:
        return []
    was_folder = info["type"] == "directory"
    there = [found[len(path) :].lstrip("/") for found in system.find(path)] if was_folder else []
    if was_folder and is_folder and not there:
        return []
    if not overwrite:
        raise OutputError(f"{name} exists; choose another place, or overwrite=True (--overwrite) to replace it")
    if was_folder != is_folder:
        kind = "folder" if was_folder else "file"
        raise OutputError(f"{name} is a {kind}, and would be replaced by the other kind; remove it first")
    if is_folder and not any(_is_weights(file) for file in there):
        raise OutputError(f"{name} is a folder without weights in it; overwriting is for checkpoints only")
    return there


def _info(system: Any, path: str) -> dict[str, Any] | None:
    """What the server says of a path; None if it says that nothing is there. (``exists`` hides every other error.)"""
    try:
        return system.info(path)
    except FileNotFoundError:
        return None


def _is_weights(name: str) -> bool:
    from weightsmith.weights._save import belongs_to_checkpoint  # the writer above us knows the formats

    return "/" not in name and belongs_to_checkpoint(name)


def _renames(system: Any) -> bool:
    """Whether moving is a step of the server. The method that fsspec lends copies and deletes instead."""
    from fsspec import AbstractFileSystem

    return type(system).mv is not AbstractFileSystem.mv


def _send_alone(system: Any, source: Path, path: str, name: str, advance: Callable[[int], None]) -> None:
    with _named(name, OutputError):
        if not _renames(system):
            _send(system, source, path, name, advance)
            return
        aside = _aside(path)
        with _removing(system, aside):
            system.makedirs(system._parent(path), exist_ok=True)
            _send(system, source, aside, name, advance)
            system.mv(aside, path)


def _send_aside(system: Any, files: dict[str, Path], path: str, name: str, advance: Callable[[int], None]) -> None:
    """A folder under another name, which then takes its own in one step."""
    aside = _aside(path)
    with _named(name, OutputError), _removing(system, aside):
        for file, source in files.items():
            system.makedirs(system._parent(f"{aside}/{file}"), exist_ok=True)
            _send(system, source, f"{aside}/{file}", f"{name}/{file}", advance)
        info = _info(system, path)
        if info is not None:
            if info["type"] != "directory" or system.find(path):
                raise OutputError(f"{name} appeared while it was being sent; choose another place")
            system.rmdir(path)  # a move onto an empty folder would end inside it
        system.mv(aside, path, recursive=True)


def _aside(path: str) -> str:
    return f"{path}.{uuid.uuid4().hex}.partial"


def _send_in_order(
    system: Any, files: dict[str, Path], there: list[str], path: str, name: str, advance: Callable[[int], None]
) -> None:
    """File by file into the folder itself: what makes it a checkpoint goes first when old and comes last when new."""
    with _named(name, OutputError):
        for file in sorted(filter(_is_weights, there), key=_completes, reverse=True):
            system.rm_file(f"{path}/{file}")
    sent: list[str] = []
    try:
        for file in sorted(files, key=_completes):
            _send_alone(system, files[file], f"{path}/{file}", f"{name}/{file}", advance)
            sent.append(file)
    except BaseException:
        for file in reversed(sent):
            if _is_weights(file) or file not in there:
                _remove(system, f"{path}/{file}")
        raise


def _completes(name: str) -> tuple[int, str]:
    """How much a file makes its folder look whole: companions little, weights more, their index most."""
    return (2 if name.endswith(".index.json") else int(_is_weights(name))), name


def _send(system: Any, source: Path, path: str, name: str, advance: Callable[[int], None]) -> None:
    size = source.stat().st_size
    with _removing(system, path):
        system.put_file(str(source), path)
        system.invalidate_cache()
        arrived = system.info(path)["size"]
        if arrived != size:
            raise OutputError(f"{name}: {arrived} of {size} bytes arrived; try again")
    advance(size)


@contextmanager
def _removing(system: Any, path: str) -> Iterator[None]:
    """If this fails, leave nothing new at ``path``. What stood there before and still does is not touched."""
    before = _info(system, path)
    try:
        yield
    except BaseException:
        _remove(system, path, before)
        raise


def _remove(system: Any, path: str, unless: dict[str, Any] | None = None) -> None:
    try:
        system.invalidate_cache()
        found = _info(system, path)
        if found is not None and found != unless:
            system.rm(path, recursive=True)
    except Exception:  # the failure that brought us here is the one to report
        return

"""A place beside the output in which it grows, and the moment when it takes its name.

``out.partial/`` holds a lock, a journal of what is finished, and the files. Whatever happens before
the last step, ``out`` is what it was before; the last step is one rename. A power cut cannot make
the journal promise what the disk does not have: lines are added after the data are synced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from weightsmith.errors import OutputError

SYNC_SECONDS = 2.0  # at most this much work is repeated after an interruption

Done = tuple[int, int]
"""Number of a group of outputs, number of its unit."""


class WorkersLost(OutputError):
    """Processes that do the work died again and again. What is finished stays for a resume."""


class Staging:
    """The growing output. Held by one process at a time; see `claimed`."""

    def __init__(self, target: Path):
        self.target = target
        self.folder = staging_folder(target)
        self.whole = self.folder / "whole"
        self.journal = self.folder / "journal"

    def begin(self, plan: object, resume: bool, files: Mapping[str, int]) -> set[Done]:
        """Empty the place for ``plan``, or find what an interrupted run of the same plan has finished.

        Args:
            files: name -> size of the files that hold tensors. If one is not there, or not of its
                size, the journal is not believed.
        """
        mark = hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=20).hexdigest()
        if resume and self.journal.exists():
            mine, done = _journal(self.journal)
            if mine and mine != mark:
                raise OutputError(
                    f"{self.folder}: was left by a save of something else (other inputs, settings or version, or "
                    "inputs in memory, which cannot be compared); save again without resume to start afresh"
                )
            if mine and all(_size(self.whole / name) == size for name, size in files.items()):
                return done
        self._forget()
        self.whole.mkdir()
        with open(self.journal, "x", encoding="ascii") as file:
            file.write(mark + "\n")
        return set()

    def promise_nothing(self) -> None:
        """Drop the journal, before the files it speaks of move or go: it must never outlive them."""
        self.journal.unlink(missing_ok=True)
        _sync_folder(self.folder)

    def _forget(self) -> None:
        self.promise_nothing()
        if self.whole.is_symlink():
            self.whole.unlink()
        elif self.whole.exists():
            shutil.rmtree(self.whole)
        shutil.rmtree(self.folder / "held", ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing behind. The lock goes last."""
        with suppress(OSError):
            self._forget()
        (self.folder / "lock").unlink(missing_ok=True)
        _remove_empty(self.folder)


def staging_folder(target: Path) -> Path:
    """Where the output for ``target`` grows."""
    return target.with_name(target.name + ".partial")


def bytes_on_disk(folder: Path) -> int:
    """Bytes on disk under a folder, which another process may be emptying at this moment."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1


def _journal(path: Path) -> tuple[str, set[Done]]:
    text = path.read_bytes()
    kept = text.rfind(b"\n") + 1
    if kept < len(text):  # a torn last line was never promised, and the next must not be written behind it
        os.truncate(path, kept)
    complete = text[:kept].decode("ascii", errors="replace").splitlines()
    done: set[Done] = set()
    for line in complete[1:]:
        group, _, unit = line.partition(" ")
        if group.isdigit() and unit.isdigit():
            done.add((int(group), int(unit)))
    return (complete[0] if complete else ""), done


@contextmanager
def claimed(target: Path) -> Iterator[Staging]:
    """Hold the place for ``target``, against other processes and other threads of this one."""
    staging = Staging(target)
    try:
        staging.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write beside {target}: {error.strerror}") from None
    descriptor = _locked(staging)
    try:
        yield staging
    finally:
        os.close(descriptor)


def _locked(staging: Staging) -> int:
    path = staging.folder / "lock"
    while True:
        try:
            staging.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the holder finished and removed the folder between the two calls
        except OSError as error:
            raise OutputError(f"cannot write beside {staging.target}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, there = os.fstat(descriptor), os.stat(path)
            if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"another process is saving to {staging.target} right now") from None
        except FileNotFoundError:
            pass  # we locked a file that its holder had already removed: try again
        os.close(descriptor)


class Journal:
    """Notes what is finished, some time after it is finished: data first, then the note."""

    def __init__(self, path: Path, descriptors: Iterable[int]):
        self._file = open(path, "a", encoding="ascii")  # noqa: SIM115 - closed by `close`
        self._descriptors = list(descriptors)
        self._finished: list[Done] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_noting, name="weightsmith-journal", daemon=True)
        self._thread.start()

    def add(self, done: Done) -> None:
        with self._lock:
            self._finished.append(done)

    def _keep_noting(self) -> None:
        while not self._stop.wait(SYNC_SECONDS):
            try:
                self._note()
            except OSError:
                return  # the writers meet the same error and report it

    def _note(self) -> None:
        with self._lock:
            finished, self._finished = self._finished, []
        if finished:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            self._file.write("".join(f"{group} {unit}\n" for group, unit in finished))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, note: bool) -> None:
        """Stop; with ``note`` write down what is still open, for a later resume."""
        self._stop.set()
        self._thread.join()
        try:
            if note:
                self._note()
        finally:
            self._file.close()


# The last step


def publish(staging: Staging, made: Path, overwrite: bool, is_mine: Callable[[str], bool]) -> None:
    """Give ``made`` (in the staging place) the target's name, in one step.

    Args:
        overwrite: whether something may stand there. A folder keeps those of its files that are
            not part of a checkpoint.
        is_mine: whether a top-level file of an old folder belongs to the checkpoint being replaced.
    """
    target = staging.target
    there = os.path.lexists(target)
    if there and not is_empty_folder(target):
        if not overwrite:
            raise OutputError(f"{target} appeared while it was being made; the new one is whole at {made}")
        if made.is_dir():
            _carry_over(target, made, is_mine)
    sync_tree(made)
    staging.promise_nothing()  # from here on what stands in the staging place may be the old output
    if not made.is_dir():
        _rename_file(made, target, overwrite)
    elif not there:
        os.rename(made, target)
    elif not _exchange(made, target):
        # No atomic exchange on this system: for a moment only the old one under another name is there.
        aside = staging.folder / "old"
        os.rename(target, aside)
        os.rename(made, target)
        if aside.is_symlink():
            aside.unlink()
        else:
            shutil.rmtree(aside)
    _sync_folder(target.parent)


def _rename_file(made: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(made, target)
        return
    try:
        os.link(made, target)  # unlike rename, a link never replaces
    except FileExistsError:
        raise OutputError(f"{target} appeared while it was being made; the new one is whole at {made}") from None
    except OSError:
        os.replace(made, target)  # a file system without links


def _carry_over(old: Path, new: Path, is_mine: Callable[[str], bool]) -> None:
    """Link the old folder's other files into the new one: replacing a checkpoint loses nothing else."""
    for folder, folders, files in os.walk(old):
        inside = Path(folder).relative_to(old)
        for name in files + [f for f in folders if Path(folder, f).is_symlink()]:
            source, place = Path(folder, name), new / inside / name
            if os.path.lexists(place) or (inside == Path() and is_mine(name)):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                os.symlink(os.readlink(source), place)
            else:
                try:
                    os.link(source, place)
                except OSError:
                    shutil.copy2(source, place)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    at_cwd, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def sync_tree(path: Path) -> None:
    """Everything of a file or folder on the disk, before it takes its name."""
    if path.is_file():
        _sync(path)
        return
    for folder, _, files in os.walk(path):
        for name in files:
            if not Path(folder, name).is_symlink():
                _sync(Path(folder, name))
        _sync_folder(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems have no folder to sync
        _sync(path)


def is_empty_folder(path: Path) -> bool:
    """Whether a folder stands there that nobody would miss."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _remove_empty(folder: Path) -> None:
    for _ in range(3):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.01)  # somebody who waits for the lock has just made theirs

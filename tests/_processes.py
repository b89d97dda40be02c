"""Real processes for tests of what they say to one another."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def together(file: str, folder: Path, world: int = 2, imports: Sequence[str] = ()) -> None:
    """Run ``work(rank, folder)`` of a test file in so many processes; an assertion if one of them fails.

    They begin as one, which imports once what all need, and part then: importing costs more than all the rest.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system has no os.fork")
    module = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    command = [sys.executable, __file__, module, str(folder), str(world), *imports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def apart(module: str, folder: str, world: int, imports: Sequence[str]) -> None:
    """What the first of the processes runs."""
    work: Callable[[int, str], None] = importlib.import_module(module).work
    for name in imports:
        importlib.import_module(name)
    rank, others = 0, []
    for other in range(1, world):
        child = os.fork()
        if not child:
            rank, others = other, []
            break
        others.append(child)
    failed = 1
    try:
        work(rank, folder)
        failed = 0
    except BaseException:
        traceback.print_exc()
        for child in others:
            os.kill(child, signal.SIGKILL)  # or they would wait for this one
    sys.stderr.flush()
    if rank:
        os._exit(failed)
    for child in others:
        failed |= os.waitpid(child, 0)[1] != 0
    sys.exit(failed)


if __name__ == "__main__":
    sys.modules["tests"] = here = ModuleType("tests")  # installed packages may bring tests of their own
    here.__path__ = [str(Path(__file__).parent)]
    apart(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])

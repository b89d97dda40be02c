"""Workers that are processes of this machine.

Each is a fresh interpreter (no copy of this process, whose threads and locks would be in an unknown
state) at the other end of a socket. It does not import the running script, so a script needs no
``if __name__ == "__main__"``. If this process goes, whatever the reason, the socket closes and the
worker ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from weightsmith.weights._crew import Died
from weightsmith.weights._execute import default_threads

_CODE = "import sys; sys.path[:] = {path!r}; from weightsmith.weights._bench import serve; serve({descriptor})"


@contextmanager
def machine(workers: int | None) -> Iterator[tuple[Callable[[], Process], int]]:
    """What begins a worker here, and how many there may be."""
    yield Process, workers or default_threads()


class Process:
    """One worker; see `weightsmith.weights._crew.Link`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE.format(path=sys.path, descriptor=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for us, who then end the workers
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())

    def ask(self, message: bytes) -> bytes:
        try:
            self._connection.send_bytes(message)
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise Died(self._ending()) from None

    def _ending(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

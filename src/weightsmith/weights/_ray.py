"""Workers that are actors of a Ray cluster, on this machine or on many that share a file system."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from weightsmith.errors import missing
from weightsmith.weights._bench import Bench
from weightsmith.weights._crew import Died, Link
from weightsmith.weights._execute import default_threads

OBJECTS = 2**27
"""Bytes for Ray's own store in a cluster that is started here: results are small, so little will do."""


class Actor:
    """One worker; see `weightsmith.weights._crew.Link`."""

    def __init__(self, ray: Any):
        self._ray = ray
        self._actor = ray.remote(num_cpus=1, max_restarts=0)(Bench).remote()

    def ask(self, message: bytes) -> bytes:
        errors = self._ray.exceptions
        try:
            return self._ray.get(self._actor.answer.remote(message))
        except errors.RayError as error:  # the process, its machine or the memory for it is gone
            if isinstance(error, errors.RayTaskError):
                raise
            raise Died(str(error).strip().partition("\n")[0]) from None

    def stop(self) -> None:
        self._ray.kill(self._actor)


def check_installed() -> None:
    """An error that says what to install."""
    if importlib.util.find_spec("ray") is None:
        raise missing("ray", "ray", 'executor="ray"')


@contextmanager
def cluster(workers: int | None) -> Iterator[tuple[Callable[[], Link], int]]:
    """What begins a worker, and how many there may be.

    The cluster that this program is connected to, else the one that runs here or that ``RAY_ADDRESS``
    names, else one of this machine alone that ends with the save.
    """
    check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    connected, folder = ray.is_initialized(), ""
    quiet: dict[str, Any] = {"namespace": "weightsmith", "logging_level": "ERROR", "log_to_driver": False}
    try:
        if not connected:
            folder = _connect(ray, workers, quiet)
        found = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        yield (lambda: Actor(ray)), min(workers or found, found)
    finally:
        if not connected:
            ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _connect(ray: Any, workers: int | None, quiet: dict[str, Any]) -> str:
    """Connect to the cluster that there is, or start one; the folder of one that was started."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address != "local":
        try:
            ray.init(address=address, **quiet)
            return ""
        except ConnectionError:
            if address != "auto":
                raise
    folder = tempfile.mkdtemp(prefix="weightsmith-", dir="/tmp" if os.path.isdir("/tmp") else None)  # sockets: short
    count = workers or default_threads()
    ray.init("local", num_cpus=count, num_gpus=0, include_dashboard=False, object_store_memory=OBJECTS,
             _temp_dir=folder, **quiet)  # fmt: skip
    return folder

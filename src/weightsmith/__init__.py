"""weightsmith: start, train, average, merge, align, prune, quantize, keep, edit and read weights.

    import weightsmith as ws

    base, a, b = ws.open("base/"), ws.open("run_a/"), ws.open("run_b/")
    merged = ws.merge.mean([a, b])
    merged.save("out/")

Names are imported when they are first used, so that what needs no tensors starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsmith._version import __version__
from weightsmith.errors import Error

if TYPE_CHECKING:
    from weightsmith import average, inspect, merge, progress, prune, quantize, weights
    from weightsmith.weights import Spec, Weights, by_depth, open

_ROOMS = ("average", "inspect", "merge", "progress", "prune", "quantize", "weights")
_NAMES = ("Spec", "Weights", "by_depth", "open")

__all__ = ["Error", "__version__", *_NAMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _ROOMS:
        found: Any = importlib.import_module(f"weightsmith.{name}")
    elif name in _NAMES:
        found = getattr(importlib.import_module("weightsmith.weights"), name)
    else:
        raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)

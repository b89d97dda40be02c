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
    from weightsmith import (
        adapt,
        average,
        graph,
        inspect,
        merge,
        optim,
        progress,
        prune,
        quantize,
        recipe,
        share,
        solve,
        start,
        stats,
        weights,
    )
    from weightsmith.weights import Spec, Weights, by_depth, open

__all__ = [
    "Error",
    "Spec",
    "Weights",
    "__version__",
    "adapt",
    "average",
    "by_depth",
    "graph",
    "inspect",
    "merge",
    "open",
    "optim",
    "progress",
    "prune",
    "quantize",
    "recipe",
    "share",
    "solve",
    "start",
    "stats",
    "weights",
]

_FROM_WEIGHTS = ("Spec", "Weights", "by_depth", "open")


def __getattr__(name: str) -> Any:
    import importlib

    if name in _FROM_WEIGHTS:
        found: Any = getattr(importlib.import_module("weightsmith.weights"), name)
    elif name in __all__:
        found = importlib.import_module(f"weightsmith.{name}")
    else:
        raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)

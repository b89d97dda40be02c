"""How the outputs of recipes are written: options, the card and the recipe beside the tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import Error
from weightsmith.weights import Saved, Weights, open
from weightsmith.weights import _lineage as lineages


@dataclass(frozen=True)
class Settings:
    """How outputs are written; see `weightsmith.Weights.save`."""

    overwrite: bool = False
    resume: bool = False
    threads: int | None = None
    memory: int | str | None = None
    executor: str = "threads"
    workers: int | None = None

    def planning(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of `Weights.planned`, but for ``overwrite``."""
        return {
            **_layout(options),
            "threads": self.threads,
            "memory": self.memory,
        }

    def saving(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of `Weights.save`."""
        given = {
            **_layout(options),
            "overwrite": self.overwrite,
            "resume": self.resume,
            "threads": self.threads,
            "memory": self.memory,
        }
        return given | {"executor": self.executor, "workers": self.workers}


def _layout(options: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: options[key] for key in ("format",) if options.get(key) is not None}
    if "max_shard_size" in options:
        size = options["max_shard_size"]
        found["max_shard_size"] = None if size in (None, "none") else size
    return found


def dressed(weights: Weights, options: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> Weights:
    """The weights as an output wants them: in its dtype, with more files beside them."""
    if options.get("dtype"):
        weights = weights.cast(options["dtype"])
    return weights.with_files(files) if files else weights


def finished(weights: Weights, path: str, *, exact: bool = True) -> Saved | None:
    """What an earlier run of the same recipe wrote to a place in whole; None where it did not.

    Args:
        weights: what would be written, without the files that a recipe adds.
        path: where to.
        exact: what was written came from the same steps, options and inputs. Where the steps choose on their way
            these are not known before, and the tensors' names, shapes and dtypes must do.
    """
    if not os.path.exists(path):
        return None
    try:
        there = open(path)
    except (Error, OSError):
        return None
    said = there.lineage.past
    if not said or (list(there), there.specs) != (list(weights), weights.specs):
        return None
    if exact and said != lineages.parsed(lineages.written(weights.lineage)):
        return None
    place = Path(path)
    files = (
        sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()) if place.is_dir() else []
    )
    nbytes = sum((place / file).stat().st_size for file in files) if files else place.stat().st_size
    return Saved(path, tuple(files) or (place.name,), len(weights) - len(weights.ties), nbytes, len(weights))

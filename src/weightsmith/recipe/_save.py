"""How the outputs of recipes are written: options, the card and the recipe beside the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.weights import Weights


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
        """The keywords of `Weights.planned`."""
        return {
            **_layout(options),
            "threads": self.threads,
            "memory": self.memory,
            "overwrite": self.overwrite or self.resume,
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
        if self.executor != "threads":
            given |= {"executor": self.executor, "workers": self.workers}
        return given


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

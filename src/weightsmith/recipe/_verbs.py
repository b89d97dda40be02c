"""Steps of a recipe that are not methods of a room: what every `Weights` can do by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.errors import Error
from weightsmith.weights import PerTensor, Weights, open

Source = Any


def cast(weights: Source, dtype: PerTensor[str]) -> Weights:
    """The same values in another dtype."""
    return open(weights).cast(dtype)


def select(weights: Source, pattern: str | Sequence[str]) -> Weights:
    """Only the tensors whose name fits."""
    return open(weights).select(pattern)


def drop(weights: Source, pattern: str | Sequence[str]) -> Weights:
    """All but the tensors whose name fits."""
    return open(weights).drop(pattern)


def rename(weights: Source, names: Mapping[str, str]) -> Weights:
    """Other names: ``{old: new}``."""
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for pair in names.items() for name in pair):
        raise Error("names must be a mapping of old names to new ones")
    return open(weights).rename(names)


def overlay(weights: Source, patch: Source) -> Weights:
    """The tensors of ``patch`` in place of, and beside, those of ``weights``."""
    return open(weights) | open(patch)


def files(weights: Source, like: Source) -> Weights:
    """The same tensors with the configuration, tokenizer and other small files of ``like``."""
    found = open(like).files
    if not found:
        raise Error("there are no files beside the weights that they should be taken from")
    return open(weights).with_files(found)


VERBS = {verb.__name__: verb for verb in (cast, select, drop, rename, overlay, files)}
"""What ``method:`` may say beside the methods of the rooms."""

"""Saying which tensors, and saying it differently for each: patterns and per-tensor options."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from weightsmith.errors import Error, listed

T = TypeVar("T")

Pattern = str | Sequence[str] | Callable[[str], bool]
"""A glob (``"*.weight"``), a regular expression (``"re:layers\\.[0-3]\\."``), several, or a test."""

_INDEX = re.compile(r"(?:^|[._/])(\d+)(?=[._/])")
_FIRST = re.compile(r"embed|wte|wpe|stem|patch|tok_|^conv1|^shared", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except re.error as error:
        raise Error(f"the pattern {pattern!r} is no regular expression: {error}") from None


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a name fits a pattern. Globs fit whole names; expressions fit anywhere in them.

    >>> [matches(pattern, "layer.0.weight") for pattern in ("*.weight", "re:^layer", "layer")]
    [True, True, False]
    """
    if callable(pattern):
        return bool(pattern(name))
    if isinstance(pattern, str):
        compiled = _compiled(pattern)
        return bool(compiled.search(name) if pattern.startswith("re:") else compiled.match(name))
    return any(matches(one, name) for one in pattern)


def depth_of(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor stands between the first layer (0) and the last (1).

    The layer is the first number that is a part of the name (``model.layers.7.mlp``). Names
    without one are 0 when they say they are an embedding or a stem, and else 1.

    >>> depth_of(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.weight"])["layers.1.w"]
    0.5
    """
    names = list(names)
    layers = {name: int(found[1]) for name in names if (found := _INDEX.search(name))}
    last = max(layers.values(), default=0)
    return {
        name: (layers[name] / last if last else 0.0) if name in layers else float(not _FIRST.search(name))
        for name in names
    }


class by_depth(Sequence[float]):
    """Values interpolated over the depth of the network: ``by_depth([0.1, 0.9])``.

    >>> resolve(by_depth([0.0, 1.0]), ["layers.0.w", "layers.1.w", "layers.4.w"])
    {'layers.0.w': 0.0, 'layers.1.w': 0.25, 'layers.4.w': 1.0}
    """

    def __init__(self, values: Iterable[float]):
        self.values = tuple(float(v) for v in values)
        if not self.values:
            raise Error("by_depth needs at least one value")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def at(self, depth: float) -> float:
        """The value at ``depth`` in [0, 1], linear between neighbours."""
        place = depth * (len(self.values) - 1)
        low = min(int(place), len(self.values) - 1)
        high = min(low + 1, len(self.values) - 1)
        share = place - low
        # The exact ends, and equal neighbours, come out without rounding.
        return self.values[low] + share * (self.values[high] - self.values[low])

    def __repr__(self) -> str:
        return f"by_depth({list(self.values)})"


PerTensor = T | Mapping[str, T] | by_depth | Callable[[str], T]
"""An option that may differ by tensor: a value, ``{pattern: value}``, `by_depth`, or ``name -> value``."""


def varies(option: object) -> bool:
    """Whether an option has to be looked up by name."""
    if isinstance(option, list | tuple):
        return any(varies(item) for item in option)
    return isinstance(option, Mapping | by_depth) or callable(option)


def resolve(option: PerTensor[T], names: Iterable[str], option_name: str = "option") -> dict[str, T]:
    """The value of an option for every tensor.

    In a mapping the first pattern that fits counts; ``"*"`` as the last serves the rest. A list or
    tuple (one value a model) may hold options that differ by tensor.

    >>> resolve({"*.bias": 0, "*": 1}, ["a.weight", "a.bias"])
    {'a.weight': 1, 'a.bias': 0}
    """
    names = list(names)
    found: dict[str, Any]
    if isinstance(option, by_depth):
        depths = depth_of(names)
        found = {name: option.at(depths[name]) for name in names}
    elif isinstance(option, Mapping):
        found = {name: _first_match(option, name, option_name) for name in names}
    elif callable(option):
        found = {name: option(name) for name in names}
    elif isinstance(option, list | tuple) and varies(option):
        columns = [resolve(item, names, option_name) for item in option]
        found = {name: type(option)(column[name] for column in columns) for name in names}
    else:
        found = dict.fromkeys(names, option)
    return found


def _first_match(option: Mapping[str, T], name: str, option_name: str) -> T:
    for pattern, value in option.items():
        if matches(pattern, name):
            return value
    raise Error(
        f'{option_name} says nothing for the tensor {name}: its patterns are {listed(option)}; add "*" for the rest'
    )

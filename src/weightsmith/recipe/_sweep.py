"""All combinations of swept values, each a recipe of its own."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from weightsmith.recipe._schema import Output, Recipe, read, with_settings
from weightsmith.recipe._yaml import Node, plain

MOST = 10_000
"""Combinations; more are a mistake."""


@dataclass(frozen=True)
class Variant:
    """One combination: its values, and the recipe with them in place (``sweep`` has one value each)."""

    values: dict[str, object]
    recipe: Recipe

    @property
    def label(self) -> str:
        """The values as a person would say them."""
        return ", ".join(f"{key}={value}" for key, value in self.values.items())

    def path(self, output: Output) -> str:
        """The output's path with the values in place of the names in braces."""
        placed = re.sub(r"\{([^{}]*)\}", lambda found: self._in_a_path(found[1], found[0]), output.path)
        return os.path.expanduser(placed)

    def _in_a_path(self, key: str, otherwise: str) -> str:
        """A swept value as a part of a path: it opens no folder and leads out of none."""
        return re.sub(r"[/\\]+", "-", str(self.values[key])).strip("-") if key in self.values else otherwise


def variants(recipe: Recipe) -> list[Variant]:
    """Every combination in the order of the lists, the last varying fastest; one without a sweep."""
    count = 1
    for choices in recipe.sweep.values():
        count *= len(choices)
    if count > MOST:
        raise recipe.document.at("sweep").error(f"the sweep has {count:,} combinations, more than {MOST:,}")
    return [_variant(recipe, dict(chosen)) for chosen in _combinations(recipe)]


def _combinations(recipe: Recipe) -> Iterator[list[tuple[str, Node]]]:
    return map(list, itertools.product(*([(key, value) for value in values] for key, values in recipe.sweep.items())))


def _variant(recipe: Recipe, chosen: dict[str, Node]) -> Variant:
    if not chosen:
        return Variant({}, recipe)
    made = read(with_settings(recipe.document, chosen.items()))
    single = {key: (value,) for key, value in chosen.items()}
    return Variant({key: plain(value) for key, value in chosen.items()}, replace(made, sweep=single))

"""All combinations of swept values, each a recipe of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from weightsmith.errors import Error
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
        return re.sub(r"\{([^{}]*)\}", lambda found: str(self.values.get(found[1], found[0])), output.path)


def variants(recipe: Recipe) -> list[Variant]:
    """Every combination in the order of the lists, the last varying fastest; one without a sweep."""
    count = 1
    for choices in recipe.sweep.values():
        count *= len(choices)
    if count > MOST:
        raise Error(f"{recipe.name}: the sweep has {count:,} combinations, more than {MOST:,}")
    return [_variant(recipe, dict(chosen)) for chosen in _combinations(recipe)]


def _combinations(recipe: Recipe) -> Iterator[list[tuple[str, Node]]]:
    return map(list, itertools.product(*([(key, value) for value in values] for key, values in recipe.sweep.items())))


def _variant(recipe: Recipe, chosen: dict[str, Node]) -> Variant:
    if not chosen:
        return Variant({}, recipe)
    made = read(with_settings(recipe.document, chosen.items()))
    single = {key: (value,) for key, value in chosen.items()}
    return Variant({key: plain(value) for key, value in chosen.items()}, replace(made, sweep=single))

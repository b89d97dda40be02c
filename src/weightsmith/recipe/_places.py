"""Where a recipe writes: no two results in one place, nothing over what it reads, a page that can be written."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import missing
from weightsmith.recipe._schema import Output, Recipe, page_path
from weightsmith.recipe._sweep import Variant
from weightsmith.recipe._yaml import Node
from weightsmith.weights._files import is_remote
from weightsmith.weights._open import input_files


class Places:
    """The outputs of all variants of a recipe, and the files that it reads."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.taken: dict[str, tuple[Output, str]] = {}  # a path -> who writes there, and for which values
        self.shown: dict[str, str] = {}  # a path without links -> as it was written
        self.seen: set[int] = set()
        self.inputs: set[Path] = set()

    def read_from(self, built: Mapping[str, Any]) -> None:
        """Remember the files that inputs and steps read."""
        for made in built.values():
            for weights in made if isinstance(made, list) else [made]:
                if id(weights) not in self.seen:
                    self.seen.add(id(weights))
                    self.inputs |= {file.path.resolve() for file in input_files(weights)}

    def take(self, path: str, output: Output, variant: Variant) -> bool:
        """Whether a place is new; an error if something else goes there."""
        values = ", ".join(
            f"{key}={variant.values[key]}" for key in re.findall(r"\{([^{}]*)\}", output.path) if key in variant.values
        )
        own = path if is_remote(path) else os.path.realpath(path)
        if own not in self.taken:
            self.taken[own], self.shown[own] = (output, values), path
            return True
        other, theirs = self.taken[own]
        if other is not output:
            raise output.node.error(f"{path}: the outputs {other.path} and {output.path} are the same place")
        if theirs != values:
            raise output.node.error(f"{path}: {theirs} and {values} would be written to the same place")
        return False

    def check(self) -> None:
        """An error for an output within another, or over something that the recipe reads."""
        for own, (output, _) in self.taken.items():
            if is_remote(own):
                continue
            for other in (other for other in self.taken if other != own and other.startswith(own.rstrip("/") + "/")):
                node = self.taken[other][0].node
                raise node.error(f"{self.shown[other]} is inside of the output {self.shown[own]}; choose another place")
            read = next((file for file in self.inputs if Path(own) == file or Path(own) in file.parents), None)
            if read is not None:
                raise output.node.error(f"{self.shown[own]} holds an input of this recipe ({read.name}); "
                                        "choose another place")  # fmt: skip


def check_report(recipe: Recipe) -> None:
    """An error for a report that could not be written once everything is measured."""
    if recipe.report is None:
        return
    node = _node(recipe)
    place = Path(os.path.expanduser(page_path(node)))
    if place.is_dir():
        raise node.error(f"{recipe.report} is a folder; the report is one file")
    parent = place.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise node.error(f"{recipe.report}: {parent} is no folder that can be written to")
    if recipe.sweep and recipe.measures and importlib.util.find_spec("matplotlib") is None:
        raise node.error(str(missing("matplotlib", "plot", "the plot of a sweep")))


def _node(recipe: Recipe) -> Node:
    top = recipe.document.value if isinstance(recipe.document.value, Mapping) else {}
    node = top.get("report")
    return node if node is not None and node.value == recipe.report else Node(recipe.report, 1, 1, "--report")

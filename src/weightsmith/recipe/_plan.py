"""What a recipe would do: bytes to read and write, passes, memory, time; nothing is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.recipe._build import build, lookup
from weightsmith.recipe._save import Settings, dressed
from weightsmith.recipe._schema import Output, Recipe
from weightsmith.recipe._sweep import Variant, variants
from weightsmith.weights import Scratch, Weights
from weightsmith.weights._execute import default_threads
from weightsmith.weights._lazy import UNIT, Lazy, reductions_of
from weightsmith.weights._lazy import Output as Computed


@dataclass(frozen=True)
class Planned:
    """What one output takes."""

    path: str
    weights: str
    values: dict[str, Any]
    tensors: int
    reads: int
    writes: int
    passes: int
    passes_at_least: bool
    memory: int
    seconds: float
    """Estimated from one piece of the largest tensor."""
    free: int


def plan(recipe: Recipe, settings: Settings | None = None) -> list[Planned]:
    """Check a recipe in full, and say what each output takes.

    Every input is opened (headers only) and every step built, for every variant of a sweep; places that
    are taken and disks that are too small are found.

    Raises:
        Error: what is wrong, with its line and column.
    """
    settings = settings or Settings()
    made: dict[tuple[str, str], Any] = {}
    found: list[Planned] = []
    known: dict[int, float] = {}
    for variant in variants(recipe):
        built = build(variant.recipe, made, trial=True)
        for output in variant.recipe.outputs:
            path = variant.path(output)
            if any(path == other.path for other in found):
                continue  # the best of a sweep is kept there; any of them says what it takes
            found.append(_planned(variant, output, lookup(built, output.weights), path, settings, known))
        for measure in variant.recipe.measures:
            for name in measure.on:
                lookup(built, name)
    return found


def _planned(
    variant: Variant, output: Output, weights: Weights, path: str, settings: Settings, known: dict[int, float]
) -> Planned:
    try:
        weights = dressed(weights, output.options)
        taken = weights.planned(path, **settings.planning(output.options))
    except ValueError as error:
        raise output.node.error(str(error)) from None
    key = id(weights.node(max(weights, key=lambda name: weights.spec(name).numel)))
    if key not in known:
        known[key] = estimate(weights, taken.writes, settings.threads)
    return Planned(
        path=path,
        weights=output.weights,
        values=variant.values,
        tensors=taken.tensors,
        reads=taken.reads,
        writes=taken.writes,
        passes=taken.passes,
        passes_at_least=taken.passes_at_least,
        memory=taken.memory,
        seconds=known[key],
        free=taken.free,
    )


WRITING = 1e9
"""Bytes a second that a disk takes, for an estimate."""


def estimate(weights: Weights, writes: int, threads: int | None = None) -> float:
    """Seconds that a save will take, roughly: one piece of the largest tensor is timed."""
    nodes = [weights.node(name) for name in weights if name not in weights.ties]
    computed = [node for node in nodes if isinstance(node, Computed) and node.spec.numel]
    if not computed:
        return 3 * writes / WRITING
    largest = max(computed, key=lambda node: node.spec.numel)
    total = sum(node.spec.numel for node in computed)
    return total * _seconds_each(largest) / (threads or default_threads()) + writes / WRITING


def _seconds_each(node: Lazy) -> float:
    """Seconds that an element of a tensor takes."""
    reductions = reductions_of(node)
    best = float("inf")
    for _ in range(2):  # the first touches the pages
        started, elements = time.perf_counter(), 0
        if reductions:
            elements = _one_piece(reductions)
        if not elements:
            stop = min(max(UNIT // node.grain, 1) * node.grain, node.spec.numel)
            if not reductions:
                node.read(0, stop, Scratch())
            elements = stop
        best = min(best, (time.perf_counter() - started) / elements)
    return best * (1 + 2 * len(reductions))


def _one_piece(reductions: Sequence[Any]) -> int:
    """Read one unit of the first pass of the innermost reduction; how many elements that were."""
    passes = reductions[0].passes()
    calls = next(passes, None)
    if not calls:
        return 0
    calls[0](Scratch())
    passes.close()
    item, first, last = reductions[0].units[0]
    inputs = reductions[0].items[item]
    return max((last - first) * inputs.per_position(inputs.nodes[0]), 1)

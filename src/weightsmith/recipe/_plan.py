"""What a recipe would do: bytes to read and write, passes, memory, time; nothing is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsmith.errors import Error
from weightsmith.recipe._build import any_eager, build, evaluator_at, lookup, place_of
from weightsmith.recipe._places import Places, check_report
from weightsmith.recipe._save import Settings, dressed, finished
from weightsmith.recipe._schema import Output, Recipe
from weightsmith.recipe._sweep import Variant, variants
from weightsmith.recipe._yaml import Node
from weightsmith.weights import Scratch, Weights
from weightsmith.weights._execute import default_threads
from weightsmith.weights._lazy import UNIT, Lazy, reductions_of
from weightsmith.weights._lazy import Output as Computed
from weightsmith.weights._save import check_executor


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
    check_executor(settings.executor, settings.threads, settings.workers)
    check_report(recipe)
    for measure in recipe.measures:
        evaluator_at(measure.spec)
    made: dict[tuple[str, str], Any] = {}
    found: list[Planned] = []
    known: dict[int, float] = {}
    places = Places(recipe)
    for variant in variants(recipe):
        built = build(variant.recipe, made, trial=True)
        places.read_from(built)
        for output, planned in zip(recipe.outputs, variant.recipe.outputs, strict=True):
            weights = _referenced(built, output.weights, output.node)
            path = variant.path(output)  # the caller's output: it may have been given another path
            # The best of a sweep is kept where there is room for one; any of them says what it takes.
            if places.take(path, output, variant):
                found.append(_planned(variant, replace(planned, path=path), weights, path, settings, known))
        for measure in variant.recipe.measures:
            for name in measure.on:
                _referenced(built, name, measure.spec)
    places.check()
    return found


def _referenced(built: Mapping[str, Any], name: str, node: Node) -> Weights:
    try:
        return lookup(built, name)
    except Error as error:
        raise node.error(str(error)) from None


def _planned(
    variant: Variant, output: Output, weights: Weights, path: str, settings: Settings, known: dict[int, float]
) -> Planned:
    try:
        weights = dressed(weights, output.options)
        there = settings.resume and finished(weights, path, exact=not any_eager(variant.recipe)) is not None
        taken = weights.planned(path, **settings.planning(output.options), overwrite=settings.overwrite or there)
    except OSError as error:
        raise output.node.error(f"{path[:100]}: {error.strerror or error}") from None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise place_of(output.places, str(error), output.node).error(str(error)) from None
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

"""What a recipe would do: bytes to read and write, passes, memory, time; nothing is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from weightsmith.errors import Error
from weightsmith.recipe._build import any_eager, build, evaluator_at, lookup, place_of
from weightsmith.recipe._places import Places, check_report
from weightsmith.recipe._save import Settings, dressed, finished
from weightsmith.recipe._schema import Output, Recipe
from weightsmith.recipe._sweep import Variant, variants
from weightsmith.recipe._yaml import Node
from weightsmith.weights import Planned as Taken
from weightsmith.weights import Scratch, Weights
from weightsmith.weights._execute import default_threads
from weightsmith.weights._lazy import CHUNK, Lazy, reductions_of, sources
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
    """Estimated from the time of one tensor."""
    free: int


def plan(recipe: Recipe, settings: Settings | None = None) -> list[Planned]:
    """Check a recipe in full, and say what each output takes.

    Raises:
        Error: what is wrong, with its line and column.
    """
    settings = settings or Settings()
    known: dict[int, float] = {}
    found = []
    for one in checked(recipe, settings):
        key = id(one.weights.node(max(one.weights, key=lambda name: one.weights.spec(name).numel)))
        if key not in known:
            known[key] = estimate(one.weights, one.taken.writes, settings.threads)
        found.append(told(one.taken, one.path, one.output.weights, one.values, known[key]))
    return found


def told(taken: Taken, path: str, weights: str, values: Mapping[str, Any], seconds: float) -> Planned:
    """What a save takes, with the names that a recipe gives to it."""
    own = {one.name: getattr(taken, one.name) for one in fields(Planned) if hasattr(taken, one.name)}
    return Planned(**own | {"path": path, "weights": weights, "values": dict(values), "seconds": seconds})


@dataclass(frozen=True)
class Checked:
    """One output that could be written."""

    output: Output
    weights: Weights
    path: str
    values: Mapping[str, Any]
    taken: Taken


def checked(recipe: Recipe, settings: Settings) -> list[Checked]:
    """Check a recipe in full; what each output takes, but for the time.

    Every input is opened (headers only) and every step built, for every variant of a sweep; places that
    are taken and disks that are too small are found.

    Raises:
        Error: what is wrong, with its line and column.
    """
    check_executor(settings.executor, settings.threads, settings.workers)
    check_report(recipe)
    for measure in recipe.measures:
        evaluator_at(measure.spec)
    made: dict[tuple[str, str], Any] = {}
    found: list[Checked] = []
    places = Places(recipe)
    for variant in variants(recipe):
        built = build(variant.recipe, made, trial=True)
        places.read_from(built)
        for output, planned in zip(recipe.outputs, variant.recipe.outputs, strict=True):
            weights = _referenced(built, output.weights, output.node)
            path = variant.path(output)  # the caller's output: it may have been given another path
            # The best of a sweep is kept where there is room for one; any of them says what it takes.
            if places.take(path, output, variant):
                found.append(_checked(variant, replace(planned, path=path), weights, settings))
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


def _checked(variant: Variant, output: Output, weights: Weights, settings: Settings) -> Checked:
    path = output.path
    try:
        weights = dressed(weights, output.options)
        there = settings.resume and finished(weights, path, exact=not any_eager(variant.recipe)) is not None
        taken = weights.planned(path, **settings.planning(output.options), overwrite=settings.overwrite or there)
    except OSError as error:
        raise output.node.error(f"{path[:100]}: {error.strerror or error}") from None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise place_of(output.places, str(error), output.node).error(str(error)) from None
    return Checked(output, weights, path, variant.values, taken)


WRITING = 1e9
"""Bytes a second that a disk takes, for an estimate."""


ENOUGH = 4_000_000
"""Bytes of inputs that a tensor should have to be timed on."""


def estimate(weights: Weights, writes: int, threads: int | None = None) -> float:
    """Seconds that a save will take, roughly: one tensor of a middling size is made, and its time is scaled up."""
    nodes = {id(weights.node(name)): weights.node(name) for name in weights}
    sizes = {key: _input_bytes(node) for key, node in nodes.items()}
    computed = [node for node in nodes.values() if isinstance(node, Computed) and node.spec.numel]
    if not computed:
        return 3 * writes / WRITING
    # Statistics of the whole model are left for the run itself.
    own = [node for node in computed if all(len(one.items) == 1 for one in reductions_of(node))] or computed
    ranked = sorted(own, key=lambda node: sizes[id(node)])
    tried = next((node for node in ranked if sizes[id(node)] >= ENOUGH), ranked[-1])
    together = {id(node.work): sizes[key] for key, node in nodes.items() if isinstance(node, Computed)}
    each = _cpu_seconds(tried) / max(sizes[id(tried)], 1)
    return sum(together.values()) * each / (threads or default_threads()) + writes / WRITING


def _input_bytes(node: Lazy) -> int:
    """What a tensor is made from, each input once."""
    return sum(leaf.spec.nbytes for leaf in sources(node) if not list(leaf.inputs()))


def _cpu_seconds(node: Lazy) -> float:
    """Processor seconds that it takes to make a tensor: all of it, or one piece where it needs the whole model."""
    scratch, step = Scratch(), max(CHUNK // node.grain, 1) * node.grain
    joint = any(len(one.items) > 1 for one in reductions_of(node))
    started = time.process_time()
    if joint:
        elements = _one_piece(reductions_of(node))
        share = elements / max(node.spec.numel, 1)
        return (time.process_time() - started) / max(share, 1e-9) * 3
    for start in range(0, node.spec.numel, step):
        scratch.next_chunk()
        node.read(start, min(start + step, node.spec.numel), scratch)
    scratch.next_unit()
    return time.process_time() - started


def _one_piece(reductions: Sequence[Any]) -> int:
    """Read one unit of the first pass of the innermost reduction; how many elements that were."""
    passes = reductions[0].passes()
    calls = next(passes, None)
    if not calls:
        return 1
    calls[0](Scratch())
    passes.close()
    item, first, last = reductions[0].units[0]
    inputs = reductions[0].items[item]
    return max((last - first) * inputs.per_position(inputs.nodes[0]), 1)

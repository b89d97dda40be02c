"""Run a recipe: build it, measure it, write it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith import page, progress
from weightsmith.errors import Error
from weightsmith.evaluators import Evaluate
from weightsmith.recipe import _model_card
from weightsmith.recipe._build import build, evaluator_at, lookup
from weightsmith.recipe._plan import checked
from weightsmith.recipe._save import Settings, dressed, finished
from weightsmith.recipe._schema import Output, Recipe
from weightsmith.recipe._sweep import Variant, variants
from weightsmith.weights import Saved, Weights, open
from weightsmith.weights._execute import as_bytes
from weightsmith.weights._lazy import Totals, reductions_of


@dataclass(frozen=True)
class Row:
    """What was measured of one checkpoint."""

    weights: str
    values: dict[str, Any]
    """The swept values that made it."""
    figures: dict[str, float]
    seconds: float
    nbytes: int = 0
    """Of its tensors."""


@dataclass(frozen=True)
class Ran:
    """What came of a recipe."""

    saved: tuple[Saved, ...]
    rows: tuple[Row, ...]
    best: dict[str, Any] = field(default_factory=dict)
    """The swept values that were kept where there was room for one."""
    report: str | None = None


def run(recipe: Recipe, settings: Settings | None = None, on_row: Callable[[Row], None] | None = None) -> Ran:
    """Check a recipe in full, then build, measure and write what it says.

    In a sweep what does not depend on the swept options is built once, and statistics that differ only in
    how they are used are gathered once. Where an output has room for one of several, the best by the first
    figure is kept.

    Args:
        recipe: from `read`.
        settings: how outputs are written.
        on_row: told of every checkpoint that was measured.

    Raises:
        Error: what is wrong, with its line and column; before anything is computed or written, but for
            what only the computation can find.
    """
    settings = settings or Settings()
    checked(recipe, settings)
    made: dict[tuple[str, str], Any] = {}
    totals = _kept_totals(recipe, settings)
    several = variants(recipe)
    measured: dict[tuple[str, str, str], float] = {}
    saved: list[Saved] = []
    rows: list[Row] = []
    built: list[dict[str, Any]] = []
    for variant in several:
        built.append(build(variant.recipe, made))
        if totals is not None:
            _share(built[-1], totals)
    judges = {measure.name: evaluator_at(measure.spec) for measure in recipe.measures}
    if not recipe.sweep:
        saved = [_written(recipe, several[0], output, built[0], (), settings) for output in recipe.outputs]
        there = {output.weights: saved[i].path for i, output in enumerate(recipe.outputs) if not output.options}
        rows = _measured(several[0], _reopened(built[0], there), judges, measured, on_row)
    else:
        with progress.task("sweep", len(several)) as advance:
            for variant, weights in zip(several, built, strict=True):
                rows += _measured(variant, weights, judges, measured, on_row)
                advance(1)
    best: dict[str, Any] = {}
    for output in recipe.outputs if recipe.sweep else ():
        for number in _kept(recipe, several, output, rows):
            if "{" not in output.path:
                best |= several[number].values
            saved.append(_written(recipe, several[number], output, built[number], rows, settings))
    made_report = _reported(recipe, saved, rows, best) if recipe.report else None
    return Ran(tuple(saved), tuple(rows), best, made_report)


def _kept_totals(recipe: Recipe, settings: Settings) -> Totals | None:
    """What passes find is kept only where something else may ask for it again, and in a quarter of the memory."""
    asked = len(recipe.outputs) + len({name for measure in recipe.measures for name in measure.on})
    if not recipe.sweep and asked < 2:
        return None
    budget = as_bytes(settings.memory)
    return Totals() if budget is None else Totals(budget // 4)


def _share(built: Mapping[str, Any], totals: Totals) -> None:
    for made in built.values():
        for weights in made if isinstance(made, list) else [made]:
            for name in weights:
                for reduction in reductions_of(weights.node(name)):
                    reduction.totals = totals


def _reopened(built: Mapping[str, Any], there: Mapping[str, str]) -> dict[str, Any]:
    """What was written is measured as it was written."""
    return {**built, **{name: open(path) for name, path in there.items() if name in built}}


def _measured(
    variant: Variant,
    built: Mapping[str, Any],
    judges: Mapping[str, Evaluate],
    known: dict[tuple[str, str, str], float],
    on_row: Callable[[Row], None] | None,
) -> list[Row]:
    rows: list[Row] = []
    measures = variant.recipe.measures
    for name in dict.fromkeys(name for measure in measures for name in measure.on):
        started, figures, fresh = time.perf_counter(), {}, False
        depends = variant.recipe.affected(name.partition(".")[0])
        values = {key: variant.values[key] for key in depends}
        for measure in measures:
            if name not in measure.on:
                continue
            key = (measure.name, name, json.dumps(values, sort_keys=True, default=str))
            if key not in known:
                fresh = True
                try:
                    known[key] = float(judges[measure.name](lookup(built, name)))
                except Error as error:
                    raise measure.spec.error(f"{measure.name} of {name}: {error}") from error
            figures[measure.name] = known[key]
        if fresh:  # what no swept option touches is measured once
            row = Row(name, values, figures, time.perf_counter() - started, lookup(built, name).nbytes)
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _kept(recipe: Recipe, several: Sequence[Variant], output: Output, rows: Iterable[Row]) -> list[int]:
    """The variants that an output has a place for: all with a path of their own, or the best."""
    paths = [variant.path(output) for variant in several]
    chosen = []
    for path in dict.fromkeys(paths):
        numbers = [number for number, one in enumerate(paths) if one == path]
        chosen.append(max(numbers, key=lambda number: _score(recipe, several[number], output, rows)))
    return chosen


def _score(recipe: Recipe, variant: Variant, output: Output, rows: Iterable[Row]) -> float:
    """The first figure of what an output holds; of the first thing measured, where that is not."""
    if not recipe.measures:
        return 0.0
    first = recipe.measures[0]
    name = output.weights if output.weights in first.on else first.on[0]
    for row in rows:
        if row.weights == name and all(variant.values[key] == value for key, value in row.values.items()):
            figure = row.figures.get(first.name, math.nan)
            return -math.inf if math.isnan(figure) else figure
    return -math.inf


def _written(
    recipe: Recipe,
    variant: Variant,
    output: Output,
    built: Mapping[str, Any],
    rows: Sequence[Row],
    settings: Settings,
) -> Saved:
    weights: Weights = lookup(built, output.weights)
    path = variant.path(output)
    files = _model_card.files(recipe, variant, output, weights, rows) if is_folder(path) else {}
    try:
        there = finished(dressed(weights, output.options), path) if settings.resume and not settings.overwrite else None
        return there or dressed(weights, output.options, files).save(path, **settings.saving(output.options))
    except Error as error:
        raise output.node.error(str(error)) from error


def is_folder(path: str) -> bool:
    """Whether an output is a folder, by its name."""
    from weightsmith.weights._open import SUFFIXES

    return os.path.splitext(path.rstrip("/"))[1] not in SUFFIXES


def _reported(recipe: Recipe, saved: Sequence[Saved], rows: Sequence[Row], best: Mapping[str, Any]) -> str:
    from weightsmith.recipe import _report

    assert recipe.report is not None
    page.written(recipe.report, _report.page_of(recipe, saved, rows, best))
    return recipe.report

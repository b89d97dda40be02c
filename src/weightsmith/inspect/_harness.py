"""What EleutherAI's evaluation harness (lm-eval) found, read from the files that it writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report


def beside(models: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """The latest results that lie in the folders of models, at most two folders deep; the dates are in their names."""
    found = {}
    for model in models:
        place = Path(model)
        files = (
            [file for depth in ("", "*/", "*/*/") for file in place.glob(f"{depth}results*.json")]
            if place.is_dir()
            else []
        )
        good = [file for file in files if _is_results(file)]
        if good:
            found[os.fspath(model)] = max(good, key=lambda file: file.name)
    return found


def _is_results(file: Path) -> bool:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(read, dict) and isinstance(read.get("results"), dict)


def harness_results(files: Mapping[str, str | os.PathLike[str]]) -> Report:
    """The figures of several models side by side.

    Args:
        files: by the name of a model, a ``results_....json`` as ``lm_eval --output_path`` writes it.

    Returns:
        Report: a row a task, metric and model: ``value``, and its ends at 1.96 standard errors where the file has one.

    Raises:
        ValueError: a file that is none of lm-eval's.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "results.json")
    >>> _ = file.write_text('{"results": {"piqa": {"alias": "piqa", "acc,none": 0.7, "acc_stderr,none": 0.01}}}')
    >>> harness_results({"mine": file}).table[0]["value"]
    0.7
    """
    rows = []
    for model, path in files.items():
        for task, metric, value, error in _figures(Path(path)):
            ends = (value - 1.96 * error, value + 1.96 * error) if error is not None else (None, None)
            rows.append((task, metric, {"task": task, "metric": metric, "model": model, "value": value,
                                        "value low": ends[0], "value high": ends[1]}))  # fmt: skip
    order = {key: place for place, key in enumerate(dict.fromkeys((task, metric) for task, metric, _ in rows))}
    table = [row for _, _, row in sorted(rows, key=lambda row: order[row[0], row[1]])]
    return Report(
        "Results of lm-eval", {}, table, _plots(table, list(files)), ["Read from lm-eval's files, not measured here."]
    )


def _figures(path: Path) -> list[tuple[str, str, float, float | None]]:
    """``(task, metric, value, standard error)``."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise Error(f"{path}: is no JSON: {error}") from None
    results = read.get("results") if isinstance(read, dict) else None
    if not isinstance(results, dict):
        raise Error(f"{path}: has no results, so it is no file of lm-eval's")
    found = []
    for task, figures in results.items():
        if not isinstance(figures, dict):
            raise Error(f"{path}: the results of {task} are no figures")
        for key, value in figures.items():
            metric, _, filter = key.partition(",")
            if metric.endswith("_stderr") or not _is_number(value):
                continue
            error: Any = figures.get(f"{metric}_stderr,{filter}" if filter else f"{metric}_stderr")
            named = metric if filter in ("", "none") else f"{metric} ({filter})"
            found.append((task, named, float(value), float(error) if _is_number(error) else None))
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plots(table: list[dict[str, Any]], models: list[str]) -> list[Plot]:
    """A drawing of each metric: bars a task, a colour a model."""
    plots = []
    for metric in dict.fromkeys(row["metric"] for row in table):
        rows = [row for row in table if row["metric"] == metric]
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        by_model = {model: {row["task"]: row["value"] for row in rows if row["model"] == model} for model in models}
        lines = [
            Line(Path(model).name or model, tasks, [values.get(task, math.nan) for task in tasks], style="bars")
            for model, values in by_model.items()
            if values
        ]
        plots.append(Plot(metric, "task", metric, lines))
    return plots

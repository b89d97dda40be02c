"""Many points of weight space, tried one by one or several in one go, and kept in a file where one is named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from weightsmith import progress, stats
from weightsmith.errors import Error
from weightsmith.inspect.landscape._parts import Batches, Objective, Source, Walk, walking
from weightsmith.stats import room

AT_ONCE = 64
"""Points that are tried together where the work of one is too small to fill a processor."""

SMALL = 2**18
"""Weights times examples up to which it is. With more, one point after the other was as fast or faster."""


@dataclass(frozen=True)
class Sweep:
    """How points are tried; the options that lines, planes and paths share."""

    recalibrate: Batches | None = None
    resume: str | os.PathLike[str] | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.recalibrate is not None and iter(self.recalibrate) is self.recalibrate:  # every point needs it again
            object.__setattr__(self, "recalibrate", list(self.recalibrate))

    def __call__(
        self,
        model: nn.Module,
        objective: Objective,
        origin: Source,
        directions: Sequence[Source],
        points: Sequence[Sequence[float]],
        label: str,
    ) -> dict[str, list[float]]:
        """What is measured at each point, by name.

        Args:
            model: lent; it is given back as it was.
            objective: what is measured.
            origin: where all coefficients are 0; the model's own weights for None.
            directions: k of them.
            points: k coefficients each.
            label: what the progress is called.
        """
        for point in points:
            if not all(math.isfinite(amount) for amount in point):
                raise Error(f"{label}: a point lies at {list(point)}")
        recalibrate = self.recalibrate
        with walking(model, origin, directions) as walk:
            store = _Store(self.resume, _key(walk, points, recalibrate is not None))
            checked = False
            todo = [index for index in range(len(points)) if index not in store.found]
            together = 1 if recalibrate is not None else _together(self.at_once, walk, objective)
            with progress.task(label, len(points)) as advance:
                advance(len(points) - len(todo))
                try:
                    while todo:
                        part, todo = todo[:together], todo[together:]
                        if len(part) == 1:
                            rows = [_try(model, walk, objective, points[part[0]], recalibrate)]
                        else:
                            rows = _try_together(model, walk, objective, [points[i] for i in part])
                            if not checked:
                                alone = _try(model, walk, objective, points[part[-1]], None)
                                checked = rows is not None and _alike(rows[-1], alone)
                            if rows is None or not checked:
                                together, todo = 1, part + todo
                                continue
                        store.add(dict(zip(part, rows, strict=True)))
                        advance(len(part))
                finally:
                    store.write()
        names = list(store.found[0]) if store.found else ["loss"]
        return {name: [store.found[index][name] for index in range(len(points))] for name in names}


def _try(
    model: nn.Module, walk: Walk, objective: Objective, point: Sequence[float], recalibrate: Batches | None
) -> dict[str, float]:
    walk.go(point)
    if recalibrate is not None:
        stats.batch_norm(model, recalibrate).load_into(model, strict=False)
    return {name: float(value) for name, value in objective(model).items()}


def _try_together(
    model: nn.Module, walk: Walk, objective: Objective, points: Sequence[Sequence[float]]
) -> list[dict[str, float]] | None:
    """Several points in one go, or None where the model or the loss cannot be vectorised.

    Any exception says so: the points are then tried one by one, where it is raised again if the fault lies elsewhere.
    """

    def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
        def called(*inputs: Any, **named: Any) -> Any:
            return functional_call(model, values, inputs, named)

        return objective(called)

    try:
        own = {name: tensor for name, (tensor, _, _) in walk.moved.items()}
        stacked = {n: torch.stack([walk.at(n, point) for point in points]).to(own[n].dtype) for n in own}
        found = vmap(one)(stacked)
    except Exception:
        return None
    columns = {name: values.tolist() for name, values in found.items()}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(points))]


def _alike(together: Mapping[str, float], alone: Mapping[str, float]) -> bool:
    """Whether a point tried with others has what it has alone: a loss that asks another model than the one it is
    given would not notice that it is moved."""

    def near(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))

    return together.keys() == alone.keys() and all(near(together[name], alone[name]) for name in alone)


def _together(asked: int | None, walk: Walk, objective: Objective) -> int:
    if asked is not None:
        if asked < 1:
            raise Error(f"at_once is at least 1, got {asked}")
        return asked
    if not isinstance(objective.batches, Sequence):
        return 1
    weights = sum(base.numel() for _, base, _ in walk.moved.values())
    return AT_ONCE if weights * max(room.size(batch) for batch in objective.batches) <= SMALL else 1


def _key(walk: Walk, points: Sequence[Sequence[float]], recalibrated: bool) -> Callable[[], str]:
    def made() -> str:
        return hashlib.sha256(json.dumps([walk.digest(), [list(p) for p in points], recalibrated]).encode()).hexdigest()

    return made


class _Store:
    """Points that are known already, in a small file where one is named."""

    SECONDS = 2.0

    def __init__(self, path: str | os.PathLike[str] | None, key: Callable[[], str]):
        self.path = None if path is None else Path(path)
        self.found: dict[int, dict[str, float]] = {}
        self.key, self.written = "", time.monotonic()
        if self.path is None:
            return
        self.key = key()
        if self.path.exists():
            try:
                kept = json.loads(self.path.read_text(encoding="utf-8"))
                same, points = kept["key"] == self.key, kept["points"]
            except (ValueError, KeyError, TypeError):
                raise Error(f"{self.path}: is not what an earlier run left; name another file with resume=") from None
            if not same:
                raise Error(f"{self.path}: holds points of other weights, directions or steps; name another file")
            self.found = {int(index): values for index, values in points.items()}

    def add(self, rows: Mapping[int, dict[str, float]]) -> None:
        self.found.update(rows)
        if time.monotonic() - self.written > self.SECONDS:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        if self.path is None or not self.found:
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps({"key": self.key, "points": self.found}), encoding="utf-8")
        partial.replace(self.path)


def spread(span: tuple[float, float], steps: int, what: str) -> list[float]:
    """``steps`` places from one end to the other, the ends and a middle of 0 exact.

    >>> spread((-1.0, 1.0), 5, "line")
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    low, high = map(float, span)
    if steps < 2 or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise Error(f"{what} needs a span of two rising numbers and at least 2 steps, got {span} and {steps}")
    inside = [((steps - 1 - i) * low + i * high) / (steps - 1) for i in range(1, steps - 1)]
    return [low, *inside, high]

"""Steps that averages of checkpoints on disk share; they know no paper."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from weightsmith.average.room import Source
from weightsmith.errors import Error, listed
from weightsmith.merge import mean
from weightsmith.merge.room import check_alike
from weightsmith.weights import Step, Weights, open

Path = TypeVar("Path", str, os.PathLike[str])


def by_step(checkpoints: Iterable[Path]) -> list[Path]:
    """Paths of checkpoints in the order of training: ``checkpoint-900`` before ``checkpoint-1000``.

    They are sorted by the numbers in them, the first number first (``epoch=2-step=700.ckpt``), which is
    the order of training where the names are alike but for numbers.

    Args:
        checkpoints: folders or files, in any order.

    Raises:
        ValueError: the names differ in more than numbers, or two of them do not differ at all.

    >>> by_step(["run/checkpoint-1000/", "run/checkpoint-900/"])
    ['run/checkpoint-900/', 'run/checkpoint-1000/']
    """
    named = [(os.fspath(path).rstrip("/"), path) for path in checkpoints]
    if len({re.sub(r"\d+", "#", name) for name, _ in named}) > 1:
        raise Error(f"{listed(name for name, _ in named)}: these names differ in more than numbers, so they do not say "
                    "which was saved first; give them in the order of training")  # fmt: skip
    steps = {path: [int(word) for word in re.findall(r"\d+", name)] for name, path in named}
    if len({tuple(numbers) for numbers in steps.values()}) < len(named):
        raise Error(f"{listed(name for name, _ in named)}: two of these are the same checkpoint")
    return sorted(steps, key=lambda path: steps[path])


def opened_run(checkpoints: Sequence[Source], method: str) -> list[Weights]:
    """The checkpoints of a run as `Weights`, from the first to the last; at least one, and all alike.

    Paths whose names differ only in numbers are taken by these; anything else in the order given.
    """
    if isinstance(checkpoints, str | os.PathLike | Mapping | nn.Module):
        raise Error(f"{method} takes a list of checkpoints of one run, got one {type(checkpoints).__name__}")
    given: list[Any] = list(checkpoints)
    if not given:
        raise Error(f"{method} needs at least 1 checkpoint, got 0")
    opened = [open(one) for one in in_order(given)]
    check_alike(opened, None, method)
    return opened


def in_order(checkpoints: Sequence[Any]) -> list[Any]:
    """By step where the checkpoints are paths that tell it, else as they were given."""
    if all(isinstance(one, str | os.PathLike) for one in checkpoints):
        try:
            return by_step(checkpoints)
        except Error:
            pass  # names that tell no order: that of the list is all there is
    return list(checkpoints)


def combination(
    checkpoints: Sequence[Weights],
    coefficients: Sequence[float],
    method: str,
    options: Mapping[str, Any],
    nonfinite: Literal["refuse", "allow"] = "refuse",
) -> Weights:
    """``sum_i coefficients[i] * checkpoints[i]``, lazily; what holds no floats, and the files, from the last of them.

    A checkpoint with the coefficient 0 is not read.
    """
    pairs = zip(checkpoints, coefficients, strict=True)
    used = [(one, coefficient) for one, coefficient in pairs if coefficient != 0]
    if not used:
        raise Error(f"{method}: all {len(checkpoints)} coefficients are 0")
    models, last = [one for one, _ in used], used[-1][0]
    mixed = mean(models, weight=[coefficient for _, coefficient in used], normalize=False, nonfinite=nonfinite)
    nodes = {name: mixed.node(name) if mixed.spec(name).dtype.is_floating_point else last.node(name) for name in mixed}
    return Weights(nodes, Step(method, options, tuple(one.lineage for one in models)), last.files, last.metadata)

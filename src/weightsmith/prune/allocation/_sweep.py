"""Quality against sparsity, and the knee of the curve: how much can go at once before it begins to hurt.

Small weights go for nothing at first; then quality falls ever faster. The knee is the point of the curve that lies
furthest from the straight line between its ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.evaluators import Evaluate
from weightsmith.prune import magnitude, sparsity_of
from weightsmith.prune.room import Source
from weightsmith.weights import Weights, open

if TYPE_CHECKING:
    from weightsmith.inspect import Report

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, "2:4")


@card(
    paper="Jaiswal et al. 2023, 'The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that "
    "Matter'",
    covers=("essential-sparsity",),
    needs=("evaluate",),
    unit="model",
    claim="up to the knee quality falls far more slowly than after it",
)
def sweep(
    weights: Source,
    evaluate: Evaluate,
    sparsities: Sequence[float | str] = SPARSITIES,
    *,
    method: Callable[[Weights, float | str], Weights] | None = None,
) -> Report:
    """The quality at every sparsity, each pruned once from the whole weights.

    Args:
        weights: anything that `weightsmith.open` opens.
        evaluate: ``weights -> quality`` on held-out data, higher is better.
        sparsities: shares removed, and N:M patterns to stand beside them.
        method: ``(weights, sparsity) -> pruned weights``; by default magnitude with one threshold for all tensors
            (patterns within their groups).

    Returns:
        Report: a row for each, the whole weights first: what was asked for, the share of zeros among the prunable
        tensors, and the quality. Where at least three different shares (the whole weights have
        one) have a finite quality: the ``knee``, the quality there, and the ``loss before`` and ``loss after`` it, in
        quality for all of the weights.

    Raises:
        Error: no sparsity.

    >>> found = sweep({"w": torch.tensor([[1.0, 2.0, 3.0, 9.0]])}, lambda w: float(w["w"].sum()), (0.25, 0.5, 0.75, 1))
    >>> found["quality"], found["knee"]
    ([15.0, 14.0, 12.0, 9.0, 0.0], 0.75)
    """
    from weightsmith.inspect import Line, Plot, Report

    if not sparsities:
        raise Error("sweep needs at least 1 sparsity, got none")
    opened = open(weights)
    rows = [{"asked": "whole", "sparsity": sparsity_of(opened), "quality": float(evaluate(opened))}]
    with progress.task("sweep", len(sparsities)) as advance:
        for asked in sparsities:
            pruned = (method or _by_magnitude)(opened, asked)
            found = sparsity_of(pruned)
            rows.append({"asked": asked, "sparsity": found, "quality": float(evaluate(pruned))})
            advance(1)
    plain = [row for row in rows if not isinstance(row["asked"], str) or row is rows[0]]
    # Once each: what was zero already is not removed again. No knee is looked for where there is no quality left.
    shares = sorted({row["sparsity"]: row["quality"] for row in plain if math.isfinite(row["quality"])}.items())
    places, quality = [share for share, _ in shares], [value for _, value in shares]
    figures = {"quality, whole": rows[0]["quality"]}
    if len(places) > 2:
        at = knee(places, [-value for value in quality])
        figures |= {
            "knee": places[at],
            "quality at the knee": quality[at],
            "loss before": (quality[0] - quality[at]) / (places[at] - places[0]),
            "loss after": (quality[at] - quality[-1]) / (places[-1] - places[at]),
        }
    patterns = [row for row in rows[1:] if isinstance(row["asked"], str)]
    lines = [Line("shares", places, quality)]
    lines += [Line(row["asked"], [row["sparsity"]], [row["quality"]], style="points") for row in patterns]
    return Report(
        "Quality by sparsity", figures, rows, [Plot("Quality by sparsity", "share removed", "quality", lines)]
    )


def knee(places: Sequence[float], harms: Sequence[float]) -> int:
    """The inner point of a curve that lies furthest below the straight line between its ends; the first of equals.

    Args:
        places: ``[n]``, rising, n >= 3.
        harms: ``[n]``, less is better.

    Returns:
        Its index.

    Raises:
        Error: fewer than three points, points that do not rise, or harms that are not finite.

    >>> knee([0.0, 0.5, 0.8, 1.0], [0.0, 0.1, 0.3, 9.0])
    2
    """
    if len(places) < 3 or len(places) != len(harms):
        raise Error(f"a knee needs at least 3 points of a curve, got {len(places)} places and {len(harms)} harms")
    if not all(before < after for before, after in pairwise(places)):
        raise Error("a knee needs places that rise")
    if not all(map(math.isfinite, harms)):
        raise Error("a knee needs finite harms; leave out the sparsities at which there is no quality left")
    slope = (harms[-1] - harms[0]) / (places[-1] - places[0])
    below = [harms[0] + slope * (place - places[0]) - harm for place, harm in zip(places, harms, strict=True)]
    return max(range(1, len(places) - 1), key=below.__getitem__)


def _by_magnitude(weights: Weights, sparsity: float | str) -> Weights:
    return magnitude(weights, sparsity, scope="tensor" if isinstance(sparsity, str) else "global")

"""What the matrices of a checkpoint are like inside: their singular values, by layer and by kind.

Matrices of one kind (all query projections, say) are alike from layer to layer. So what a layer does otherwise
than its neighbours, a rank that fell, a tail that grew heavy, shows when they stand in one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.inspect._parts import Source, by_kind, grid, matrices, median_of, named
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._statistics import streamed
from weightsmith.inspect._tails import NoiseEdge, PowerLaw, noise_edge, power_law
from weightsmith.solve import effective_rank, roots_of, singular_values, stable_rank
from weightsmith.weights import Lazy, Pattern, Weights, open

POINTS = 65
"""Places along a curve of singular values."""

TALL = 8
"""Rows over columns from which a matrix, such as an embedding, is read by runs of rows and never held."""

ROUNDING = 2.0**-23
"""Singular values below the longer side times this times the largest count as zero: what float32 can tell."""


@card(
    paper="Martin, Mahoney 2021, 'Implicit Self-Regularization in Deep Neural Networks: Evidence from Random Matrix "
    "Theory and Implications for Learning' (spectra, tail exponents); Roy, Vetterli 2007 (effective rank); "
    "Gavish, Donoho 2014 (noise level)",
    unit="tensor",
    claim="a low tail exponent tells a matrix with strong directions from noise, whose exponent is high",
    departs="the level of the noise is read off the median singular value, not found by shuffling the matrix",
)
def spectra(weights: Source, *, pattern: Pattern = "*", threads: int | None = None) -> Report:
    r"""Singular values of every matrix: how many directions it uses, how its tail falls, what rises above noise.

    .. math:: r_{\text{stable}} = \frac{\sum_i s_i^2}{s_1^2}, \quad
              r_{\text{effective}} = e^{-\sum_i p_i \ln p_i}, \quad p_i = \frac{s_i}{\sum_j s_j}, \quad
              \rho(\lambda) \sim \lambda^{-\alpha}, \quad \lambda_i = s_i^2

    Args:
        weights: a checkpoint; anything that `weightsmith.open` opens.
        pattern: names of tensors; float tensors of two axes or more, viewed as ``[first, all others]``.
        threads: workers; default one a core. Each holds one matrix, or of one that is much taller than wide only
            matrices of the shorter side squared; and works for about n³ steps with n that side.

    Returns:
        Report: a row a matrix: ``norm`` (of all entries), ``largest`` singular value, ``stable rank``,
        ``effective rank``, ``rank`` (singular values above what rounding in float32 leaves), ``condition`` (largest
        over smallest of those), ``alpha``, ``tail`` (share of those eigenvalues that the power law is of),
        ``distance`` of the law, ``edge`` of pure noise and ``spikes`` beyond it. None where values are not finite,
        or too few. Plots: curves by kind (medians over layers); effective rank and alpha by layer and kind.

    Raises:
        ValueError: no float matrix fits.

    >>> found = spectra({"a.weight": torch.diag(torch.tensor([2.0, 2.0, 0.0]))})
    >>> found["rank"], found["effective rank"], found["stable rank"]
    ([2], [2.0], [2.0])
    """
    opened = open(weights)
    names = matrices(opened, pattern)
    found = _found(opened, names, threads)
    rows = [_row(name, opened.spec(name).shape, found[name]) for name in names]
    curves = {name: inside.curve for name, inside in found.items() if inside is not None}
    bad = [row["tensor"] for row in rows if row["norm"] is None]
    plots = [
        _curves(rows, curves),
        grid("effective rank, share of all", rows, lambda row: _share(row["effective rank"], row["of"])),
        grid("tail exponent alpha", rows, lambda row: row["alpha"]),
    ]
    return Report(
        "Spectra of weights",
        figures={
            "matrices": len(rows),
            "values": sum(row["values"] for row in rows),
            "median alpha": median_of([row["alpha"] for row in rows]),
            "median effective rank, share": median_of([_share(row["effective rank"], row["of"]) for row in rows]),
            "median stable rank": median_of([row["stable rank"] for row in rows]),
            "matrices of less than full rank": sum(row["rank"] is not None and row["rank"] < row["of"] for row in rows),
        },
        table=rows,
        plots=plots,
        notes=[
            "alpha is fitted to the largest eigenvalues alone; with fewer than about 50 of them it says little.",
            *([f"{len(bad)} with values that are not finite: {', '.join(bad[:5])}."] if bad else []),
        ],
    )


@dataclass(frozen=True)
class _Inside:
    """Of one matrix; small, so that those of a whole checkpoint can be held."""

    norm: float
    largest: float
    stable: float
    effective: float
    rank: int
    condition: float | None
    law: PowerLaw | None
    edge: NoiseEdge
    curve: list[float]


def _found(weights: Weights, names: Sequence[str], threads: int | None) -> dict[str, _Inside | None]:
    tall = [name for name in names if weights.spec(name).shape[0] ** 2 >= TALL * weights.spec(name).numel]
    others = [name for name in names if name not in set(tall)]
    by_rows = streamed(_gram, _nodes(weights, tall), "singular values", threads, "row", _inside_of_gram, large=True)
    whole = streamed(_inside_of, _nodes(weights, others), "singular values", threads, "tensor")
    return dict(zip([*tall, *others], [*by_rows, *whole], strict=True))


def _nodes(weights: Weights, names: Sequence[str]) -> list[tuple[Lazy]]:
    return [(weights.node(name),) for name in names]


def _gram(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the columns of some rows, and how many rows they are."""
    wide = rows.reshape(len(rows), -1).double()
    return wide.T @ wide, torch.tensor(len(rows))


def _inside_of_gram(total: tuple[Tensor, Tensor]) -> _Inside | None:
    return _inside(roots_of(total[0]), int(total[1]), len(total[0]))


def _inside_of(tensor: Tensor) -> _Inside | None:
    return _inside(singular_values(tensor), tensor.shape[0], tensor[0].numel())


def _inside(values: Tensor | None, rows: int, columns: int) -> _Inside | None:
    if values is None:
        return None
    largest = float(values[0])
    rank = int((values > max(rows, columns) * ROUNDING * largest).sum())
    kept = values[:rank]
    clear = torch.cat([kept, torch.zeros_like(values[rank:])])  # what is left by rounding stands out of no noise
    return _Inside(
        norm=float(values.square().sum().sqrt()),
        largest=largest,
        stable=stable_rank(values),
        effective=effective_rank(values),
        rank=rank,
        condition=largest / float(kept[-1]) if rank else None,
        law=power_law(kept.square()),
        edge=noise_edge(clear, rows, columns),
        curve=_sampled(values / (largest or 1.0)),
    )


def _sampled(values: Tensor) -> list[float]:
    """Values ``[r]`` at `POINTS` places from the first to the last, linear between neighbours."""
    places = torch.linspace(0, len(values) - 1, POINTS, dtype=torch.float64, device=values.device)
    below = places.floor().long().clamp(max=max(len(values) - 2, 0))
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], places - below).tolist()


def _row(name: str, shape: Sequence[int], inside: _Inside | None) -> dict[str, Any]:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    of = min(rows, columns)
    row: dict[str, Any] = {**named(name), "rows": rows, "columns": columns, "values": rows * columns, "of": of}
    law = inside.law if inside else None
    return row | {
        "norm": inside and inside.norm,
        "largest": inside and inside.largest,
        "stable rank": inside and inside.stable,
        "effective rank": inside and inside.effective,
        "rank": inside and inside.rank,
        "condition": inside and inside.condition,
        "alpha": law and law.exponent,
        "tail": inside and law and law.count / inside.rank,
        "distance": law and law.distance,
        "edge": inside and inside.edge.edge,
        "spikes": inside and inside.edge.spikes,
    }


def _curves(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, list[float]]) -> Plot:
    places = [index / (POINTS - 1) for index in range(POINTS)]
    lines = []
    kinds = by_kind([row for row in rows if row["tensor"] in curves])
    for kind, members in kinds.items():
        together = [sorted(column) for column in zip(*(curves[row["tensor"]] for row in members), strict=True)]
        middle = [column[len(column) // 2] for column in together]
        several = len(members) > 1 and len(kinds) <= 3  # more spans than that hide each other
        low = [column[0] for column in together] if several else None
        lines.append(Line(kind, places, middle, low, [column[-1] for column in together] if several else None))
    return Plot("Singular values by kind", "place, from the largest to the smallest", "over the largest", lines)


def _share(value: float | None, of: int) -> float | None:
    return None if value is None else value / of

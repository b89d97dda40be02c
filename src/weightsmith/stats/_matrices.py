"""What matrices are like by themselves: how long, how strong in one direction, of how many directions.

No data are needed. The largest singular value, by which a matrix can lengthen a vector at most, takes a few products
with the matrix where an earlier result says where to look; all singular values take a decomposition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import solve
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.weights import Inputs, Pattern, Reduction, Weights, open, single, solve_all

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

EXACT = ("effective_rank", "nuclear", "rank")
"""What takes all singular values."""

BY_PRODUCTS = ("spectral", "stable_rank", "vector")
"""What takes the largest singular value alone."""

KNOWN = ("norm", *BY_PRODUCTS, *EXACT)

ROUNDING = 2.0**-23
"""Singular values below the longer side times this times the largest are none: what float32 can tell."""


def matrices(
    weights: Source,
    what: Sequence[str] = ("norm", "spectral", "stable_rank"),
    *,
    pattern: Pattern = "*",
    start: Source | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Weights]:
    r"""Figures of every matrix of a checkpoint, streamed.

    .. math:: \lVert W \rVert_F, \quad \sigma_1 = \max_{\lVert v \rVert = 1} \lVert W v \rVert, \quad
        \frac{\lVert W \rVert_F^2}{\sigma_1^2}, \quad e^{-\sum_i p_i \ln p_i}\ \ (p_i = \sigma_i / \textstyle\sum_j
        \sigma_j), \quad \textstyle\sum_i \sigma_i

    Args:
        weights: a checkpoint; anything that `weightsmith.open` opens.
        what: of ``"norm"`` (of all entries), ``"spectral"`` (the largest singular value), ``"stable_rank"``,
            ``"vector"`` (the right singular vector of the largest value), ``"effective_rank"``, ``"rank"`` (singular
            values above what rounding in float32 leaves) and ``"nuclear"`` (the sum of singular values). The last
            three take a decomposition of some n³ steps with n the shorter side; ``"norm"`` takes a reading and holds a
            chunk; the others some products with the matrix, which each thread holds whole in float32.
        pattern: names of tensors; those of two axes or more are taken, viewed as ``[first, all others]``.
        start: the ``"vector"`` of an earlier result, say of the step before in training: fewer products. It may lack
            names.
        tolerance: of the largest singular value, see `weightsmith.solve.largest_singular`.
        seed: of the vectors to begin with.
        threads: workers; default one a core.

    Returns:
        dict[str, Weights]: by the words of ``what``, under the names of the tensors: numbers ``[]`` float64; the
        vectors ``[in]`` float32. NaN where a value is not finite (a norm may be infinite). Tied tensors are there
        once, under the first name.

    Raises:
        ValueError: an unknown word, no matrix that fits, or vectors that do not.

    >>> found = matrices({"w": torch.diag(torch.tensor([3.0, 4.0]))}, ("norm", "spectral", "stable_rank"))
    >>> [round(float(one["w"]), 4) for one in found.values()]
    [5.0, 4.0, 1.5625]
    """
    what = (what,) if isinstance(what, str) else tuple(what)
    unknown = [word for word in what if word not in KNOWN]
    if unknown or not what:
        said = f"{unknown[0]!r}{did_you_mean(str(unknown[0]), KNOWN)}" if unknown else "nothing"
        raise Error(f"what= names {said}; known: {', '.join(KNOWN)}")
    opened = open(weights)
    names = _names(opened, pattern)
    earlier = _starts(opened, names, start)
    wanted = frozenset(what)
    exact, products = bool(wanted & set(EXACT)), bool(wanted & set(BY_PRODUCTS))
    reductions = []
    for name in names:
        if exact or products:
            own = earlier.get(name)
            function = partial(_whole, wanted=wanted, guess=own, tolerance=tolerance, seed=seed)
            item, solver = Inputs([opened.node(name)], "tensor"), partial(single, function, _same)
        else:
            item, solver = Inputs([opened.node(name)], "element"), partial(single, _squares, _root)
        reductions.append(Reduction([item], solver))
    solve_all(reductions, threads)
    found = dict(zip(names, (reduction.value() for reduction in reductions), strict=True))
    order = ["norm"] if not (exact or products) else [word for word in KNOWN if word in wanted]
    made = {word: {name: _as(word, found[name][order.index(word)]) for name in names} for word in what}
    return {word: Weights.of(values) for word, values in made.items()}


def _names(weights: Weights, pattern: Pattern) -> list[str]:
    ties = weights.ties
    fitting = dict.fromkeys(ties.get(name, name) for name in weights.names(pattern, floating=True))
    names = [n for n in fitting if len(weights.spec(n).shape) >= 2 and weights.spec(n).numel]
    if not names:
        raise Error(f"no float matrix fits pattern={pattern!r}; there are {listed(weights)}")
    return names


def _starts(weights: Weights, names: Sequence[str], start: Source | None) -> dict[str, Tensor]:
    if start is None:
        return {}
    given = open(start)
    for name in names:
        inputs = math.prod(weights.spec(name).shape[1:])
        if name in given and given.spec(name).shape != (inputs,):
            raise Error(f"start= has {list(given.spec(name).shape)} for {name}, whose rows have {inputs} entries")
    return {name: given[name] for name in names if name in given}


def _same(found: Any) -> Any:
    return found


def _root(found: tuple[Tensor]) -> tuple[Tensor]:
    return (found[0].sqrt(),)


def _squares(values: Tensor) -> tuple[Tensor]:
    return (values.double().square().sum(),)


def _as(word: str, value: Tensor) -> Tensor:
    return value.float() if word == "vector" else value.double()


def _whole(
    tensor: Tensor, *, wanted: frozenset[str], guess: Tensor | None, tolerance: float, seed: int
) -> tuple[Tensor, ...]:
    """The figures of one matrix, in the order of `KNOWN`."""
    matrix = tensor.reshape(len(tensor), -1)
    made: dict[str, Any] = {"norm": float(torch.linalg.vector_norm(matrix, dtype=torch.float64))}
    if wanted & set(BY_PRODUCTS):
        made["spectral"], made["vector"] = solve.largest_singular(matrix, guess, tolerance=tolerance, seed=seed)
    if wanted & set(EXACT):
        values = solve.singular_values(matrix)
        made |= dict.fromkeys(("spectral", *EXACT), math.nan) if values is None else _of_values(values, matrix)
    if "stable_rank" in wanted:
        made["stable_rank"] = (made["norm"] / made["spectral"]) ** 2 if made["spectral"] else 0.0
    return tuple(torch.as_tensor(made[word], dtype=torch.float64) for word in KNOWN if word in wanted)


def _of_values(values: Tensor, matrix: Tensor) -> dict[str, float]:
    return {
        "spectral": float(values[0]),
        "effective_rank": solve.effective_rank(values),
        "nuclear": float(values.sum()),
        "rank": float((values > max(matrix.shape) * ROUNDING * values[0]).sum()),
    }

"""Change one code at a time, and what decodes them, as long as the outputs of a layer come nearer.

The squared error of a layer's outputs is a quadratic in each weight alone, so the best code of one, with all others
standing still, is the point nearest to its minimum. With all codes standing still, the best steps or levels of a row
are the solution of a small linear system. Neither ever makes the error larger.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import (
    Coded,
    checked_matrix,
    coded,
    fitted,
    group_count,
    joined,
    matrix_of,
    parts_by_gram,
    runs_of,
)
from weightsmith.quantize._gptq import column_by_column
from weightsmith.quantize.grids import Grid, Integer, Levels, Params
from weightsmith.solve import BLOCK, cholesky, steadied

Start = Literal["gptq", "nearest"]

AT_ONCE = 2**22
"""Numbers of the linear systems that are solved together."""

RIDGE = 1e-7
"""Added to the diagonal of such a system, as a share of its mean: what no code uses stays where it is."""


@card(
    paper="Kim, El Halabi, Park, Song 2025, 'GuidedQuant: Large Language Model Quantization via Exploiting End Loss "
    "Guidance' (cyclic coordinate descent of the codes)",
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less than with the codes it starts from",
    departs="on any grid, not on tables alone; a code is changed only where the error becomes smaller; the Gram matrix "
    "is damped, without which the outputs on other texts are farther off",
)
def coordinate_descent(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid = Integer(),  # noqa: B008
    codes_from: Start = "gptq",
    sweeps: int = 4,
    refit: bool = False,
    damp: float = 0.1,
    shrink: float = 0.0,
    clip: int = 8,
) -> Coded:
    r"""Codes of which none can be changed alone for the better, or what some sweeps towards them give.

    .. math:: q_j \leftarrow \operatorname{arg\,min}_q \Bigl| g(q) - \Bigl( v_j - \frac{[(v - w) H]_j}{H_{jj}} \Bigr)
        \Bigr|, \qquad v_j \leftarrow g(q_j)

    Args:
        weight: ``[out, in]``.
        gram: ``[in, in]``, blocks, a diagonal, or ``[runs, in, in]`` for runs of rows.
        grid: the points.
        codes_from: the codes to start from: those of `gptq`, or the nearest.
        sweeps: over all columns; it ends early where nothing changes.
        refit: whether after each sweep the steps (or levels) of the groups are solved for.
        damp, shrink: of the Gram matrix, as for `gptq`.
        clip: how many narrower ranges are tried for each group at the start.

    Returns:
        codes and parameters; for each row :math:`(v - w) H (v - w)^\top`, with the damped :math:`H`, is at most that of
        the start. Memory: the Gram matrix three times in float64, then the weight five times.

    Raises:
        Error: shapes that do not fit, NaN, or options out of their range.

    >>> gram = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
    >>> weight, grid = torch.tensor([[0.4, 0.4]]), ws.quantize.grids.Integer(bits=2)
    >>> found = coordinate_descent(weight, gram, grid=grid, codes_from="nearest", damp=0)
    >>> found.codes, found.values()
    (tensor([[3, 3]], dtype=torch.uint8), tensor([[0.2667, 0.2667]]))
    """
    _check_start(codes_from)
    _check_turns("sweeps", sweeps)
    rows = checked_matrix("coordinate_descent", weight, gram, runs=True)
    shared = grid.shared(rows)
    found = []
    for part, own in parts_by_gram(rows, gram):
        if codes_from == "gptq":
            start = column_by_column(part, own, grid, shared=shared, damp=damp, shrink=shrink, clip=clip)
        else:
            start = coded(part, grid, fitted(part, grid, own, clip=clip, shared=shared), shared)
        matrix = whole_gram(own, damp, shrink, part.dtype)
        for _ in range(sweeps):
            before, start = start, swept(part, matrix, start)
            start = refitted(part, matrix, start) if refit else start
            if torch.equal(start.codes, before.codes) and _same(start.params, before.params):
                break
        found.append(start)
    return joined(found)


@card(
    paper="Kim, El Halabi, Park, Song 2025, 'GuidedQuant: Large Language Model Quantization via Exploiting End Loss "
    "Guidance' (layer-wise non-uniform quantization)",
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less than with a table of k-means, rounded column by column",
    departs="the first codes are those of GPTQ on the first table unless codes_from='nearest'; a table is taken only "
    "where it makes the error of its row smaller; the Gram matrix is damped, without which the outputs on other texts "
    "are farther off",
)
def lnq(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid = Levels(),  # noqa: B008
    codes_from: Start = "gptq",
    turns: int = 2,
    sweeps: int = 4,
    damp: float = 0.1,
    shrink: float = 0.0,
) -> Coded:
    r"""Tables and codes in turns, each the best for the other.

    .. math:: c = (P^\top H P)^{-1} P^\top H\, w, \qquad P_{jq} = [q_j = q]

    and then `coordinate_descent` of the codes, for each row. The first table is that of k-means with the weights
    :math:`H_{jj}`.

    Args:
        weight: ``[out, in]``.
        gram: as for `coordinate_descent`.
        grid: with ``"levels"`` (one table for each group) this is the paper's; of other grids the steps are solved for.
        codes_from: the first codes: those of `gptq` on the first table, or the nearest.
        turns: of tables and codes.
        sweeps: over all columns, in each turn.
        damp, shrink: of the Gram matrix, as for `gptq`.

    Returns:
        codes and levels. Memory: the Gram matrix three times in float64, then the weight five times.

    Raises:
        Error: shapes that do not fit, NaN, or options out of their range.

    >>> lnq(torch.tensor([[0.0, 1.0, 5.0, 6.0, 7.0]]), torch.eye(5), grid=ws.quantize.grids.Levels(bits=1)).values()
    tensor([[0.5000, 0.5000, 6.0000, 6.0000, 6.0000]])
    """
    _check_start(codes_from)
    _check_turns("turns", turns)
    _check_turns("sweeps", sweeps)
    rows = checked_matrix("lnq", weight, gram, runs=True)
    shared = grid.shared(rows)
    found = []
    for part, own in parts_by_gram(rows, gram):
        matrix = whole_gram(own, damp, shrink, part.dtype)
        params = fitted(part, grid, shared=shared, importance=matrix.diagonal())
        if codes_from == "gptq":
            made = column_by_column(part, own, grid, params, shared=shared, damp=damp, shrink=shrink)
        else:
            made = coded(part, grid, params, shared)
        for _ in range(turns):
            made = refitted(part, matrix, made)
            for _ in range(sweeps):
                before = made.codes
                made = swept(part, matrix, made)
                if torch.equal(made.codes, before):
                    break
        found.append(refitted(part, matrix, made))
    return joined(found)


def _same(one: Params, other: Params) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _check_start(codes_from: str) -> None:
    if codes_from not in ("gptq", "nearest"):
        raise Error(f"codes_from is 'gptq' or 'nearest', got {codes_from!r}")


def _check_turns(name: str, count: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise Error(f"{name} is a whole number from 0, got {count!r}")


def whole_gram(gram: Tensor, damp: float, shrink: float, dtype: torch.dtype) -> Tensor:
    """A Gram matrix of any form as ``[in, in]``, steadied."""
    return steadied(matrix_of(gram), damp=damp, shrink=shrink).to(dtype)


def row_errors(weight: Tensor, matrix: Tensor, values: Tensor) -> Tensor:
    """``(v - w) H (v - w)'`` of each row, ``[out]``."""
    apart = values - weight
    return ((apart @ matrix) * apart).sum(1)


def swept(weight: Tensor, matrix: Tensor, found: Coded, *, block: int = BLOCK) -> Coded:
    """Every code once changed for the better, if it can be; parameters stay.

    Args:
        weight: ``[out, in]``.
        matrix: ``[in, in]``, positive semidefinite; codes of inputs that have zero on its diagonal stay.
    """
    grid, size = found.grid, found.grid.group or max(weight.shape[1], 1)
    values = found.values().to(weight.dtype).t().contiguous()
    slopes = matrix @ (values - weight.t())
    codes = found.codes.t().contiguous()
    curves = matrix.diagonal().tolist()
    for start in range(0, len(values), block):
        stop = min(start + block, len(values))
        moves = torch.zeros_like(values[start:stop])
        for column in range(start, stop):
            if not curves[column] > 0:
                continue
            params = {name: value[:, column // size] for name, value in found.params.items()}
            now = values[column]
            aim = now - slopes[column] / curves[column]
            code = grid.encode(aim.unsqueeze(-1), {**found.shared, **params})
            new = grid.decode(code, {**found.shared, **params}).squeeze(-1).to(now.dtype)
            better = (new - aim).abs() < (now - aim).abs()
            torch.where(better, new - now, moves[column - start], out=moves[column - start])
            codes[column] = torch.where(better, code.squeeze(-1), codes[column])
            slopes[column + 1 : stop].addr_(matrix[column, column + 1 : stop], moves[column - start])
        slopes[stop:].addmm_(matrix[stop:, start:stop], moves)
    return replace(found, codes=codes.t().contiguous())


def refitted(weight: Tensor, matrix: Tensor, found: Coded) -> Coded:
    r"""The steps or levels of each row that are best for its codes, in closed form.

    Values are linear in them, ``v = B c``, so :math:`c = (B^\top H B)^{-1} B^\top H w`, over all groups of a row at
    once. A row keeps its own where these would not be better, as they are stored. What grids store otherwise than as
    plain steps, smallest values or levels stays as it is.

    Args:
        weight: ``[out, in]``.
        matrix: ``[in, in]``, positive semidefinite.
    """
    names = _linear(found.grid)
    if not names or not weight.numel():
        return found
    inputs, groups = weight.shape[1], group_count(weight.shape[1], found.grid.group)
    width = found.grid.group if groups > 1 and found.grid.group else inputs
    tail = sum(2**found.grid.bits if name == "levels" else 1 for name in names)
    each = (groups * tail) ** 2 + 3 * groups * width * tail
    new: list[Params] = []
    step = max(AT_ONCE // each, 1)
    for start in range(0, len(weight), step):
        part = Coded(
            found.codes[start : start + step],
            {name: value[start : start + step] for name, value in found.params.items()},
            found.grid,
            found.shared,
        )
        new.append(_solved(weight[start : start + step], matrix, part, names, width))
    params = {**found.params, **{name: torch.cat([one[name] for one in new]) for name in names}}
    made = replace(found, params=params)
    if "levels" in params:
        made = _ordered(made)
    better = row_errors(weight, matrix, made.values()) < row_errors(weight, matrix, found.values())
    return _chosen(better, made, found)


def _linear(grid: Grid) -> tuple[str, ...]:
    """The parameters of groups in which the values of a grid are linear; none where that is not known."""
    own = {name for name, stored in grid.stored().items() if not stored.shared and stored.dtype.is_floating_point}
    others = set(grid.stored()) - own - {name for name, stored in grid.stored().items() if stored.shared}
    if own == {"levels"} and not others:
        return ("levels",)
    if own in ({"scale"}, {"scale", "minimum"}) and others <= {"zero_point"}:
        return tuple(sorted(own, reverse=True))
    return ()


def _basis(found: Coded, names: tuple[str, ...], width: int) -> Tensor:
    """``B [rows, groups, width, tail]``: what each weight is of each parameter of its group; zeros pad the last."""
    if names == ("levels",):
        points = torch.arange(2**found.grid.bits, device=found.codes.device, dtype=torch.uint8)
        parts = (found.codes.unsqueeze(-1) == points).to(found.params["levels"].dtype)
    else:
        one, nothing = found.params["scale"].new_ones(()), found.params["scale"].new_zeros(())
        plain = {**found.params, "scale": one.expand_as(found.params["scale"])}
        if "minimum" in names:
            plain["minimum"] = nothing.expand_as(found.params["minimum"])
        steps = replace(found, params=plain).values()
        parts = torch.stack([steps, *(torch.ones_like(steps) for _ in names[1:])], -1)
    parts = torch.nn.functional.pad(parts, (0, 0, 0, -parts.shape[1] % width))
    return parts.unflatten(1, (-1, width))


def _solved(weight: Tensor, matrix: Tensor, found: Coded, names: tuple[str, ...], width: int) -> Params:
    """New parameters of some rows."""
    basis = _basis(found, names, width)
    rows, groups, _, tail = basis.shape
    now = torch.cat([found.params[name].reshape(rows, groups, -1) for name in names], -1)
    values = (basis * now.unsqueeze(-2)).sum(-1)
    inputs = weight.shape[1]
    if not torch.allclose(values.flatten(1)[:, :inputs].to(weight.dtype), found.values().to(weight.dtype), atol=1e-6):
        return {name: found.params[name] for name in names}  # its values are not linear in them
    more = groups * width - inputs
    matrix = torch.nn.functional.pad(matrix, (0, more, 0, more))
    slopes = torch.nn.functional.pad(weight, (0, more)) - values.flatten(1).to(weight.dtype)
    slopes = (slopes @ matrix).unflatten(1, (groups, width))
    right = (basis.to(slopes.dtype) * slopes.unsqueeze(-1)).sum(2).flatten(1).double()
    system = weight.new_empty(rows, groups, tail, groups, tail)
    for group in range(groups):
        here = basis[:, group].mT.reshape(rows * tail, width).to(matrix.dtype)
        across = (here @ matrix[group * width : (group + 1) * width]).view(rows, tail, groups, width)
        system[:, group] = (across.transpose(1, 2) @ basis.to(across.dtype)).transpose(1, 2)
    whole = system.reshape(rows, groups * tail, groups * tail).double()
    whole = (whole + whole.mT) / 2
    lift = RIDGE * whole.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    whole.diagonal(dim1=1, dim2=2).add_(lift[:, None])
    step = torch.cholesky_solve(right.unsqueeze(-1), cholesky(whole)).view(rows, groups, tail)
    return _stored(found, names, now.double() + step)


def _stored(found: Coded, names: tuple[str, ...], solved: Tensor) -> Params:
    """What was solved for, as it is stored; steps that would vanish or turn round stay."""
    made, done = {}, 0
    for name in names:
        old = found.params[name]
        size = old[0, 0].numel()
        new = solved[..., done : done + size].reshape(old.shape)
        new = new.to(found.grid.stored()[name].dtype).to(old.dtype)
        fine = new.isfinite() if name != "scale" else new.isfinite() & (new * old.sign() > 0)
        made[name] = torch.where(fine, new, old)
        done += size
    return made


def _ordered(found: Coded) -> Coded:
    """The same values with levels from low to high."""
    levels, order = found.params["levels"].sort(-1)
    place = order.argsort(-1).to(torch.uint8)
    codes, done = [], 0
    for runs in runs_of(found.codes, found.grid.group):
        own = place[:, done : done + runs.shape[1]]
        codes.append(own.gather(-1, runs.long()).flatten(1))
        done += runs.shape[1]
    return replace(found, codes=torch.cat(codes, 1), params={**found.params, "levels": levels})


def _chosen(better: Tensor, one: Coded, other: Coded) -> Coded:
    """Row by row the one or the other."""
    params = {
        name: torch.where(better.reshape(-1, *[1] * (value.dim() - 1)), value, other.params[name])
        for name, value in one.params.items()
    }
    return replace(other, codes=torch.where(better[:, None], one.codes, other.codes), params=params)

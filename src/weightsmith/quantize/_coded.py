"""A matrix on a grid: its codes, and what turns them back into values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.grids import Grid, Params

NARROWEST = 0.5
"""The share of its range below which a group is never clipped."""


@dataclass(frozen=True)
class Coded:
    """What a rounding makes of a weight.

    Attributes:
        codes: ``[out, in]``, uint8.
        params: ``{name: [out, groups, *tail]}``.
        grid: what they are codes of.
        shared: ``{name: [*tail]}``, of the whole tensor.
    """

    codes: Tensor
    params: Params
    grid: Grid
    shared: Params = field(default_factory=dict)

    def values(self) -> Tensor:
        """The weights that the codes stand for: ``[out, in]``, float32 or wider."""
        pieces = []
        for runs, own in _by_group(self.codes, self.grid.group, self.params):
            pieces.append(self.grid.decode(runs, {**self.shared, **own}).flatten(1))
        return torch.cat(pieces, 1) if len(pieces) != 1 else pieces[0]


def group_count(inputs: int, group: int | None) -> int:
    """How many groups a row of so many inputs has; the last may be shorter."""
    return 1 if group is None else max(-(-inputs // group), 1)


def spans(inputs: int, group: int | None) -> Iterator[tuple[int, int]]:
    """Where each group begins and ends."""
    size = max(inputs, 1) if group is None else group
    for start in range(0, max(inputs, 1), size):
        yield start, min(start + size, inputs)


def runs_of(matrix: Tensor, group: int | None) -> list[Tensor]:
    """``[out, in]`` as ``[out, groups, group]``, and what is left over as ``[out, 1, rest]``."""
    inputs = matrix.shape[1]
    if group is None or not inputs:
        return [matrix.unsqueeze(1)]
    whole = inputs - inputs % group
    found = []
    if whole:
        found.append(matrix[:, :whole].unflatten(1, (whole // group, group)))
    if whole < inputs:
        found.append(matrix[:, whole:].unsqueeze(1))
    return found


def _by_group(matrix: Tensor, group: int | None, params: Params) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The runs of a matrix, each with its parameters."""
    done = 0
    for runs in runs_of(matrix, group):
        yield runs, {name: value[:, done : done + runs.shape[1]] for name, value in params.items()}
        done += runs.shape[1]


def fitted(
    weight: Tensor,
    grid: Grid,
    gram: Tensor | None = None,
    *,
    clip: int = 0,
    shared: Params | None = None,
    importance: Tensor | None = None,
) -> dict[str, Tensor]:
    """The parameters of all groups of a matrix, each with the range that leaves its outputs nearest.

    Args:
        weight: ``[out, in]``, float32 or wider.
        grid: with what each group is fitted.
        gram: of its inputs, ``[in, in]``, blocks ``[in / b, b, b]`` or ``[in]``: errors are then those of the outputs
            of a group; else of its weights.
        clip: how many narrower ranges are tried, down to half of the range; 0 for the whole one.
        shared: what the tensor shares; asked of the grid by default.
        importance: ``[in]`` or ``[out, in]``, for grids that are fitted with weights.

    Returns:
        ``{name: [out, groups, *tail]}``. Memory: a few copies of the weight.
    """
    shared = grid.shared(weight) if shared is None else shared
    whole = importance.expand_as(weight) if importance is not None else None
    parts = []
    start = 0
    for number, runs in enumerate(runs_of(weight, grid.group)):
        stop = start + runs.shape[1] * runs.shape[2]
        heed = None if whole is None else runs_of(whole, grid.group)[number]
        fit = _fitting(grid, runs, shared, heed)
        params = fit(1.0)
        if clip and runs.numel():
            blocks = None if gram is None else gram_runs(gram, start, stop, runs.shape[2])
            params = _clipped(grid, runs, shared, fit, params, blocks, clip)
        parts.append(params)
        start = stop
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def _fitting(grid: Grid, runs: Tensor, shared: Params, heed: Tensor | None) -> Callable[[float], Params]:
    return lambda shrink: grid.fit(runs, shared, shrink=shrink, importance=heed)


def _clipped(
    grid: Grid, runs: Tensor, shared: Params, fit: Callable[[float], Params], whole: Params, gram: Tensor | None,
    clip: int,
) -> Params:  # fmt: skip
    """For every row and group the range of least error."""

    gram = None if gram is None else gram.to(runs.dtype)

    def error(params: Params) -> Tensor:
        both = {**shared, **params}
        return run_errors(grid.decode(grid.encode(runs, both), both).sub_(runs), gram)

    best, least = dict(whole), error(whole)
    for step in range(1, clip + 1):
        params = fit(1.0 - (1.0 - NARROWEST) * step / clip)
        found = error(params)
        better = found < least
        least = torch.where(better, found, least)
        for name, value in params.items():
            best[name] = torch.where(better.reshape(*better.shape, *[1] * (value.dim() - 2)), value, best[name])
    return best


def run_errors(error: Tensor, gram: Tensor | None) -> Tensor:
    """Squared errors of the outputs of each group: ``[out, groups]`` of ``[out, groups, n]``.

    ``gram`` is ``[groups, n, n]`` or ``[groups, n]``; None for errors of the weights.
    """
    if gram is None:
        return error.square().sum(-1)
    gram = gram.to(error.dtype)
    if gram.dim() == 2:
        return (error.square() * gram).sum(-1)
    turned = error.transpose(0, 1)
    return ((turned @ gram) * turned).sum(-1).t()


def gram_runs(gram: Tensor, start: int, stop: int, size: int) -> Tensor:
    """The parts of a Gram matrix on whose diagonal the groups lie: ``[groups, n, n]``, or ``[groups, n]``.

    Of blocks that do not hold whole groups, their diagonal.
    """
    if gram.dim() == 3:
        if gram.shape[1] % size == 0 and start % size == 0:
            parts = _on_the_diagonal(gram, size).flatten(0, 1)
            return parts[start // size : stop // size]
        gram = energy_of(gram)
    if gram.dim() == 1:
        return gram[start:stop].unflatten(0, (-1, size))
    return _on_the_diagonal(gram[None, start:stop, start:stop], size)[0]


def _on_the_diagonal(gram: Tensor, size: int) -> Tensor:
    """``[n, in, in]`` to ``[n, in / size, size, size]``, a view."""
    return gram.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3).movedim(-1, 1)


def energy_of(gram: Tensor) -> Tensor:
    """The diagonal ``[in]`` of a Gram matrix, of its blocks, or as it is."""
    return gram if gram.dim() == 1 else gram.diagonal(dim1=-2, dim2=-1).flatten()


def matrix_of(gram: Tensor) -> Tensor:
    """``[in, in]``: a Gram matrix as it is, or its blocks or its diagonal with zeros beside them."""
    return torch.block_diag(*gram) if gram.dim() == 3 else torch.diag(gram) if gram.dim() == 1 else gram


def times(error: Tensor, gram: Tensor) -> Tensor:
    """``error [out, in]`` times a Gram matrix of any form."""
    if gram.dim() == 1:
        return error * gram
    if gram.dim() == 3:
        runs = error.unflatten(1, gram.shape[:2]).transpose(0, 1)
        return (runs @ gram).transpose(0, 1).flatten(1)
    return error @ gram


def row_errors(error: Tensor, gram: Tensor) -> Tensor:
    """The squared error of each output: ``[out]``."""
    return times(error, gram).mul_(error).sum(1)


def coded(weight: Tensor, grid: Grid, params: Params | None = None, shared: Params | None = None) -> Coded:
    """Every weight at the nearest point of a grid.

    Args:
        weight: ``[out, in]``, float32 or wider.
        params, shared: as `fitted` and the grid find them, by default for this weight.

    >>> from weightsmith.quantize.grids import Integer
    >>> coded(torch.tensor([[7.5, -7.5, 1.0, 0.4]]), Integer(bits=4)).values()
    tensor([[ 7., -8.,  1.,  0.]])
    """
    shared = grid.shared(weight) if shared is None else shared
    params = fitted(weight, grid, shared=shared) if params is None else params
    pieces = [grid.encode(runs, {**shared, **own}).flatten(1) for runs, own in _by_group(weight, grid.group, params)]
    return Coded(torch.cat(pieces, 1) if len(pieces) != 1 else pieces[0], params, grid, shared)


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> Tensor:
    r"""How far outputs are apart: :math:`\operatorname{tr}\big((W - V)\, H\, (W - V)^\top\big)`, a number.

    Args:
        weight, other: ``[out, in]``.
        gram: of the inputs, ``[in, in]``, blocks ``[in / b, b, b]`` or ``[in]``.
    """
    return row_errors((weight - other).to(gram.dtype), gram).sum()


def by_rows(gram: Tensor, inputs: int) -> bool:
    """Whether these are Gram matrices ``[runs, in, in]``, one for each run of rows."""
    return gram.dim() == 3 and gram.shape[1] == inputs and (len(gram) > 1 or inputs == 0)


def parts_by_gram(rows: Tensor, gram: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Runs of rows, each with its Gram matrix; most often there is one."""
    if not by_rows(gram, rows.shape[1]):
        return [(rows, gram)]
    return list(zip(rows.split(max(len(rows) // max(len(gram), 1), 1)), gram, strict=True))


def joined(parts: Iterable[Coded]) -> Coded:
    """Runs of rows below one another, on one grid and with one set of what is shared."""
    first, *others = parts
    if not others:
        return first
    whole = (first, *others)
    params = {name: torch.cat([part.params[name] for part in whole]) for name in first.params}
    return Coded(torch.cat([part.codes for part in whole]), params, first.grid, first.shared)


def checked_matrix(method: str, weight: Tensor, gram: Tensor | None = None, *, runs: bool = False) -> Tensor:
    """The weight in float32 or wider as ``[out, in]``, with a Gram matrix that fits it.

    With ``runs`` also one for each run of rows, ``[runs, in, in]``.
    """
    if weight.dim() < 1:
        raise Error(f"{method} quantizes matrices [out, in], got a single number")
    weight = weight.detach()
    rows = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if gram is not None:
        _check_gram(method, rows, gram, runs)
    return rows


def _check_gram(method: str, rows: Tensor, gram: Tensor, runs: bool) -> None:
    inputs, square = rows.shape[1], gram.dim() == 1 or (gram.dim() in (2, 3) and gram.shape[-1] == gram.shape[-2])
    if runs and square and by_rows(gram, inputs):
        if len(rows) % len(gram):
            raise Error(f"{method}: {len(rows)} rows cannot be cut into {len(gram)} runs, one for each Gram matrix")
        return
    if not square or (gram.shape[0] * gram.shape[1] if gram.dim() == 3 else len(gram)) != inputs:
        raise Error(
            f"{method}: a weight of {inputs} inputs needs a Gram matrix [in, in], blocks of it or its "
            f"diagonal{', or [runs, in, in] for runs of rows' if runs else ''}, got {list(gram.shape)}"
        )

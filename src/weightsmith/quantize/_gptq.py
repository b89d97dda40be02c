"""Round column after column; those that are not rounded yet make up for each error as it is made.

One triangular matrix, from the Gram matrix of the inputs, says for all rows at once how the rest must move so that the
outputs change least.

A Gram matrix of few tokens knows the directions that its inputs share only roughly, and making up for errors along them
spoils what other texts need. With 3 bits in groups of 64 and 8,192 tokens, SmolLM2-135M had on a near and a far text
the perplexities 48 and 163 with the paper's ``damp=0.01, clip=0``, 27 and 58 with ``shrink=0.3`` as well, 32 and 52
with ``damp=0.01, clip=8``, 27 and 49 with ``damp=0.1, clip=8``, which are the defaults, and 43 and 67 rounded to
nearest. Narrower ranges were then judged by whole parts of the Gram matrix. The diagonal alone is cheaper and no worse:
errors along shared directions are made up for in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith import native
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import (
    Coded,
    checked_matrix,
    energy_of,
    fitted,
    group_count,
    joined,
    matrix_of,
    parts_by_gram,
)
from weightsmith.quantize.grids import Grid, Integer, Params
from weightsmith.solve import BLOCK, Begin, Settle, column_loop, inverse_factor, steadied

Order = Literal["given", "activation"]

STEP = 32
"""Columns that are rounded one by one before those of their block after them are brought up to date."""


@card(
    paper="Frantar, Ashkboos, Hoefler, Alistarh 2022, 'GPTQ: Accurate Post-Training Quantization for Generative "
    "Pre-trained Transformers'",
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less than with rounding to nearest on the same grid",
    departs="columns come by the size of their inputs, with more damping (0.1 instead of 0.01), and ranges are "
    "narrowed where that leaves less error: with 3 bits a language model is far better for each of the three; inputs "
    "that were always zero keep their weights' nearest codes instead of zero",
)
def gptq(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid = Integer(),  # noqa: B008
    damp: float = 0.1,
    shrink: float = 0.0,
    order: Order = "activation",
    static: bool = False,
    clip: int = 8,
    zeros: bool = False,
    block: int = BLOCK,
) -> Coded:
    r"""Codes for a matrix, column by column, with the columns after each making up for its error.

    .. math:: e_j = \frac{w_j - g(q_j)}{U_{jj}}, \qquad w_k \leftarrow w_k - e_j\,U_{jk} \quad (k > j), \qquad
        H^{-1} = U^\top U

    Args:
        weight: ``[out, in]``.
        gram: ``[in, in]``, or blocks or a diagonal, with which columns of other blocks do not make up for one another;
            or ``[runs, in, in]``, one for each run of rows (`weightsmith.stats.guided_gram`).
        grid: the points.
        damp: what is added to the diagonal of the Gram matrix, as a share of its mean; 0.01 in the paper.
        shrink: how far the Gram matrix is drawn to its diagonal, from 0 to 1.
        order: of the columns: those first whose inputs are largest (``"activation"``), or as they are ``"given"``, as
            in the paper. Groups stay runs of neighbours.
        static: parameters of groups are those of the weights before any has moved; always so with
            ``order="activation"``.
        clip: how many narrower ranges are tried for each group, by its errors weighted with the diagonal of the Gram
            matrix; 0, as in the paper, for the one that holds all values.
        zeros: weights that are zero stay zero, as those of a pruned matrix should, and the others make up for it; on
            grids that have a zero.
        block: columns that are kept up to date one by one.

    Returns:
        codes and parameters. Memory: the Gram matrix three times in float64, then the weight three times.

    Raises:
        Error: shapes that do not fit, NaN, or options out of their range.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> grid = ws.quantize.grids.Integer(bits=2, symmetric=False)
    >>> gptq(torch.tensor([[0.4, 1.0]]), gram, grid=grid, damp=0, clip=0).codes
    tensor([[1, 3]], dtype=torch.uint8)
    """
    if order not in ("given", "activation"):
        raise Error(f"order is 'given' or 'activation', got {order!r}")
    rows = checked_matrix("gptq", weight, gram, runs=True)
    shared = grid.shared(rows)
    options: dict[str, Any] = {
        "damp": damp, "shrink": shrink, "order": order, "static": static, "clip": clip, "zeros": zeros, "block": block,
    }  # fmt: skip
    found = joined(
        column_by_column(part, own, grid, shared=shared, **options) for part, own in parts_by_gram(rows, gram)
    )
    if zeros and found.values()[:, : rows.shape[1]][rows == 0].any():
        raise Error(
            "zeros=True keeps weights that are zero, and this grid has no code for zero; take a symmetric one, or "
            'zero="integer"'
        )
    return found


def column_by_column(
    rows: Tensor,
    gram: Tensor,
    grid: Grid,
    params: Params | None = None,
    *,
    shared: Params,
    damp: float,
    shrink: float = 0.0,
    order: Order = "activation",
    static: bool = False,
    clip: int = 0,
    zeros: bool = False,
    block: int = BLOCK,
) -> Coded:
    """What `gptq` does with rows that have one Gram matrix; with ``params``, on a grid that is fitted already."""
    inputs = rows.shape[1]
    whole = grid.group is None or grid.group >= inputs
    ahead = params is not None or static or order == "activation" or whole
    if ahead and params is None:
        params = fitted(rows, grid, energy_of(gram), clip=clip, shared=shared)
    factor, places = factored(gram, damp=damp, shrink=shrink, order=order, dtype=rows.dtype)
    at = list(range(inputs)) if places is None else places.tolist()
    groups = _Groups(rows, grid, energy_of(gram), clip, shared, ahead, dict(params or {}))
    size = groups.size
    width = block if ahead else max(block // size, 1) * size  # so that a group lies in one block
    if type(grid) is Integer and inputs and not zeros:
        codes = _integers(rows if places is None else rows[:, places], factor, grid, groups, at, width)
    else:
        codes = torch.empty(inputs, len(rows), dtype=torch.uint8, device=rows.device)
        begin = _settling(codes, grid, groups, at, (rows == 0).t() if zeros else None)
        column_loop(rows if places is None else rows[:, places], factor, begin, block=width)
    if places is not None:
        codes = codes[torch.argsort(places)]
    if not groups.params and not shared:  # of a matrix without inputs
        groups.params = dict(fitted(rows, grid, shared=shared))
    return Coded(codes.t().contiguous(), groups.params, grid, shared)


@dataclass
class _Groups:
    """The parameters of a matrix: fitted already, or group after group, each by what its weights have become."""

    rows: Tensor
    grid: Grid
    energy: Tensor
    clip: int
    shared: Params
    ahead: bool
    params: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.grid.group or max(self.rows.shape[1], 1)

    def reached(self, place: int, columns: Tensor) -> None:
        """Fit the group that begins at an input, by the present values ``[columns, rows]`` from there on."""
        if self.ahead or place % self.size:
            return
        group = columns[: self.size].t()
        own = self.energy[place : place + group.shape[1]]
        for name, value in fitted(group, self.grid, own, clip=self.clip, shared=self.shared).items():
            if name not in self.params:
                count = group_count(self.rows.shape[1], self.size)
                self.params[name] = value.new_empty(len(self.rows), count, *value.shape[2:])
            self.params[name][:, place // self.size] = value[:, 0]

    def of(self, place: int) -> dict[str, Tensor]:
        """The parameters of the group of an input: ``[rows, *tail]``, and what is shared."""
        return {**self.shared, **{name: value[:, place // self.size] for name, value in self.params.items()}}


def _settling(codes: Tensor, grid: Grid, groups: _Groups, at: list[int], zero: Tensor | None) -> Begin:
    """How each column becomes codes ``[columns, rows]``, on any grid; ``zero [columns, rows]`` where they are zero."""

    def begin(start: int, values: Tensor) -> Settle:
        def settle(column: int) -> Tensor:
            place = at[start + column]
            groups.reached(place, values[column:])
            now = groups.of(place)
            present = values[column] if zero is None else values[column].masked_fill(zero[place], 0)
            code = grid.encode(present.unsqueeze(-1), now)
            codes[start + column] = code.squeeze(-1)
            return grid.decode(code, now).squeeze(-1)

        return settle

    return begin


# Evenly spaced points, a few columns at a time


def _integers(rows: Tensor, factor: Tensor, grid: Integer, groups: _Groups, at: list[int], width: int) -> Tensor:
    """Codes ``[columns, rows]``: what `column_loop` finds, with fewer and larger steps."""
    values = rows.t().contiguous()
    values = values.clone() if values.data_ptr() == rows.data_ptr() else values
    codes = torch.empty(values.shape, dtype=torch.uint8, device=rows.device)
    inputs = len(values)
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        errors = torch.empty_like(values[start:stop])
        here = start
        while here < stop:
            groups.reached(at[here], values[here:stop])
            ends = stop if groups.ahead else min(here - here % groups.size + groups.size, stop)
            there = min(here + STEP, ends)
            steps, span = _steps(grid, groups, at[here:there], values)
            done = errors[here - start : there - start]
            rounded_columns(values[here:there], factor[here:there, here:there], *steps, *span, done, codes[here:there])
            values[there:stop].addmm_(factor[here:there, there:stop].t(), done, alpha=-1)
            here = there
        values[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return codes


def _steps(
    grid: Integer, groups: _Groups, places: list[int], like: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int]]:
    """Step, code of zero and smallest value of some columns, each ``[columns or 1, rows]``; lowest and highest code."""
    belongs = [place // groups.size for place in places]
    one = len(set(belongs)) == 1
    index = torch.tensor(belongs[:1] if one else belongs, device=like.device)

    def column(name: str, usual: float) -> Tensor:
        if name in groups.params:
            return groups.params[name].t()[index].contiguous()
        value = groups.shared.get(name, like.new_tensor(usual))
        return value.to(like.dtype).expand(1, like.shape[1]).contiguous()

    zero = column("zero_point", grid.middle if grid.symmetric else 0).to(like.dtype)
    return (column("scale", 1.0), zero, column("minimum", 0.0)), grid.ends()


def rounded_columns(
    values: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    minimum: Tensor,
    lowest: int,
    highest: int,
    errors: Tensor,
    codes: Tensor,
) -> None:
    """Round a few columns one after another, each before those after it make up for it.

    Args:
        values: ``[columns, rows]``; used up.
        factor: ``[columns, columns]``, the part of the triangular one that is theirs.
        scale, zero, minimum: ``[columns, rows]``, or ``[1, rows]`` for all columns.
        errors: ``[columns, rows]``, made.
        codes: ``[columns, rows]`` uint8, made.
    """
    if native.rounded_columns(values, factor, scale, zero, minimum, lowest, highest, errors, codes):
        return
    sizes = factor.diagonal().tolist()
    for column, size in enumerate(sizes):
        now, step, middle, low = (one[min(column, len(one) - 1)] for one in (values, scale, zero, minimum))
        code = (now - low).div_(step).round_().add_(middle).clamp_(lowest, highest)
        codes[column] = code
        torch.sub(now, code.sub_(middle).mul_(step).add_(low), out=errors[column]).div_(size)
        # Not as one operation: products are rounded before they are taken away, as in the native loop.
        values[column + 1 :].sub_(factor[column, column + 1 :, None] * errors[column])


# The factor


_kept: ContextVar[dict[str, Any] | None] = ContextVar("kept factor", default=None)


@contextmanager
def shared_factor(kept: dict[str, Any]) -> Iterator[None]:
    """Inside, the last factor is kept in ``kept``, for the next layer that has the same tensor as its Gram matrix."""
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def factored(
    gram: Tensor, *, damp: float, shrink: float, order: Order = "given", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """The triangular factor of the inverse of a Gram matrix, and the order of columns that it is in (None: as given).

    Args:
        gram: ``[in, in]``, blocks ``[in / b, b, b]`` or ``[in]``.
    """
    kept, settings = _kept.get(), (damp, shrink, order, dtype)
    if kept is not None and kept.get("gram") is gram and kept["settings"] == settings:
        return kept["found"]
    matrix = steadied(matrix_of(gram), damp=damp, shrink=shrink)
    places = None
    if order == "activation":
        # Inputs that were always zero got the mean in the steadied matrix; they come last.
        places = torch.argsort(energy_of(gram), descending=True, stable=True)
        matrix = matrix[places][:, places]
    found = (inverse_factor(matrix).to(dtype) if len(matrix) else matrix.to(dtype)), places
    if kept is not None:
        kept |= {"gram": gram, "settings": settings, "found": found}
    return found

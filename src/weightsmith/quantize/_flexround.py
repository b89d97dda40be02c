"""Divide every weight by a number of its own before it is rounded, and learn these numbers and the grid together.

A weight is moved by what it is divided with, so large weights, which matter most, may move over several points of the
grid, and small ones stay close.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._adaround import Adam, steady
from weightsmith.quantize._coded import Coded, checked_matrix, coded, fitted, row_errors, runs_of, times
from weightsmith.quantize._neighbours import reach
from weightsmith.quantize.grids import Grid, Integer, Params

LEAST, MOST = 0.25, 4.0
"""Between these stay divisors and factors of steps, so that none comes to zero or turns its sign."""


@card(
    paper="Lee, Kim, Kwon, Lee 2023, 'FlexRound: Learnable Rounding based on Element-wise Division for Post-Training "
    "Quantization'",
    covers=("flexround",),
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less on inputs that were not seen than with rounding to nearest",
    departs="errors of outputs by the Gram matrix, for all inputs at once instead of random batches; each row is "
    "measured in its own error of rounding to nearest; every row keeps the best codes that were met; divisors and "
    "factors of steps stay between 1/4 and 4; divisors of input channels are left out for convolutions as for matrices",
)
def flexround(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid = Integer(),  # noqa: B008
    steps: int = 200,
    lr: float = 0.01,
    damp: float = 0.01,
    shrink: float = 0.0,
    clip: int = 0,
) -> Coded:
    r"""Codes for a matrix, by dividing each weight before it is rounded.

    .. math:: \hat W = g_s\!\left(\frac{W}{S \odot s_3}\right), \qquad
        \frac{\partial \hat W}{\partial S} = -\frac{W}{S^2 \odot s_3}, \quad
        \frac{\partial \hat W}{\partial s} = \frac{\hat W - W / (S \odot s_3)}{s}

    from :math:`S = 1` (of each weight) and :math:`s_3 = 1` (of each row), by Adam on
    :math:`\sum_r (\hat w_r - w_r)\, H\, (\hat w_r - w_r)^\top / e_r`; gradients pass through the rounding within the
    reach of the grid. Integers give :math:`\hat W = s \operatorname{round}(W / (s\, S\, s_3))`.

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, ``[in, in]``, blocks ``[in / b, b, b]`` or ``[in]``.
        grid: the points. Steps :math:`s` learn with the rest, unless the tensor shares them or they are not stored as
            plain floats.
        steps: of Adam; each costs one product ``[out, in] x [in, in]``.
        lr: of Adam, which falls to zero along a line.
        damp: what is added to the diagonal of the Gram matrix (of each block), as a share of its mean.
        shrink: how far the Gram matrix is drawn to its diagonal, from 0 to 1.
        clip: how many narrower ranges are tried for where each group begins, by the error of its outputs.

    Returns:
        codes and parameters; by the damped Gram matrix no row is worse than rounded to nearest. Memory: the Gram matrix
        three times, then the weight ten times.

    Raises:
        Error: shapes that do not fit, NaN, or options out of their range.

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> weight = torch.tensor([[3.0, 0.45]])
    >>> flexround(weight, gram, grid=ws.quantize.grids.Integer(bits=2)).values().shape
    torch.Size([1, 2])
    """
    if steps < 1 or not lr > 0:
        raise Error(f"flexround needs a step and an lr above 0, got {steps=} and {lr=}")
    rows = checked_matrix("flexround", weight, gram)
    shared = grid.shared(rows)
    params = dict(fitted(rows, grid, gram, clip=clip, shared=shared))
    best = coded(rows, grid, params, shared)
    if not rows.numel():
        return best
    matrix = steady(gram, damp, shrink).to(rows.dtype)
    usual = least = row_errors(best.values().to(rows.dtype).sub_(rows), matrix)
    scale = 2 / torch.where(usual > 0, usual, 1)[:, None]
    divisor, of_rows = torch.ones_like(rows), torch.ones_like(rows[:, :1])
    factor = torch.ones_like(params["scale"]) if learns_steps(grid) else None
    adams = [Adam(value, lr) for value in (divisor, of_rows, factor) if value is not None]
    for step in range(steps + 1):
        now = params if factor is None else stretched(grid, params, factor)
        moved = rows / divisor / of_rows
        found = coded(moved, grid, now, shared)
        values = found.values().to(rows.dtype)
        error = values - rows
        turned = times(error, matrix)
        errors = (turned * error).sum(1)
        better = errors < least
        if bool(better.any()):
            least = torch.where(better, errors, least)
            best = better_rows(better, found, best)
        if step == steps:
            break
        for adam, slope in zip(
            adams, slopes(turned.mul_(scale), moved, values, found, divisor, of_rows, factor), strict=True
        ):
            adam.step(slope, 1 - step / steps)
            adam.value.clamp_(LEAST, MOST)
    return best


def slopes(
    gradient: Tensor, moved: Tensor, values: Tensor, found: Coded, divisor: Tensor, of_rows: Tensor,
    factor: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """By divisors, those of rows and factors of steps, of what has this gradient ``[out, in]`` by the values.

    ``moved`` are the weights after they were divided, ``found`` their codes and ``values`` what these stand for.
    """
    within = reached(moved, found.grid, found.params, found.shared)
    by_logarithm = (gradient * within).mul_(moved).neg_()
    made = [by_logarithm / divisor, by_logarithm.sum(1, keepdim=True).div_(of_rows)]
    if factor is not None:
        minimum = found.params.get("minimum")
        base = values if minimum is None else values - over_inputs(minimum, found.grid, values.shape[1])
        by_factor = torch.where(within, values - moved, base).mul_(gradient)
        made.append(summed(by_factor, found.grid).div_(factor))
    return made


def learns_steps(grid: Grid) -> bool:
    """Whether every group has a step that is stored as a plain float."""
    stored = grid.stored().get("scale")
    return stored is not None and not stored.shared and not stored.tail and stored.dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
    )  # fmt: skip


def stretched(grid: Grid, params: Params, factor: Tensor) -> dict[str, Tensor]:
    """Parameters with other steps, rounded as they are stored."""
    scale = params["scale"] * factor
    return {**params, "scale": scale.to(grid.stored()["scale"].dtype).to(scale.dtype)}


def reached(values: Tensor, grid: Grid, params: Params, shared: Params) -> Tensor:
    """True for values that are rounded, not cut off: ``[out, in]``."""
    low, high = (over_inputs(end, grid, values.shape[1]) for end in reach(values, grid, params, shared))
    return (values >= low) & (values <= high)


def over_inputs(params: Tensor, grid: Grid, inputs: int) -> Tensor:
    """What each group has, at every input: it broadcasts to ``[out, in]``."""
    if params.shape[1] == 1 or grid.group is None:
        return params
    return params.repeat_interleave(grid.group, 1)[:, :inputs]


def summed(values: Tensor, grid: Grid) -> Tensor:
    """The sums of all groups: ``[out, groups]``."""
    return torch.cat([runs.sum(-1) for runs in runs_of(values, grid.group)], 1)


def better_rows(better: Tensor, found: Coded, best: Coded) -> Coded:
    """The rows of one where they are better, else those of the other."""

    def either(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(better.reshape(-1, *[1] * (first.dim() - 1)), first, second)

    params = {name: either(value, best.params[name]) for name, value in found.params.items()}
    return Coded(either(found.codes, best.codes), params, best.grid, best.shared)

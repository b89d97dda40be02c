"""Learn for every weight whether it goes up or down.

The nearest point is best for a weight alone, not for the sum that it is part of: errors of weights whose inputs come
together may cancel. Each weight is given a slider between its two neighbours. The sliders learn what leaves the outputs
nearest, while a growing pull drives them to their ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import Coded, checked_matrix, coded, fitted, row_errors, times
from weightsmith.quantize._neighbours import neighbours
from weightsmith.quantize.grids import Grid, Integer
from weightsmith.solve import steadied

STRETCH = 0.1
"""How far the sigmoid reaches beyond 0 and 1, so that sliders come to rest at their ends."""

WARM = 0.2
"""The share of the steps before anything pulls the sliders to their ends."""


@card(
    paper="Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, 'Up or Down? Adaptive Rounding for Post-Training "
    "Quantization'",
    covers=("adaround",),
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less on inputs that were not seen than with rounding to nearest",
    departs="errors of outputs by the Gram matrix, before any activation function, of both weights on the same inputs "
    "and for all of them at once instead of random batches; each row is measured in its own error of rounding to "
    "nearest; a row that ends no better than nearest stays nearest",
)
def adaround(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid = Integer(),  # noqa: B008
    steps: int = 500,
    lr: float = 0.05,
    pull: float = 100.0,
    beta: tuple[float, float] = (20.0, 2.0),
    damp: float = 0.01,
    shrink: float = 0.0,
    clip: int = 0,
) -> Coded:
    r"""Codes for a matrix, each weight one of the two points next to it.

    .. math:: h = \operatorname{clip}(1.2\,\sigma(V) - 0.1, 0, 1), \qquad
        \hat W = \underline{W} + h \odot (\overline{W} - \underline{W})

    .. math:: \min_V \; \sum_r \Big( \frac{(\hat w_r - w_r)\, H\, (\hat w_r - w_r)^\top}{e_r}
        + \lambda \operatorname{mean}_i \big(1 - |2 h_{ri} - 1|^\beta\big) \Big)

    from :math:`\hat W = W` as nearly as the grid reaches, by Adam; :math:`e_r` is the error of row r rounded to
    nearest, and :math:`\beta` falls.

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, ``[in, in]``, blocks ``[in / b, b, b]`` or ``[in]``.
        grid: the points.
        steps: of Adam; each costs one product ``[out, in] x [in, in]``.
        lr: of Adam, which falls to zero along a line.
        pull: :math:`\lambda`, how strongly sliders are drawn to their ends.
        beta: where its exponent begins and ends, 1 or more.
        damp: what is added to the diagonal of the Gram matrix (of each block), as a share of its mean.
        shrink: how far the Gram matrix is drawn to its diagonal, from 0 to 1.
        clip: how many narrower ranges are tried for each group, by the error of its outputs.

    Returns:
        codes and parameters; by the damped Gram matrix no row is worse than rounded to nearest. Memory: the Gram matrix
        three times, then the weight ten times.

    Raises:
        Error: shapes that do not fit, NaN, or options out of their range.

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> adaround(torch.tensor([[0.4, 0.4]]), gram, grid=ws.quantize.grids.Integer(bits=2)).values().sum() > 0
    tensor(True)
    """
    if steps < 1 or not lr > 0 or not pull >= 0 or not min(beta) >= 1:
        raise Error(
            "adaround needs a step, an lr above 0, a pull of 0 or more and beta of 1 or more; got "
            f"{steps=}, {lr=}, {pull=}, {beta=}"
        )
    rows = checked_matrix("adaround", weight, gram)
    shared = grid.shared(rows)
    params = fitted(rows, grid, gram, clip=clip, shared=shared)
    near = coded(rows, grid, params, shared)
    if not rows.numel():
        return near
    matrix = steady(gram, damp, shrink).to(rows.dtype)
    around = neighbours(rows, grid, params, shared)
    apart = around.high - around.low
    usual = row_errors(near.values().to(rows.dtype).sub_(rows), matrix)
    scale = 1 / torch.where(usual > 0, usual, 1)[:, None]
    slider = inverse_slid(around.share(rows))
    adam = Adam(slider, lr)
    for step in range(steps):
        soft, slope = slid(slider)
        error = apart.mul(soft).add_(around.low).sub_(rows)
        slope = slope.mul_(apart > 0)
        gradient = times(error, matrix).mul_(apart).mul_(scale).mul_(2)
        progress = step / steps
        if progress >= WARM:
            late = (progress - WARM) / (1 - WARM)
            gradient.add_(pulled(soft, beta[0] + (beta[1] - beta[0]) * late), alpha=pull / rows.shape[1])
        adam.step(gradient.mul_(slope), 1 - progress)
    up = slid(slider)[0] > 0.5
    found = around.chosen(up)
    better = row_errors(found.values().to(rows.dtype).sub_(rows), matrix) < usual
    return Coded(torch.where(better[:, None], found.codes, near.codes), params, grid, shared)


def slid(slider: Tensor) -> tuple[Tensor, Tensor]:
    """The rectified sigmoid of each slider, and its slope."""
    sigmoid = slider.sigmoid()
    soft = sigmoid.mul(1 + 2 * STRETCH).sub_(STRETCH)
    slope = sigmoid.mul(1 - sigmoid).mul_(1 + 2 * STRETCH).mul_((soft > 0) & (soft < 1))
    return soft.clamp_(0, 1), slope


def inverse_slid(share: Tensor) -> Tensor:
    """The slider of a place between 0 and 1."""
    return share.add(STRETCH).div_(1 + 2 * STRETCH).logit_()


def pulled(soft: Tensor, beta: float) -> Tensor:
    r"""The slope of :math:`1 - |2h - 1|^\beta`."""
    out = soft.mul(2).sub_(1)
    return out.abs().pow_(beta - 1).mul_(out.sign()).mul_(-2 * beta)


def steady(gram: Tensor, damp: float, shrink: float) -> Tensor:
    """A Gram matrix of any form with something on its diagonal.

    Inputs that were always zero stand alone in it, so that their weights come to rest where they are nearest.
    """
    if gram.dim() == 3:
        return torch.stack([steadied(one, damp=damp, shrink=shrink) for one in gram])
    if gram.dim() == 1:  # a few at a time, as they are not to fill a matrix
        return torch.cat([steadied(part.diag(), damp=damp, shrink=shrink).diagonal() for part in gram.split(1024)])
    return steadied(gram, damp=damp, shrink=shrink)


class Adam:
    """Adam on one tensor, in place."""

    def __init__(self, value: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.99)):
        self.value, self.lr, self.betas = value, lr, betas
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.count = 0

    def step(self, gradient: Tensor, factor: float = 1.0) -> None:
        """One step; the gradient is used up."""
        self.count += 1
        first, second = self.betas
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        width = self.square.sqrt().div_((1 - second**self.count) ** 0.5).add_(1e-12)
        self.value.addcdiv_(self.mean, width, value=-self.lr * factor / (1 - first**self.count))

"""Go from one model to another along an arc, so that the weights keep their size on the way.

The straight line between two vectors passes nearer to zero than either, so a plain mean of models
that differ in direction is shorter than all of them. An arc keeps the length. Whatever is built of
arcs between models lies in their span: the inner products of the models tell the coefficients, and
the result is one linear combination.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.merge._parts import at_least, combined, shares, wide
from weightsmith.weights import working

_BLOCK = 2**16
"""Elements of a model that are made float64 at once."""

STRAIGHT = 1 - 1e-14
"""Above this cosine an arc and its chord are the same in float64."""


def gram(models: Tensor, base: Tensor | None = None) -> Tensor:
    """Inner products ``[k, k]`` of models, or of task vectors, in float64; additive over chunks."""
    flat = models.reshape(len(models), models[0].numel())
    origin = None if base is None else base.reshape(-1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for begin in range(0, flat.shape[1], _BLOCK):
        part = flat[:, begin : begin + _BLOCK].double()
        if origin is not None:
            part -= origin[begin : begin + _BLOCK].double()
        total.addmm_(part, part.T)
    return total


def slerp_coefficients(gram: Tensor, *, t: float = 0.5, threshold: float = 0.9995) -> Tensor:
    """``[k]``: arcs between neighbours, and again between the points on them, until one is left."""
    points = list(torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    while len(points) > 1:
        points = [_on_arc(start, stop, t, gram, threshold) for start, stop in pairwise(points)]
    return points[0]


def nuslerp_coefficients(gram: Tensor, *, weight: float | Sequence[float] | None = None) -> Tensor:
    """``[k]``: each model draws the point so far by its share of the weight so far."""
    axes = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    point, total = axes[0], 0.0
    for axis, share in zip(axes, shares(weight, len(gram), normalize=True), strict=True):
        total += share
        point = _on_arc(point, axis, _step(share, total, weight), gram, STRAIGHT) if share else point
    return point


def multislerp_coefficients(
    gram: Tensor, *, weight: float | Sequence[float] | None = None, normalize: bool = True, eps: float = 1e-8
) -> Tensor:
    """``[k]``: the weighted mean direction, at the weighted mean length."""
    given = shares(weight, len(gram), normalize)
    weights = torch.tensor(given, dtype=gram.dtype, device=gram.device)
    lengths = gram.diagonal().clamp(min=0).sqrt()
    direction = torch.where(lengths > 0, weights / lengths.clamp(min=torch.finfo(gram.dtype).tiny), 0)
    reach = _length(direction, gram)
    if reach <= eps * float(weights.abs().sum()):
        return weights
    return direction * (float(weights @ lengths) / reach)


def karcher_coefficients(gram: Tensor, *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """``[k]``: Newton-like steps on the sphere to the point with the smallest sum of squared angles."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    units = torch.diag(1 / lengths.clamp(min=torch.finfo(gram.dtype).tiny))[lengths > 0]
    if not len(units):
        return torch.full_like(lengths, 1 / len(lengths))
    mean = units.mean(dim=0)
    mean = mean / _length(mean, gram) if _length(mean, gram) >= tol else units[0]
    for _ in range(max_iter):
        tangent = torch.stack([_towards(unit, mean, gram, tol) for unit in units]).mean(dim=0)
        step = _length(tangent, gram)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / _length(mean, gram)
    return mean * lengths.mean()


def _length(point: Tensor, gram: Tensor) -> float:
    return math.sqrt(max(float(point @ gram @ point), 0.0))


def _on_arc(start: Tensor, stop: Tensor, t: float, gram: Tensor, threshold: float) -> Tensor:
    """The point at share ``t`` of the arc; all points are coefficients ``[k]`` on the models."""
    scale = _length(start, gram) * _length(stop, gram)
    cosine = min(max(float(start @ gram @ stop) / scale, -1.0), 1.0) if scale else 1.0
    if abs(cosine) > min(threshold, STRAIGHT):
        return (1 - t) * start + t * stop
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * start + math.sin(t * angle) * stop) / math.sin(angle)


def _towards(unit: Tensor, mean: Tensor, gram: Tensor, tol: float) -> Tensor:
    """The tangent at ``mean`` whose length is the angle to ``unit``. None leads to the far side of the sphere."""
    cosine = min(max(float(mean @ gram @ unit), -1.0), 1.0)
    angle = math.acos(cosine)
    if angle < tol or math.pi - angle < 1e-7:
        return torch.zeros_like(mean)
    return angle / math.sin(angle) * (unit - cosine * mean)


def _spanned(models: Tensor, coefficients: Tensor, base: Tensor | None = None) -> Tensor:
    if base is None:
        return combined(working(models), coefficients.tolist()).to(models.dtype)
    wider, origin = wide(models, base)
    return combined(wider - origin, coefficients.tolist()).add_(origin).to(models.dtype)


@card(
    paper="Shoemake 1985, 'Animating rotation with quaternion curves' (spherical linear interpolation; for more than "
    "two models its spherical Bezier curve)",
    unit="element",
    reduce=gram,
    solve=slerp_coefficients,
    laws=("agreement", "scale", "rotation"),
    claim="between two models of one length, every point has that length",
    departs="weights need not have length one: the coefficients of the arc are applied to them as they are; a tensor "
    "of zeros has no direction, so it is met on the straight line",
)
def slerp(models: Tensor, *, t: float = 0.5, threshold: float = 0.9995, solved: Tensor | None = None) -> Tensor:
    r"""The point at share ``t`` of the arc from the first model to the last.

    .. math:: w = \frac{\sin((1-t)\,\theta)}{\sin\theta}\, w_1 + \frac{\sin(t\,\theta)}{\sin\theta}\, w_2,
        \qquad \cos\theta = \frac{w_1 \cdot w_2}{|w_1|\,|w_2|}

    for each tensor as one vector. Where :math:`|\cos\theta|` is above ``threshold`` it is the straight line
    :math:`(1-t)\,w_1 + t\,w_2`. More than two models are control points of a curve: the same step between
    neighbours, repeated until one point is left.

    Args:
        models: ``[k, *shape]``, k >= 2.
        t: 0 is the first model, 1 the last; beyond them the arc goes on.
        threshold: at 1 only parallel and opposed tensors are joined by a straight line.
        solved: coefficients ``[k]``, where they were found from all chunks of the tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; coefficients in float64, applied in float32 or wider.

    Raises:
        ValueError: fewer than two models, or ``t`` or ``threshold`` is no usable number.

    >>> slerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.7071, 0.7071])
    >>> slerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), t=1 / 3)
    tensor([0.8660, 0.5000])
    """
    at_least(2, models, "slerp")
    if not math.isfinite(t):
        raise Error(f"slerp: t must be a finite number, got {t}")
    if not 0 <= threshold <= 1:
        raise Error(f"slerp: threshold is a cosine between 0 and 1, got {threshold}")
    return _spanned(models, slerp_coefficients(gram(models), t=t, threshold=threshold) if solved is None else solved)


def what_turns(
    shape: tuple[int, ...], *, flatten: bool = True, row_wise: bool = False
) -> Literal["element", "row", "tensor"]:
    """What `nuslerp` must see at once, beside the inner products."""
    if flatten or len(shape) < 2:
        return "element"
    return "tensor" if row_wise else "row"


def _turned(models: Tensor, base: Tensor | None, weight: float | Sequence[float] | None, axis: int) -> Tensor:
    """`nuslerp` of the many vectors along an axis, each with its own angle."""
    given = shares(weight, len(models), normalize=True)
    wider, *origin = wide(models) if base is None else wide(models, base)
    points = (wider - origin[0] if origin else wider).double()
    point, total = points[0], 0.0
    for other, share in zip(points, given, strict=True):
        total += share
        if share:
            point = _between(point, other, _step(share, total, weight), axis - (axis > 0))
    return (point.to(wider.dtype) + origin[0] if origin else point).to(models.dtype)


def _step(share: float, total: float, weight: float | Sequence[float] | None) -> float:
    """How far a model draws the point, with a share of the weight so far."""
    if abs(total) < 1e-12:
        raise Error(f"nuslerp: the first weights of {weight} sum to zero; put the models in another order")
    return share / total


def _between(start: Tensor, stop: Tensor, t: float, axis: int) -> Tensor:
    """The points at share ``t`` of the arcs between vectors along ``axis``."""
    scale = start.norm(dim=axis, keepdim=True) * stop.norm(dim=axis, keepdim=True)
    cosine = torch.where(scale > 0, (start * stop).sum(dim=axis, keepdim=True) / scale, 1.0).clamp(-1, 1)
    straight = cosine.abs() > STRAIGHT
    angle = torch.where(straight, 1.0, cosine).acos().where(~straight, torch.ones_like(cosine))
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    second = torch.where(straight, t, (t * angle).sin() / angle.sin())
    return first * start + second * stop


@card(
    paper="Shoemake 1985, 'Animating rotation with quaternion curves'; weights in place of a position, as in "
    "mergekit's nuslerp",
    unit="element",
    reduce=gram,
    solve=nuslerp_coefficients,
    laws=("agreement", "scale", "rotation"),
    claim="between two models of one length, every point has that length",
    unit_for=what_turns,
    departs="weights that sum to zero are refused where mergekit takes the middle; vectors of zeros are met on the "
    "straight line; more than two models are taken",
)
def nuslerp(
    models: Tensor,
    base: Tensor | None = None,
    *,
    weight: float | Sequence[float] | None = None,
    flatten: bool = True,
    row_wise: bool = False,
    solved: Tensor | None = None,
) -> Tensor:
    r"""Arcs between models by weights: :func:`slerp` with :math:`t = a_2 / (a_1 + a_2)`.

    .. math:: p_1 = w_1, \qquad p_i = \mathrm{slerp}\Big(p_{i-1}, w_i;\ t = \frac{a_i}{a_1 + \dots + a_i}\Big)

    with :math:`a_i` the ``weight`` of model :math:`i`; the result is :math:`p_k`. With more than two models the
    order matters a little. With a base the arcs are between task vectors, :math:`w_i - w_0`, and :math:`w_0` is added.

    Args:
        models: ``[k, *shape]``, k >= 2.
        base: ``[*shape]``, the point around which the arcs go; the origin by default.
        weight: one number for each model; all equal by default.
        flatten: a tensor is one vector; else it is many, along its last axis.
        row_wise: where it is not flattened, along its first axis (mergekit's ``nuslerp_row_wise``).
        solved: coefficients ``[k]``, where they were found from all chunks of the tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; coefficients in float64, applied in float32 or wider.

    Raises:
        ValueError: fewer than two models, a wrong number of weights, or weights that sum to zero.

    >>> nuslerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), weight=[2, 1])
    tensor([0.8660, 0.5000])
    """
    at_least(2, models, "nuslerp")
    if not flatten and models.dim() > 2:
        return _turned(models, base, weight, 1 if row_wise else -1)
    if solved is None:
        solved = nuslerp_coefficients(gram(models, base), weight=weight)
    return _spanned(models, solved, base)


@card(
    paper="Goddard 2025, 'Multi-SLERP' (mergekit's multislerp)",
    unit="element",
    reduce=gram,
    solve=multislerp_coefficients,
    laws=("model_order", "agreement", "scale", "rotation"),
    claim="as long as the models are on average",
    departs="the step out to the tangent plane and back is left out: at the weighted mean direction the weighted sum "
    "of tangents is zero, so it never moves anything; where the directions cancel the result is the weighted mean for "
    "any number of models; eps is relative",
)
def multislerp(
    models: Tensor,
    base: Tensor | None = None,
    *,
    weight: float | Sequence[float] | None = None,
    normalize: bool = True,
    eps: float = 1e-8,
    solved: Tensor | None = None,
) -> Tensor:
    r"""The weighted mean direction of models, at their weighted mean length.

    .. math:: w = \Big(\sum_i a_i |w_i|\Big) \frac{m}{|m|}, \qquad m = \sum_i a_i \frac{w_i}{|w_i|}

    With a base this is done to the task vectors, :math:`w_i - w_0`, and :math:`w_0` is added.

    Args:
        models: ``[k, *shape]``, k >= 1.
        base: ``[*shape]``, what the directions are seen from; the origin by default.
        weight: one number :math:`a_i` for each model; all equal by default.
        normalize: divide the weights by their sum first.
        eps: directions cancel where :math:`|m|` is not above this share of :math:`\sum_i |a_i|`; the result is
            then :math:`\sum_i a_i w_i`.
        solved: coefficients ``[k]``, where they were found from all chunks of the tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; coefficients in float64, applied in float32 or wider.

    Raises:
        ValueError: no model, a wrong number of weights, or weights that are not finite or sum to zero.

    >>> multislerp(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    tensor([2.1213, 2.1213])
    """
    at_least(1, models, "multislerp")
    if solved is None:
        solved = multislerp_coefficients(gram(models, base), weight=weight, normalize=normalize, eps=eps)
    return _spanned(models, solved, base)


@card(
    paper="Karcher 1977, 'Riemannian center of mass and mollifier smoothing', on the sphere of directions",
    unit="element",
    reduce=gram,
    solve=karcher_coefficients,
    laws=("model_order", "agreement", "scale", "rotation"),
    claim="no other direction has a smaller sum of squared angles to the models",
    departs="weights need not have length one: directions are averaged, and the result has the mean length; only "
    "tensors of zeros are left out of the directions, where mergekit leaves out all that are shorter than tol",
)
def karcher(models: Tensor, *, max_iter: int = 10, tol: float = 1e-5, solved: Tensor | None = None) -> Tensor:
    r"""The direction in the middle of the models' directions, at their mean length.

    .. math:: w = \frac{1}{k} \sum_i |w_i| \cdot \arg\min_{|u| = 1} \sum_i \angle(u, w_i)^2

    found by moving ``u`` along the mean of the tangents that lead to the models.

    Args:
        models: ``[k, *shape]``, k >= 1.
        max_iter: steps at most; three or four are the rule.
        tol: a step shorter than this angle, in radians, is the last.
        solved: coefficients ``[k]``, where they were found from all chunks of the tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; coefficients in float64, applied in float32 or wider.

    Raises:
        ValueError: no model, a negative number of steps, or a ``tol`` that is not positive.

    >>> karcher(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    tensor([2.1213, 2.1213])
    """
    at_least(1, models, "karcher")
    if max_iter < 0:
        raise Error(f"karcher: max_iter must not be negative, got {max_iter}")
    if not tol > 0:
        raise Error(f"karcher: tol must be positive, got {tol}")
    return _spanned(
        models, karcher_coefficients(gram(models), max_iter=max_iter, tol=tol) if solved is None else solved
    )

"""Directions in weight space: random ones that fit the network's scale, and those that checkpoints lie along.

A network with ReLUs or batch norm computes the same after one layer is doubled and the next halved, so the
length of a plain random direction says nothing. Filter by filter, a direction is therefore given the norm of
the weights that it moves. A direction is `Weights`, so it can be added, scaled, selected from and saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.weights import Pattern, Weights, open, same_names, working, working_dtype

Scale = Literal["filter", "layer", "weight", "none"]
Vectors = Literal["zero", "scaled"]


@card(
    paper="Li, Xu, Taylor, Studer, Goldstein 2018, 'Visualizing the Loss Landscape of Neural Nets'",
    covers=("loss-landscape",),
    unit="model",
    claim="curves along it do not change when a layer is scaled without changing the function",
)
def random_direction(
    model: nn.Module | Weights | Any,
    *,
    seed: int = 0,
    scale: Scale = "filter",
    vectors: Vectors = "zero",
    pattern: Pattern = "*",
) -> Weights:
    r"""A Gaussian direction whose filters are as long as those of the weights.

    .. math:: d_{ij} \leftarrow \frac{\lVert \theta_{ij} \rVert}{\lVert d_{ij} \rVert}\, d_{ij}

    with :math:`\theta_{ij}` the j-th filter of layer i: a slice of the first axis.

    Args:
        model: a module (its parameters), or weights (all that are floating).
        seed: of the direction.
        scale: what is given the norm of the weights: each ``"filter"``, each ``"layer"`` (tensor), each single
            ``"weight"`` (the direction is multiplied by its size), or ``"none"``: a plain Gaussian.
        vectors: tensors of one axis or none, which are biases and the parameters of norms: ``"zero"`` they stay,
            or ``"scaled"`` they move as one filter each. With ``scale="none"`` they move as all others do.
        pattern: names that move; the others stay.

    Returns:
        Weights: ``[*shape]`` for each name, float32 (float64 for such). Tied tensors have one direction.

    Raises:
        ValueError: no tensor that fits, or options that there are not.

    >>> found = random_direction({"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "b": torch.ones(2)})["w"]
    >>> round(float(found[0].norm()), 4), float(found[1].norm())
    (5.0, 0.0)
    """
    for name, value, known in (("scale", scale, Scale), ("vectors", vectors, Vectors)):
        if value not in get_args(known):
            raise Error(f"{name} is one of {', '.join(get_args(known))}; got {value!r}")
    weights = _floating(model)
    chosen = set(weights.names(pattern))
    if not chosen:
        raise Error(f"no floating tensor fits {pattern!r}")
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name in weights:
        tied = weights.ties.get(name)
        if tied is not None:
            made[name] = made[tied]
            continue
        weight = working(weights[name].detach())
        drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        # All are drawn, so that what one tensor gets does not hang on the pattern.
        made[name] = _scaled(drawn, weight, scale, vectors) if name in chosen else torch.zeros_like(drawn)
    return Weights.of(made)


def _floating(model: Any) -> Weights:
    if isinstance(model, nn.Module):
        return Weights.of(dict(model.named_parameters(remove_duplicate=False))).select(floating=True)
    return open(model).select(floating=True)


def _scaled(drawn: Tensor, weight: Tensor, scale: Scale, vectors: Vectors) -> Tensor:
    if scale == "none":
        return drawn
    if weight.dim() < 2 and vectors == "zero":
        return torch.zeros_like(drawn)
    if scale == "weight":
        return drawn * weight.abs()
    rows = weight.dim() >= 2 and scale == "filter"
    wanted, given = (t.flatten(1) if rows else t.reshape(1, -1) for t in (weight, drawn))
    lengths = torch.linalg.vector_norm(given, dim=1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
    return (given * (torch.linalg.vector_norm(wanted, dim=1, keepdim=True) / lengths)).reshape(weight.shape)


@card(
    paper="Goodfellow, Vinyals, Saxe 2015, 'Qualitatively characterizing neural network optimization problems'",
    covers=("loss-landscape",),
    unit="model",
    claim="the first checkpoint plus once the direction is the second",
)
def between(first: Any, second: Any) -> Weights:
    r"""The direction from one checkpoint to another, :math:`\theta_b - \theta_a`.

    Args:
        first, second: checkpoints of the same tensors. Floating buffers (the running statistics of batch norm)
            are part of the direction; leave them out with ``.drop("*running*")``.

    Returns:
        Weights: lazy, float32 (float64 for such).

    >>> between({"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])})["w"]
    tensor([2.])
    """
    a, b = (_wide(open(one)) for one in (first, second))
    same_names(a, b, "a direction needs two checkpoints of the same tensors")
    return b - a


def _wide(weights: Weights) -> Weights:
    floats = weights.select(floating=True)
    return floats.cast(lambda name: working_dtype(floats.spec(name).dtype))


def inner(first: Weights, second: Weights) -> float:
    """The inner product of two directions, over all tensors; tied ones count once.

    >>> inner(Weights.of({"w": torch.ones(2)}), Weights.of({"w": torch.tensor([2.0, 3.0])}))
    5.0
    """
    same_names(first, second, "an inner product needs two directions of the same tensors")
    ties = first.ties
    return sum(float((first[n].double() * second[n].double()).sum()) for n in first if n not in ties)


def length(direction: Weights) -> float:
    """The norm of a direction, over all tensors."""
    return inner(direction, direction) ** 0.5


@dataclass(frozen=True)
class Principal:
    """The plane, or what has more axes, that a trajectory lies nearest to."""

    origin: Weights
    """The last checkpoint."""
    directions: tuple[Weights, ...]
    """Orthonormal, the most telling first; lazy."""
    coordinates: tuple[tuple[float, ...], ...]
    """Of each checkpoint, from the last; ``[checkpoints, directions]``."""
    explained: tuple[float, ...]
    """Share of the variance of the checkpoints along each direction."""

    def report(self) -> Report:
        """The coordinates of the checkpoints as a table and a drawing."""
        axes = [f"direction {i + 1}" for i in range(len(self.directions))]
        rows = [
            {"checkpoint": i} | dict(zip(axes, row, strict=True)) | {"distance": sum(x * x for x in row) ** 0.5}
            for i, row in enumerate(self.coordinates)
        ]
        plots = []
        if len(axes) > 1:
            xs, ys = ([row[i] for row in self.coordinates] for i in (0, 1))
            plots.append(Plot("trajectory", axes[0], axes[1], [Line("checkpoints", xs, ys)]))
        shares = {f"explained by {axis}": share for axis, share in zip(axes, self.explained, strict=True)}
        return Report("Principal directions of a trajectory", shares, rows, plots)


@card(
    paper="Li, Xu, Taylor, Studer, Goldstein 2018, 'Visualizing the Loss Landscape of Neural Nets'",
    covers=("loss-landscape",),
    unit="model",
    claim="no other plane through the mean of the checkpoints lies nearer to them",
    departs="the last checkpoint, from which the others are measured, counts as well",
)
def principal(checkpoints: Sequence[Any], *, count: int = 2, pattern: Pattern = "*") -> Principal:
    r"""The principal directions of a trajectory of checkpoints.

    .. math:: M = [\theta_0 - \theta_n; \dots; \theta_{n-1} - \theta_n; 0], \qquad
        (M - \bar M)(M - \bar M)^\top = U \Lambda U^\top, \qquad d_i = (M - \bar M)^\top u_i / \sqrt{\lambda_i}

    Only the small matrix of inner products is decomposed; the directions are combinations of the checkpoints.

    Args:
        checkpoints: at least ``count + 1``, in the order of training; one tensor of all is in memory at a time.
        count: how many directions.
        pattern: names of the tensors that count.

    Returns:
        Principal: directions as lazy `Weights`, and where each checkpoint lies.

    Raises:
        ValueError: too few checkpoints, of different tensors, or ones that span fewer directions.

    >>> found = principal([{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}, {"w": torch.zeros(2)}])
    >>> round(sum(found.explained), 6), len(found.coordinates)
    (1.0, 3)
    """
    if count < 1 or len(checkpoints) < count + 1:
        raise Error(f"{count} principal directions need at least {count + 1} checkpoints, got {len(checkpoints)}")
    runs = [_wide(open(one)).select(pattern) for one in checkpoints]
    for run in runs[1:]:
        same_names(runs[0], run, "a trajectory needs checkpoints of the same tensors")
    ties = runs[0].ties
    gram = torch.zeros(len(runs), len(runs), dtype=torch.float64)
    for name in runs[0]:
        if name not in ties:
            rows = torch.stack([run[name].double().reshape(-1) for run in runs])
            rows -= rows[-1].clone()
            gram += (rows @ rows.T).cpu()
    if not gram.isfinite().all():
        raise Error("a trajectory needs finite checkpoints; some hold NaN or infinite values")
    middle = torch.eye(len(runs), dtype=torch.float64) - 1 / len(runs)
    values, vectors = torch.linalg.eigh(middle @ gram @ middle)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(values.sum())
    if not total or float(values[count - 1]) <= 1e-12 * total:
        raise Error(f"the {len(runs)} checkpoints span fewer than {count} directions; ask for fewer with count=")
    amounts = middle @ vectors[:, :count] / values[:count].sqrt()
    amounts *= torch.where(amounts[0] < amounts[-1], -1.0, 1.0)  # a run comes from the right
    directions = tuple(_combined(runs, column.tolist()) for column in amounts.T)
    return Principal(
        open(checkpoints[-1]),
        directions,
        tuple(tuple(row) for row in (gram @ amounts).tolist()),
        tuple((values[:count] / total).tolist()),
    )


def _combined(runs: Sequence[Weights], amounts: Sequence[float]) -> Weights:
    """The combination of checkpoints, whose amounts sum to zero, from their differences to the last."""
    total = amounts[0] * (runs[0] - runs[-1])
    for run, amount in zip(runs[1:-1], amounts[1:-1], strict=True):
        total = total + amount * (run - runs[-1])
    return total

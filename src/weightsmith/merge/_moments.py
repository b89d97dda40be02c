"""Averaging makes weights smaller; give each tensor back the spread that it had in the models.

What the models disagree on cancels in their mean: of k unrelated models the mean has a k-th of the variance,
and signals that pass through such layers die away. So every tensor is shifted and scaled until its mean and
its variance are again those of the models, on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.merge._parts import learned, shares
from weightsmith.merge.room import Source, check_alike, opened_models
from weightsmith.weights import (
    Inputs,
    Lazy,
    Pattern,
    PerTensor,
    Reduction,
    Stack,
    Weights,
    apply,
    open,
    resolve,
    single,
)

Line = tuple[Tensor, Tensor]
"""A factor and what is added, by which a tensor gets its new moments."""


def power_sums(merged: Tensor, models: Tensor) -> tuple[Tensor, Tensor]:
    """Elements a tensor, and the sums ``[k + 1, 2]`` of values and of squares: merged first, then the models."""
    values = torch.cat([merged.reshape(1, -1), models.reshape(len(models), -1)]).double()
    return torch.tensor(merged.numel()), torch.stack([values.sum(1), values.square().sum(1)], 1)


def line_of_sums(weight: Sequence[float], sums: tuple[Tensor, Tensor]) -> Line:
    """The line that gives the merged tensor the moments of the models."""
    count, powers = sums
    mean, square = (powers / count.clamp(min=1)).unbind(1)
    return line(mean, square - mean.square(), weight)


def line(mean: Tensor, variance: Tensor, weight: Sequence[float]) -> Line:
    """From moments ``[k + 1, ...]``, merged first. Where the merged values are all the same they are only shifted."""
    if not (mean.isfinite().all() and variance.isfinite().all()):
        raise Error("match_moments: the merge or a model holds NaN or infinity; weightsmith.inspect.verify finds where")
    given = mean.new_tensor(weight).reshape(-1, *[1] * (mean.dim() - 1))
    target_mean, target_variance = ((given * value[1:]).sum(0) for value in (mean, variance.clamp(min=0)))
    # What is left of the variance of equal values is rounding, and must not be blown up.
    own, noise = variance[0], 1e-12 * mean[0].square()
    factor = torch.where(own > noise, (target_variance / own.clamp(min=torch.finfo(own.dtype).tiny)).sqrt(), 1.0)
    return factor, target_mean - factor * mean[0]


@card(
    paper="Tian, Al-Ars, Kitsak, Hofstee 2024, 'Vanishing Variance Problem in Fully Decentralized Neural-Network "
    "Systems'",
    covers=("vanishing-variance-problem-fully",),
    unit="model",
    reduce=power_sums,
    solve=line_of_sums,
    claim="nodes with unrelated starts that average their weights with their neighbours learn faster",
    departs="the mean is matched as well as the variance: after a plain mean it is the same, after other merges not",
)
def match_moments(
    merged: Source,
    models: Sequence[Source],
    *,
    weight: PerTensor[float | Sequence[float]] | None = None,
    rows: PerTensor[bool] = False,
    pattern: Pattern = "*",
) -> Weights:
    r"""A merge whose tensors have the mean and the variance that the models' tensors have on average.

    .. math:: w' = \sum_i a_i \mu_i + \sqrt{\frac{\sum_i a_i \sigma_i^2}{\sigma^2}}\,(w - \mu), \qquad \sum_i a_i = 1

    with :math:`\mu, \sigma^2` of the merged tensor and :math:`\mu_i, \sigma_i^2` of model :math:`i`'s. A tensor
    whose elements are all the same (to float32's rounding) is only shifted.

    Args:
        merged: what came of a merge of the models; anything that `weightsmith.open` opens.
        models: k >= 1 models of the same architecture.
        weight: :math:`a_i`, one number >= 0 for each model; all equal by default. May differ by tensor.
        rows: match every row (index of the first axis) by itself. May differ by tensor.
        pattern: which tensors; by default all that hold floats but the running statistics of batch norm, which
            are to be estimated anew (`weightsmith.stats.batch_norm`).

    Returns:
        Weights: lazy, in the dtypes of ``merged``; moments are summed in float64.

    Raises:
        ValueError: no model, models of another architecture, negative weights, or a pattern that fits nothing; when
            computed, NaN or infinity.

    >>> a, b = ({"w": torch.tensor(x)} for x in ([1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]))
    >>> ws.merge.mean([a, b])["w"]                                  # half the variance
    tensor([ 1.,  0.,  0., -1.])
    >>> match_moments(ws.merge.mean([a, b]), [a, b])["w"]
    tensor([ 1.4142,  0.0000,  0.0000, -1.4142])
    """
    own, opened = open(merged), opened_models(models, "match_moments")
    check_alike([*opened, own], None, "match_moments")
    names = learned(own, pattern, "match_moments")
    given = resolve(weight, names, "weight")
    by_row = resolve(rows, names, "rows")
    shared = {name: _shared(given[name], len(opened), name) for name in names}

    def build(name: str, node: Lazy, *members: Lazy) -> Lazy:
        if name not in shared:
            return node
        arguments = (node, Stack(members))
        if by_row[name] and node.spec.shape:
            return apply(_matched_rows, *arguments, unit="row", spec=node.spec, options={"weight": shared[name]})
        solver = partial(single, power_sums, partial(line_of_sums, shared[name]))
        reduction = Reduction([Inputs(arguments, "element")], solver)
        return apply(_matched, *arguments, spec=node.spec, reduction=reduction)

    def apart(name: str) -> object:
        return shared.get(name), by_row.get(name)

    options = {"weight": weight, "rows": rows}
    return own.zip_nodes(build, tuple(opened), "merge.match_moments", options, apart)


def _shared(weight: float | Sequence[float] | None, count: int, name: str) -> tuple[float, ...]:
    given = shares(weight, count, normalize=True)
    if min(given) < 0:
        raise Error(f"match_moments needs weights that are not negative, got {weight} for {name}")
    return tuple(given)


def _matched(merged: Tensor, models: Tensor, *, solved: Line) -> Tensor:
    factor, shift = solved
    return (merged.double() * factor + shift).to(merged.dtype)


def _matched_rows(merged: Tensor, models: Tensor, *, weight: Sequence[float]) -> Tensor:
    rows, width = len(merged), merged.numel() // max(len(merged), 1)
    values = torch.cat([merged.unsqueeze(0), models]).double().reshape(len(models) + 1, rows, width)
    if not width:
        return merged.clone()
    factor, shift = line(values.mean(2), values.var(2, correction=0), weight)
    return (values[0] * factor[:, None] + shift[:, None]).to(merged.dtype).reshape(merged.shape)

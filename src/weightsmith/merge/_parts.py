"""Steps that merging methods share; they know no paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean
from weightsmith.weights import Pattern, Weights, matches, promote, working_dtype


def at_least(count: int, models: Tensor, method: str) -> None:
    """An error unless there are ``count`` models."""
    if len(models) < count:
        raise Error(f"{method} needs at least {count} model{'s' * (count > 1)}, got {len(models)}")


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype that is wide enough to compute in: float32, or float64 if one of them is."""
    dtype = promote(*(working_dtype(tensor.dtype) for tensor in tensors))
    return tuple(tensor.to(dtype) for tensor in tensors)


def shares(weight: float | Sequence[float] | None, count: int, normalize: bool) -> list[float]:
    """One coefficient a model; with ``normalize`` they sum to one."""
    if weight is None or isinstance(weight, int | float):
        given = [1.0 if weight is None else float(weight)] * count
    else:
        given = [float(value) for value in weight]
    if len(given) != count:
        raise Error(f"weight needs one number for each of the {count} models, got {len(given)}")
    if not all(map(math.isfinite, given)):
        raise Error(f"the weights {given} are not all finite")
    if not normalize:
        return given
    total = sum(given)
    if abs(total) < 1e-12 * max(map(abs, given), default=1.0) or total == 0:
        raise Error(f"the weights {given} sum to zero, so they cannot be normalized; pass normalize=False")
    return [value / total for value in given]


def learned(weights: Weights, pattern: Pattern, method: str) -> list[str]:
    """The tensors with floats that a pattern names, without batch norm's running statistics; an error if none."""
    able = [n for n in weights.names(floating=True) if not n.endswith(("running_mean", "running_var"))]
    names = [name for name in able if matches(pattern, name)]
    if not names:
        raise Error(f"{method}: no tensor with floats fits pattern={pattern!r}{did_you_mean(str(pattern), able)}")
    return names


def combined(models: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``sum_i coefficients[i] * models[i]``: ``[k, *shape]`` to ``[*shape]``, in one accumulator."""
    total = models[0] * coefficients[0]
    for model, coefficient in zip(models[1:], coefficients[1:], strict=True):
        total.add_(model, alpha=coefficient)
    return total


def delta_gram(models: Tensor, base: Tensor) -> Tensor:
    """Inner products ``[k, k]`` of the differences ``models - base``; additive over chunks."""
    models, base = wide(models, base)
    deltas = (models - base).reshape(len(models), base.numel())
    return (deltas @ deltas.T).double()


def mean_pairwise_cosine(gram: Tensor) -> Tensor:
    """The mean cosine between different vectors, from their inner products ``[k, k]``.

    A vector of no length has no direction; its cosines count as 0.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(lengths, lengths)
    cosines = torch.where(scale > 0, gram / scale.clamp(min=torch.finfo(gram.dtype).tiny), torch.zeros_like(gram))
    upper = torch.triu_indices(len(gram), len(gram), offset=1)
    return cosines[upper[0], upper[1]].mean().clamp(-1, 1)

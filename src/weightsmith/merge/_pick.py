"""Take each weight from the base or from a fine-tune, by what changed and by how much.

A fine-tune changes few weights for a reason and many by noise. These methods pick: those that are
near already, those that matter, those on which the models agree or that only one of them touched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.merge._parts import at_least, wide


@card(
    paper="alchemonaut 2024, 'QuartetAnemoi-70B-t0.0001' (NearSwap)",
    needs=("base",),
    unit="element",
    laws=("translation",),
    claim="no weight moves from the base by more than t for each model",
    departs="without the floor of 1e-6 that mergekit puts under differences, which matters for a smaller t only",
)
def nearswap(models: Tensor, base: Tensor, *, t: float = 1e-4) -> Tensor:
    r"""The base, with every weight moved towards the model by at most ``t``.

    .. math:: w = w_0 + \min(\max(w_1 - w_0, -t), t)

    So weights that differ by less than ``t`` are swapped for the model's. Several models are taken in turn, each
    from where the last one led.

    Args:
        models: ``[k, *shape]``, k >= 1.
        base: ``[*shape]``.
        t: the largest move, in the unit of the weights.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, or ``t`` is negative or not finite.

    >>> nearswap(torch.tensor([[1.05, 2.0, -3.0]]), torch.ones(3), t=0.1)
    tensor([1.0500, 1.1000, 0.9000])
    """
    at_least(1, models, "nearswap")
    if not (math.isfinite(t) and t >= 0):
        raise Error(f"nearswap: t must be a finite number of at least 0, got {t}")
    wider, merged = wide(models, base)
    for model in wider:
        merged = torch.clamp(model, merged - t, merged + t)
    return merged.to(models.dtype)


@card(
    paper="Wan et al. 2024, 'FuseChat: Knowledge fusion of chat models' (SCE: select, calculate, erase)",
    needs=("base",),
    unit="tensor",
    laws=("model_order", "agreement", "translation", "scale"),
    claim="models that changed a tensor more have more say in it",
    departs="no absolute floors (1e-6 in mergekit): a tensor that all models changed little is weighted like any "
    "other, and a weight that one model alone may decide is not shrunk; among equal variances the first are selected",
)
def sce(models: Tensor, base: Tensor, *, select_topk: float = 1.0) -> Tensor:
    r"""Task vectors weighted by their squared size, where their sign is that of the sum.

    .. math:: w = w_0 + \frac{\sum_i m_i\, a_i\, d_i}{\sum_i m_i\, a_i}, \qquad a_i = \sum d_i^2

    with :math:`m_i` 1 where :math:`d_i` has the sign of :math:`\sum_j d_j` and else 0, and
    :math:`d_i = w_i - w_0` set to zero outside the share ``select_topk`` of the weights on which the models
    vary most (counted among those on which they vary at all).

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        select_topk: share of the varying weights that is kept; 1 keeps all weights, varying or not.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, or ``select_topk`` is not between 0 and 1.

    >>> sce(torch.tensor([[3.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]), torch.zeros(3))   # a = 10 and 2
    tensor([3., 0., 1.])
    """
    at_least(1, models, "sce")
    if not 0 <= select_topk <= 1:
        raise Error(f"sce: select_topk is a share between 0 and 1, got {select_topk}")
    wider, start = wide(models, base)
    deltas = (wider - start).flatten(1) if start.dim() else (wider - start).unsqueeze(1)
    if select_topk < 1:
        deltas = deltas * _varying_most(deltas, select_topk)
    agreeing = deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1, -1)
    weights = deltas.double().square().sum(dim=1).to(deltas.dtype)
    say = agreeing * (weights / weights.sum()).nan_to_num().unsqueeze(1)
    total = say.sum(dim=0)
    change = (say * deltas).sum(dim=0) / torch.where(total > 0, total, 1)
    return (start + change.reshape(start.shape)).to(models.dtype)


def _varying_most(deltas: Tensor, share: float) -> Tensor:
    """Where the variance over ``[k, n]`` is among the largest; the first of equal ones."""
    variance = deltas.var(dim=0, correction=0)
    count = int(int(variance.count_nonzero()) * share)
    mask = torch.zeros_like(variance)
    mask[variance.argsort(stable=True, descending=True)[:count]] = 1
    return mask


@card(
    paper="Yuan et al. 2026, 'Behavior Knowledge Merge in Reinforced Agentic Models' (RAM)",
    needs=("base",),
    unit="element",
    laws=("model_order", "translation"),
    claim="what one model alone has learnt is not diluted by the others",
)
def ram(models: Tensor, base: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    r"""The mean of those models that changed a weight; the base where none did.

    .. math:: w = w_0 + \frac{\sum_i m_i\, d_i}{\max(1, \sum_i m_i)}, \qquad m_i = [\,|d_i| > \epsilon\,]

    with :math:`d_i = w_i - w_0`. Made for fine-tunes by reinforcement, which change few weights.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        epsilon: a change up to this counts as none.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, or a negative ``epsilon``.

    >>> ram(torch.tensor([[1.0, 4.0, 0.0], [0.0, 2.0, 0.0]]), torch.zeros(3))
    tensor([1., 3., 0.])
    """
    at_least(1, models, "ram")
    if not epsilon >= 0:
        raise Error(f"ram: epsilon must be at least 0, got {epsilon}")
    wider, start = wide(models, base)
    deltas = wider - start
    changed = deltas.abs() > epsilon
    return (start + (deltas * changed).sum(dim=0) / changed.sum(dim=0).clamp(min=1)).to(models.dtype)


@card(
    paper="Arcee 2024, 'Arcee Fusion' (mergekit's arcee_fusion)",
    needs=("base",),
    unit="tensor",
    claim="takes over the changes that stand out, and leaves the rest of the base alone",
    departs="the quartiles are exact on tensors of any size, not of a random million; divergences are computed in "
    "float64 without a floor: in float32 those of a fine-tune from its base drown in rounding",
)
def arcee_fusion(models: Tensor, base: Tensor) -> Tensor:
    r"""The base, with those weights of the model whose change stands out.

    .. math:: s = |w_1 - w_0| \cdot \mathrm{KL}(\mathrm{softmax}(w_1), \mathrm{softmax}(w_0))

    and :math:`w = w_1` where :math:`s \ge q_2 + \frac{3}{2} (q_3 - q_1)`, else :math:`w_0`.
    The softmax and the divergence are over the last axis; :math:`q_1, q_2, q_3` are the quartiles of :math:`s` in the
    tensor. Several models are taken in turn, each fused into what the last one left.

    Args:
        models: ``[k, *shape]``, k >= 1.
        base: ``[*shape]``.

    Returns:
        ``[*shape]``, in the dtype of ``models``; every element is one of the model's or of the base's.

    Raises:
        ValueError: no model.

    >>> base = torch.zeros(1, 8)
    >>> arcee_fusion(torch.tensor([[[0.1, 0.2, 0.1, 0.2, 5.0, 0.1, 0.2, 0.1]]]), base)
    tensor([[0., 0., 0., 0., 5., 0., 0., 0.]])
    """
    at_least(1, models, "arcee_fusion")
    wider, merged = wide(models, base)
    for model in wider if merged.numel() else ():
        score = (model - merged).abs() * _divergence(model, merged)
        ordered = score.flatten().sort().values
        first, middle, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
        merged = torch.where(score >= middle + 1.5 * (third - first), model, merged)
    return merged.to(models.dtype, copy=True)


def _divergence(model: Tensor, base: Tensor) -> Tensor:
    """KL of the softmax of ``model`` from that of ``base`` along the last axis: ``[..., 1]``, float64."""
    new, old = (values.double().contiguous().log_softmax(dim=-1) for values in (model, base))
    found = (new.exp() * (new - old)).sum(dim=-1, keepdim=base.dim() > 0)
    return found.clamp(min=0)

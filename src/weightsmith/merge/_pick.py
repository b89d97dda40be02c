"""Take each weight from the base or from a fine-tune, by what changed and by how much.

A fine-tune changes few weights for a reason and many by noise. These methods pick: those that are
near already, those that matter, those on which the models agree or that only one of them touched.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.merge._parts import at_least, combined, wide
from weightsmith.solve import EVERYTHING, Cut, cuts_at, kept
from weightsmith.weights import Pass, in_memory, working


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
    return _not_hidden(wider, merged).to(models.dtype)


def _not_hidden(models: Tensor, merged: Tensor) -> Tensor:
    """A choice among numbers would leave out what is none, and nobody would learn that a model is spoilt."""
    for model in models:
        merged = torch.where(model.isfinite(), merged, model)
    return merged


@dataclass(frozen=True)
class Say:
    """What `sce` must know of a tensor: which weights are selected, and the squared sizes of the task vectors."""

    cut: Cut
    sizes: list[float]


def say_by_size(*, select_topk: float = 1.0) -> Generator[Pass, Any, Say]:
    """The share of the varying weights that vary most, and the squared sizes of what is left of the task vectors."""
    cut = EVERYTHING
    if select_topk < 1:
        count = int(int((yield Pass(_varying))) * select_topk)
        (cut,) = yield from cuts_at(_variances, partial(_of_one_row, count), positive=True)
    return Say(cut, (yield Pass(partial(_sizes, cut=cut))).tolist())


def _of_one_row(count: int, rows: int, total: int) -> list[int]:
    return [count]


def _deltas(models: Tensor, base: Tensor) -> Tensor:
    wider, start = wide(models, base)
    return (wider - start).reshape(len(models), base.numel())


def _variance(deltas: Tensor) -> Tensor:
    """``[k, n]`` to ``[n]``, row after row: the rounding of an element does not depend on its neighbours."""
    mean = combined(deltas, [1.0] * len(deltas)).div_(len(deltas))
    return combined((deltas - mean).square_(), [1.0] * len(deltas)).div_(len(deltas))


def _variances(models: Tensor, base: Tensor) -> Tensor:
    return _variance(_deltas(models, base)).unsqueeze(0)


def _varying(models: Tensor, base: Tensor) -> Tensor:
    return _variance(_deltas(models, base)).count_nonzero()


def _selected(deltas: Tensor, cut: Cut, start: int) -> Tensor:
    return deltas if cut == EVERYTHING else deltas.mul_(kept(_variance(deltas), cut, start))


def _sizes(models: Tensor, base: Tensor, *, cut: Cut, start: int) -> Tensor:
    return _selected(_deltas(models, base), cut, start).double().square_().sum(dim=1)


@card(
    paper="Wan et al. 2024, 'FuseChat: Knowledge fusion of chat models' (SCE: select, calculate, erase)",
    needs=("base",),
    unit="element",
    solve=say_by_size,
    laws=("model_order", "agreement", "translation", "scale"),
    claim="models that changed a tensor more have more say in it",
    departs="no absolute floors (1e-6 in mergekit): a tensor that all models changed little is weighted like any "
    "other, and a weight that one model alone may decide is not shrunk; among equal variances the first are selected",
)
def sce(models: Tensor, base: Tensor, *, select_topk: float = 1.0, solved: Say | None = None, start: int = 0) -> Tensor:
    r"""Task vectors weighted by their squared size, where their sign is that of the sum.

    .. math:: w = w_0 + \frac{\sum_i m_i\, a_i\, d_i}{\sum_i m_i\, a_i}, \qquad a_i = \sum d_i^2

    with :math:`m_i` 1 where :math:`d_i` has the sign of :math:`\sum_j d_j` and else 0, and
    :math:`d_i = w_i - w_0` set to zero outside the share ``select_topk`` of the weights on which the models
    vary most (counted among those on which they vary at all).

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        select_topk: share of the varying weights that is kept; 1 keeps all weights, varying or not.
        solved: the selection and the :math:`a_i`, where they were found from all chunks of the tensor.
        start: index of the first element in its tensor.

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
    say = in_memory(say_by_size(select_topk=select_topk), models, base) if solved is None else solved
    origin = wide(base, models)[0]
    deltas = _selected(_deltas(models, base), say.cut, start)
    ones = [1.0] * len(deltas)
    agreeing = deltas.sign() == torch.where(combined(deltas, ones) >= 0, 1, -1)
    sizes = deltas.new_tensor(say.sizes)
    weights = agreeing * (sizes / sizes.sum()).nan_to_num().unsqueeze(1)
    total = combined(weights, ones)
    change = combined(weights.mul_(deltas), ones) / torch.where(total > 0, total, 1)
    return (origin + change.reshape(origin.shape)).to(models.dtype)


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


def counts_of_changes(models: Tensor, base: Tensor, *, epsilon: float) -> Tensor:
    """How many weights each model changed, with others and alone: ``[2, k]``; additive over chunks."""
    wider, start = wide(models, base)
    changed = (wider - start).abs().reshape(len(models), base.numel()) > epsilon
    several = changed.sum(dim=0) > 1
    return torch.stack([(changed & several).sum(dim=1), (changed & ~several).sum(dim=1)])


def says_more(*, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Generator[Pass, Any, list[float]]:
    """By how much what a model changed alone is multiplied, for each model."""
    shared, alone = (yield Pass(partial(counts_of_changes, epsilon=epsilon))).tolist()
    ratios = [both / max(own, epsilon) if both else 0.0 for both, own in zip(shared, alone, strict=True)]
    return [1 + r * min(ratio, alpha) for ratio in ratios]


@card(
    paper="Yuan et al. 2026, 'Behavior Knowledge Merge in Reinforced Agentic Models' (RAM+), tensor by tensor as in "
    "mergekit's ramplus_tl",
    needs=("base",),
    unit="element",
    solve=says_more,
    laws=("model_order", "translation"),
    claim="what a model has learnt alone is made up for what it shares and is diluted in",
    departs="the shares are counted in every tensor, not in the whole model",
)
def ramplus_tl(
    models: Tensor,
    base: Tensor,
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    solved: list[float] | None = None,
) -> Tensor:
    r"""The mean of those models that changed a weight; what one model changed alone counts for a little more.

    .. math:: w = w_0 + \begin{cases} \lambda_i d_i & \text{only } i \text{ changed it} \\
        \sum_i m_i d_i / \sum_i m_i & \text{several did} \end{cases}, \qquad
        \lambda_i = 1 + r \min\Big(\frac{|\text{shared}_i|}{|\text{alone}_i|}, \alpha\Big)

    with :math:`d_i = w_i - w_0`, :math:`m_i = [\,|d_i| > \epsilon\,]`, and counted over the tensor how many weights
    model :math:`i` changed together with others and alone.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        r: how much the share of shared changes adds.
        alpha: the largest share that counts.
        epsilon: a change up to this counts as none.
        solved: :math:`\lambda_i`, where they were found from all chunks of the tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, or an option that is negative or not finite.

    >>> models = torch.tensor([[1.0, 4.0, 2.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    >>> ramplus_tl(models, torch.zeros(4), r=1.0)                 # alone: 1.2 times; shared: the mean
    tensor([1.2000, 3.0000, 2.4000, 0.0000])
    """
    at_least(1, models, "ramplus_tl")
    for name, value in (("r", r), ("alpha", alpha), ("epsilon", epsilon)):
        if not (math.isfinite(value) and value >= 0):
            raise Error(f"ramplus_tl: {name} must be a finite number of at least 0, got {value}")
    if solved is None:
        solved = in_memory(says_more(r=r, alpha=alpha, epsilon=epsilon), models, base)
    wider, start = wide(models, base)
    deltas = wider - start
    changed = deltas.abs() > epsilon
    count = changed.sum(dim=0)
    more = deltas.new_tensor(solved).reshape(-1, *[1] * base.dim())
    return (start + (deltas * changed * more.where(count == 1, 1 / count.clamp(min=1))).sum(dim=0)).to(models.dtype)


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
    return _not_hidden(wider, merged).to(models.dtype, copy=True)


def _divergence(model: Tensor, base: Tensor) -> Tensor:
    """KL of the softmax of ``model`` from that of ``base`` along the last axis: ``[..., 1]``, float64."""
    new, old = (values.double().contiguous().log_softmax(dim=-1) for values in (model, base))
    found = (new.exp() * (new - old)).sum(dim=-1, keepdim=base.dim() > 0)
    return found.clamp(min=0)


@card(
    paper="none: one model as it is (mergekit's passthrough)",
    unit="element",
    laws=("agreement", "scale", "rotation"),
    claim="with a scale of 1 every byte is that of the model",
)
def passthrough(models: Tensor, *, scale: float | None = 1.0) -> Tensor:
    r"""One model, with every weight multiplied by ``scale``.

    .. math:: w = s\, w_1

    For stacks of layers, and to scale some tensors of a model (``scale`` by tensor).

    Args:
        models: ``[1, *shape]``.
        scale: the factor :math:`s`; none is 1.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: another number of models than one, or a ``scale`` that is not finite.

    >>> passthrough(torch.tensor([[1.0, 2.0]]), scale=0.5)
    tensor([0.5000, 1.0000])
    """
    if len(models) != 1:
        raise Error(f"passthrough needs exactly 1 model, got {len(models)}")
    factor = 1.0 if scale is None else scale
    if not math.isfinite(factor):
        raise Error(f"passthrough: scale must be a finite number, got {scale}")
    return (working(models[0]) * factor).to(models.dtype)

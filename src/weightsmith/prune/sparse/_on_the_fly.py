"""Train filters so that their small weights can be cut and nothing has to be trained again.

A filter on a sphere keeps its length whatever happens: what is taken from its small weights goes to its large ones. A
penalty does the taking, until the filter and what is left of it after the cut point the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.adapt import parametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.room import Source, apply_mask
from weightsmith.prune.sparse._parametrizations import fan_in, weights_of, wide
from weightsmith.weights import Pattern, Weights, apply, open

Fill = Literal["zero", "mean"]


class Sphere(nn.Module):
    """The parametrization ``V -> gain * V / |V|`` of each filter; see `on_sphere`.

    Args:
        weight: ``[out, ...]``; the gains begin as the lengths of its filters.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.gain = nn.Parameter(_lengths(weight.detach().to(wide(weight))))

    def forward(self, weight: Tensor) -> Tensor:
        value = weight.to(self.gain.dtype)
        length = _lengths(value)
        there = length > 0  # a filter of zeros has no direction and stays
        return torch.where(there, self.gain * (value / torch.where(there, length, 1.0)), value).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The filters themselves; gains become their lengths."""
        with torch.no_grad():
            self.gain.copy_(_lengths(weight.to(self.gain.dtype)))
        return weight


def _lengths(weight: Tensor) -> Tensor:
    """Of each filter, ``[out, 1, ...]``."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)


@card(
    paper="Liu, Liu 2022, 'Pruning On-the-Fly: A Recoverable Pruning Method without Fine-tuning'",
    covers=("pruning-on-the-fly",),
    unit="model",
    claim="cut without retraining, a network trained so is more accurate than one trained plainly",
    departs="only weights lie on a sphere: inputs that were divided by their length could not be folded away; each "
    "filter has a scale of its own. The penalty is `bimodal`, whose form is ours",
)
def on_sphere(module: nn.Module, pattern: Pattern | None = None) -> dict[str, Sphere]:
    r"""Let each filter of a module be a direction with a learned length.

    .. math:: W_i = g_i\, \frac{V_i}{\lVert V_i \rVert}

    The module's outputs do not change; gains and directions learn. Make the optimizer afterwards: one from before does
    not know the gains. `weightsmith.adapt.fold` leaves a plain module.

    Args:
        module: changed in place.
        pattern: of the names of weights, ``[out, ...]`` each; default the usual ones.

    Returns:
        name of a weight -> its parametrization, in order.

    Raises:
        Error: no weight fits.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> sphere = on_sphere(model)["weight"]
    >>> sphere.gain.item(), model.weight.tolist()
    (5.0, [[3.0, 4.0]])
    """
    found: dict[str, Sphere] = {}
    for name, weight in weights_of(module, pattern).items():
        found[name] = Sphere(weight)
        parametrized(module, name, found[name])
    return found


def bimodal(weights: Iterable[Tensor], sparsity: float) -> Tensor:
    r"""What to add to the loss: how far each filter turns when its smallest weights are cut.

    .. math:: \frac1F \sum_i \sin \angle (W_i, \hat W_i) = \frac1F \sum_i
              \sqrt{\frac{\sum_{j \in \text{cut}} w_{ij}^2}{\sum_j w_{ij}^2}}

    over all F filters, with :math:`\hat W_i` the filter without the share ``sparsity`` of its smallest weights. At a
    fixed length what the cut ones lose the others win, so weights part into zeros and large ones; and the pull does not
    weaken as the small ones vanish, since the root of a sum of squares has a constant slope towards zero.

    Args:
        weights: ``[out, ...]`` each, with gradients; the scale of a filter does not matter, so the parameters under
            `on_sphere` are as good as what it makes of them.
        sparsity: the share that will be cut of every filter; the number is rounded.

    Returns:
        A number between 0 and 1; 0 where every filter could be cut without any change.

    Raises:
        Error: no weights, a tensor of one axis, or a share outside [0, 1].

    >>> round(bimodal([torch.tensor([[3.0, 4.0]])], 0.5).item(), 4)
    0.6
    """
    found = list(weights)
    if not found or not 0 <= sparsity <= 1 or any(w.dim() < 2 for w in found):
        raise Error(f"bimodal needs weights [out, ...] and a share in [0, 1], got {len(found)} tensors and {sparsity}")
    home = found[0].device
    turns = [_turns(weight, round(sparsity * fan_in(weight))).to(home) for weight in found if weight.numel()]
    return torch.cat(turns).mean() if turns else torch.zeros((), device=home)


def _turns(weight: Tensor, cut: int) -> Tensor:
    """The sine of the angle of each filter to itself without its ``cut`` smallest weights, ``[out]``."""
    energy = weight.to(wide(weight)).flatten(1).square()
    whole = energy.sum(dim=1)
    lost = energy.topk(cut, dim=1, largest=False, sorted=False).values.sum(dim=1) if cut else torch.zeros_like(whole)
    there = (whole > 0) & (lost > 0)
    # Where nothing is lost the root has no slope; a filter of zeros has no direction.
    ratio = torch.where(there, lost, 1.0) / torch.where(there, whole, 1.0)
    return torch.where(there, ratio.sqrt(), lost * 0)


def filled(weight: Tensor, mask: Tensor, fill: Fill = "zero") -> Tensor:
    """What is cut becomes zero, or the mean of what was cut from its filter: then the filter's sum stays.

    Args:
        weight: ``[out, ...]``.
        mask: ``[*shape]`` boolean, true where a weight is kept.
        fill: ``"zero"`` or ``"mean"``.

    Returns:
        ``[*shape]`` in the dtype of ``weight``; computed in float32 or wider.

    >>> filled(torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[True, False, False]]), "mean")
    tensor([[4.0000, 1.5000, 1.5000]])
    """
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    if fill == "zero":
        return torch.where(mask, weight, zero)
    gone = ~mask.flatten(1)
    value = torch.where(gone, weight.flatten(1), zero).to(wide(weight))
    mean = value.sum(dim=1, keepdim=True) / gone.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(gone, mean.to(weight.dtype), weight.flatten(1)).reshape(weight.shape)


def refilled(weights: Source, masks: Source, *, fill: Fill = "zero") -> Weights:
    """Cut by masks; what is cut becomes zero or the mean of what was cut from its filter, which keeps the filter's sum.

    Args:
        weights: a model or checkpoint.
        masks: boolean, under the names of weights; the others stay.
        fill: ``"zero"``, as `weightsmith.prune.apply_mask`, or ``"mean"``, one number a filter.

    Returns:
        Weights: all tensors, in their dtypes; means are computed in float32 or wider.

    Raises:
        Error: a mask that fits no weight, means for a tensor of one axis, or an unknown word.

    >>> weights = {"w": torch.tensor([[4.0, 1.0, 2.0]])}
    >>> refilled(weights, {"w": torch.tensor([[True, False, False]])}, fill="mean")["w"].sum().item()
    7.0
    """
    if fill not in get_args(Fill):
        raise Error(f"refilled: fill is one of {', '.join(get_args(Fill))}; got {fill!r}")
    opened, found = open(weights), open(masks)
    cut = apply_mask(opened, found)
    if fill == "zero":
        return cut
    for name in found:
        if len(found.spec(name).shape) < 2:
            raise Error(f"refilled: {name} has one axis and no filters, so fill='mean' has no mean; leave out its mask")
    first: Mapping[str, Any] = {opened.ties.get(name, name): found.node(name) for name in found}

    def build(name: str, node: Any) -> Any:
        if name not in first:
            return node
        return apply(filled, node, first[name], unit="row", spec=node.spec, options={"fill": fill})

    return opened.zip_nodes(build, (), "prune.sparse.refilled", {"fill": fill})

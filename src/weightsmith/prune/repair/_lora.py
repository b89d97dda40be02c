"""Changes of low rank that keep the zeros of a pruned weight, so that they can be folded into it.

A plain change of low rank fills the zeros again. Here it is masked, or it multiplies the weight: either way nothing
comes of nothing, and the folded weight is as sparse as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from weightsmith.adapt import LowRank, lora, parametrized
from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.weights import Pattern, matches


class Masked(nn.Module):
    """The parametrization ``W -> M W``."""

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(~self.mask, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Scaled(nn.Module):
    """The parametrization ``W -> W (B A)``, elementwise; ``B A`` is 1 at first."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        wide = torch.promote_types(weight.dtype, torch.float32)
        shapes = ((len(weight), rank), (rank, weight[0].numel()))
        self.b, self.a = (nn.Parameter(torch.full(s, rank**-0.5, dtype=wide, device=weight.device)) for s in shapes)

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * (self.b @ self.a).view(weight.shape)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        scale = (self.b @ self.a).detach().view(weight.shape)
        return torch.where(scale == 0, 0, weight / scale).to(weight.dtype)


@card(
    paper="Zimmer, Andoni, Spiegel, Pokutta 2023, 'PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs'",
    covers=("perp",),
    unit="model",
    claim="more of what pruning lost comes back than with norms alone, and the folded weights are as sparse as before",
)
def masked_lora(
    module: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
) -> dict[str, LowRank]:
    r"""Let a pruned module learn changes of low rank that keep its zeros; everything else stands still.

    .. math:: W = M \odot \left(W_0 + \frac{\alpha}{r} B A\right), \qquad B = 0 \text{ at first}

    Args:
        module: changed in place: weights get the parametrizations `weightsmith.adapt.LowRank` and a mask, all else is
            frozen.
        masks: boolean ``[out, ...]`` by the names of weights, true for what is kept; default: the zeros of every matrix
            or convolution that holds some.
        rank: ``r``.
        alpha: the changes are multiplied by ``alpha / rank``; default ``2 * rank``.
        seed: of ``A``.

    Returns:
        name of a weight -> its factors. `weightsmith.adapt.fold` makes of the module a plain one again.

    Raises:
        Error: no mask, one that fits no weight, or a rank below 1.

    >>> layer = torch.nn.Linear(3, 2)
    >>> layer.weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    >>> factors = masked_lora(layer, rank=1)["weight"]
    >>> _ = factors.b.data.fill_(1)
    >>> ws.adapt.fold(layer)
    >>> (layer.weight == 0).tolist()
    [[False, True, False], [True, False, True]]
    """
    found = checked_masks(module, masks)
    return low_rank(module, list(found), found, rank=rank, alpha=alpha, seed=seed)


def low_rank(
    module: nn.Module,
    names: Sequence[str],
    masks: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float | None = None,
    seed: int = 0,
) -> dict[str, LowRank]:
    """`masked_lora` for some weights, with or without a mask each."""
    learning = lora(module, frozenset(names).__contains__, rank=rank, alpha=alpha, seed=seed)
    for name in learning:
        if name in masks:
            parametrized(module, name, Masked(masks[name]))
    return learning


@card(
    paper="Zimmer, Andoni, Spiegel, Pokutta 2023, 'PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs'",
    covers=("perp",),
    unit="model",
    claim="scales of low rank keep zeros without a mask",
)
def scale_lora(module: nn.Module, pattern: Pattern = "*", *, rank: int = 8) -> dict[str, Scaled]:
    r"""Let a pruned module learn scales of low rank for its weights; everything else stands still.

    .. math:: W = W_0 \odot (B A), \qquad B A = 1 \text{ at first}

    Args:
        module: changed in place: its matrices and convolutions get the parametrization, all else is frozen.
        pattern: of the names of weights.
        rank: columns of ``B``; all are equal at first, so only their sum learns until something sets them apart.

    Returns:
        name of a weight -> its factors. `weightsmith.adapt.fold` makes of the module a plain one again.

    Raises:
        Error: no matrix fits, or the rank is below 1.

    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[3.0, 0.0]])
    >>> factors = scale_lora(layer, rank=1)["weight"]
    >>> _ = factors.b.data.fill_(2)
    >>> layer.weight.tolist()
    [[6.0, 0.0]]
    """
    if rank < 1:
        raise Error(f"scale_lora: the rank must be at least 1, got {rank}")
    named = dict(module.named_parameters())
    chosen = {
        name: value
        for name, value in named.items()
        if value.dim() > 1 and value.numel() and value.is_floating_point() and matches(pattern, name)
    }
    if not chosen:
        raise Error(f"scale_lora: no matrix fits {pattern!r}; there are {listed(named)}")
    for parameter in named.values():
        parameter.requires_grad_(False)
    made = {name: Scaled(value, rank) for name, value in chosen.items()}
    for name, scales in made.items():
        parametrized(module, name, scales)
    return made


def carried_masks(module: nn.Module) -> dict[str, Tensor]:
    """Name -> where a weight is not zero, for the matrices and convolutions of a module that hold zeros."""
    found = {name: value.detach() != 0 for name, value in module.named_parameters() if value.dim() > 1}
    return {name: mask for name, mask in found.items() if not bool(mask.all())}


def checked_masks(module: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The masks of a module by the first names of its parameters, on their device; by default those that it carries."""
    if masks is None:
        found = carried_masks(module)
        if not found:
            raise Error("no weight of the module holds zeros; prune it first, or give masks=")
        return found
    named = dict(module.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for name in masks:
        mask = masks[name]
        if name not in named or named[name].shape != mask.shape or mask.dtype != torch.bool:
            raise Error(
                f"the mask of {name} must be boolean and fit a parameter of the module{did_you_mean(name, named)}"
            )
        mask = mask.to(named[name].device)
        if not torch.equal(found.setdefault(first[id(named[name])], mask), mask):
            raise Error(f"{name} and {first[id(named[name])]} are one tensor, but have two masks")
    if not found:
        raise Error("masks= holds no mask; leave it out for the zeros that the weights hold")
    return found

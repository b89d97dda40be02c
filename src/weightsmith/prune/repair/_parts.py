"""What repairs share: the problem they are given, checked and made regular, and how many weights go where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.prune._parts import full_gram
from weightsmith.prune._select import kept_of_groups, pattern_of
from weightsmith.solve import steadied

Budget = float | tuple[int, int]
"""A share to remove, or how many are kept of every so many."""


@dataclass(frozen=True)
class Problem:
    """Weights ``W`` whose outputs are to be kept: ``min tr((X - W) H (X - W)')``."""

    weight: Tensor
    """``[out, in]``, float32 or wider."""
    matrix: Tensor
    """``H [in, in]``, float64: the Gram matrix, made regular."""
    dead: Tensor
    """``[in]``: inputs that were always zero."""
    mask: Tensor | None
    budget: Budget | None

    def kept(self) -> Tensor:
        """The mask, where one was asked for."""
        assert self.mask is not None
        return self.mask


def posed(
    method: str,
    weight: Tensor,
    gram: Tensor,
    mask: Tensor | None,
    sparsity: float | str | None = None,
    *,
    damp: float,
    shrink: float,
    chooses: bool = False,
) -> Problem:
    """What a repair was given, with everything checked.

    Args:
        chooses: whether the repair can choose the mask by itself.

    Raises:
        Error: shapes that do not fit, weights that are not finite, no mask and nothing to choose one by, or both.
    """
    if weight.dim() != 2:
        raise Error(f"{method} repairs matrices [out, in], got {list(weight.shape)}: flatten all but the first axis")
    if chooses and (mask is None) == (sparsity is None):
        raise Error(f"{method} needs either mask=, what is kept, or sparsity=, what to remove; got {_said(mask)}")
    if not chooses and mask is None:
        raise Error(f"{method} needs mask=, what is kept: it does not choose by itself")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        kind = str(mask.dtype).removeprefix("torch.")
        raise Error(f"{method} needs a boolean mask {list(weight.shape)}, got {list(mask.shape)} of {kind}")
    if not weight.isfinite().all():
        raise Error(f"{method} cannot repair weights that are NaN or infinite")
    full = full_gram(gram, weight.shape[1], method).to(weight.device)
    if full.shape != (weight.shape[1],) * 2:
        raise Error(f"{method} needs a Gram matrix of the {weight.shape[1]} inputs, got {list(full.shape)}")
    return Problem(
        weight.to(torch.promote_types(weight.dtype, torch.float32)),
        steadied(full, damp=damp, shrink=shrink),
        full.diagonal() <= 0,
        None if mask is None else mask.to(weight.device),
        None if sparsity is None else budget_of(sparsity, weight.shape[1], method),
    )


def _said(mask: Tensor | None) -> str:
    return "neither" if mask is None else "both"


def budget_of(sparsity: float | str, inputs: int, method: str) -> Budget:
    """A share, or an N:M pattern that the inputs can be cut into.

    >>> budget_of(0.5, 6, "x"), budget_of("1:3", 6, "x")
    (0.5, (1, 3))
    """
    if isinstance(sparsity, str):
        keep, group = pattern_of(sparsity)
        if inputs % group:
            raise Error(f"{method}: {inputs} inputs a row cannot be cut into groups of {group}")
        return keep, group
    if not 0 <= sparsity <= 1:
        raise Error(f"{method}: sparsity must lie between 0 and 1, got {sparsity}")
    return float(sparsity)


def lowest(score: Tensor, count: int) -> Tensor:
    """True for exactly so many of the lowest scores; of equal ones the last go first.

    >>> lowest(torch.tensor([1.0, 0.0, 1.0, 1.0]), 3)
    tensor([False,  True,  True,  True])
    """
    if count <= 0 or count >= score.numel():
        return torch.full(score.shape, count > 0, dtype=torch.bool, device=score.device)
    flat = score.reshape(-1)
    edge = flat.kthvalue(count).values
    gone = flat < edge
    equal = (flat == edge).nonzero()[:, 0]
    gone[equal[len(equal) - (count - int(gone.sum())) :]] = True
    return gone.reshape(score.shape)


def chosen(score: Tensor, budget: Budget) -> Tensor:
    """The mask ``[out, in]`` of what is kept, by a score: a share of the whole matrix, or N of every M inputs."""
    if isinstance(budget, tuple):
        return kept_of_groups(score, keep=budget[0], group=budget[1])
    return ~lowest(score, round(budget * score.numel()))

"""Properties of scores; a user can run them on a score of their own.

Each takes a kernel ``(weight [out, in]) -> score`` and a weight (float32) and raises
`AssertionError` where the property does not hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightsmith.solve import cut_at, kept
from weightsmith.weights import in_memory

Kernel = Callable[..., Tensor]


def _mask(kernel: Kernel, weight: Tensor, sparsity: float) -> Tensor:
    """What is kept with this score."""
    score = kernel(weight)
    total = score.numel()
    return kept(score, in_memory(cut_at(total - round(sparsity * total), total), score))


def nested(kernel: Kernel, weight: Tensor) -> None:
    """What a higher sparsity keeps, a lower one keeps too."""
    assert not (_mask(kernel, weight, 0.75) & ~_mask(kernel, weight, 0.5)).any()


def scale(kernel: Kernel, weight: Tensor) -> None:
    """Scaling a tensor (by a power of two, so that nothing is rounded) does not change which are kept."""
    assert torch.equal(_mask(kernel, weight * 8, 0.5), _mask(kernel, weight, 0.5))


def sign(kernel: Kernel, weight: Tensor) -> None:
    """Nor does turning its sign."""
    assert torch.equal(_mask(kernel, -weight, 0.5), _mask(kernel, weight, 0.5))


def element_order(kernel: Kernel, weight: Tensor) -> None:
    """The score of an element does not depend on where it stands."""
    flat = weight.flatten()
    order = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernel(flat[order]), kernel(flat)[order])

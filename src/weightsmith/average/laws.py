"""Properties of averages along a run; a user can run them on a kernel of their own.

Each takes a kernel ``(mean, weight, count) -> mean`` and moments ``[n, *shape]`` and raises
`AssertionError` where the property does not hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[..., Tensor]


def _along(kernel: Kernel, moments: Tensor) -> Tensor:
    """The average after all moments."""
    kept = moments[0].clone()
    for count, moment in enumerate(moments[1:], start=1):
        kept = kernel(kept, moment, count)
    return kept


def constant(kernel: Kernel, moments: Tensor) -> None:
    """A run that stands still has its place as its average."""
    still = moments[:1].expand_as(moments).clone()
    torch.testing.assert_close(_along(kernel, still), moments[0])


def linear(kernel: Kernel, moments: Tensor) -> None:
    """Scaling and moving a run scales and moves its average."""
    torch.testing.assert_close(_along(kernel, moments * 2 + 1), _along(kernel, moments) * 2 + 1, rtol=1e-4, atol=1e-4)


def plain_mean(kernel: Kernel, moments: Tensor) -> None:
    """The result is the mean of all moments."""
    torch.testing.assert_close(_along(kernel, moments), moments.double().mean(0).float(), rtol=1e-4, atol=1e-5)

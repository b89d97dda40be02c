"""Properties of roundings; a user can run them on a rounding of their own.

Each takes a kernel ``(weight [out, in]) -> (codes, scale)`` and a weight (float32) and raises
`AssertionError` where the property does not hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightsmith.quantize._parts import decode

Kernel = Callable[..., tuple[Tensor, Tensor]]


def half_a_step(kernel: Kernel, weight: Tensor) -> None:
    """No weight is moved by more than half a step of its grid."""
    codes, scale = kernel(weight)
    step = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    moved = (decode(codes, scale) - weight.reshape(codes.shape)).abs()
    assert (moved <= step * (0.5 + 1e-5)).all(), float((moved / step).max())


def scale(kernel: Kernel, weight: Tensor) -> None:
    """Scaling a tensor by a power of two scales the steps and leaves the codes."""
    codes, steps = kernel(weight)
    scaled_codes, scaled_steps = kernel(weight * 8)
    assert torch.equal(codes, scaled_codes)
    alive = weight.reshape(len(weight), steps.shape[1], -1).abs().amax(-1) > 0
    assert torch.equal((steps * 8)[alive], scaled_steps[alive])


def row_order(kernel: Kernel, weight: Tensor) -> None:
    """A row is coded alike wherever it stands."""
    codes, steps = kernel(weight)
    turned_codes, turned_steps = kernel(weight.flip(0))
    assert torch.equal(codes.flip(0), turned_codes)
    assert torch.equal(steps.flip(0), turned_steps)


def sign(kernel: Kernel, weight: Tensor) -> None:
    """Turning the sign turns the codes, but for the one code that has no opposite."""
    codes, steps = kernel(weight)
    turned, turned_steps = kernel(-weight)
    lowest = int(min(codes.min(), turned.min()))
    same = (turned == -codes) | (codes == lowest) | (turned == lowest)
    assert same.all()
    assert torch.equal(steps, turned_steps)

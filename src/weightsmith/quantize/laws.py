"""Properties of roundings; a user can run them on a rounding of their own.

Each takes a kernel ``(weight [out, in]) -> Coded`` and a weight (float32) and raises `AssertionError` where the
property does not hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightsmith.quantize._coded import Coded

Kernel = Callable[..., Coded]


def half_a_step(kernel: Kernel, weight: Tensor) -> None:
    """No weight is moved by more than half a step of its grid."""
    found = kernel(weight)
    scale = found.params["scale"].abs()
    step = scale.repeat_interleave(found.codes.shape[1] // scale.shape[1], dim=1)
    moved = (found.values() - weight.reshape(found.codes.shape)).abs()
    assert (moved <= step * (0.5 + 1e-5)).all(), float((moved / step).max())


def scale(kernel: Kernel, weight: Tensor) -> None:
    """Scaling a tensor by a power of two scales the steps and leaves the codes."""
    found, scaled = kernel(weight), kernel(weight * 8)
    assert torch.equal(found.codes, scaled.codes)
    steps, larger = found.params["scale"], scaled.params["scale"]
    alive = weight.reshape(len(weight), steps.shape[1], -1).abs().amax(-1) > 0
    assert torch.equal((steps * 8)[alive], larger[alive])


def row_order(kernel: Kernel, weight: Tensor) -> None:
    """A row is coded alike wherever it stands."""
    found, turned = kernel(weight), kernel(weight.flip(0))
    assert torch.equal(found.codes.flip(0), turned.codes)
    for name, values in found.params.items():
        assert torch.equal(values.flip(0), turned.params[name]), name


def sign(kernel: Kernel, weight: Tensor) -> None:
    """Turning the sign turns the values, but where the largest of a group stands, which may have no opposite."""
    found, turned = kernel(weight), kernel(-weight)
    lowest = (found.codes == found.codes.min()) | (turned.codes == turned.codes.min())
    assert ((turned.values() == -found.values()) | lowest).all()
    for name, steps in found.params.items():
        assert torch.equal(steps, turned.params[name]), name

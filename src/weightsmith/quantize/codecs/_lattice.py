"""Evenly spaced points that are moved at random as a whole, so that rounding to them is right in the mean.

Rounding to nearest always throws the same way: a step smaller than half the spacing never moves a weight. Where the
points themselves are shifted by one random share of the spacing, the error is as small as that of rounding to nearest
at every draw, and zero on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error


@card(
    paper="Markov, Vladu, Guo, Alistarh 2023, 'Quantized Distributed Training of Large Models with Convergence "
    "Guarantees' (the weight quantizer of its analysis)",
    covers=("quantized-distributed-training-large",),
    unit="model",
    claim="weights on a lattice that are rounded with a random shift are right in the mean, and no farther off than "
    "half its spacing",
    departs="the shift is one number a call, for all tensors given; the learned levels of the paper's experiments are "
    "not here",
)
@torch.no_grad()
def onto_lattice(
    tensors: Iterable[Tensor], spacing: float, *, generator: torch.Generator | None = None, shift: float | None = None
) -> float:
    r"""Move values to a lattice with a random shift, in place; call it after every ``optimizer.step()``.

    .. math:: Q(x) = \delta \Big\lfloor \frac{x - r}{\delta} \Big\rceil + r, \qquad r \sim U(-\delta/2, \delta/2)

    so that :math:`E\,Q(x) = x` and :math:`|Q(x) - x| \le \delta / 2`. What has to be sent of a value is its whole
    number.

    Args:
        tensors: floating, written to, such as ``model.parameters()``. Of low precision they are rounded to their dtype
            afterwards. One is worked on at a time, in float32 or wider.
        spacing: :math:`\delta`, above 0.
        generator: of the shift; PyTorch's own where None.
        shift: :math:`r`, where it is known (0 for plain rounding to nearest); drawn where None.

    Returns:
        The shift.

    Raises:
        Error: a spacing that is not above 0; a tensor that is not floating or holds a NaN or an infinity.

    >>> values = torch.tensor([0.1, 0.4, -0.7])
    >>> onto_lattice([values], 0.5, shift=0.1), values
    (0.1, tensor([ 0.1000,  0.6000, -0.9000]))
    """
    if not (spacing > 0 and math.isfinite(spacing)):
        raise Error(f"onto_lattice needs a spacing above 0, got {spacing!r}")
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for number, tensor in enumerate(given):
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise Error(f"onto_lattice needs finite floating values; tensor {number} {list(tensor.shape)} has others")
    if shift is None:
        place = generator.device if generator is not None else "cpu"
        shift = (float(torch.rand((), generator=generator, device=place, dtype=torch.float64)) - 0.5) * spacing
    for tensor in given:
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        tensor.copy_(wide.sub_(shift).div_(spacing).round_().mul_(spacing).add_(shift))
    return shift

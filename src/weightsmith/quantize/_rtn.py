"""Round every weight to the nearest point of a grid.

Each group of weights gets its own step, just wide enough for its largest value. Needs no data;
the baseline that every other rounding is measured against, and nearly free of loss at 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.quantize._parts import check_bits, grouped, symmetric_scale


@card(
    paper="Jacob et al. 2018, 'Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference' (symmetric weights); measured as a strategy by Jin et al. 2024, 'A Comprehensive Evaluation of "
    "Quantization Strategies for Large Language Models'",
    covers=("comprehensive-evaluation-quantization-strategies",),
    unit="row",
    laws=("half_a_step", "scale", "row_order", "sign"),
    claim="at 4 bits a network is about as good as in floats; below that it breaks",
)
def rtn(
    weight: Tensor, *, bits: int = 4, group: int | None = None, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    r"""Codes and scales by rounding to nearest on a symmetric grid.

    .. math:: s = \frac{2 \max |w|}{2^b - 1}, \qquad
              q = \mathrm{clip}\big(\mathrm{round}(w / s),\, -2^{b-1},\, 2^{b-1} - 1\big)

    with the maximum over each group of inputs, and :math:`w \approx s\,q`.

    Args:
        weight: ``[out, ...]``; the axes after the first are the inputs of a row.
        bits: :math:`b`, from 2 to 8.
        group: inputs that share a step; None for whole rows.
        scale_dtype: the dtype in which the scales will be stored; float32 by default.

    Returns:
        codes ``[out, in]`` int8 and scales ``[out, groups]`` float32.

    Raises:
        ValueError: bits out of range, groups that do not fill a row, or values that are not finite.

    >>> rtn(torch.tensor([[7.5, -7.5, 1.0, 0.4]]))
    (tensor([[ 7, -8,  1,  0]], dtype=torch.int8), tensor([[1.]]))
    """
    check_bits(bits)
    groups = grouped(weight.float(), group)
    scale = symmetric_scale(groups, bits, scale_dtype)
    codes = (groups / scale.unsqueeze(-1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8).flatten(1), scale

"""The values that a code may stand for, between -1 and 1: sorted tables that a block's scale stretches.

A table is a choice of where to be exact. One with evenly spaced values has the same error everywhere; the dynamic one
spends half of its values on the largest tenth, a quarter on the tenth below, and so on, so that it reaches over seven
powers of ten; quantiles put the same number of given values on every code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.errors import Error

MOST_BITS = 8
"""Codes are bytes."""


def check_width(bits: int) -> int:
    """The bits of a code, if codes can have that many.

    >>> check_width(4)
    4
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MOST_BITS:
        raise Error(f"codes have 2 to {MOST_BITS} bits, got {bits!r}")
    return bits


def dynamic_codebook(bits: int = 8, *, signed: bool = True) -> Tensor:
    r"""Values with an exponent of variable length: powers of ten that grow finer towards 1.

    With ``e`` leading zeros the exponent is :math:`10^{-e}` and the bits that are left number even steps between 0.1
    and 1, of which the middles are taken. Without a sign one bit more is left for the steps. 0 and 1 are added, so 0
    is exact and -1 is not there.

    Args:
        bits: of a code, 2 to 8.
        signed: half of the values below 0; else none.

    Returns:
        ``[2^bits]``, sorted, float32.

    Source: Dettmers, Lewis, Shleifer, Zettlemoyer 2022, '8-bit Optimizers via Block-wise Quantization' (dynamic tree
    quantization, and without its sign bit).

    >>> dynamic_codebook(3)
    tensor([-0.7750, -0.3250, -0.0550,  0.0000,  0.0550,  0.3250,  0.7750,  1.0000])
    """
    check_width(bits)
    found = [torch.tensor([0.0, 1.0])]
    for length in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2 ** (length + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (length - (bits - 2))
        found += [middles, -middles] if signed else [middles]
    return torch.cat(found).sort().values


def linear_codebook(bits: int = 8, *, signed: bool = True) -> Tensor:
    """Evenly spaced values, 0 among them.

    Args:
        bits: of a code, 2 to 8.
        signed: from -1 to 1, one value fewer than there are codes; else from 0 to 1.

    Returns:
        ``[2^bits - 1]`` or ``[2^bits]``, sorted, float32.

    >>> linear_codebook(2), linear_codebook(2, signed=False)
    (tensor([-1.,  0.,  1.]), tensor([0.0000, 0.3333, 0.6667, 1.0000]))
    """
    most = 2 ** check_width(bits) - 1
    if not signed:
        return torch.arange(most + 1) / most
    return torch.arange(-(most // 2), most // 2 + 1) / (most // 2)


def quantile_codebook(values: Tensor, bits: int = 8) -> Tensor:
    r"""The table with which every code is used equally often on some values.

    .. math:: q_i = \frac{1}{2}\Big(Q\big(\tfrac{i}{2^b}\big) + Q\big(\tfrac{i + 1}{2^b}\big)\Big),
        \quad i = 0 \dots 2^b - 1

    of the quantile function :math:`Q`, divided by the largest magnitude; the value nearest 0 is set to 0 and the one of
    the largest magnitude to its end, so that nothing that is 0 or the largest of its block changes.

    Args:
        values: any shape, a sample of what will be coded, each divided by its block's largest magnitude where blocks
            differ. Sorted once: O(n log n).
        bits: of a code, 2 to 8.

    Returns:
        ``[2^bits]``, sorted, float32, from -1 to 1; equal values may stand in it where the sample repeats itself.

    Raises:
        Error: no values, some that are not finite, or nothing but zeros.

    Source: Dettmers et al. 2022 (quantile quantization).

    >>> quantile_codebook(torch.arange(-8.0, 9.0), 2)
    tensor([-0.7500,  0.0000,  0.2500,  1.0000])
    """
    check_width(bits)
    flat = values.detach().reshape(-1).float().sort().values
    if not len(flat) or not bool(flat.isfinite().all()) or not bool(flat.abs().max() > 0):
        raise Error("a table of quantiles needs finite values that are not all zero")
    places = torch.linspace(0, 1, 2**bits + 1, device=flat.device, dtype=torch.float64) * (len(flat) - 1)
    below = places.long()
    above = (below + 1).clamp(max=len(flat) - 1)
    edges = flat[below].double().lerp(flat[above].double(), places - below)
    table = (edges[:-1] + edges[1:]) / 2 / flat.abs().max()
    table[table.abs().argmin()] = 0
    table[-1 if flat[-1] >= -flat[0] else 0] = 1 if flat[-1] >= -flat[0] else -1
    return table.sort().values.float()

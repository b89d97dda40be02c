"""Floats as planes of bytes: what says how large they are apart from what says how they differ.

Weights of one tensor are of like size, so their exponents take few values and can be told in few bits; signs and
mantissas are as good as random and are kept as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weightsmith import native

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def planes(values: Tensor) -> Tensor:
    """Floats ``[n]`` as ``[bytes of one, n]`` uint8, equal to the bit whatever they are.

    The first plane holds the eight bits below the sign: in bfloat16 and float32 the exponent, in float16 the exponent
    and three bits of the mantissa. The others hold the sign and the bits that are left, highest first. A float8 is its
    own only plane.

    >>> planes(torch.tensor([-1.5], dtype=torch.bfloat16)).tolist()     # 127 and 0x80 | 0x40
    [[127], [192]]
    """
    found = native.planes(values)
    if found is not None:
        return found
    width, bits = values.itemsize, values.contiguous().view(_INTEGERS[values.itemsize])
    if width == 1:
        return bits[None].clone()  # a run that was read lasts only until the next is
    below = 8 * width - 9  # the sign goes to where the lowest bit of the first plane was
    left = (bits & 2**below - 1) | torch.where(bits < 0, 2**below, 0).to(bits.dtype)
    made = [bits >> below, *(left >> 8 * byte for byte in range(width - 2, -1, -1))]
    return torch.stack([(one & 255).to(torch.uint8) for one in made])


def together(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back, ``[n]``.

    >>> together(torch.tensor([[127], [192]], dtype=torch.uint8), torch.bfloat16)
    tensor([-1.5000], dtype=torch.bfloat16)
    """
    made = torch.empty(planes.shape[1], dtype=dtype, device=planes.device)
    if native.together(planes, made):
        return made
    width, integers = dtype.itemsize, _INTEGERS[dtype.itemsize]
    if width == 1:
        return planes[0].contiguous().view(dtype)
    below = 8 * width - 9
    left = torch.zeros(planes.shape[1], dtype=torch.int64, device=planes.device)
    for plane in planes[1:]:
        left = left << 8 | plane.long()
    size = planes[0].long() << below | left & 2**below - 1
    low = -(2 ** (8 * width - 1))
    return (torch.where(left >> below & 1 == 1, size + low, size)).to(integers).view(dtype)


def entropy(counts: Tensor) -> float:
    """Bits that a symbol takes at least, each told by itself, where symbols occur so often (``[k]``).

    >>> entropy(torch.tensor([2, 1, 1, 0]))
    1.5
    """
    shares = counts[counts > 0].double() / max(int(counts.sum()), 1)
    return math.fsum((-shares * shares.log2()).tolist())

"""Numbers of 4, 6 and 8 bits that hardware computes with: their tables, and rounding to them.

A float of few bits has a sign, an exponent and a mantissa; its values are evenly spaced between two powers of two and
twice as wide apart from the next one on. Rounded is to the nearest value, of two as near to the one whose last bit is
zero; what is too large becomes the largest finite value.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean


@dataclass(frozen=True)
class Element:
    """A number format of few bits.

    Attributes:
        word: what it is called.
        exponent: bits of the exponent; 0 for whole numbers in two's complement, of which the first two bits stand
            before the point.
        mantissa: bits after the leading one.
        bias: what is taken off the exponent's bits.
        largest: the largest finite value.
    """

    word: str
    exponent: int
    mantissa: int
    bias: int
    largest: float

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa + (1 if not self.exponent else 0)

    @property
    def top(self) -> int:
        """The exponent of the largest value."""
        return 0 if not self.exponent else math.frexp(self.largest)[1] - 1


ELEMENTS: dict[str, Element] = {
    "e2m1": Element("e2m1", 2, 1, 1, 6.0),
    "e2m3": Element("e2m3", 2, 3, 1, 7.5),
    "e3m2": Element("e3m2", 3, 2, 3, 28.0),
    "e4m3": Element("e4m3", 4, 3, 7, 448.0),
    "e5m2": Element("e5m2", 5, 2, 15, 57344.0),
    "int8": Element("int8", 0, 6, 0, 127 / 64),
}
"""Formats by their word: those of the Open Compute Project's microscaling and 8-bit float specifications."""


def element_of(word: str) -> Element:
    """A format by its word.

    Raises:
        Error: a word of no format.

    >>> element_of("e3m2").largest
    28.0
    """
    if word not in ELEMENTS:
        raise Error(f"there is no element format {word!r}{did_you_mean(word, ELEMENTS)}; known: {', '.join(ELEMENTS)}")
    return ELEMENTS[word]


def to_element(values: Tensor, element: Element) -> Tensor:
    """The codes of the nearest values of a format: uint8, of the shape of ``values``.

    Args:
        values: finite, float32 or float64.

    >>> to_element(torch.tensor([0.25, 0.75, 5.0, -100.0]), ELEMENTS["e2m1"])    # 0, 1, 4 and -6: ties go to even
    tensor([ 0,  2,  6, 15], dtype=torch.uint8)
    """
    if not element.exponent:
        highest = 2 ** (element.bits - 1) - 1
        return (values * 2.0**element.mantissa).round_().clamp_(-highest, highest).to(torch.int8).view(torch.uint8)
    magnitude = values.abs().clamp_(max=element.largest)
    lowest = 1 - element.bias
    power = (torch.frexp(magnitude).exponent - 1).clamp_(min=lowest).masked_fill_(magnitude == 0, lowest)
    # An even last bit is an even count of steps, and a count that overflows its power of two is the next one's first.
    steps = torch.ldexp(magnitude, element.mantissa - power).round_()
    codes = (power - lowest) * 2**element.mantissa + steps.int()
    return (codes + torch.signbit(values).int() * 2 ** (element.bits - 1)).to(torch.uint8)


def of_element(codes: Tensor, element: Element, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes, in a dtype, of the shape of ``codes``.

    >>> of_element(torch.tensor([2, 15], dtype=torch.uint8), ELEMENTS["e2m1"])
    tensor([ 1., -6.])
    """
    return torch.tensor(table_of(element), dtype=dtype, device=codes.device)[codes.long()]


@functools.cache
def table_of(element: Element) -> tuple[float, ...]:
    """The value of every code; those that stand for no number are NaN or infinite.

    >>> table_of(ELEMENTS["e2m1"])[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    if not element.exponent:
        half = 2 ** (element.bits - 1)
        return tuple((code - 2 * half * (code >= half)) / 2**element.mantissa for code in range(2 * half))
    values = []
    for code in range(2 ** (element.bits - 1)):
        power, steps = divmod(code, 2**element.mantissa)
        value = (steps + 2**element.mantissa * (power > 0)) * 2.0 ** (max(power, 1) - element.bias - element.mantissa)
        if value > element.largest:
            value = float("inf") if element.word == "e5m2" and not steps else float("nan")
        values.append(value)
    return tuple(values) + tuple(-value for value in values)

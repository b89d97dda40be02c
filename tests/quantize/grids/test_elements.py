"""Number formats of few bits, code by code."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.quantize.grids import ELEMENTS, element_of, of_element, table_of, to_element

# word: exponent bits, mantissa bits, bias, largest, smallest normal, smallest (the specifications' tables)
SPECIFIED = {
    "e2m1": (2, 1, 1, 6.0, 1.0, 0.5),
    "e2m3": (2, 3, 1, 7.5, 1.0, 0.125),
    "e3m2": (3, 2, 3, 28.0, 0.25, 0.0625),
    "e4m3": (4, 3, 7, 448.0, 2.0**-6, 2.0**-9),
    "e5m2": (5, 2, 15, 57344.0, 2.0**-14, 2.0**-16),
}
floats = pytest.mark.parametrize("word", SPECIFIED)
every = pytest.mark.parametrize("word", ELEMENTS)


def read(code: int, exponent: int, mantissa: int, bias: int) -> float:
    """A code by its bits."""
    sign = -1.0 if code >> (exponent + mantissa) else 1.0
    power, part = code >> mantissa & (2**exponent - 1), code & (2**mantissa - 1)
    if power == 0:
        return sign * part / 2**mantissa * 2.0 ** (1 - bias)
    return sign * (1 + part / 2**mantissa) * 2.0 ** (power - bias)


@floats
def test_every_code_against_its_bits(word: str):
    exponent, mantissa, bias, largest, normal, smallest = SPECIFIED[word]
    table = table_of(ELEMENTS[word])
    assert len(table) == 2 ** (1 + exponent + mantissa) == 2 ** ELEMENTS[word].bits
    for code, value in enumerate(table):
        by_bits = read(code, exponent, mantissa, bias)
        if abs(by_bits) <= largest:
            assert value == by_bits
            assert math.copysign(1, value) == math.copysign(1, by_bits)
        else:
            assert not math.isfinite(value)
    finite = [value for value in table if math.isfinite(value)]
    assert max(finite) == largest == -min(finite)
    assert min(value for value in finite if value > 0) == smallest
    assert normal in finite
    assert ELEMENTS[word].top == math.floor(math.log2(largest))


def test_which_codes_are_no_numbers():
    assert sum(math.isnan(value) for value in table_of(ELEMENTS["e4m3"])) == 2  # 0x7F and 0xFF
    assert math.isnan(table_of(ELEMENTS["e4m3"])[0x7F])
    five = table_of(ELEMENTS["e5m2"])
    assert [five[0x7C], five[0xFC]] == [math.inf, -math.inf]
    assert all(math.isnan(five[code]) for code in (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF))
    for word in ("e2m1", "e2m3", "e3m2", "int8"):
        assert all(map(math.isfinite, table_of(ELEMENTS[word])))


def test_whole_numbers_of_sixty_fourths():
    table = table_of(ELEMENTS["int8"])
    assert table[:3] == (0, 1 / 64, 2 / 64)
    assert table[127] == 127 / 64
    assert table[255] == -1 / 64
    assert table[128] == -2
    codes = to_element(torch.tensor([0.0, 1.0, -1.0, 5.0, -5.0, 1.5 / 64, 2.5 / 64]), ELEMENTS["int8"])
    assert codes.tolist() == [0, 64, 192, 127, 129, 2, 2]


@every
def test_every_number_is_its_own_nearest(word: str):
    element = ELEMENTS[word]
    table = torch.tensor(table_of(element))
    codes = torch.arange(len(table), dtype=torch.uint8)
    kept = table.isfinite() & (table.abs() <= element.largest)
    assert torch.equal(to_element(table[kept], element), codes[kept])
    assert torch.equal(of_element(codes[kept], element), table[kept])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_against_a_search(word: str, dtype: torch.dtype):
    """The nearest of all numbers; of two as near the one with an even code; halves are hit exactly."""
    element = ELEMENTS[word]
    numbers = sorted({value for value in table_of(element) if abs(value) <= element.largest})
    generator = torch.Generator().manual_seed(0)
    at = torch.tensor(numbers, dtype=dtype)
    tests = torch.cat(
        [at, (at[1:] + at[:-1]) / 2, 3 * element.largest * (torch.rand(300, generator=generator, dtype=dtype) - 0.5),
         torch.randn(300, generator=generator, dtype=dtype) * numbers[len(numbers) // 2 + 2]]
    )  # fmt: skip
    got = to_element(tests, element)
    for value, code in zip(tests.tolist(), got.tolist(), strict=True):
        clipped = min(max(value, -element.largest), element.largest)
        least = min(abs(clipped - number) for number in numbers)
        near = [number for number in numbers if abs(clipped - number) == least]
        found = table_of(element)[code]
        assert found in near, (value, found)
        if len(near) == 2:
            assert code % 2 == 0, (value, found)


@pytest.mark.parametrize(("word", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_against_the_floats_of_torch(word: str, dtype: torch.dtype):
    element = ELEMENTS[word]
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.linspace(-20, 15, 5000)
    values = values.clamp(-element.largest, element.largest)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 2.0**-140])])
    assert torch.equal(to_element(values, element), values.to(dtype).view(torch.uint8))
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(of_element(codes, element), codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@floats
def test_what_is_too_large_becomes_the_largest(word: str):
    element = ELEMENTS[word]
    values = torch.tensor([element.largest * 1.01, 1e30, -1e30, 3.4e38])
    assert of_element(to_element(values, element), element).tolist() == [
        element.largest, element.largest, -element.largest, element.largest
    ]  # fmt: skip


def test_a_misspelt_element():
    with pytest.raises(Error, match="did you mean 'e4m3'"):
        element_of("e4m3fn")

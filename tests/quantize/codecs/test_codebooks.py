"""Tables of values: the dynamic one built bit by bit, the even one, quantiles by sorting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.quantize.codecs import dynamic_codebook, linear_codebook, quantile_codebook


def by_bits(bits: int, signed: bool) -> list[float]:
    """Every code read as the paper reads it: a sign, zeros, a one, and a number of the bits that are left."""
    found = [0.0, 1.0]
    for code in range(2 ** (bits - 1)):
        # Behind the sign's place: as many zeros as the exponent says, a one, the number.
        word = format(code, f"0{bits - 1}b")
        if "1" not in word:
            continue
        zeros = word.index("1")
        rest = word[zeros + 1 :]
        for extra in [""] if signed else ["0", "1"]:  # without a sign its bit is one more of the number
            number = rest + extra
            steps = 2 ** len(number)
            value = 0.1 + 0.9 * ((int(number, 2) if number else 0) + 0.5) / steps
            found += [s * value * 10.0**-zeros for s in ([1, -1] if signed else [1])]
    return sorted(found)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_dynamic_table_bit_by_bit(bits: int, signed: bool):
    table = dynamic_codebook(bits, signed=signed)
    assert len(table) == 2**bits
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.tensor(by_bits(bits, signed)), rtol=1e-6, atol=0)


def test_the_dynamic_table_reaches_over_seven_powers_of_ten():
    table = dynamic_codebook()
    assert 0 in table
    assert table[-1] == 1
    assert table[0] == pytest.approx(-0.99296875)
    assert float(table[table > 0].min()) == pytest.approx(5.5e-7)
    assert float(dynamic_codebook(signed=False)[1]) == pytest.approx(3.25e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_even_table(bits: int):
    table, unsigned = linear_codebook(bits), linear_codebook(bits, signed=False)
    assert len(table) == 2**bits - 1
    assert len(unsigned) == 2**bits
    assert 0 in table
    assert table[0] == -1
    assert table[-1] == 1
    assert unsigned[0] == 0
    assert unsigned[-1] == 1
    for one in (table, unsigned):
        torch.testing.assert_close(one.diff(), one.diff()[:1].expand(len(one) - 1), rtol=1e-4, atol=0)


def test_quantiles_are_used_equally_often():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    table = quantile_codebook(values, 4)
    nearest = (values[:, None] / values.abs().max() - table).abs().argmin(dim=1)
    share = nearest.bincount(minlength=16) / len(values)
    assert bool((share[2:-2] > 0.03).all())
    assert bool((share[2:-2] < 0.1).all())
    assert 0 in table
    assert float(table.abs().max()) == 1
    assert bool((table.diff() > 0).all())


def test_quantiles_by_sorting():
    values = torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0, 1.0, 0.0, 2.5, -2.0])
    ordered = sorted(values.tolist())
    edges = []
    for i in range(5):
        place = i / 4 * 8
        low = math.floor(place)
        edges.append(ordered[low] + (place - low) * (ordered[min(low + 1, 8)] - ordered[low]))
    middles = [(a + b) / 2 / 4 for a, b in itertools.pairwise(edges)]
    middles[min(range(4), key=lambda i: abs(middles[i]))] = 0
    middles[0] = -1  # the largest magnitude is that of -4
    assert quantile_codebook(values, 2).tolist() == pytest.approx(sorted(middles))


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(4), torch.tensor([1.0, torch.nan])])
def test_quantiles_of_nothing(values: torch.Tensor):
    with pytest.raises(Error, match="finite values that are not all zero"):
        quantile_codebook(values)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_widths_that_are_not_there(bits: int):
    for make in (dynamic_codebook, linear_codebook):
        with pytest.raises(Error, match="2 to 8 bits"):
            make(bits)

"""Floats as planes of bytes: every bit pattern there and back."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from weightsmith import native
from weightsmith.share._planes import entropy, planes, together

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def patterns(dtype: torch.dtype) -> Tensor:
    """All of 16 bits; many of the others, NaN of every kind among them."""
    if dtype.itemsize <= 2:
        every = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
        return every.to({1: torch.uint8, 2: torch.int16}[dtype.itemsize]).view(dtype)
    drawn = torch.randint(0, 256, (5001 * dtype.itemsize,), generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_comes_back(dtype: torch.dtype, plain: bool, monkeypatch: pytest.MonkeyPatch):
    if plain:
        monkeypatch.setattr(native, "_library", lambda: None)
    values = patterns(dtype)
    made = planes(values)
    assert made.shape == (dtype.itemsize, len(values))
    assert made.dtype == torch.uint8
    assert same_bits(together(made, dtype), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_make_the_same_planes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    made = planes(patterns(dtype))
    monkeypatch.setattr(native, "_library", lambda: None)
    assert torch.equal(planes(patterns(dtype)), made)


def test_the_first_plane_is_the_exponent():
    values = torch.tensor([1.0, -1.0, 2.0, -0.375, 0.0, -0.0, math.inf])
    expected = [struct.unpack("<I", struct.pack("<f", value))[0] >> 23 & 255 for value in values.tolist()]
    assert planes(values)[0].tolist() == expected == [127, 127, 128, 125, 0, 0, 255]
    assert planes(values.bfloat16())[0].tolist() == expected
    assert planes(values.bfloat16())[1].tolist() == [0, 0x80, 0, 0x80 | 0x40, 0, 0x80, 0]
    assert planes(values.half())[0].tolist() == [15 << 3, 15 << 3, 16 << 3, 13 << 3 | 4, 0, 0, 31 << 3]


def test_floats_that_were_narrower_have_planes_of_zeros():
    values = patterns(torch.bfloat16)[:30_000]
    wide = planes(values.float())
    assert torch.equal(wide[:2], planes(values))
    assert not wide[2:].any()


def test_any_strides_and_none():
    values = torch.randn(10, 6).t()[::2].reshape(-1)
    assert same_bits(together(planes(values[::3]), torch.float32), values[::3].contiguous())
    assert planes(torch.empty(0, dtype=torch.bfloat16)).shape == (2, 0)
    assert together(torch.empty(2, 0, dtype=torch.uint8), torch.bfloat16).shape == (0,)


def test_entropy():
    assert entropy(torch.tensor([1] * 8)) == pytest.approx(3)
    assert entropy(torch.tensor([5, 0])) == 0
    assert entropy(torch.zeros(3, dtype=torch.int64)) == 0
    assert entropy(torch.tensor([3, 1])) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))

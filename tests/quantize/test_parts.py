"""Grids, groups of inputs, and packing of codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize._parts import (
    check_bits,
    check_group,
    decode,
    grouped,
    pack,
    packed_width,
    symmetric_scale,
    unpack,
)


def codes_of(bits: int, rows: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, inputs), generator=generator).to(torch.int8)


def packed_by_hand(codes: Tensor, bits: int) -> list[list[int]]:
    """One long whole number a row, cut into words of 32 bits."""
    rows = []
    for row in codes.tolist():
        number = sum((code + 2 ** (bits - 1)) << (index * bits) for index, code in enumerate(row))
        words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return rows


@given(st.integers(2, 8), st.integers(0, 4), st.integers(0, 130), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, inputs: int, seed: int):
    codes = codes_of(bits, rows, inputs, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_width(inputs, bits))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, inputs), codes)


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
def test_the_words_by_hand(bits: int, rows: int, inputs: int, seed: int):
    codes = codes_of(bits, rows, inputs, seed)
    assert pack(codes, bits).tolist() == packed_by_hand(codes, bits)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_ends_of_the_range(bits: int):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.tensor([[low] * 40, [high] * 40, [low, high] * 20], dtype=torch.int8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, 40), codes)
    assert packed[0].eq(0).all()
    assert packed[1, 0] == -1


def test_pack_does_not_write_to_its_input_and_takes_any_strides():
    codes = codes_of(4, 6, 9, 0)
    before = codes.clone()
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    assert torch.equal(codes, before)


def test_groups():
    weight = torch.arange(24.0).reshape(2, 3, 4)
    assert grouped(weight, None).shape == (2, 1, 12)
    assert torch.equal(grouped(weight, 6)[1, 1], torch.arange(18.0, 24))
    assert grouped(torch.ones(5), None).shape == (5, 1, 1)
    assert grouped(torch.ones(0, 8), 4).shape == (0, 2, 4)
    assert grouped(torch.ones(3, 0), None).shape == (3, 1, 0)
    assert grouped(torch.ones(3, 0), 64).shape == (3, 1, 0)


@pytest.mark.parametrize(
    ("inputs", "group", "message"),
    [
        (96, 64, "groups of 64 do not fill a row of 96 inputs; these fit: 16, 32, 48, 96, or None for whole rows"),
        (7, 2, "groups of 2 do not fill a row of 7 inputs; use group=None"),
        (8, 0, "groups of 0 do not fill"),
        (8, -4, "groups of -4 do not fill"),
    ],
)
def test_groups_that_do_not_fill_a_row(inputs: int, group: int, message: str):
    with pytest.raises(Error, match=message):
        check_group(inputs, group)
    with pytest.raises(Error, match=message):
        grouped(torch.ones(2, inputs), group)


@pytest.mark.parametrize("bits", [0, 1, 9, 4.0, "4", None])
def test_bits_that_cannot_be_packed(bits: object):
    with pytest.raises(Error, match=f"bits must be a whole number from 2 to 8, got {bits!r}"):
        check_bits(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_step_just_holds_the_largest_value(bits: int):
    groups = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    scale = symmetric_scale(groups, bits)
    for row in range(3):
        for group in range(4):
            largest = max(abs(float(x)) for x in groups[row, group])
            assert float(scale[row, group]) == pytest.approx(2 * largest / (2**bits - 1), rel=1e-6)


def test_a_group_of_zeros_has_a_step_of_one():
    assert symmetric_scale(torch.zeros(2, 1, 4), 4).tolist() == [[1], [1]]
    assert symmetric_scale(torch.zeros(2, 1, 0), 4).tolist() == [[1], [1]]
    # So has one whose step vanishes in the dtype it is stored in: its codes are 0, not 0 / 0.
    assert symmetric_scale(torch.full((1, 1, 4), 1e-12), 4, torch.float16).tolist() == [[1]]


def test_the_step_is_the_one_that_will_be_stored():
    groups = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0))
    scale = symmetric_scale(groups, 4, torch.bfloat16)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(scale, symmetric_scale(groups, 4).bfloat16().float())


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), None, "not finite, or too large for a scale in float32"),
        (float("inf"), None, "not finite"),
        (1e6, torch.float16, "too large for a scale in float16"),
        (1.0, torch.int8, "scales are floats; they cannot be stored as int8"),
    ],
)
def test_what_no_grid_holds(value: float, dtype: torch.dtype | None, message: str):
    groups = torch.ones(2, 2, 4)
    groups[1, 0, 2] = value
    with pytest.raises(Error, match=message):
        symmetric_scale(groups, 4, dtype)


def test_decode_by_hand():
    codes = torch.tensor([[1, -2, 3, 4], [0, 5, -8, 7]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 10.0], [1.0, 2.0]]).bfloat16()
    assert decode(codes, scale).tolist() == [[0.5, -1, 30, 40], [0, 5, -16, 14]]
    assert decode(codes, scale).dtype == torch.float32
    assert decode(torch.zeros(0, 4, dtype=torch.int8), torch.ones(0, 2)).shape == (0, 4)
    assert decode(torch.zeros(3, 0, dtype=torch.int8), torch.ones(3, 1)).shape == (3, 0)

"""Packing codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.quantize._parts import pack, packed_width, unpack


def codes_of(bits: int, rows: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, inputs), generator=generator).to(torch.uint8)


def packed_by_hand(codes: Tensor, bits: int) -> list[list[int]]:
    """One long whole number a row, cut into words of 32 bits."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (index * bits) for index, code in enumerate(row))
        words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return rows


@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 130), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, inputs: int, seed: int):
    codes = codes_of(bits, rows, inputs, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_width(inputs, bits))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, inputs), codes)


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
def test_the_words_by_hand(bits: int, rows: int, inputs: int, seed: int):
    codes = codes_of(bits, rows, inputs, seed)
    assert pack(codes, bits).tolist() == packed_by_hand(codes, bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_ends_of_the_range(bits: int):
    low, high = 0, 2**bits - 1
    codes = torch.tensor([[low] * 40, [high] * 40, [low, high] * 20], dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, 40), codes)
    assert packed[0].eq(0).all()
    assert packed[1, 0] == -1


def test_pack_does_not_write_to_its_input_and_takes_any_strides():
    codes = codes_of(4, 6, 9, 0)
    before = codes.clone()
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    assert torch.equal(codes, before)

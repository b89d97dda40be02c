"""Bits of masks, and nodes that read any run of a packed tensor, against everything at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.errors import FormatError
from weightsmith.prune.formats import _bits
from weightsmith.prune.formats._bits import (
    Bits,
    Dense,
    Kept,
    KeptOfFour,
    Rows,
    RowStarts,
    as_integers,
    counts_of,
    counts_of_bits,
    kept,
    packed_bits,
    per_block,
    places,
    unpacked_bits,
)
from weightsmith.weights import Held, Scratch, materialize


def sparse(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, share: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < share, 0.0, values).to(dtype)


SPECIAL = torch.tensor([0.0, -0.0, 1.0, torch.nan, -torch.inf, 1e-45, -1e-45, 0.0])


def test_what_is_kept():
    assert kept(SPECIAL, "value").tolist() == [False, False, True, True, True, True, True, False]
    assert kept(SPECIAL, "bits").tolist() == [False, True, True, True, True, True, True, False]
    assert kept(SPECIAL, "2:4").tolist() == [False, False, True, True, True, True, False, False]
    zeros = torch.tensor([0.0, 0.0, 0.0, 2.0] + [0.0] * 4)
    assert kept(zeros, "2:4").tolist() == [True, False, False, True, True, True, False, False]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_zeros_of_every_dtype(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -2.0]).to(dtype)
    assert kept(values, "value").tolist() == [False, False, True, True]
    assert kept(values, "bits").tolist() == [False, True, True, True]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_bits_by_hand(rows: int, columns: int, seed: int):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = packed_bits(mask)
    assert packed.shape == (rows, -(-columns // 8))
    for r in range(rows):
        for c in range(8 * packed.shape[1]):
            bit = bool(packed[r, c // 8] >> (c % 8) & 1)
            assert bit == (bool(mask[r, c]) if c < columns else False)
    assert torch.equal(unpacked_bits(packed.view(-1)).view(rows, -1)[:, :columns], mask)


def test_sums_by_block():
    numbers = torch.arange(10)
    assert per_block(numbers, 5, 4, 6).tolist() == [0, 0 + 1 + 2, 3 + 4 + 5 + 6, 7 + 8 + 9, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (5, 16), (5, 3), (7, 9), (4, 8), (3, 0), (0, 3)])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rule", ["value", "bits"])
def test_any_run_of_any_part(shape, flat, rule, monkeypatch):
    monkeypatch.setattr(_bits, "BLOCK", 16)
    tensor = sparse(*shape, dtype=torch.bfloat16)
    tensor.view(-1)[:1] = -0.0
    node = Held(tensor)
    rows = Rows(1, tensor.numel()) if flat else Rows(*shape)
    counts = counts_of(node, rule)
    begin = places(counts.value()) if tensor.numel() else [0]
    values = Kept(node, rule, begin)
    bits = Bits(node, rule, rows, (rows.byte(rows.total) if tensor.numel() else 0,))
    there = kept(tensor.view(-1), rule)
    expected = as_integers(tensor.view(-1)[there])
    assert values.spec.numel == len(expected)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            found = values.read(start, stop, Scratch())
            assert torch.equal(as_integers(found), expected[start:stop])
    packed = packed_bits(there.view(1, -1) if flat else there.view(shape)).view(-1)
    assert torch.equal(materialize(bits), packed)
    if not tensor.numel():
        return
    assert places(counts_of_bits(Held(packed), rows).value())[-1] == len(expected)
    dense = Dense(
        Held(tensor.view(-1)[there]), Held(packed), rows, shape, places(counts_of_bits(Held(packed), rows).value())
    )
    wanted = as_integers(tensor).view(-1) * there
    for start in range(0, tensor.numel(), dense.grain):
        for stop in [*range(start + dense.grain, tensor.numel(), dense.grain), tensor.numel()]:
            assert torch.equal(as_integers(dense.read(start, stop, Scratch())), wanted[start:stop])


@pytest.mark.parametrize("shape", [(1, 5), (9, 7), (40, 2), (3, 50), (4, 0), (0, 4)])
@pytest.mark.parametrize("rule", ["value", "bits"])
def test_any_run_of_row_starts(shape, rule, monkeypatch):
    monkeypatch.setattr(_bits, "BLOCK", 16)
    tensor = sparse(*shape, share=0.5)
    tensor.view(-1)[:1] = -0.0
    node = Held(tensor)
    begin = places(counts_of(node, rule).value()) if tensor.numel() else [0]
    counts = kept(tensor, rule).sum(dim=1)
    expected = counts.cumsum(0) - counts
    for start in range(shape[0] + 1):
        for stop in range(start, shape[0] + 1):
            assert torch.equal(RowStarts(node, rule, begin).read(start, stop, Scratch()), expected[start:stop])


def test_two_of_four(monkeypatch):
    monkeypatch.setattr(_bits, "BLOCK", 8)
    tensor = sparse(3, 12, share=0.0)
    tensor.view(-1, 4)[:, 1:3] = 0
    tensor[0, 3] = 0  # a group of one value
    node, rows = Held(tensor), Rows(3, 12)
    assert counts_of(node, "2:4").value().tolist() == [0]
    values = materialize(KeptOfFour(node))
    assert torch.equal(values, tensor.view(3, 3, 4)[:, :, [0, 3]].reshape(3, 6))
    packed = Bits(node, "2:4", rows, (3, 2))
    begin = places(counts_of_bits(packed, rows).value())
    assert torch.equal(materialize(Dense(Held(values), packed, rows, (3, 12), begin)), tensor)
    tensor[2, 1] = 1
    assert counts_of(Held(tensor), "2:4").value().tolist() == [1]


def test_what_fills_up_a_row_is_not_counted():
    packed = torch.tensor([[0xFF, 0xFF], [0x01, 0xFE]], dtype=torch.uint8)  # rows of 9: the last 7 bits mean nothing
    assert counts_of_bits(Held(packed), Rows(2, 9)).value().tolist() == [9 + 1]


def test_too_few_values_are_an_error():
    packed = packed_bits(torch.ones(1, 8, dtype=torch.bool)).view(-1)
    with pytest.raises(FormatError, match="damaged"):
        materialize(Dense(Held(torch.ones(5)), Held(packed), Rows(1, 8), (8,), [0, 8]))

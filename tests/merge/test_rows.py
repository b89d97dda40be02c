"""Gathering rows: against a slow loop, in small pieces, from sources that can only be had in large ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.merge._rows import Order, Rows, mean_slice
from weightsmith.weights import Held, Lazy, Scratch, Spec, Weights, apply, materialize


def by_hand(sources: list[Tensor], terms: list[list[tuple[int, int]]], axis: int) -> Tensor:
    """Slice after slice, in float64."""
    slices = []
    for one in terms:
        total = torch.zeros_like(sources[0].select(axis, 0), dtype=torch.float64)
        for source, row in one:
            total = total + sources[source].select(axis, row).double() / len(one)
        slices.append(total)
    return torch.stack(slices, axis)


class Watched:
    """A source that notes what is asked of it, and can only be cut every ``grain`` elements."""

    def __init__(self, tensor: Tensor, grain: int = 1):
        self.tensor, self.grain = tensor.contiguous(), grain
        self.spec = Spec(tuple(tensor.shape), tensor.dtype)
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        assert start % self.grain == 0
        assert stop % self.grain == 0 or stop == self.spec.numel
        self.asked.append((start, stop))
        values = scratch.take(stop - start, self.spec.dtype)  # as files do: valid until the next chunk
        return values.copy_(self.tensor.view(-1)[start:stop])

    def inputs(self) -> tuple[Lazy, ...]:
        return ()

    def identity(self) -> object:
        return "watched"


def blocks_of(elements: int) -> type[Rows]:
    """Gathers that read at most so many elements together that are not all wanted."""
    return type("Small", (Rows,), {"BLOCK": elements})


HEIGHTS = (5, 3, 7)
TERMS = st.lists(
    st.lists(st.sampled_from([(s, r) for s, height in enumerate(HEIGHTS) for r in range(height)]), max_size=3),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(TERMS, st.sampled_from([(), (4,), (2, 3)]), st.integers(0, 1), st.integers(1, 40), st.sampled_from([1, 6, 99]))
def test_the_loop(terms, tail, axis, grain, block):
    """Runs and blocks, any grain, either axis, in pieces as small as a row."""
    shapes = [(height, *tail) if axis == 0 else (3, height, *tail) for height in HEIGHTS]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    rows = blocks_of(block)([Watched(tensor, grain) for tensor in tensors], Order.of(terms), torch.float32, axis)
    expected = by_hand(tensors, terms, axis)
    assert rows.spec.shape == expected.shape
    torch.testing.assert_close(materialize(rows).double(), expected, rtol=1e-6, atol=1e-6)
    pieces = []
    for start in range(0, rows.spec.numel, rows.grain):
        pieces.append(rows.read(start, min(start + rows.grain, rows.spec.numel), Scratch()).clone())
    assert torch.equal(torch.cat(pieces).view(expected.shape), materialize(rows))


def test_only_what_is_wanted_is_read():
    source = Watched(torch.arange(4000.0).view(1000, 4))
    rows = blocks_of(8)([source], Order.of([[(0, 3)], [(0, 4)], [(0, 900)], [(0, 10)]]), torch.float32)
    assert materialize(rows)[:, 0].tolist() == [12, 16, 3600, 40]
    assert source.asked == [(12, 20), (3600, 3604), (40, 44)]


def test_near_rows_are_read_in_one_piece():
    source = Watched(torch.arange(40.0).view(10, 4))
    rows = Rows([source], Order.of([[(0, 5)], [(0, 3)], [(0, 4)]]), torch.float32)
    assert materialize(rows)[:, 0].tolist() == [20, 12, 16]
    assert source.asked == [(12, 24)]


def test_a_source_that_comes_whole_is_read_once():
    source = Watched(torch.arange(4000.0).view(1000, 4), grain=4000)
    rows = blocks_of(8)([source], Order.of([[(0, 999 - row)] for row in range(1000)]), torch.float32)
    assert rows.grain == 4000
    assert torch.equal(materialize(rows), source.tensor.flip(0))
    assert source.asked == [(0, 4000)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_are_exact_and_means_are_rounded_once(dtype):
    one, two = torch.full((1, 2), 1.0, dtype=dtype), torch.full((1, 2), 1.0 + 2**-7, dtype=dtype)
    copied = Rows([Held(one), Held(two)], Order.of([[(1, 0)]]), dtype)
    assert copied.read(0, 2, Scratch()).dtype == dtype
    assert torch.equal(materialize(copied), two)
    mixed = Rows([Held(one), Held(two)], Order.of([[(1, 0)], [(0, 0), (1, 0)]]), dtype)
    travelling = mixed.read(0, 4, Scratch())
    assert travelling.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert travelling.tolist() == [1 + 2**-7] * 2 + [1 + 2**-8] * 2
    assert torch.equal(materialize(mixed)[1], torch.tensor([1 + 2**-8] * 2).to(dtype))


def test_rows_of_other_dtypes_travel_wide():
    rows = Rows([Held(torch.ones(1, 1, dtype=torch.bfloat16)), Held(torch.full((1, 1), 1 / 3))],
                Order.of([[(1, 0)], [(0, 0)]]), torch.bfloat16)  # fmt: skip
    assert rows.read(0, 2, Scratch())[0] == torch.tensor(1 / 3)
    assert materialize(rows).dtype == torch.bfloat16


def test_float8_is_copied():
    table = torch.randn(4, 3).to(torch.float8_e4m3fn)
    rows = Rows([Held(table)], Order.of([[(0, 2)], [(0, 0)], []]), table.dtype)
    expected = torch.stack([table[2].float(), table[0].float(), torch.zeros(3)])
    assert torch.equal(materialize(rows).float(), expected)


def test_zero_rows_nan_rows_and_no_elements():
    table = torch.tensor([[float("nan"), 1.0], [2.0, float("inf")]])
    zero = materialize(Rows([Held(table)], Order.of([[], []]), torch.float32))
    assert zero.tolist() == [[0, 0], [0, 0]]
    mixed = materialize(Rows([Held(table)], Order.of([[], [(0, 1)], [(0, 0)]]), torch.float32))
    torch.testing.assert_close(mixed, torch.cat([torch.zeros(1, 2), table.flip(0)]), equal_nan=True)
    assert materialize(Rows([Held(torch.ones(3, 0))], Order.of([[(0, 1)]]), torch.float32)).shape == (1, 0)


def test_a_table_that_is_not_contiguous():
    table = torch.arange(12.0).view(3, 4).T
    rows = blocks_of(1)([Held(table)], Order.of([[(0, 3)], [(0, 1)]]), torch.float32)
    assert torch.equal(materialize(rows), table[[3, 1]])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.usefixtures("small_pieces")
def test_the_mean_slice(axis):
    table = torch.randn(9, 11, 3)
    found = materialize(mean_slice(Held(table), axis))
    torch.testing.assert_close(found, table.double().mean(axis, keepdim=True).float())


@pytest.mark.usefixtures("small_pieces")
def test_saved_bytes_do_not_depend_on_threads_and_the_identity_says_what_it_is(tmp_path):
    table = torch.randn(50, 8, dtype=torch.float32)
    Weights.of({"w": table, "v": table.flip(0).clone()}).save(tmp_path / "in.safetensors")

    def made() -> Weights:
        import weightsmith as ws

        read = ws.open(tmp_path / "in.safetensors")
        terms = [[(row % 2, (7 * row) % 50)] if row % 5 else [(0, row % 50), (1, 3)] for row in range(60)]
        gathered = Rows([read.node("w"), read.node("v")], Order.of(terms), torch.float32)
        whole = Rows([read.node("w"), mean_slice(gathered, 0)], Order.of([[(0, 4)], [(1, 0)]]), torch.float32)
        return Weights({"a": gathered, "b": whole, "c": apply(torch.neg, whole)})

    for threads in (1, 4):
        made().save(tmp_path / f"{threads}.safetensors", threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()
    assert made().node("b").identity() == made().node("b").identity()
    assert made().node("b").identity() != made().node("a").identity()
    torch.testing.assert_close(made()["b"][1], made()["a"].mean(0))

"""Codes of unequal length: the best ones there are, there and back in C and in PyTorch, and damaged ones refused."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from weightsmith import native
from weightsmith.errors import FormatError
from weightsmith.share import _huffman
from weightsmith.share._huffman import LANE, WIDEST, WINDOW, code_lengths, code_of, coded, counted, decoded, lane_bytes

SIZES = (1, 2, 31, 32, 33, LANE - 1, LANE, LANE + 1, 4 * LANE, 5 * LANE + 40)


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the loops in C, and without."""
    if request.param == "plain":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the native loops were not built (no C compiler?)")
    return request.param


def exponents(size: int, seed: int = 0) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return (values.abs().log2().floor() + 100).clamp(0, 255).to(torch.uint8)


def lengths_for(symbols: Tensor) -> list[int]:
    counts = counted(symbols).tolist()
    counts[0] += 1  # at least two symbols, or there is no code
    counts[1] += 1
    return code_lengths(counts)


def starts(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def encoded(symbols: Tensor) -> tuple[Tensor, Tensor, bytes]:
    lengths = bytes(lengths_for(symbols))
    code = code_of(lengths)
    begin = starts(lane_bytes(symbols, code))
    return coded(symbols, begin, code), begin, lengths


def by_hand(stream: Tensor, begin: list[int], count: int, lengths: bytes) -> list[int]:
    """Bit by bit, from the definition of a canonical code."""
    words: dict[str, int] = {}
    word, before = 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        word <<= length - before
        before = length
        words[format(word, f"0{length}b")] = symbol
        word += 1
    found: list[int] = []
    for lane, first in enumerate(begin[:-1]):
        bits = iter(stream[first : begin[lane + 1]].tolist())
        flat = (byte >> place & 1 for byte in bits for place in range(8))
        wanted = min(LANE, count - lane * LANE)
        for _ in range(wanted):
            seen = ""
            while seen not in words:
                seen += str(next(flat))
            found.append(words[seen])
    return found


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(way: str, size: int):
    symbols = exponents(size, size)
    stream, begin, lengths = encoded(symbols)
    assert len(stream) == begin[-1]
    assert torch.equal(decoded(stream, begin, size, code_of(lengths)), symbols)
    if size <= LANE + 1:
        assert by_hand(stream, begin.tolist(), size, lengths) == symbols.tolist()


@pytest.mark.skipif(not native.available(), reason="the native loops were not built (no C compiler?)")
@pytest.mark.parametrize("size", SIZES)
def test_both_ways_give_the_same_bytes(size: int, monkeypatch: pytest.MonkeyPatch):
    symbols = exponents(size, size)
    one = encoded(symbols)
    counts = counted(symbols)
    monkeypatch.setattr(native, "_library", lambda: None)
    other = encoded(symbols)
    assert torch.equal(counts, counted(symbols))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_all_symbols_and_the_longest_codes(way: str):
    counts = [max(2 ** (40 - symbol), 1) for symbol in range(256)]
    lengths = bytes(code_lengths(counts))
    assert max(lengths) == WINDOW
    symbols = torch.arange(256, dtype=torch.uint8).repeat(40)
    code = code_of(lengths)
    begin = starts(lane_bytes(symbols, code))
    stream = coded(symbols, begin, code)
    assert torch.equal(decoded(stream, begin, len(symbols), code), symbols)
    for seed in range(20):  # codes of every length, from every bit of a byte on, up to the very end of a lane
        few = torch.randint(0, 256, (31,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8) // (1 + seed)
        begin = starts(lane_bytes(few, code))
        assert torch.equal(decoded(coded(few, begin, code), begin, 31, code), few)
    worst = torch.full((LANE,), 255, dtype=torch.uint8)
    assert lane_bytes(worst, code).tolist() == [WIDEST]


def test_a_code_of_eight_bits_each_is_the_symbols_themselves():
    code = code_of(bytes([8] * 256))
    reversed_bits = code.words.to(torch.int32)
    assert sorted(reversed_bits.tolist()) == list(range(256))
    assert (code.lengths == 8).all()


# Lengths


def cost(counts: list[int], lengths: list[int]) -> int:
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


@pytest.mark.parametrize("limit", [2, 3, 4])
def test_lengths_are_the_best_of_all(limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_huffman, "WINDOW", limit)
    draw = random.Random(limit)
    for _ in range(30):
        size = draw.randint(2, min(2**limit, 5))
        counts = [draw.choice([1, 1, 2, 5, 30, 1000]) for _ in range(size)]
        found = code_lengths(counts)
        complete = [one for one in itertools.product(range(1, limit + 1), repeat=size)
                    if sum(2 ** (limit - length) for length in one) == 2**limit]  # fmt: skip
        assert tuple(found) in complete
        assert cost(counts, found) == min(cost(counts, list(one)) for one in complete), counts


def test_lengths_stay_within_a_bit_of_the_entropy():
    counts = counted(exponents(100_000))
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * shares.log2()).sum())
    mean = cost(counts.tolist(), code_lengths(counts.tolist())) / 100_000
    assert entropy <= mean < entropy + 0.1


def test_symbols_that_do_not_occur_have_no_code():
    assert code_lengths([3, 0, 0, 3]) == [1, 0, 0, 1]
    assert code_lengths([0, 0, 9]) == [0, 0, 1]
    assert code_lengths([0, 0]) == [0, 0]


# What is damaged


def test_a_stream_that_is_too_long_is_refused(way: str):
    symbols = exponents(LANE + 7)
    stream, begin, lengths = encoded(symbols)
    begin[-1] += 1
    with pytest.raises(FormatError, match="damaged"):
        decoded(torch.nn.functional.pad(stream, (0, 1)), begin, len(symbols), code_of(lengths))


@pytest.mark.parametrize(
    "lengths",
    [
        bytes(256),
        bytes([1] + [0] * 255),
        bytes([1, 1, 1] + [0] * 253),
        bytes([2, 2, 2] + [0] * 253),
        bytes([13, *range(1, 13), 13] + [0] * 242),
        bytes([1, 1]),
    ],
)
def test_tables_that_are_no_code_are_refused(lengths: bytes):
    with pytest.raises(FormatError):
        code_of(lengths)


def test_a_lane_that_ends_elsewhere_is_refused(way: str):
    symbols = exponents(3 * LANE + 7)
    stream, begin, lengths = encoded(symbols)
    for lane in range(1, len(begin)):
        moved = begin.clone()
        moved[lane] -= 1
        with pytest.raises(FormatError, match="damaged"):
            decoded(stream[: int(moved[-1])], moved, len(symbols), code_of(lengths))


def test_any_stream_ends(way: str):
    """Whatever the bytes, there are symbols of the right number, or an error; nothing is read from outside."""
    draw = torch.Generator().manual_seed(0)
    lengths = bytes(lengths_for(exponents(10_000)))
    refused, trials = 0, 60 if way == "native" else 8
    for trial in range(trials):
        size = int(torch.randint(0, 3000, (), generator=draw))
        stream = torch.randint(0, 256, (size,), generator=draw).to(torch.uint8)
        count = int(torch.randint(1, 3 * LANE, (), generator=draw))
        lanes = -(-count // LANE)
        inner = torch.randint(0, size + 1, (lanes - 1,), generator=draw).sort().values
        begin = torch.cat([torch.tensor([0]), inner, torch.tensor([size])])
        if trial % 2:
            begin = begin.flip(0)  # not even in order
        try:
            assert len(decoded(stream, begin, count, code_of(lengths))) == count
        except FormatError:
            refused += 1
    assert refused == trials  # random bytes end where they should about never


@pytest.mark.skipif(not native.available(), reason="the native loops were not built (no C compiler?)")
def test_wrong_lanes_are_the_same_in_both():
    stream, begin, lengths = encoded(exponents(6 * LANE))
    code, damaged = code_of(lengths), stream.clone()
    damaged[int(begin[4]) + 5] ^= 0xFF
    found = native.decoded(damaged, begin, 6 * LANE, LANE, code.several, code.single, WINDOW)
    assert found is not None
    made, wrong = _huffman._decoded(damaged, begin, 6 * LANE, code)
    assert found[1] == wrong
    assert wrong in (-1, 4)
    assert torch.equal(found[0][: 4 * LANE], made[: 4 * LANE])


def test_nothing_is_nothing(way: str):
    code = code_of(bytes([1, 1] + [0] * 254))
    assert decoded(torch.empty(0, dtype=torch.uint8), torch.tensor([0]), 0, code).tolist() == []

"""The block codec against a loop over values, at every setting; what it does with what cannot be coded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.codecs import BlockCodec, Blocks, dynamic_codebook, linear_codebook, quantile_codebook
from weightsmith.quantize.codecs import _blocks as module

NAMES: Any = {"dynamic": dynamic_codebook, "linear": linear_codebook}


def sample(numel: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).exp()
    return wide * (torch.arange(numel) % 7 != 3)  # zeros among them


def by_hand(values: Tensor, codec: BlockCodec) -> Tensor:
    """Nearest values, block after block and value after value."""
    flat = values.reshape(-1).double()
    found = []
    for block in flat.split(codec.block or max(len(flat), 1)):
        if codec.codebook == "uniform":
            step = float(block.max() - block.min()) / (2**codec.bits - 1)
            points = block.min() + step * torch.arange(2**codec.bits, dtype=torch.float64)
        else:
            points = NAMES[codec.codebook](codec.bits, signed=codec.signed).double() * block.abs().max()
        found += [points[(points - value).abs().argmin()] for value in block]
    return torch.stack(found).view(values.shape) if found else values.double()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("codebook", "signed"), [("dynamic", True), ("dynamic", False), ("linear", True),
                                                  ("linear", False), ("uniform", True)])  # fmt: skip
@pytest.mark.parametrize("block", [1, 7, 16, None])
def test_every_value_goes_to_the_nearest_point(codebook: str, signed: bool, bits: int, block: int | None):
    values = sample(75).view(5, 15)
    values = values if signed else values.abs()
    codec = BlockCodec(codebook, bits=bits, block=block, signed=signed)
    blocks = codec.encode(values)
    found = codec.decode(blocks)
    assert found.shape == values.shape
    assert found.dtype == values.dtype
    assert blocks.codes.dtype == torch.uint8
    assert len(blocks.codes) == (75 if bits > 4 else 38)
    expected = by_hand(values, codec)
    # Of two points that are equally near either may be taken.
    torch.testing.assert_close((found - values).abs().double(), (expected - values).abs(), rtol=1e-4, atol=1e-5)
    assert blocks.nbytes == codec.nbytes(75) == sum(part.nbytes for part in blocks.tensors)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_table_of_ones_own(rounding: Any):
    values = sample(200)
    table = tuple(quantile_codebook(values, 3).tolist())
    codec = BlockCodec(table, bits=3, block=50, rounding=rounding)
    found = codec.decode(codec.encode(values))
    points = torch.tensor(table) * values.view(4, 50).abs().amax(dim=1, keepdim=True).repeat_interleave(50, 0)
    gaps = (found[:, None] - points).abs().amin(dim=1)
    assert float(gaps.max()) < 1e-6


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch):
    """What lies across the border of two pieces is coded as anything else is."""
    values = sample(301)
    for bits, book, block in itertools.product((4, 8), ("dynamic", "uniform"), (3, 40, 300, None)):
        codec = BlockCodec(book, bits=bits, block=block)
        monkeypatch.setattr(module, "CHUNK", 2**18)
        whole = codec.encode(values)
        decoded = codec.decode(whole)
        monkeypatch.setattr(module, "CHUNK", 16)
        parts = codec.encode(values)
        for one, other in zip(whole.tensors, parts.tensors, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(codec.decode(parts), decoded)


def test_marks_that_are_too_near_for_the_table_of_places_are_searched():
    table = (-1.0, 0.5, 0.50001, 0.50002, 0.50003, 1.0)
    values = torch.tensor([0.500011, 0.500021, 0.4, 1.0, -0.9, 0.2])
    found = BlockCodec(table, bits=5).encode(values)
    assert found.codes.tolist() == [2, 3, 1, 5, 0, 1]


def test_places_are_those_of_a_search():
    """At marks, next to them, and everywhere else; of both signs."""
    levels = dynamic_codebook()
    marks = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([torch.nextafter(marks, torch.tensor(side)) for side in (-2.0, 2.0)])
    values = torch.cat([marks, near, levels, torch.linspace(-1, 1, 10_001), torch.tensor([0.0, -0.0, 1e-40, -1e-40])])
    assert torch.equal(module._Finder(marks)(values).long(), torch.bucketize(values, marks))


@pytest.mark.parametrize("codec", [BlockCodec("linear", bits=3, rounding="stochastic", block=8),
                                   BlockCodec("dynamic", bits=4, rounding="stochastic", block=8),
                                   BlockCodec("uniform", bits=3, rounding="stochastic", block=8),
                                   BlockCodec("uniform", bits=3, rounding="shifted", block=8)])  # fmt: skip
def test_rounding_at_random_is_right_in_the_mean(codec: BlockCodec):
    values = sample(16) - (0.1 if codec.codebook == "uniform" else 0)
    if codec.codebook == "dynamic":
        values[[0, 8]] = 30.0  # -1 is not in the table
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([codec.decode(codec.encode(values, generator=generator)) for _ in range(4000)])
    error = draws.std(dim=0) / 4000**0.5
    assert bool(((draws.mean(dim=0) - values).abs() <= 5 * error + 1e-5).all())
    nearest = BlockCodec(codec.codebook, bits=codec.bits, block=8)
    assert float((nearest.decode(nearest.encode(values)) - values).abs().max()) > 0.01


def test_a_shift_is_one_for_all_and_keeps_within_half_a_step():
    values = sample(64)
    codec = BlockCodec("uniform", bits=4, block=16, rounding="shifted")
    steps = (values.view(4, 16).amax(dim=1) - values.view(4, 16).amin(dim=1)) / 15
    for seed in range(20):
        blocks = codec.encode(values, generator=torch.Generator().manual_seed(seed))
        assert blocks.offset is not None
        shift = (blocks.offset - values.view(4, 16).amin(dim=1)) / steps
        torch.testing.assert_close(shift, shift[:1].expand(4), rtol=1e-4, atol=1e-4)
        error = (codec.decode(blocks) - values).abs().view(4, 16)
        assert bool((error <= steps[:, None] * 0.5001).all())


def test_a_seed_is_a_draw():
    values, codec = sample(100), BlockCodec("linear", rounding="stochastic")
    one, same, other = (codec.encode(values, generator=torch.Generator().manual_seed(s)).codes for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype):
    values = sample(100).to(dtype)
    codec = BlockCodec(block=16)
    blocks = codec.encode(values)
    assert torch.equal(blocks.codes, codec.encode(values.float()).codes)
    found = codec.decode(blocks)
    assert found.dtype == dtype
    assert torch.equal(found, codec.decode(codec.encode(values.float())).to(dtype))


def test_any_strides_and_the_input_is_left_alone():
    values = sample(60).view(6, 10).t()
    before = values.clone()
    codec = BlockCodec(block=8)
    found = codec.decode(codec.encode(values))
    assert torch.equal(values, before)
    assert torch.equal(found, codec.decode(codec.encode(values.contiguous())))


def test_decoding_into_a_tensor():
    codec = BlockCodec(block=8)
    blocks = codec.encode(sample(20))
    out = torch.full((20,), 9.0, dtype=torch.bfloat16)
    assert codec.decode(blocks, out=out) is out
    assert torch.equal(out, codec.decode(blocks).bfloat16())
    for wrong in (torch.empty(19), torch.empty(20, 2)[:, 0]):
        with pytest.raises(Error, match="contiguous out of 20 values"):
            codec.decode(blocks, out=wrong)


@pytest.mark.parametrize("other", [{"bits": 4}, {"block": 16}, {"codebook": "uniform"}])
def test_blocks_of_another_codec_are_refused(other: dict[str, Any]):
    blocks = BlockCodec(block=8).encode(sample(20))
    with pytest.raises(Error, match=r"blocks of its own codec: .* these have 32"):
        BlockCodec(**{"block": 8} | other).decode(blocks)


@pytest.mark.parametrize("book", ["dynamic", "linear", "uniform"])
@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_one_value_and_zeros(book: str, bits: int):
    codec = BlockCodec(book, bits=bits, block=4)
    nothing = codec.encode(torch.empty(3, 0))
    assert nothing.nbytes == 0
    assert codec.decode(nothing).shape == (3, 0)
    one = torch.tensor(2.5)
    torch.testing.assert_close(codec.decode(codec.encode(one)), one)
    zeros = codec.decode(codec.encode(torch.zeros(9)))
    assert torch.equal(zeros, torch.zeros(9))
    tiny = torch.full((5,), 1e-42)
    assert bool((codec.decode(codec.encode(tiny)) - tiny).abs().max() < 1e-42)
    huge = torch.tensor([-3e38, 3e38, 0.0, 1e38])
    if book == "uniform":
        with pytest.raises(Error, match="reach from -3e\\+38 to 3e\\+38"):
            codec.encode(huge)
    else:
        assert bool(codec.decode(codec.encode(huge)).isfinite().all())


def test_zero_and_the_largest_are_exact():
    values = sample(4096)
    for book in ("dynamic", "linear"):
        codec = BlockCodec(book, block=64)
        found = codec.decode(codec.encode(values))
        assert bool((found[values == 0] == 0).all())
        largest, place = values.view(-1, 64).max(dim=1)
        up = largest == values.view(-1, 64).abs().amax(dim=1)
        assert torch.equal(found.view(-1, 64).gather(1, place[:, None])[up, 0], largest[up])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("book", ["dynamic", "uniform", (-1.0, -0.3, 0.5, 1.0)])  # the last without 0
def test_what_is_not_finite(bad: float, book: Any):
    values = sample(12)
    values[5] = bad
    codec = BlockCodec(book, block=4)
    with pytest.raises(Error, match="finite values"):
        codec.encode(values)
    found = codec.decode(codec.encode(values, check=False))
    assert bool(found[4:8].isnan().all())
    good = BlockCodec(book, block=4)
    assert torch.equal(found[:4], good.decode(good.encode(values[:4])))
    assert torch.equal(found[8:], good.decode(good.encode(values[8:])))


def test_below_zero_without_a_sign():
    codec = BlockCodec(signed=False)
    with pytest.raises(Error, match="at least 0, got -2"):
        codec.encode(torch.tensor([1.0, -2.0]))
    assert codec.decode(codec.encode(torch.tensor([1.0, -2.0]), check=False)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("options", "words"), [
    ({"bits": 9}, "2 to 8 bits"),
    ({"block": 0}, "at least one value"),
    ({"codebook": "dynamc"}, "did you mean 'dynamic'"),
    ({"rounding": "up"}, "rounding is one of"),
    ({"rounding": "shifted"}, "take 'stochastic'"),
    ({"codebook": (1.0, 0.0)}, "sorted"),
    ({"codebook": (0.0, 2.0)}, "between -1 and 1"),
    ({"codebook": (0.0, 0.5, 0.7, 0.8, 1.0), "bits": 2}, "2 to 4 finite values"),
])  # fmt: skip
def test_settings_that_do_not_go(options: dict[str, Any], words: str):
    with pytest.raises(Error, match=words):
        BlockCodec(**options)


def test_whole_numbers_and_tables_of_uniform_codecs():
    with pytest.raises(Error, match="floating values"):
        BlockCodec().encode(torch.arange(3))
    with pytest.raises(Error, match="has no table"):
        BlockCodec("uniform").levels()


def test_dynamic_blocks_are_nearer_than_one_even_scale():
    """What the paper measures: wide values, with outliers in a few blocks."""
    values = sample(2**16)
    values[:3] *= 1000

    def error(codec: BlockCodec) -> float:
        return float((codec.decode(codec.encode(values)) - values).abs().mean())

    assert error(BlockCodec()) < error(BlockCodec(block=None)) < error(BlockCodec("linear", block=None))
    assert error(BlockCodec()) < error(BlockCodec("linear"))


def test_blocks_say_what_they_hold():
    blocks = BlockCodec("uniform", bits=4, block=32).encode(torch.zeros(3, 33, dtype=torch.bfloat16))
    assert isinstance(blocks, Blocks)
    assert blocks.shape == (3, 33)
    assert blocks.dtype == torch.bfloat16
    assert len(blocks.codes) == 50
    assert len(blocks.scale) == 4
    assert blocks.nbytes == 50 + 2 * 16

"""Lossless coding of whole tensors: layouts, runs that are read anyhow, and files that lie."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weightsmith import native
from weightsmith.errors import Error, FormatError
from weightsmith.share import _exponents, decode, encode
from weightsmith.share._exponents import DTYPES, floats, read, runs
from weightsmith.share._huffman import LANE, code_lengths
from weightsmith.share._planes import entropy, planes
from weightsmith.share.room import METADATA
from weightsmith.weights import Held, Scratch, Spec, Weights, apply


def normal(*shape: int, seed: int = 0, size: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def same_bits(one: Tensor, other: Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def odd() -> Tensor:
    """NaN with payloads, infinities, both zeros, the smallest numbers, among weights."""
    bits = normal(3 * LANE + 11).bfloat16().view(torch.int16)
    places = torch.randperm(len(bits), generator=torch.Generator().manual_seed(1))[:12]
    words = [0x7F81, 0xFFC3, 0x7FFF, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x8001, 0x0080, 0x7F7F, 0xFF7F]
    bits[places] = torch.tensor([word - 2**16 * (word >> 15) for word in words], dtype=torch.int16)
    return bits.view(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, LANE - 1, LANE, 2 * LANE + 1])
def test_there_and_back(dtype: torch.dtype, size: int):
    values = normal(size, seed=size).abs().to(dtype)
    assert same_bits(decode(encode({"w": values}, pattern="w"))["w"], values)


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_no_common_number_comes_back_to_the_bit(plain: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if plain:
        monkeypatch.setattr(native, "_library", lambda: None)
    values = odd()
    assert values.isnan().any()
    for weights in ({"w": values}, {"w": values.reshape(1, -1).t()}):  # the other has strides
        encoded = encode(weights, pattern="w")
        assert same_bits(decode(encoded)["w"], weights["w"])
        encoded.save(tmp_path / "w.safetensors", overwrite=True)
        assert same_bits(decode(tmp_path / "w.safetensors")["w"], weights["w"])


def test_every_pattern_of_sixteen_bits():
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bits(decode(encode({"w": values.view(dtype)}, pattern="w"))["w"], values.view(dtype))


def test_what_is_stored():
    values = normal(100, 300).bfloat16()
    encoded = encode({"w": values})
    exponents, rest = planes(values.reshape(-1))
    assert torch.equal(encoded["w_rest"], rest)
    assert encoded["w_shape"].tolist() == [100, 300]
    assert encoded["w_sizes"].shape == (1, -(-30_000 // LANE))
    assert int(encoded["w_sizes"].sum()) == len(encoded["w_stream"])
    assert encoded["w_table"].shape == (2, 128)
    table = [[word >> 4 * half & 15 for word in row for half in (0, 1)] for row in encoded["w_table"].tolist()]
    assert table[0] == code_lengths(torch.bincount(exponents.long(), minlength=256).tolist())
    assert table[1] == [8] * 256
    lengths = torch.tensor(table[0])[exponents.int()]
    by_lane = [-(-int(part.sum()) // 8) for part in lengths.split(LANE)]
    assert encoded["w_sizes"][0].tolist() == by_lane


def test_sizes_are_near_the_bound():
    values = normal(400, 500).bfloat16()
    counts = torch.bincount(planes(values.reshape(-1))[0].long())
    bound = values.numel() * (8 + entropy(counts)) / 8
    encoded = encode({"w": values})
    assert bound < encoded.nbytes < 1.01 * bound
    assert encoded.nbytes < 0.68 * values.nbytes


def test_floats_that_were_narrower_before_take_what_they_took_then():
    narrow = normal(300, 400).bfloat16()
    encoded, wide = encode({"w": narrow}), encode({"w": narrow.float()})
    assert abs(wide.nbytes - encoded.nbytes) < 600
    assert same_bits(decode(wide)["w"], narrow.float())


def test_one_value_all_over_takes_nothing_for_each():
    encoded = encode({"w": torch.full((90_000,), -1.5)})
    assert encoded["w_stream"].numel() == encoded["w_rest"].numel() == 0
    assert same_bits(decode(encoded)["w"], torch.full((90_000,), -1.5))


def test_a_lane_of_the_longest_codes_fits_its_count():
    values = torch.cat([torch.tensor([2.0**-k]).repeat(2 ** max(17 - k, 0)) for k in range(40)])
    values = torch.cat([values, torch.full((3 * LANE,), 2.0**-39)]).bfloat16()
    rare = torch.cat([torch.tensor([2.0**-k]).repeat(2**19 >> k or 1) for k in range(60)]).bfloat16()
    for one in (values, rare):
        assert same_bits(decode(encode({"w": one}, pattern="w"))["w"], one)


# Runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_run_of_any_part(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_exponents, "RUN", LANE)  # several runs a read
    values = normal(3 * LANE + 100).bfloat16().to(dtype)
    values[: len(values) // 2] += 0.001  # in float32, planes that are coded, kept and neither
    encoded = encode({"w": values}, pattern="w")
    draw = random.Random(0)
    for weights, name in [(encoded, "w_stream"), (encoded, "w_rest"), (decode(encoded), "w")]:
        node = weights.node(name)
        whole = node.read(0, node.spec.numel, Scratch()).clone()
        for _ in range(40):
            start = draw.randint(0, node.spec.numel)
            stop = draw.randint(start, min(start + draw.choice([3, 5000, 10**6]), node.spec.numel))
            assert torch.equal(node.read(start, stop, Scratch()), whole[start:stop]), (name, start, stop)


@pytest.mark.usefixtures("small_pieces")
def test_small_pieces_and_threads_give_the_same_file(tmp_path: Path):
    weights = {"a": normal(40, 130).bfloat16(), "b": normal(5000).half()}
    encode(weights, pattern="*", threads=1).save(tmp_path / "one.safetensors", threads=1)
    encode(weights, pattern="*", threads=3).save(tmp_path / "many.safetensors", threads=3)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "many.safetensors").read_bytes()
    back = decode(tmp_path / "one.safetensors")
    back.save(tmp_path / "back.safetensors", threads=3)
    found = Weights.of(weights)
    assert all(same_bits(back[name], found[name]) for name in weights)


def test_sources_that_are_read_in_coarse_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_exponents, "UNIT", LANE)
    values = normal(70, 131)
    rows = Weights({"w": apply(torch.negative, Held(values), unit="tensor", spec=Spec((70, 131), torch.float32))})
    assert rows.node("w").grain == values.numel()
    encoded = encode(rows, pattern="w")
    assert encoded.node("w_stream").grain == encoded.spec("w_stream").numel
    assert same_bits(decode(encoded)["w"], -values)
    turned = encode({"w": values.t()}, pattern="w")  # read row by row, of 70
    assert same_bits(decode(turned)["w"], values.t())


def test_read_widens_to_the_grain():
    node = Held(torch.arange(30.0).reshape(5, 6).t())
    assert node.grain == 5
    expected = torch.arange(30.0).reshape(5, 6).t().reshape(-1)
    for start in range(30):
        assert torch.equal(read(node, start, 30, Scratch()), expected[start:])


class Strict(Held):
    """Is read as the contract of nodes says, or fails; what it gave is overwritten by the next reading."""

    reads = 0

    def __init__(self, tensor: Tensor, grain: int = 1):
        super().__init__(tensor)
        self.grain = grain

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        assert start % self.grain == 0
        assert stop % self.grain == 0 or stop == self.spec.numel
        assert 0 <= start <= stop <= self.spec.numel
        self.reads += 1
        return scratch.take(stop - start, self.spec.dtype).copy_(self.tensor.reshape(-1)[start:stop])


@pytest.mark.parametrize("grain", [1, 4, 7, 30])
def test_reads_begin_and_end_at_the_grain(grain: int):
    node = Strict(torch.arange(30.0), grain)
    for start in range(30):
        for stop in range(start, 31):
            assert torch.equal(read(node, start, stop, Scratch()), torch.arange(30.0)[start:stop])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grain", [1, 100])
def test_runs_of_what_is_overwritten_by_the_next(dtype: torch.dtype, grain: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_exponents, "RUN", LANE)
    bits = torch.randint(0, 256, ((3 * LANE + 100) * dtype.itemsize,), generator=torch.Generator().manual_seed(0))
    for values in (bits.to(torch.uint8).view(dtype), normal(3 * LANE + 100).to(dtype)):
        encoded = encode(Weights({"w": Strict(values, grain)}), pattern="w")
        for weights, name in [(encoded, "w_stream"), (encoded, "w_rest"), (decode(encoded), "w")]:
            node = weights.node(name)
            whole = weights[name].reshape(-1)
            assert name != "w" or same_bits(whole, values)
            for start in (0, 1, LANE - 1, 2 * LANE):
                if start < node.spec.numel:
                    found = node.read(start, node.spec.numel, Scratch())
                    assert torch.equal(found.view(torch.uint8), whole[start:].view(torch.uint8)), (name, start)


def test_what_is_made_in_one_piece_is_made_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_exponents, "UNIT", LANE)
    monkeypatch.setattr(_exponents, "RUN", LANE)
    values = normal(5 * LANE + 3)
    source = Strict(values, len(values))
    encoded = encode(Weights({"w": source}), pattern="w")
    assert source.reads == 2  # to count, and to count again
    for name, reads in (("w_stream", 1), ("w_rest", 1)):
        source.reads = 0
        encoded[name]
        assert source.reads == reads, name
    source.reads = 0
    assert same_bits(decode(encoded)["w"], values)
    assert source.reads == 2


def test_runs():
    assert list(runs(3, 11, 4)) == [(3, 4), (4, 8), (8, 11)]
    assert list(runs(4, 4, 4)) == []


# What lies


def damaged(tensors: dict[str, Tensor], words: dict[str, object]) -> Weights:
    return Weights(Weights.of(tensors)._nodes, metadata={METADATA: json.dumps(words)})


def sound() -> tuple[dict[str, Tensor], dict[str, object]]:
    encoded = encode({"w": normal(2 * LANE + 50).bfloat16()}, pattern="w")
    return encoded.to_dict(), json.loads(encoded.metadata[METADATA])


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("w_shape", lambda t: t + 1, "w_rest|w_sizes"),
        ("w_shape", lambda t: -t, "no tensor has that shape"),
        ("w_shape", lambda t: torch.tensor([2**40, 2**40]), "no tensor has that shape"),
        ("w_shape", lambda t: torch.ones(40, dtype=torch.int64), "not the sizes"),
        ("w_shape", lambda t: t.int(), "not the sizes"),
        ("w_sizes", lambda t: t + 1, "speak of"),
        ("w_sizes", lambda t: t * torch.tensor([[-1, 3, 1]], dtype=torch.int16), "damaged|speak"),
        ("w_sizes", lambda t: t[:, :1], "w_sizes is"),
        ("w_table", lambda t: t * 2, "table|code"),
        ("w_table", lambda t: t * 0, "table"),
        ("w_table", lambda t: torch.full_like(t, 0x99), "complete code"),
        ("w_sizes", lambda t: torch.stack([t.sum() + 1, t[0, 0] * 0 - 1, t[0, 0] * 0])[None].short(), "a lane takes"),
        ("w_table", lambda t: t[:1], "w_table is"),
        ("w_stream", lambda t: t[:-1], "speak of"),
        ("w_rest", lambda t: t[:-1], "w_rest is"),
        ("w_rest", lambda t: t.to(torch.int8), "w_rest is"),
    ],
)
def test_parts_that_do_not_fit_are_told_before_anything_is_decoded(name: str, change, told: str):
    tensors, words = sound()
    tensors[name] = change(tensors[name])
    with pytest.raises(FormatError, match=told):
        decode(damaged(tensors, words))


def test_a_stream_that_is_damaged_is_told_when_it_is_read():
    tensors, words = sound()
    tensors["w_stream"] = tensors["w_stream"].clone()
    tensors["w_stream"][100:140] = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(3)).byte()
    weights = decode(damaged(tensors, words))
    with pytest.raises(FormatError, match=r"tensor w: .*damaged"):
        weights["w"]


@pytest.mark.parametrize("word", ["int64", "nonsense", None, 7, "complex64"])
def test_dtypes_that_are_none_of_ours(word: object):
    tensors, _ = sound()
    with pytest.raises(FormatError):
        decode(damaged(tensors, {"w": {"codec": "exponents", "dtype": word}}))
    with pytest.raises(FormatError, match="not of int64"):
        floats(damaged(tensors, {}), "w", torch.int64)


def test_anything_may_be_wrong(tmp_path: Path):
    """Bytes of a file at random: what comes out is an error of ours, or floats of the right shape."""
    encode({"w": normal(2 * LANE + 50).bfloat16()}, pattern="w").save(tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    draw, refused = random.Random(0), 0
    begin = whole.index(b"}}") + 2
    for trial in range(150):
        bytes_ = bytearray(whole)
        for _ in range(draw.choice([1, 2, 20])):
            bytes_[draw.randrange(begin if trial % 3 else 8, len(bytes_))] = draw.randrange(256)
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(bytes(bytes_) if trial % 7 else bytes(bytes_)[: draw.randrange(len(bytes_))])
        try:
            weights = decode(path)
            for name in weights:
                if weights.spec(name).numel < 10**7:
                    assert weights[name].shape == weights.spec(name).shape
        except Error:
            refused += 1
    assert 30 < refused < 150

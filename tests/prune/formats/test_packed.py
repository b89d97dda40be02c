"""Packed weights: there and back to the bit, in files, by layouts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error, FormatError
from weightsmith.prune.formats import pack, sizes, unpack
from weightsmith.prune.formats._bits import as_integers
from weightsmith.weights import Weights

FORMATS = ("bitmask", "sparse-bitmask", "sparse-24-bitmask")


def sparse(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, share: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < share, 0.0, values).to(dtype)


def two_of_four(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return ws.prune.magnitude({"w": sparse(*shape, share=0.0)}, "2:4", pattern="w")["w"].to(dtype)


def same(found: Weights, expected: Weights) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert found.spec(name) == expected.spec(name)
        if expected[name].is_floating_point():
            assert torch.equal(as_integers(found[name]), as_integers(expected[name])), name
        else:
            assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_through_a_file(format, dtype, tmp_path, small_pieces):
    matrices = {"a.weight": two_of_four(5, 12, dtype=dtype), "b.weight": two_of_four(3, 20, dtype=dtype)}
    others = {"a.bias": torch.ones(5), "ids": torch.arange(3)}
    weights = Weights.of(matrices | others)
    packed = pack(weights, format, pattern="*.weight")
    packed.save(tmp_path / "p.safetensors")
    assert not any(name.endswith("weight") for name in ws.open(tmp_path / "p.safetensors"))
    for source in (packed, tmp_path / "p.safetensors"):
        same(unpack(source), weights)
    unpack(tmp_path / "p.safetensors").save(tmp_path / "w.safetensors")
    same(ws.open(tmp_path / "w.safetensors"), weights)


@pytest.mark.parametrize("format", FORMATS[:2])
@pytest.mark.parametrize("shape", [(7, 9), (4, 3, 3, 3), (6, 5, 1, 1), (11,), (2, 0), (0, 4), (1, 1), (1, 64)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shapes_no_zeros_and_nothing_else(format, shape, share):
    weights = Weights.of({"l.weight": sparse(*shape, share=share)})
    same(unpack(pack(weights, format, pattern="*")), weights)


def test_a_number_alone():
    for value in (0.0, 2.0):
        same(unpack(pack({"w": torch.tensor(value)}, pattern="w")), Weights.of({"w": torch.tensor(value)}))


def test_strides_do_not_matter():
    weights = Weights.of({"w": sparse(8, 6).T})
    same(unpack(pack(weights, pattern="w")), Weights.of({"w": sparse(8, 6).T.contiguous()}))


def test_values_as_bits():
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-45, 3.0])
    odd.view(torch.int32)[2] = 0x7FA00001  # a NaN with something to say
    for dtype in (torch.float32, torch.bfloat16):
        values = (
            odd
            if dtype == torch.float32
            else as_integers(torch.zeros(6, dtype=dtype))
            .copy_(torch.tensor([0, -0x8000, 0x7F81, 0x7F80, 1, 0x4040]))
            .view(dtype)
        )
        exact = pack({"w": values}, pattern="w", exact=True)
        assert exact.spec("w_compressed").numel == 5
        same(unpack(exact), Weights.of({"w": values}))
        usual = pack({"w": values}, pattern="w")
        assert usual.spec("w_compressed").numel == 4
        found = unpack(usual)["w"]
        assert not as_integers(found)[1]  # the sign of zero is gone, and nothing else
        assert torch.equal(as_integers(found)[2:], as_integers(values)[2:])


def test_what_rounds_to_zero_is_left_out():
    """A lazy weight is computed in float32, and what is stored is what counts."""
    tiny = Weights.of({"w": torch.tensor([1e-6, 1.0, 0.0], dtype=torch.float16)}) * 1e-3
    packed = pack(tiny, pattern="w")
    assert packed.spec("w_compressed").numel == int((tiny["w"] != 0).sum()) == 1
    same(unpack(packed), Weights.of({"w": tiny["w"]}))


def test_a_pruned_checkpoint_in_one_line(tmp_path):
    weights = Weights.of(
        {"a.weight": sparse(16, 32, share=0.0, dtype=torch.bfloat16), "embed.weight": torch.zeros(8, 8)}
    )
    pruned = ws.prune.magnitude(weights, 0.75)
    packed = pack(pruned)
    assert "embed.weight" in packed  # by default what is usually pruned
    assert packed.spec("a.weight_compressed").numel == 128
    packed.save(tmp_path / "m")
    same(unpack(tmp_path / "m"), pruned)
    report = sizes(tmp_path / "m")
    assert report["before"] == [16 * 32 * 2]
    assert report["after"] == [128 * 2 + 64 + 16]
    assert report["bytes before"] == 16 * 32 * 2 + 8 * 8 * 4
    assert report["kept"] == [0.25]


def test_by_default_only_what_gets_smaller():
    weights = {"full.weight": sparse(16, 16, share=0.0), "half.weight": sparse(16, 16, share=0.5)}
    assert set(pack(weights)) == {"full.weight", "half.weight_compressed", "half.weight_bitmask", "half.weight_shape"}
    with pytest.raises(Error, match="nothing here gets smaller"):
        pack({"full.weight": weights["full.weight"]})
    mixed = {"a.weight": two_of_four(16, 16), "half.weight": sparse(16, 16, share=0.3)}
    assert "half.weight" in pack(mixed, "sparse-24-bitmask")


def test_methods_that_cannot_be_cut():
    """A node that comes whole is read whole; the result is the same."""
    weights = Weights.of({"w": sparse(300, 300)})
    whole = weights.map(lambda w: w * 1.0, unit="tensor", spec=weights.spec("w"))
    assert whole.node("w").grain == 90_000
    same(unpack(pack(whole, pattern="w")), weights)
    same(unpack(pack(whole.rename({"w": "w.weight"}), "sparse-bitmask")).rename({"w.weight": "w"}), weights)


def test_many_blocks():
    weights = Weights.of({"w.weight": sparse(517, 1003, share=0.99), "v.weight": two_of_four(512, 600)})
    for format in FORMATS[:2]:
        packed = pack(weights, format)
        same(unpack(Weights.of(packed.to_dict())), weights)
    same(unpack(pack(weights, "sparse-24-bitmask", pattern="v*")), weights)


def test_offsets_of_rows():
    """By hand: how many values the rows before have; of more axes, along the first alone."""
    matrix = torch.tensor([[1.0, -0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    packed = pack({"l.weight": matrix}, "sparse-bitmask", pattern="*")
    assert packed["l.row_offsets"].tolist() == [0, 2, 2]
    assert pack({"l.weight": matrix}, "sparse-bitmask", pattern="*", exact=True)["l.row_offsets"].tolist() == [0, 3, 3]
    kernels = torch.stack([matrix, matrix])
    found = pack({"l.weight": kernels}, "sparse-bitmask", pattern="*")["l.row_offsets"]
    assert found.tolist() == [[0, 0, 0], [2, 0, 1]]
    tiny = Weights.of({"l.weight": torch.full((2, 2), 1e-6, dtype=torch.float16)}) * 1e-3
    assert pack(tiny, "sparse-bitmask", pattern="*")["l.row_offsets"].tolist() == [0, 0]


def test_tied_tensors_stay_tied(tmp_path):
    shared = sparse(16, 16)
    for format in FORMATS[:2]:
        packed = pack({"a.weight": shared, "b.weight": shared}, format)
        assert len(packed.ties) == len(packed) // 2
        packed.save(tmp_path / format)
        found = unpack(tmp_path / format)
        assert found.ties == {"b.weight": "a.weight"}
        assert torch.equal(found["b.weight"], shared)


def test_other_executors(tmp_path):
    weights = Weights.of({"a.weight": sparse(64, 33, dtype=torch.bfloat16)})
    pack(weights, "sparse-bitmask", pattern="*").save(tmp_path / "p.safetensors", executor="processes", workers=1)
    same(unpack(tmp_path / "p.safetensors"), weights)


@pytest.mark.parametrize("format", FORMATS)
def test_configs(format, tmp_path: Path):
    config = {"model_type": "llama", "dtype": "float32"}
    weights = Weights.of({"a.weight": two_of_four(8, 8), "b.weight": sparse(8, 8, share=0.0)})
    weights = weights.with_files({"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"})
    pack(weights, format).save(tmp_path / "m")
    if format == "bitmask":
        assert not (tmp_path / "m" / "config.json").exists()  # nobody takes it for a plain model
    else:
        said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
        assert said["quant_method"] == "compressed-tensors"
        assert said["sparsity_config"] == {
            "format": format,
            "targets": ["a"],
            "ignore": [],
            "global_sparsity": 0.5,
            "sparsity_structure": "2:4" if format == "sparse-24-bitmask" else "unstructured",
        }
    back = unpack(tmp_path / "m")
    assert json.loads(ws.weights._files.content_of(back.files["config.json"])) == config
    assert set(back.files) == {"config.json", "tokenizer.json"}
    same(back, weights)


def test_a_config_that_says_more_keeps_it():
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}
    weights = Weights.of({"a.weight": sparse(8, 8)}).with_files({"config.json": json.dumps(config).encode()})
    back = unpack(pack(weights, "sparse-bitmask", pattern="*"))
    assert json.loads(ws.weights._files.content_of(back.files["config.json"])) == config


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ({"w": torch.ones(2, 2)}, {"format": "bitmaks"}, "bitmask"),
        ({"w": torch.ones(2, 2)}, {"format": "sparse-bitmask", "pattern": "w"}, "end in"),
        ({"a.weight": torch.ones(2, 6)}, {"format": "sparse-24-bitmask", "pattern": "*"}, "multiple of 4"),
        ({"a.weight": torch.ones(2, 4)}, {"format": "sparse-24-bitmask", "pattern": "*"}, "2 groups of four"),
        ({"w": torch.ones(2, 2)}, {"pattern": "none"}, "no tensor to pack"),
        ({"i": torch.ones(2, 2, dtype=torch.long)}, {"pattern": "i"}, "no tensor to pack"),
        ({"w": torch.zeros(9, 9), "w_bitmask": torch.zeros(1)}, {"pattern": "w"}, "w_bitmask already"),
        ({"a.weight": torch.tensor(1.0)}, {"format": "sparse-bitmask", "pattern": "*"}, "single number"),
    ],
)
def test_refusals(weights, options, said):
    with pytest.raises(Error, match=said):
        pack(weights, **options)


def damaged(**parts: Tensor) -> dict[str, Tensor]:
    whole = pack({"w": sparse(5, 5)}, pattern="w").to_dict()
    whole |= {f"w_{name}": value for name, value in parts.items()}
    return {name: value for name, value in whole.items() if value.numel() or name != "w_shape"}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"shape": torch.empty(0)}, "w_shape is missing"),
        ({"shape": torch.tensor([5, -5])}, "negative"),
        ({"shape": torch.tensor([50, 50])}, "not those of a tensor"),
        ({"shape": torch.tensor([5.0, 5.0])}, "not the sizes"),
        ({"bitmask": torch.zeros(4, dtype=torch.uint8)}, "speak of 0 values"),
        ({"bitmask": torch.zeros(4)}, "not those of a tensor"),
        ({"compressed": torch.ones(3)}, "there are 3"),
        ({"compressed": torch.ones(3, dtype=torch.long)}, "not those of a tensor"),
    ],
)
def test_damaged_files(parts, said):
    with pytest.raises(FormatError, match=said):
        unpack(damaged(**parts))


def test_what_is_not_packed():
    with pytest.raises(Error, match="nothing here is packed"):
        unpack({"w": torch.ones(2)})
    with pytest.raises(Error, match="nothing here is packed"):
        sizes({"w_compressed": torch.ones(2)})
    with pytest.raises(FormatError, match="packed and as it is"):
        unpack(damaged() | {"w": torch.ones(5, 5)})

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
from weightsmith.prune.formats._bits import Bits, as_integers
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
    bits = {
        torch.float64: [0, -(2**63), 0x7FF4000000000001, 0x7FF0000000000000, 1, 0x4008000000000000],
        torch.float32: [0, -(2**31), 0x7FA00001, 0x7F800000, 1, 0x40400000],
        torch.bfloat16: [0, -0x8000, 0x7F81, 0x7F80, 1, 0x4040],
        torch.float16: [0, -0x8000, 0x7C01, 0x7C00, 1, 0x4200],
        torch.float8_e5m2: [0, -0x80, 0x7D, 0x7C, 1, 0x42],
        torch.float8_e4m3fn: [0, -0x80, 0x7F, 0x7E, 1, 0x44],  # no infinity
    }  # zero, minus zero, a NaN with something to say, infinity, the smallest, 3
    for dtype, numbers in bits.items():
        integers = as_integers(torch.zeros(6, dtype=dtype))
        values = integers.copy_(torch.tensor(numbers)).view(dtype)
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


@pytest.mark.parametrize("format", FORMATS[1:])
def test_values_as_bits_in_the_other_layouts(format, tmp_path):
    values = torch.tensor([[0.0, torch.nan, -0.0, -torch.inf], [-1e-45, 0.0, 0.0, 5.0]])
    values.view(torch.int32)[0, 1] = 0x7FA00001
    pack({"a.weight": values}, format, pattern="*").save(tmp_path / "p.safetensors")
    found, expected = unpack(tmp_path / "p.safetensors")["a.weight"], values.clone()
    expected[0, 2] = 0.0
    assert torch.equal(as_integers(found), as_integers(expected))


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
        report = sizes(tmp_path / format)
        assert len(report.table) == 1
        assert report["bytes before"] == shared.nbytes
        assert report["bytes after"] == sum(packed[name].nbytes for name in packed if name not in packed.ties)
        assert torch.equal(found["b.weight"], shared)


def test_other_executors(tmp_path):
    weights = Weights.of({"a.weight": sparse(64, 33, dtype=torch.bfloat16)})
    pack(weights, "sparse-bitmask", pattern="*").save(tmp_path / "p.safetensors", executor="processes", workers=1)
    same(unpack(tmp_path / "p.safetensors"), weights)


@pytest.mark.parametrize("format", FORMATS)
def test_configs(format, tmp_path: Path):
    config = {"model_type": "llama", "dtype": "float32"}
    pruned = two_of_four(8, 8)
    if format != "sparse-24-bitmask":
        pruned[::2] = 0
    weights = Weights.of({"a.weight": pruned, "b.weight": sparse(8, 8, share=0.0)})
    weights = weights.with_files({"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"})
    pack(weights, format).save(tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()  # nobody takes it for a plain model
    theirs = tmp_path / "m" / "config.compressed-tensors.json"
    assert theirs.exists() is (format != "bitmask")
    if format != "bitmask":
        said = json.loads(theirs.read_text())
        assert said["model_type"] == "llama"
        said = said["quantization_config"]
        assert said["quant_method"] == "compressed-tensors"
        assert said["sparsity_config"] == {
            "format": format,
            "targets": ["a"],
            "ignore": [],
            "global_sparsity": 0.5 if format == "sparse-24-bitmask" else 0.75,
            "sparsity_structure": "2:4" if format == "sparse-24-bitmask" else "unstructured",
        }
    for renamed in (False, True):
        if renamed and theirs.exists():
            theirs.rename(tmp_path / "m" / "config.json")
        back = unpack(tmp_path / "m")
        assert content(back.files["config.json"]) == json.dumps(config).encode()
        assert set(back.files) == {"config.json", "tokenizer.json"}
        same(back, weights)


def content(file) -> bytes:
    return bytes(ws.weights._files.content_of(file))


@pytest.mark.parametrize("more", [{}, {"config_groups": {}}])
def test_a_folder_that_others_made_keeps_what_else_its_config_says(more):
    """They have one config.json, which speaks of packing and perhaps of more."""
    packed = pack({"a.weight": sparse(8, 8)}, "sparse-bitmask", pattern="*")
    said = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}
    config = {"model_type": "llama", "quantization_config": said | more}
    back = unpack(packed.with_files({"config.json": json.dumps(config).encode()}))
    expected = {"quant_method": "compressed-tensors"} | more
    assert json.loads(content(back.files["config.json"])) == {"model_type": "llama"} | (
        {"quantization_config": expected} if more else {}
    )


def test_what_was_quantized_says_so_beside_what_was_packed():
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": 1}}}
    weights = Weights.of({"a.weight": sparse(8, 8)}).with_files({"config.json": json.dumps(config).encode()})
    packed = pack(weights, "sparse-bitmask", pattern="*")
    said = json.loads(content(packed.files["config.compressed-tensors.json"]))["quantization_config"]
    assert said["config_groups"] == {"g": 1}
    assert said["sparsity_config"]["targets"] == ["a"]
    assert json.loads(content(unpack(packed).files["config.json"])) == config


@pytest.mark.parametrize("format", FORMATS)
def test_shards_and_a_save_that_was_interrupted(format, tmp_path, monkeypatch):
    weights = Weights.of({f"l{i}.weight": two_of_four(16, 16, dtype=torch.bfloat16) for i in range(5)})
    pack(weights, format).save(tmp_path / "shards", max_shard_size=500)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    same(unpack(tmp_path / "shards"), weights)
    weights.save(tmp_path / "plain.safetensors")
    source = ws.open(tmp_path / "plain.safetensors")

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Bits, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(source, format).save(tmp_path / "again", threads=1)
    pack(source, format).save(tmp_path / "again", resume=True)
    same(unpack(tmp_path / "again"), weights)


def test_what_a_statistic_says_of_itself_is_kept(tmp_path):
    """Metadata travel through the packed file: shards of statistics can still be combined."""
    layer = torch.nn.Linear(6, 6, bias=False)
    found = ws.stats.gram(layer, [torch.eye(6)[:2]])
    pack(found, pattern="*").save(tmp_path / "p.safetensors")
    back = unpack(tmp_path / "p.safetensors")
    assert torch.equal(ws.stats.combine(back, found)["weight"], 2 * found["weight"])


def test_packed_twice_is_unpacked_twice():
    weights = Weights.of({"w": sparse(40, 40, share=0.9)})
    once = pack(weights, pattern="w")
    twice = pack(once, pattern="w_compressed")
    same(unpack(twice), once)
    same(unpack(unpack(twice)), weights)


def test_values_that_two_tensors_share_make_no_tie():
    """Equal values at other places, or of another shape, are other tensors."""
    values, byte = torch.ones(2), torch.tensor([3], dtype=torch.uint8)
    parts = {"a_compressed": values, "a_bitmask": byte, "a_shape": torch.tensor([2, 1])}
    others = {"b_compressed": values, "b_bitmask": torch.tensor([5], dtype=torch.uint8), "b_shape": torch.tensor([3])}
    third = {"c_compressed": values, "c_bitmask": byte, "c_shape": torch.tensor([1, 2])}
    found = unpack(parts | others | third)
    assert [found[name].tolist() for name in found] == [[[1.0], [1.0]], [1.0, 0.0, 1.0], [[1.0, 1.0]]]


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ({"w": torch.ones(2, 2)}, {"format": "bitmaks"}, "bitmask"),
        ({"w": torch.ones(2, 2)}, {"format": "sparse-bitmask", "pattern": "w"}, "end in"),
        ({"a.weight": torch.ones(2, 6)}, {"format": "sparse-24-bitmask", "pattern": "*"}, "multiple of 4"),
        ({"a.weight": torch.ones(2, 4)}, {"format": "sparse-24-bitmask", "pattern": "*"}, "2 groups of four"),
        ({"w": torch.ones(2, 2)}, {"pattern": "none"}, "no tensor to pack fits"),
        ({"b": torch.ones(2)}, {}, "none of b is usually pruned"),
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
        ({"compressed": torch.ones(26)}, "not those of a tensor"),
        ({"compressed": torch.ones(3, dtype=torch.complex64)}, "not those of a tensor"),
        ({"compressed": torch.ones(3).to(torch.float8_e8m0fnu)}, "not those of a tensor"),  # it has no zero
        ({"shape": torch.tensor([2**62, 2**62])}, "not those of a tensor"),
        ({"shape": torch.ones(9, dtype=torch.long)}, "not the sizes"),
    ],
)
def test_damaged_files(parts, said):
    with pytest.raises(FormatError, match=said):
        unpack(damaged(**parts))


@pytest.mark.parametrize("format", FORMATS[:2])
@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
def test_a_missing_part_is_named(format, part):
    packed = pack({"a.weight": sparse(5, 5), "b.weight": sparse(5, 5)}, format, pattern="*")
    (gone,) = [name for name in packed if name.startswith("a") and name.endswith(part)]
    with pytest.raises(FormatError, match=f"a.weight is packed, but {gone} is missing"):
        unpack(packed.drop(gone))


def test_a_name_that_is_packed_twice():
    weights = {"a.weight": sparse(5, 5)}
    both = pack(weights, pattern="*").to_dict() | pack(weights, "sparse-bitmask", pattern="*").to_dict()
    with pytest.raises(FormatError, match=r"packed twice: as a.weight_compressed, a.compressed"):
        unpack(both)


def test_a_file_that_changes_between_two_readings(tmp_path):
    """Whatever the bytes of the parts are: an error that says so, or a tensor of the shape that is told."""
    path = tmp_path / "p.safetensors"
    pack({"w": sparse(50, 50)}, pattern="w").save(path)
    found = unpack(path)
    raw = bytearray(path.read_bytes())
    begin = len(raw) - ws.open(path).nbytes
    raw[begin:] = bytes(255 for _ in raw[begin:])
    path.write_bytes(raw)
    with pytest.raises(Error):
        found.to_dict()
    with pytest.raises(FormatError):
        unpack(path)


def test_what_is_not_packed():
    with pytest.raises(Error, match="nothing here is packed"):
        unpack({"w": torch.ones(2)})
    with pytest.raises(Error, match="nothing here is packed"):
        sizes({"w_compressed": torch.ones(2)})
    with pytest.raises(FormatError, match="packed and as it is"):
        unpack(damaged() | {"w": torch.ones(5, 5)})

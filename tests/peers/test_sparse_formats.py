"""Sparse layouts against the compressors of compressed-tensors 0.13, the last release that had them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.prune.formats import pack, unpack

WHY = (
    'needs compressed-tensors 0.13: pip install "compressed-tensors==0.13.0"; later releases have no sparse compressors'
)
bitmask = pytest.importorskip(
    "compressed_tensors.compressors.sparse_compressors.sparse_bitmask", reason=WHY, exc_type=ImportError
)
two_four = pytest.importorskip(
    "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask", reason=WHY, exc_type=ImportError
)
config = pytest.importorskip("compressed_tensors.config", reason=WHY, exc_type=ImportError)


def sparse(*shape: int, dtype: torch.dtype = torch.float32, share: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < share, 0.0, values).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 9), (16, 64), (3, 2, 3, 3), (5, 4, 1, 1), (11,), (0, 5)])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_bitmasks(shape, dtype, share):
    tensor = sparse(*shape, dtype=dtype, share=share)
    theirs = bitmask.BitmaskTensor.from_dense(tensor).dict("l")
    ours = pack({"l.weight": tensor}, "sparse-bitmask", pattern="*")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name
    assert torch.equal(unpack(theirs)["l.weight"], tensor)
    parts = {name.removeprefix("l."): value for name, value in ours.to_dict().items()}
    parts["shape"] = parts["shape"].tolist()
    assert torch.equal(bitmask.BitmaskTensor(**parts).decompress(), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_of_four(dtype):
    tensor = ws.prune.magnitude({"w": sparse(12, 36, share=0.0)}, "2:4", pattern="w")["w"].to(dtype)
    theirs = two_four.Sparse24BitMaskTensor.from_dense(tensor).dict("l.weight")
    ours = pack({"l.weight": tensor}, "sparse-24-bitmask", pattern="*")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name
    assert torch.equal(unpack(theirs)["l.weight"], tensor)


def test_groups_with_fewer_than_two_values():
    """Which zeros stand in for values may differ; what is decoded may not."""
    tensor = ws.prune.magnitude({"w": sparse(12, 36)}, "2:4", pattern="w")["w"]
    theirs = two_four.Sparse24BitMaskTensor.from_dense(tensor).dict("l.weight")
    ours = pack({"l.weight": tensor}, "sparse-24-bitmask", pattern="*")
    assert torch.equal(unpack(theirs)["l.weight"], tensor)
    parts = {name.removeprefix("l."): value for name, value in ours.to_dict().items()}
    assert torch.equal(two_four.Sparse24BitMaskTensor.from_compressed_data(**parts).decompress(), tensor)


def test_a_folder_is_read_by_their_loader(tmp_path):
    weights = {"l.weight": sparse(8, 24), "m.weight": sparse(5, 9), "l.bias": torch.ones(8)}
    opened = ws.Weights.of(weights).with_files({"config.json": b'{"model_type": "none"}'})
    pack(opened, "sparse-bitmask", pattern="*.weight").save(tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.compressed-tensors.json").read_text())
    settings = said["quantization_config"]["sparsity_config"]
    loaded = config.SparsityCompressionConfig.load_from_registry(settings["format"], **settings)
    compressor = bitmask.BitmaskCompressor(config=loaded)
    found = dict(compressor.decompress(str(tmp_path / "m")))
    assert set(found) == set(weights)
    for name, value in weights.items():
        assert torch.equal(found[name], value)

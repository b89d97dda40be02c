"""bitsandbytes in 4 bits: by hand, with scales of scales, and folders that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error, FormatError
from weightsmith.quantize.formats import pack, unpack
from weightsmith.quantize.grids import NormalFloat
from weightsmith.weights import Weights

NAME = "model.layers.0.up.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def coded(group: int | None = 64) -> Weights:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    found = Weights.of({NAME: weight, "model.norm.weight": torch.ones(4)}).with_files({"config.json": b"{}"})
    return ws.quantize.rtn(found, grid=NormalFloat(group=group))


@pytest.mark.parametrize("group", [64, None])
def test_the_bytes_by_hand(group: int | None, tmp_path: Path):
    pack(coded(group), "bitsandbytes").save(tmp_path / "out")
    made, expected = ws.open(tmp_path / "out"), ws.quantize.dequantize(coded(group))
    assert made.spec(NAME).shape == (6 * 128 // 2, 1)
    table, scale = made[f"{NAME}.quant_map"].tolist(), made[f"{NAME}.absmax"].tolist()
    values = []
    for i, byte in enumerate(made[NAME].flatten().tolist()):
        for j, code in enumerate((byte >> 4, byte & 15)):
            values.append(table[code] * scale[(2 * i + j) // (group or 128)])
    torch.testing.assert_close(torch.tensor(values).view(6, 128), expected[NAME], rtol=1e-6, atol=0)
    back = unpack(tmp_path / "out")
    assert set(back) == {NAME, "model.norm.weight"}
    torch.testing.assert_close(back[NAME], expected[NAME], rtol=1e-6, atol=0)


def test_scales_of_scales():
    made = dict(pack(coded(), "bitsandbytes"))
    scale, fine = torch.arange(12, dtype=torch.uint8) * 20, torch.linspace(-1, 1, 256)
    coarse = torch.tensor([2.0, 3.0, 5.0])
    said = json.loads(bytes(made[STATE].tolist())) | {"nested_blocksize": 5, "nested_offset": 0.25}
    raw = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    nested = {"absmax": scale, "nested_absmax": coarse, "nested_quant_map": fine}
    tensors = {**made, STATE: raw, **{f"{NAME}.{key}": value for key, value in nested.items()}}
    files = pack(coded(), "bitsandbytes").files
    found = unpack(Weights.of(tensors).with_files(files))[NAME].flatten()
    plain = torch.tensor([float(fine[int(scale[i])]) * float(coarse[i // 5]) + 0.25 for i in range(12)])
    ones = Weights.of({**made, f"{NAME}.absmax": torch.ones(12)}).with_files(files)
    torch.testing.assert_close(found, unpack(ones)[NAME].flatten() * plain.repeat_interleave(64))


def test_what_it_cannot_hold():
    weights = Weights.of({NAME: torch.randn(6, 96)})
    with pytest.raises(Error, match=r"up\.weight: blocks are of 64, .* not 96"):
        pack(ws.quantize.rtn(weights, grid=NormalFloat(group=None)), "bitsandbytes")
    with pytest.raises(Error, match="the grid Integer is none of its own"):
        pack(ws.quantize.rtn(weights, bits=4), "bitsandbytes")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"shape": [6, 127]}, "tells of a tensor"),
        ({"shape": [-6, -128]}, "tells of a tensor"),
        ({"shape": "x"}, "tells of a tensor"),
        ({"shape": [10**30, 2]}, "tells of a tensor"),
        ({"nested_offset": float("nan")}, "nested_offset"),
        ({"blocksize": 0}, "blocksize = 0"),
        ({"blocksize": 32}, "absmax is"),
        ({"nested_blocksize": 256}, "absmax is"),
        ({"nested_offset": "x"}, "nested_offset"),
        (None, "is not JSON"),
    ],
)
def test_folders_that_lie(said: Any, message: str):
    made = pack(coded(), "bitsandbytes")
    words = b"[" if said is None else json.dumps(json.loads(bytes(made[STATE].tolist())) | said).encode()
    tensors = {**dict(made), STATE: torch.tensor(list(words), dtype=torch.uint8)}
    with pytest.raises(FormatError, match=message):
        unpack(Weights.of(tensors).with_files(made.files))[NAME]


@pytest.mark.parametrize(("word", "dtype"), [("bfloat16", "bfloat16"), ("int8", "float32"), ([3], "float32")])
def test_the_dtype_of_what_comes_back(word: Any, dtype: str):
    made = pack(coded(), "bitsandbytes")
    words = json.dumps(json.loads(bytes(made[STATE].tolist())) | {"dtype": word}).encode()
    tensors = {**dict(made), STATE: torch.tensor(list(words), dtype=torch.uint8)}
    back = unpack(Weights.of(tensors).with_files(made.files))
    assert back.spec(NAME).dtype == getattr(torch, dtype)
    assert unpack(Weights.of(tensors).with_files(made.files), "float16")[NAME].dtype == torch.float16

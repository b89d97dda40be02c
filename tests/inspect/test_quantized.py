"""What quantizing has changed, against running the layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.inspect import quantized


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_change_of_outputs_is_what_the_layer_gives_on_the_data():
    layer, inputs = nn.Linear(8, 5, bias=False), normal(40, 8, seed=3)
    gram = ws.stats.gram(layer, [inputs])
    after = ws.quantize.gptq(layer, stats=gram, bits=3)
    found = quantized(layer, after, stats=gram)
    values = ws.quantize.dequantize(after)["weight"]
    moved = inputs @ (values - layer.weight).T
    expected = float(moved.norm() / (inputs @ layer.weight.T).norm())
    assert found.table[0]["output change"] == pytest.approx(expected, rel=1e-4)
    assert found.figures["output change"] == pytest.approx(expected, rel=1e-4)
    change = float((values - layer.weight).norm() / layer.weight.norm())
    assert found["change"] == pytest.approx(change, rel=1e-4)


def test_bits_and_bytes_by_hand(tmp_path: Path):
    weights = {
        "layers.0.up.weight": normal(4, 64).bfloat16(),
        "layers.1.up.weight": normal(4, 40, seed=1).bfloat16(),
        "layers.2.up.weight": normal(6, 32, seed=2).bfloat16(),
        "norm.weight": torch.ones(64),
    }
    bits = {"layers.0.*": 4, "layers.1.*": 3}
    after = ws.quantize.rtn(weights, bits=bits, group=32, pattern="layers.[01].*", indivisible="pad")
    after.save(tmp_path / "q")
    found = quantized(weights, tmp_path / "q")
    first, second = found.table
    assert (first["bits"], first["group"], first["padding"], first["grid"]) == (4, 32, 0, "int")
    assert first["bytes"] == 4 * 64 // 2 + 4 * 2 * 2
    assert first["bits a weight"] == 4 + 16 / 32
    assert (second["bits"], second["padding"]) == (3, 24)
    assert second["bytes"] == 4 * 64 * 3 // 8 + 4 * 2 * 2
    assert found["bytes"] == first["bytes"] + second["bytes"]
    assert found["bytes before"] == 2 * 4 * 104
    assert found["bytes in all"] == found["bytes"] + 6 * 32 * 2 + 64 * 4 + 2 * 16
    assert found["left in full precision"] == 1
    assert any("layers.2.up.weight" in note for note in found.notes)
    assert any("padded with zeros: layers.1.up.weight" in note for note in found.notes)
    assert found["output change"] is None
    assert "bits a weight" in found.html()


def test_a_last_group_that_is_shorter_is_told():
    weights = {"w": normal(4, 40)}
    found = quantized(weights, ws.quantize.rtn(weights, group=32, indivisible="ragged"))
    assert any("shorter: w" in note for note in found.notes)


def test_refusals():
    weights = {"w": normal(4, 8)}
    with pytest.raises(Error, match="nothing is quantized among w"):
        quantized(weights, weights)
    with pytest.raises(Error, match=r"w: is coded as \[4, 8\], and before it is float32\[4, 9\]"):
        quantized({"w": normal(4, 9)}, ws.quantize.rtn(weights))
    with pytest.raises(Error, match="not there"):
        quantized({"v": normal(4, 8)}, ws.quantize.rtn(weights))


def test_codes_under_several_names_count_once():
    shared = normal(4, 8)
    weights = ws.weights.Weights.of({"a.weight": shared, "b.weight": shared})
    found = quantized(weights, ws.quantize.rtn(weights))
    assert len(found.table) == 1
    assert list(ws.quantize.codes(ws.quantize.rtn(weights))) == ["a.weight"]
    assert ws.quantize.codes(weights) == {}

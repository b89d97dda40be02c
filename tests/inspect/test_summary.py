"""What a checkpoint holds: sizes, ties, layers; nothing is read unless asked."""

from __future__ import annotations

import json

import pytest
import torch

from weightsmith.inspect import summary
from weightsmith.inspect._plain import layer_of
from weightsmith.weights import Spec, Weights


class Unread:
    """A node that must not be read."""

    grain = 1

    def __init__(self, *shape):
        self.spec = Spec(shape, torch.bfloat16)

    def read(self, start, stop, scratch):
        raise AssertionError("values were read")

    def inputs(self):
        return ()

    def identity(self):
        return "unread"


def model():
    embedding = torch.randn(10, 4)
    return Weights.of(
        {
            "embed.weight": embedding,
            "h.0.fc.weight": torch.randn(4, 8, dtype=torch.float64),
            "h.0.fc.bias": torch.zeros(8),
            "h.1.fc.weight": torch.randn(4, 8),
            "head.weight": embedding,
            "steps": torch.tensor(7),
        }
    )


def test_reads_no_values_unless_asked():
    found = summary(Weights({"w": Unread(2, 3)}))
    assert (found.parameters, found.bytes, found.dtypes) == (6, 12, {"bfloat16": 6})
    with pytest.raises(AssertionError):
        summary(Weights({"w": Unread(2, 3)}), stats=True)


def test_tied_tensors_count_once():
    found = summary(model())
    assert found.tensors[4].tied_to == "embed.weight"
    assert found.parameters == 40 + 32 + 8 + 32 + 1
    assert found.bytes == 160 + 256 + 32 + 128 + 8


def test_layers_add_up_to_the_whole():
    found = summary(model())
    layers = {layer.name: layer for layer in found.layers()}
    assert list(layers) == ["embed", "h.0", "h.1", "head", "steps"]
    assert (layers["h.0"].tensors, layers["h.0"].parameters, layers["h.0"].dtypes) == (2, 40, ("float32", "float64"))
    assert layers["head"].parameters == 0
    assert sum(layer.bytes for layer in layers.values()) == found.bytes


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.3.up.weight", "model.layers.12"),
        ("0.weight", "0"),
        ("conv1.weight", "conv1"),
        ("blocks/7/w", "blocks/7"),
        ("layers.3", "layers"),
        ("w", "w"),
    ],
)
def test_the_layer_of_a_name(name, layer):
    assert layer_of(name) == layer


def test_everything_is_plain_data():
    found = summary(model() | {"bad": torch.tensor([float("nan")])}, stats=True, spectra=True)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    rows = {row["name"]: row for row in data["tensors"]}
    assert rows["bad"]["nan"] == 1
    assert rows["bad"]["mean"] is None
    assert rows["embed.weight"]["shape"] == [10, 4]
    assert rows["head.weight"]["singular_values"] == rows["embed.weight"]["singular_values"]
    assert "singular_values" not in rows["steps"]
    assert data["dtypes"] == found.dtypes


def test_a_report_says_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    weights = model()
    plain, full = summary(weights).report(), summary(weights, stats=True, spectra=True).report()
    assert plain.figures["parameters"] == full.figures["parameters"] == weights.numel
    assert [row["name"] for row in full.table] == list(weights)
    assert full.table[1]["shape"] == "4 x 8"
    assert full.table[1]["singular_values"].count(" ") == 3
    assert full.table[2]["singular_values"] is None
    norms = dict(zip(full.plots[1].lines[0].x, full.plots[1].lines[0].y, strict=True))
    assert norms["embed"] == pytest.approx(float(weights["embed.weight"].norm()))
    assert full.save(tmp_path / "r.html").exists()
    assert str(summary(Weights.of({})).report())

"""Our own layout of codes, the words of config.json beside it, and headers that lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error, FormatError
from weightsmith.quantize import dequantize, rtn
from weightsmith.quantize._layout import METADATA, Layout, anywhere, embeddings, endings_of, layouts_of, tied_codes
from weightsmith.quantize.grids import Float, Integer, Microscaling, NormalFloat, NvFloat4
from weightsmith.weights import Spec, Weights
from weightsmith.weights._files import content_of

CONFIG = {"model_type": "llama"}


def checkpoint(**more: Any) -> Weights:
    generator = torch.Generator().manual_seed(0)
    found = {f"model.layers.{i}.up.weight": torch.randn(24, 64, generator=generator) for i in range(2)}
    found |= {"model.embed_tokens.weight": torch.randn(8, 64, generator=generator), "model.norm.weight": torch.ones(64)}
    return Weights.of(found).with_files({"config.json": json.dumps(CONFIG | more).encode(), "LICENSE": b"x"})


GRIDS = [
    Integer(3, group=16), Integer(4, symmetric=False), Integer(5, group=32, symmetric=False, zero="float"),
    Integer(8, per_tensor=True), Float("e4m3"), Microscaling("e3m2"), NvFloat4(), NormalFloat(),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.usefixtures("small_pieces")
def test_every_grid_through_a_file(grid: Any, tmp_path: Path):
    coded = rtn(checkpoint(), grid=grid)
    coded.save(tmp_path / "out", threads=2)
    back, values = dequantize(tmp_path / "out", "float32"), rtn(checkpoint(), grid=grid, action="values")
    assert {name: spec.shape for name, spec in back.specs.items()} == {
        n: s.shape for n, s in checkpoint().specs.items()
    }
    for name in back:
        torch.testing.assert_close(back[name], values[name], rtol=1e-6, atol=0)
    assert json.loads(content_of(back.files["config.json"])) == CONFIG
    assert content_of(back.files["LICENSE"]) == b"x"
    assert METADATA not in back.metadata


def test_the_plain_layout_is_told_to_other_programs_and_every_other_is_kept_from_them():
    for grid in GRIDS:
        files = rtn(checkpoint(), grid=grid).files
        plain = grid == Integer(3, group=16)
        assert ("config.json" in files) == plain
        assert ("config.unquantized.json" in files) != plain
    conv = Weights.of({"c.weight": torch.randn(8, 4, 3, 3)}).with_files({"config.json": b"{}"})
    assert "config.json" not in rtn(conv, bits=4).files
    assert "config.json" not in rtn(checkpoint(), bits=4, group=48, indivisible="ragged").files
    assert "config.json" not in rtn(checkpoint(), bits=4, group=48, indivisible="pad").files
    assert "config.json" not in rtn(checkpoint(), bits=4, pattern="*embed*").files


def test_codes_of_two_steps_are_read_together_and_kept_from_other_programs(tmp_path: Path):
    first = rtn(checkpoint(), bits=8, group=32, pattern="*0.up*")
    both = rtn(first, bits=3, group=16, pattern="*1.up*")
    assert "config.json" not in both.files
    both.save(tmp_path / "out")
    back = dequantize(tmp_path / "out")
    assert torch.equal(back["model.layers.0.up.weight"], dequantize(first)["model.layers.0.up.weight"])
    assert set(layouts_of(ws.open(tmp_path / "out"))) == {"model.layers.0.up.weight", "model.layers.1.up.weight"}
    assert json.loads(content_of(back.files["config.json"])) == CONFIG
    said = json.loads(content_of(ws.quantize.formats.pack(both).files["config.json"]))
    assert len(said["quantization_config"]["config_groups"]) == 2


def test_tied_codes_are_known():
    shared = torch.randn(8, 64)
    made = Weights.of({"a.weight": shared, "b.weight": shared}).with_files({"config.json": b"{}"})
    assert tied_codes(made, {"a.weight"}) == ["b.weight"]
    assert "config.json" not in rtn(made, bits=4).files
    back = dequantize(rtn(made, bits=4))
    assert back.ties == {"b.weight": "a.weight"}
    head = checkpoint(tie_word_embeddings=True)
    assert tied_codes(head, {"model.embed_tokens.weight"}) == ["model.embed_tokens.weight"]
    assert tied_codes(head, {"model.layers.0.up.weight"}) == []


def test_names_that_are_found_under_another_prefix():
    among = ["model.layers.0.up", "model.layers.1.up", "lm_head", "encoder.layers.0.q.w", "decoder.layers.0.q.w"]
    (word,) = anywhere(["model.layers.0.up"], among)
    pattern = word.removeprefix("re:")
    for name, found in (("model.layers.0.up", 1), ("layers.0.up", 1), ("x.model.layers.0.up", 1), ("layers.10.up", 0)):
        assert bool(re.match(pattern, name)) == bool(found), name
    assert not re.match(pattern, "layers.0.up_gate")
    assert not re.match(pattern, "sublayers.0.up")
    assert anywhere(["lm_head"], among) == ["lm_head"]
    (word,) = anywhere(["encoder.layers.0.q.w"], among)
    assert not re.match(word.removeprefix("re:"), "decoder.layers.0.q.w")
    assert embeddings(["a.embed_tokens.weight", "wte.weight", "a.word_embeddings.weight", "a.q.weight"]) == [
        "a.embed_tokens.weight", "wte.weight", "a.word_embeddings.weight",
    ]  # fmt: skip


def test_experts_and_convolutions_are_matrices():
    layout = Layout.of("mlp.experts.up", Spec((4, 6, 8), torch.float32), Integer(4, group=4))
    assert (layout.experts, layout.rows, layout.inputs) == (4, 24, 8)
    alone = Layout.of("mlp.experts.up", Spec((1, 6, 8), torch.float32), Integer(4, group=4))
    assert (alone.experts, alone.rows, alone.inputs) == (1, 6, 8)
    assert endings_of(layout)["_scale"] == Spec((24, 2), torch.float32)
    layout = Layout.of("conv", Spec((4, 6, 8), torch.float32), Integer(4, group=4))
    assert (layout.experts, layout.rows, layout.inputs) == (0, 4, 48)
    padded = Layout((4, 6), Integer(4, group=4), padding=2)
    assert padded.matrix(torch.ones(4, 6)).shape == (4, 8)
    gram = padded.padded(torch.ones(6, 6))
    assert gram.shape == (8, 8)
    assert gram[6:].abs().sum() == gram[:, 6:].abs().sum() == 0
    assert padded.padded(torch.ones(3, 2, 2)).shape == (8, 8)
    assert padded.padded(torch.ones(6)).shape == (8,)


NAME = "model.layers.0.up.weight"


@pytest.mark.parametrize(
    ("changes", "said", "message"),
    [
        ({"_scale": None}, None, "_scale is missing"),
        ({"_shape": None}, None, "_shape is missing"),
        ({"_shape": torch.tensor([24, 65])}, None, "on this grid have"),
        ({"_shape": torch.tensor([-1, 64])}, None, "cannot be negative"),
        ({"_shape": torch.tensor([24.0])}, None, "sizes of a tensor's axes"),
        ({"_packed": torch.zeros(24, 8)}, None, "on this grid have"),
        ({}, {"grid": "int", "bits": 8, "group": 16}, "8-bit codes of"),
        ({}, {"grid": "int", "bits": 99}, "bits must be"),
        ({}, {"grid": "none"}, "no grid 'none'"),
        ({}, {"grid": "int", "bits": 4, "group": 16, "padding": -1}, "padding of -1"),
        ({}, {"grid": "int", "bits": 4, "group": 16, "rm": "x"}, "no setting rm"),
        ({}, 3, "do not tell the grid"),
    ],
)
def test_headers_that_lie(changes: dict[str, Any], said: Any, message: str):
    made = rtn(checkpoint(), bits=4, group=16, pattern=[NAME])
    tensors = {**dict(made), **{NAME + key: value for key, value in changes.items()}}
    nodes = Weights.of({key: value for key, value in tensors.items() if value is not None})
    words = json.dumps({NAME: said}) if said is not None else made.metadata[METADATA]
    lying = Weights({n: nodes.node(n) for n in nodes}, files=made.files, metadata={METADATA: words})
    with pytest.raises(FormatError, match=message):
        dequantize(lying)


def test_what_does_not_say_how_it_is_coded():
    with pytest.raises(Error, match="nothing here is quantized"):
        dequantize(checkpoint())
    made = rtn({"a.weight": torch.ones(2, 8)}, bits=4)
    with pytest.raises(Error, match="do not say how they are coded"):
        dequantize(Weights.of(dict(made)))
    other = Weights.of({**dict(made), "b.weight_packed": torch.zeros(2, 1, dtype=torch.int32)})
    with pytest.raises(FormatError, match=r"nothing says on which grid b\.weight"):
        dequantize(Weights({n: other.node(n) for n in other}, metadata=made.metadata))

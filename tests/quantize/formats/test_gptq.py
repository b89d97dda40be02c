"""GPTQ and AWQ: the words of their tensors by hand, what they cannot hold, and folders of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error, FormatError
from weightsmith.quantize.formats import pack, unpack
from weightsmith.quantize.formats._gptq import ORDER, _in_order, _ordered
from weightsmith.quantize.grids import Integer
from weightsmith.weights import Weights

NAME = "model.layers.0.up_proj.weight"


def weights(rows: int = 32, inputs: int = 64) -> Weights:
    found = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))
    return Weights.of({NAME: found, "model.norm.weight": torch.ones(4)}).with_files({"config.json": b'{"a": 1}'})


def config_of(made: Weights) -> dict[str, Any]:
    raw = made.files["config.json"]
    assert isinstance(raw, bytes)
    return json.loads(raw)["quantization_config"]


def bits_at(words: list[int], position: int, bits: int) -> int:
    """A code of a row of words, of which the first has the lowest bits."""
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (number >> (position * bits)) & (2**bits - 1)


def gptq_by_hand(made: Weights, bits: int, less: int) -> Tensor:
    """The weight that GPTQ's tensors stand for, one code after another."""
    stem = NAME.removesuffix("weight")
    packed, zeros = made[f"{stem}qweight"].tolist(), made[f"{stem}qzeros"].tolist()
    scales, order = made[f"{stem}scales"].float(), made[f"{stem}g_idx"].tolist()
    rows, inputs = scales.shape[1], len(order)
    found = torch.empty(rows, inputs)
    for row in range(rows):
        column = [words[row] for words in packed]
        for i in range(inputs):
            zero = bits_at(zeros[order[i]], row, bits) + less
            found[row, i] = scales[order[i], row] * (bits_at(column, i, bits) - zero)
    return found


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "format"),
    [
        (4, 16, True, "gptq"),
        (3, 32, True, "gptq"),
        (8, None, True, "gptq_v2"),
        (2, 16, False, "gptq_v2"),
        (4, 64, False, "gptq_v2"),
    ],
)
def test_gptq_by_hand(bits: int, group: int | None, symmetric: bool, format: str, tmp_path: Path):
    coded = ws.quantize.rtn(weights(), bits=bits, group=group, symmetric=symmetric, scale_dtype="float16")
    pack(coded, format).save(tmp_path / "out")
    made = ws.open(tmp_path / "out")
    expected = ws.quantize.dequantize(coded, "float32")[NAME]
    torch.testing.assert_close(gptq_by_hand(made, bits, int(format == "gptq")), expected, rtol=1e-6, atol=0)
    back = unpack(tmp_path / "out", "float32")
    assert torch.equal(back[NAME], expected)
    assert set(back) == set(weights())
    said = config_of(made if isinstance(made.files["config.json"], bytes) else pack(coded, format))
    assert (said["quant_method"], said["bits"], said["group_size"]) == ("gptq", bits, group or -1)
    assert (said["sym"], said["desc_act"], said["checkpoint_format"]) == (symmetric, False, format)
    assert "quantization_config" not in json.loads(bytes_of(back.files["config.json"]))


def bytes_of(file: Any) -> bytes:
    from weightsmith.weights._files import content_of

    return content_of(file)


def test_inputs_in_another_order():
    """As act-order leaves them: the group of an input is whatever g_idx says."""
    coded = ws.quantize.rtn(weights(), bits=4, group=16, scale_dtype="float16")
    made = pack(coded, "gptq")
    stem = NAME.removesuffix("weight")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).int() // 16
    turned = Weights.of({**dict(made), f"{stem}g_idx": order}).with_files(made.files)
    torch.testing.assert_close(unpack(turned, "float32")[NAME], gptq_by_hand(turned, 4, 1), rtol=1e-6, atol=0)
    assert not torch.equal(unpack(turned)[NAME], unpack(made)[NAME])
    for wrong in (-1, 4):
        lying = Weights.of({**dict(made), f"{stem}g_idx": order.clone().fill_(wrong)}).with_files(made.files)
        with pytest.raises(FormatError, match="tells of group"):
            unpack(lying)[NAME]


def test_awq_by_hand(tmp_path: Path):
    coded = ws.quantize.rtn(weights(), bits=4, group=16, symmetric=False, scale_dtype="float16")
    pack(coded, "awq").save(tmp_path / "out")
    made = ws.open(tmp_path / "out")
    stem = NAME.removesuffix("weight")
    packed, zeros, scales = (made[stem + key] for key in ("qweight", "qzeros", "scales"))
    found = torch.empty(32, 64)
    for i in range(64):
        for word in range(4):
            for place, output in enumerate(ORDER):
                row = word * 8 + output
                code = (int(packed[i, word]) >> (4 * place)) & 15
                zero = (int(zeros[i // 16, word]) >> (4 * place)) & 15
                found[row, i] = float(scales[i // 16, row]) * (code - zero)
    expected = ws.quantize.dequantize(coded, "float32")[NAME]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(unpack(tmp_path / "out", "float32")[NAME], expected)
    said = json.loads(bytes_of(made.files["config.json"]))["quantization_config"]
    assert (said["version"], said["zero_point"], said["group_size"]) == ("gemm", True, 16)


def test_the_order_of_eight():
    codes = torch.arange(16).reshape(1, 16)
    assert _ordered(codes)[0, :8].tolist() == list(ORDER)
    assert torch.equal(_in_order(_ordered(codes)), codes)


def test_a_symmetric_grid_has_its_zero_in_the_middle():
    stem = NAME.removesuffix("weight")
    coded = ws.quantize.rtn(weights(), bits=4, group=32)
    assert pack(coded, "gptq")[f"{stem}qzeros"].unique().tolist() == [0x77777777]
    assert pack(coded, "gptq_v2")[f"{stem}qzeros"].unique().tolist() == [0x88888888 - 2**32]
    assert pack(coded, "awq")[f"{stem}qzeros"].unique().tolist() == [0x88888888 - 2**32]


def test_zero_points_of_zero_go_into_the_second_version():
    positive = Weights.of({NAME: torch.rand(32, 64, generator=torch.Generator().manual_seed(0))})
    coded = ws.quantize.rtn(positive, bits=4, group=32, symmetric=False, scale_dtype="float16")
    with pytest.raises(Error, match=r"up_proj.*zero points of 0.*gptq_v2"):
        pack(coded, "gptq")[NAME.removesuffix("weight") + "qweight"]
    back = unpack(pack(coded, "gptq_v2"), "float32")[NAME]
    assert torch.equal(back, ws.quantize.dequantize(coded, "float32")[NAME])


def test_layers_with_words_of_their_own():
    found = {f"model.layers.{i}.{x}.weight": torch.randn(32, 64) for i in range(2) for x in ("up", "down")}
    bits = {"*0.up*": 8, "*": 4}
    coded = ws.quantize.rtn(found, bits=bits, group=32, scale_dtype="float16", pattern=["*0.up*", "*1*"])
    made = pack(coded, "gptq")
    said = config_of(made)
    assert said["bits"] == 4
    assert said["dynamic"] == {
        r"-:^model\.layers\.0\.down$": {},
        r"+:^model\.layers\.0\.up$": {"bits": 8, "group_size": 32},
    }
    back, expected = unpack(made, "float32"), ws.quantize.dequantize(coded, "float32")
    assert all(torch.equal(back[name].float(), expected[name].float()) for name in found)
    with pytest.raises(Error, match="codes are of 4 bits, not 8"):
        pack(coded, "awq")


@pytest.mark.parametrize(
    ("grid", "format", "message"),
    [
        (Integer(5, group=32), "gptq", "codes are of 2 or 3 or 4 or 8 bits, not 5"),
        (Integer(4, group=32, symmetric=False, zero="float"), "gptq", "smallest value is kept as a float"),
        (Integer(4, per_tensor=True), "gptq", "scale of the whole tensor"),
        (Integer(8, group=32), "awq", "codes are of 4 bits, not 8"),
        ("nf4", "gptq", "NormalFloat is none of its own"),
        (Integer(4, group=32), "gtpq", r"no format 'gtpq' \(did you mean 'gptq'"),
    ],
)
def test_what_a_format_cannot_hold_is_told_by_name(grid: Any, format: str, message: str):
    coded = ws.quantize.rtn(weights(), grid=grid)
    with pytest.raises(Error, match=message) as caught:
        pack(coded, format)
    assert NAME in str(caught.value) or "did you mean" in message


def test_shapes_that_do_not_fill_words():
    with pytest.raises(Error, match="outputs go by 8, not 12"):
        pack(ws.quantize.rtn(weights(12), bits=4, group=32), "awq")
    with pytest.raises(Error, match="do not fill words of 8 codes"):
        pack(ws.quantize.rtn(weights(12), bits=4, group=32), "gptq")
    with pytest.raises(Error, match="groups of 48 do not fill rows of 64"):
        pack(ws.quantize.rtn(weights(), bits=4, group=48, indivisible="ragged"), "gptq")
    with pytest.raises(Error, match="only fill up a group"):
        pack(ws.quantize.rtn(weights(), bits=4, group=48, indivisible="pad"), "gptq")
    conv = Weights.of({"conv.weight": torch.randn(8, 4, 3, 3)})
    with pytest.raises(Error, match="not 4 axes"):
        pack(ws.quantize.rtn(conv, bits=4), "gptq")


def test_tied_and_looked_up_matrices_are_refused():
    shared = torch.randn(32, 64)
    coded = ws.quantize.rtn(Weights.of({"a.weight": shared, "b.weight": shared}), bits=4, group=32)
    with pytest.raises(Error, match=r"b\.weight: tensors that share their values"):
        pack(coded, "gptq")
    coded = ws.quantize.rtn({"model.embed_tokens.weight": shared}, bits=4, group=32, pattern="*")
    with pytest.raises(Error, match="no coded embeddings"):
        pack(coded, "gptq")


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"qweight": torch.zeros(8, 32)}, {}, "matrix of int32"),
        ({"qzeros": None}, {}, "qzeros"),
        ({"scales": torch.zeros(2, 31)}, {}, r"scales is float32\[2, 31\]"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, {}, "g_idx"),
        ({}, {"bits": "many"}, "bits = 'many'"),
        ({}, {"bits": 3}, "whole codes of 3 bits do not fill"),
        ({}, {"bits": None}, "does not say of how many bits"),
        ({}, {"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({}, {"dynamic": {"(": {}}}, "dynamic"),
        ({}, {"quant_method": "quip"}, "'quip', which is not understood"),
    ],
)
def test_folders_that_lie(changes: dict[str, Any], words: dict[str, Any], message: str):
    made = pack(ws.quantize.rtn(weights(), bits=4, group=32), "gptq")
    stem = NAME.removesuffix("weight")
    tensors = {**dict(made), **{stem + key: value for key, value in changes.items()}}
    said = {"quantization_config": {**config_of(made), **words}}
    lying = Weights.of({k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(Error, match=message):
        unpack(lying.with_files({"config.json": json.dumps(said).encode()}))[NAME]


def test_a_coded_head_is_told_of():
    """Readers of AWQ take the head for a whole one."""
    found = {name: torch.randn(32, 64) for name in ("lm_head.weight", "model.layers.0.up.weight")}
    coded = ws.quantize.rtn(found, bits=4, group=32, pattern="*")
    assert config_of(pack(coded, "gptq"))["lm_head"] is True
    with pytest.raises(Error, match=r"lm_head\.weight: readers of the format awq"):
        pack(coded, "awq")
    rest = pack(ws.quantize.rtn(found, bits=4, group=32, pattern="*up*"), "awq")
    assert config_of(rest)["modules_to_not_convert"] == ["lm_head"]
    assert config_of(pack(ws.quantize.rtn(found, bits=4, group=32, pattern="*up*"), "gptq"))["lm_head"] is False


@pytest.mark.parametrize(("format", "key"), [("gptq", "scales"), ("awq", "scales")])
def test_scales_that_float16_does_not_hold(format: str, key: str):
    stem = NAME.removesuffix("weight")
    large, small = (ws.quantize.rtn({NAME: weights()[NAME] * size}, bits=4, group=32) for size in (1e7, 1e-6))
    with pytest.raises(Error, match=r"up_proj\.weight has scales up to .* too large for float16"):
        pack(large, format)[stem + key]
    with pytest.warns(UserWarning, match=r"up_proj\.weight: \d+ of 64 scales are so small"):
        pack(small, format)[stem + key]


@pytest.mark.parametrize(
    ("inputs", "groups", "order"),
    [
        (64, 3, [i * 3 // 64 for i in range(64)]),
        (64, 3, [i // 22 for i in range(64)]),
        (64, 4, [i // 16 for i in range(64)]),
    ],
)
def test_groups_that_do_not_divide_the_inputs(inputs: int, groups: int, order: list[int]):
    generator = torch.Generator().manual_seed(0)
    stem = NAME.removesuffix("weight")
    made = {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (inputs // 8, 8), generator=generator).int(),
        "qzeros": torch.full((groups, 1), 0x77777777).int(), "scales": torch.rand(groups, 8, generator=generator),
        "g_idx": torch.tensor(order).int(),
    }  # fmt: skip
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}}
    theirs = Weights.of({stem + key: value for key, value in made.items()}).with_files(
        {"config.json": json.dumps(config).encode()}
    )
    torch.testing.assert_close(unpack(theirs)[NAME], gptq_by_hand(theirs, 4, 1), rtol=1e-6, atol=0)

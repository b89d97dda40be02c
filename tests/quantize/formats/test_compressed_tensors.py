"""compressed-tensors: the tensors by hand, the words of config.json, and folders of others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error, FormatError
from weightsmith.quantize.formats import pack, unpack
from weightsmith.quantize.grids import Float, Integer, Microscaling, NvFloat4
from weightsmith.weights import Weights
from weightsmith.weights._files import content_of

UP, DOWN = "model.layers.0.up.weight", "model.layers.0.down.weight"
E2M1 = (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)


def weights(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(24, 64, generator=generator).to(dtype) for name in (UP, DOWN)}
    found |= {"model.embed.weight": torch.randn(5, 64, generator=generator), "model.norm.weight": torch.ones(64)}
    return Weights.of(found).with_files({"config.json": b'{"model_type": "llama"}'})


def words(made: Weights) -> dict[str, Any]:
    return json.loads(content_of(made.files["config.json"]))["quantization_config"]


def bits_at(row: list[int], position: int, bits: int) -> int:
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
    return (number >> (position * bits)) & (2**bits - 1)


def integers_by_hand(made: Weights, name: str, bits: int, group: int) -> Tensor:
    packed, scale = made[f"{name}_packed"].tolist(), made[f"{name}_scale"].float()
    rows, inputs = made[f"{name}_shape"].tolist()
    zeros = made[f"{name}_zero_point"].t().tolist() if f"{name}_zero_point" in made else None
    found = torch.empty(rows, inputs)
    for row in range(rows):
        for i in range(inputs):
            zero = 2 ** (bits - 1) if zeros is None else bits_at(zeros[i // group], row, bits)
            found[row, i] = scale[row, i // group] * (bits_at(packed[row], i, bits) - zero)
    return found


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 16, True), (3, 32, False), (5, None, False), (8, 64, False), (2, None, True)]
)
def test_packed_integers_by_hand(bits: int, group: int | None, symmetric: bool, tmp_path: Path):
    coded = ws.quantize.rtn(weights(), bits=bits, group=group, symmetric=symmetric, pattern=[UP, DOWN])
    pack(coded).save(tmp_path / "out")
    made, expected = ws.open(tmp_path / "out"), ws.quantize.dequantize(coded)
    torch.testing.assert_close(integers_by_hand(made, UP, bits, group or 64), expected[UP], rtol=1e-6, atol=0)
    back = unpack(tmp_path / "out")
    assert all(torch.equal(back[name], expected[name]) for name in weights())
    assert json.loads(content_of(back.files["config.json"])) == {"model_type": "llama"}
    said = words(made)
    assert (said["quant_method"], said["format"], len(said["config_groups"])) == (
        "compressed-tensors",
        "pack-quantized",
        1,
    )
    scheme = said["config_groups"]["group_0"]
    assert scheme["targets"] == ["Linear"]
    assert scheme["weights"]["symmetric"] is symmetric
    assert scheme["weights"]["strategy"] == ("group" if group else "channel")


@pytest.mark.parametrize("grid", [Integer(8), Integer(4, group=16, symmetric=False), Integer(8, per_tensor=True)])
@pytest.mark.parametrize("format", ["int-quantized", "naive-quantized"])
def test_one_byte_a_code(grid: Integer, format: str, tmp_path: Path):
    coded = ws.quantize.rtn(weights(), grid=grid, pattern=[UP])
    pack(coded, format).save(tmp_path / "out")
    made, expected = ws.open(tmp_path / "out"), ws.quantize.dequantize(coded)[UP]
    assert made.spec(UP).dtype == torch.int8
    codes, scale = made[UP].float().unflatten(1, (-1, grid.group or 64)), made[f"{UP}_scale"]
    zero = made[f"{UP}_zero_point"].float().unsqueeze(-1) if not grid.symmetric else 0
    scale = scale.unsqueeze(-1) if scale.dim() > 1 else scale
    torch.testing.assert_close(((codes - zero) * scale).flatten(1), expected, rtol=1e-6, atol=0)
    assert torch.equal(unpack(tmp_path / "out")[UP], expected)
    inputs = words(made)["config_groups"]["group_0"].get("input_activations")
    assert (inputs is None) == (format == "naive-quantized")


@pytest.mark.parametrize("per_tensor", [False, True])
def test_eight_bit_floats(per_tensor: bool, tmp_path: Path):
    coded = ws.quantize.rtn(weights(), grid=Float("e4m3", per_tensor=per_tensor), pattern=[UP])
    pack(coded).save(tmp_path / "out")
    made = ws.open(tmp_path / "out")
    assert made.spec(UP).dtype == torch.float8_e4m3fn
    assert torch.equal(made[UP].float() * made[f"{UP}_scale"], ws.quantize.dequantize(coded)[UP])
    assert torch.equal(unpack(tmp_path / "out")[UP], ws.quantize.dequantize(coded)[UP])


def nibbles_by_hand(made: Weights, scale: Tensor, group: int) -> Tensor:
    packed = made[f"{UP}_packed"].tolist()
    found = torch.empty(24, 64)
    for row in range(24):
        for i in range(64):
            code = packed[row][i // 2] >> (4 * (i % 2)) & 15
            found[row, i] = (-1 if code & 8 else 1) * E2M1[code & 7] * scale[row, i // group]
    return found


def test_four_bit_floats(tmp_path: Path):
    large = Weights.of({UP: weights()[UP] * 2.0 ** torch.arange(-12, 12).unsqueeze(1)})
    for grid, group in ((Microscaling("e2m1"), 32), (NvFloat4(), 16)):
        coded = ws.quantize.rtn(large, grid=grid, pattern=[UP])
        pack(coded).save(tmp_path / str(group))
        made, expected = ws.open(tmp_path / str(group)), ws.quantize.dequantize(coded)[UP]
        if group == 32:
            assert made.spec(f"{UP}_scale").dtype == torch.uint8
            scale = 2.0 ** (made[f"{UP}_scale"].float() - 127)
        else:
            scale = made[f"{UP}_scale"].float() / made[f"{UP}_global_scale"]
        torch.testing.assert_close(nibbles_by_hand(made, scale, group), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(unpack(tmp_path / str(group))[UP].float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("element", ["e2m3", "e4m3"])
def test_six_and_eight_bit_floats_with_shared_powers(element: str, tmp_path: Path):
    large = Weights.of({UP: weights()[UP] * 2.0 ** torch.arange(-12, 12).unsqueeze(1)})
    coded = ws.quantize.rtn(large, grid=Microscaling(element), pattern=[UP])
    pack(coded).save(tmp_path / "out")
    made, expected = ws.open(tmp_path / "out"), ws.quantize.dequantize(coded)[UP]
    scale = (2.0 ** (made[f"{UP}_scale"].float() - 127)).repeat_interleave(32, 1)
    assert made.spec(f"{UP}_scale").dtype == torch.uint8
    if element == "e4m3":
        found = made[UP].float()
    else:
        small = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
        rows = [int.from_bytes(bytes(row), "little") for row in made[f"{UP}_packed"].tolist()]
        codes = [[row >> 6 * i & 63 for i in range(64)] for row in rows]
        found = torch.tensor([[(-1 if code & 32 else 1) * small[code & 31] for code in row] for row in codes])
    torch.testing.assert_close(found * scale, expected, rtol=0, atol=0)
    assert torch.equal(unpack(tmp_path / "out")[UP].float(), expected)
    scheme = words(made)["config_groups"]["group_0"]["weights"]
    assert (scheme["num_bits"], scheme["group_size"], scheme["scale_dtype"]) == (
        6 if element == "e2m3" else 8, 32, "torch.uint8"
    )  # fmt: skip


def test_several_grids_in_one_model(tmp_path: Path):
    grids: Any = {"*up*": Integer(4, group=16, symmetric=False), "*": Float("e4m3")}
    coded = ws.quantize.rtn(weights(), grid=grids, pattern=[UP, DOWN])
    pack(coded).save(tmp_path / "out")
    said = words(ws.open(tmp_path / "out"))
    assert said["format"] == "mixed-precision"
    by_format = {group["format"]: group for group in said["config_groups"].values()}
    assert set(by_format) == {"pack-quantized", "naive-quantized"}
    for format, name in (("pack-quantized", UP), ("naive-quantized", DOWN)):
        (target,) = by_format[format]["targets"]
        for module in (name.removesuffix(".weight"), name.removesuffix(".weight").removeprefix("model.")):
            assert re.match(target.removeprefix("re:"), module)
            assert not re.match(target.removeprefix("re:"), module.replace("0", "10"))
    back, expected = unpack(tmp_path / "out"), ws.quantize.dequantize(coded)
    assert all(torch.equal(back[name].float(), expected[name].float()) for name in weights())


def test_what_stays_whole_is_named():
    said = words(pack(ws.quantize.rtn(weights(), bits=4, group=32, pattern=[UP])))
    assert "lm_head" in said["ignore"]
    assert any(re.match(word.removeprefix("re:"), "layers.0.down") for word in said["ignore"])
    assert not any(re.match(word.removeprefix("re:"), "model.layers.0.up") for word in said["ignore"])


def test_nothing_is_read_before_it_is_saved():
    bad = Weights.of({UP: torch.full((24, 64), float("nan"))})
    made = pack(ws.quantize.rtn(bad, bits=4, group=32, symmetric=False))
    with pytest.raises(Error, match="not finite"):
        made[f"{UP}_packed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_what_comes_back(dtype: torch.dtype):
    made = pack(ws.quantize.rtn(weights(dtype), bits=4, group=16, pattern=[UP]))
    assert unpack(made).spec(UP).dtype == dtype
    assert unpack(made, "float64").spec(UP).dtype == torch.float64
    assert unpack(made)[UP].dtype == dtype


@pytest.mark.parametrize(
    ("grid", "format", "message"),
    [
        (
            Integer(4, group=16, symmetric=False, zero="float"),
            "compressed-tensors",
            "smallest value is kept as a float",
        ),
        (Integer(1, group=16), "compressed-tensors", "codes of 1 bit"),
        (Float("e4m3", group=16), "compressed-tensors", "not groups of 16"),
        (Float("e5m2"), "compressed-tensors", "Float is none of its own"),
        (Microscaling("e2m1", group=16), "compressed-tensors", "groups are of 32 inputs, not 16"),
        ("nf4", "compressed-tensors", "NormalFloat is none of its own"),
        (NvFloat4(), "pack-quantized", "goes into nvfp4-pack-quantized"),
        (Integer(4), "float-quantized", "goes into pack-quantized or int-quantized or naive-quantized"),
    ],
)
def test_what_a_format_cannot_hold_is_told_by_name(grid: Any, format: str, message: str):
    with pytest.raises(Error, match=message) as caught:
        pack(ws.quantize.rtn(weights(), grid=grid, pattern=[UP]), format)
    assert UP in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "scheme", "message"),
    [
        ({"_scale": None}, {}, "_scale is missing"),
        ({"_scale": torch.ones(24, 3)}, {}, "does not fit a weight"),
        ({"_shape": torch.tensor([24, 65])}, {}, r"_shape says \[24, 65\]"),
        ({"_shape": torch.tensor([-24, 64])}, {}, "cannot be negative"),
        ({"_shape": None}, {}, "_shape is missing"),
        ({"_shape": torch.tensor(24)}, {}, "sizes of a tensor's axes"),
        ({"_g_idx": torch.zeros(64)}, {}, "another order"),
        ({}, {"num_bits": 9}, "num_bits = 9"),
        ({}, {"num_bits": 8}, "for codes of 8 bits"),
        ({}, {"symmetric": False}, "_zero_point is missing"),
    ],
)
def test_folders_that_lie(changes: dict[str, Any], scheme: dict[str, Any], message: str):
    made = pack(ws.quantize.rtn(weights(), bits=4, group=16, pattern=[UP]))
    said = words(made)
    said["config_groups"]["group_0"]["weights"] |= scheme
    tensors = {**dict(made), **{UP + key: value for key, value in changes.items()}}
    lying = Weights.of({key: value for key, value in tensors.items() if value is not None})
    with pytest.raises(Error, match=message):
        unpack(lying.with_files({"config.json": json.dumps({"quantization_config": said}).encode()}))[UP]


@pytest.mark.parametrize("raw", [{}, {"config_groups": {}}, {"config_groups": {"g": 3}}, {"config_groups": [1]}])
def test_words_that_are_none(raw: dict[str, Any]):
    made = pack(ws.quantize.rtn(weights(), bits=4, group=16, pattern=[UP]))
    config = {"quantization_config": {"quant_method": "compressed-tensors", **raw}}
    with pytest.raises(FormatError, match="quantization_config in the compressed-tensors form"):
        unpack(made.with_files({"config.json": json.dumps(config).encode()}))


def test_square_blocks_of_others():
    """As large models are published: a scale for each 128 rows and inputs."""
    generator = torch.Generator().manual_seed(0)
    codes, scale = (
        torch.randn(200, 256, generator=generator).to(torch.float8_e4m3fn),
        torch.rand(2, 2, generator=generator),
    )
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "block"}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": group}}}
    made = Weights.of({"a.weight": codes, "a.weight_scale": scale}).with_files(
        {"config.json": json.dumps(config).encode()}
    )
    found = unpack(made)["a.weight"]
    for row, column in ((0, 0), (130, 5), (199, 255), (127, 128)):
        assert found[row, column] == codes[row, column].float() * scale[row // 128, column // 128]


def test_a_group_named_by_a_module_is_not_one_of_a_kind():
    """``lm_head`` has no dot, and is nevertheless a name."""
    made = pack(ws.quantize.rtn(weights(), bits=4, group=16, pattern=[UP]))
    said = words(made)
    scheme = said["config_groups"]["group_0"]
    head = {**scheme, "targets": ["lm_head"], "weights": {**scheme["weights"], "num_bits": 8}}
    said["config_groups"] = {"group_1": head, "group_0": scheme}
    files = {"config.json": json.dumps({"quantization_config": said}).encode()}
    theirs = Weights.of({**dict(made), "lm_head.weight": torch.ones(2, 2)}).with_files(files)
    assert torch.equal(unpack(theirs)[UP], unpack(made)[UP])


@pytest.mark.parametrize(("grid", "groups"), [(Microscaling("e2m1"), 1), (NvFloat4(), 2)])
def test_small_floats_whose_groups_do_not_fill_their_rows(grid: Any, groups: int):
    made = pack(ws.quantize.rtn(weights(), grid=grid, pattern=[UP]))
    cut = {f"{UP}_packed": made[f"{UP}_packed"][:, :20], f"{UP}_scale": made[f"{UP}_scale"][:, :groups]}
    with pytest.raises(FormatError, match="rows of 20 bytes, which groups of"):
        unpack(Weights.of({**dict(made), **cut}).with_files(made.files))


def test_scales_of_half_precision_are_computed_with_in_single():
    """A product of a code and a scale of 8 digits has more digits than bfloat16 has."""
    made = pack(ws.quantize.rtn(weights(torch.bfloat16), bits=8, group=16, pattern=[UP], scale_dtype="bfloat16"))
    assert made.spec(f"{UP}_scale").dtype == torch.bfloat16
    torch.testing.assert_close(unpack(made, "float32")[UP], integers_by_hand(made, UP, 8, 16), rtol=1e-6, atol=0)


def test_what_was_a_gguf_file_once_is_read_as_what_it_is_now():
    weights = Weights.of({"l.weight": torch.randn(8, 32, generator=torch.Generator().manual_seed(0))})
    once = Weights({name: weights.node(name) for name in weights}, metadata={"weightsmith.gguf": "{}"})
    once = once.with_files({"config.json": b'{"model_type": "llama"}'})
    coded = ws.quantize.rtn(once, bits=4, group=32)
    back = unpack(pack(coded, "compressed-tensors"))
    torch.testing.assert_close(back["l.weight"], ws.quantize.rtn(weights["l.weight"], bits=4, group=32).values())

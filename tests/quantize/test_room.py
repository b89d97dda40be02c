"""Quantizing whole checkpoints, and the way back."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, FormatError
from weightsmith.quantize import Coded, dequantize, gptq, lift, rtn
from weightsmith.quantize._layout import METADATA
from weightsmith.quantize._parts import pack
from weightsmith.quantize.grids import Grid, Integer
from weightsmith.weights import Spec, Weights, open


class Unread:
    """A node with a spec and no values."""

    grain = 1

    def __init__(self, *shape: int):
        self.spec = Spec(shape, torch.float32)

    def read(self, start: int, stop: int, scratch: object) -> Tensor:
        raise AssertionError("was read")

    def inputs(self) -> tuple[()]:
        return ()

    def identity(self) -> object:
        return "unread"


def unread(**shapes: tuple[int, ...]) -> Weights:
    return Weights({name: Unread(*shape) for name, shape in shapes.items()})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONFIG = {"model_type": "llama", "hidden_size": 32}


def checkpoint() -> Weights:
    weights = {
        "embed_tokens.weight": normal(16, 32),
        "layers.0.up.weight": normal(24, 32, seed=1),
        "layers.1.up.weight": normal(24, 32, seed=2),
        "norm.weight": normal(32, seed=3),
        "lm_head.weight": normal(16, 32, seed=4),
    }
    return Weights.of(weights).with_files({"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}"})


# There


def test_a_matrix_becomes_three_tensors():
    weights = checkpoint()
    found = rtn(weights, bits=4, group=16)
    assert list(found) == [
        "embed_tokens.weight",
        *(f"layers.0.up.weight_{word}" for word in ("packed", "scale", "shape")),
        *(f"layers.1.up.weight_{word}" for word in ("packed", "scale", "shape")),
        "norm.weight",
        "lm_head.weight",
    ]
    assert found.spec("layers.0.up.weight_packed") == Spec((24, 4), torch.int32)
    assert found.spec("layers.0.up.weight_scale") == Spec((24, 2), torch.float32)
    assert found["layers.0.up.weight_shape"].tolist() == [24, 32]
    coded = rtn.kernel(weights["layers.0.up.weight"], grid=Integer(4, 16))
    assert torch.equal(found["layers.0.up.weight_packed"], pack(coded.codes, 4))
    assert torch.equal(found["layers.0.up.weight_scale"], coded.params["scale"])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.usefixtures("small_pieces")
def test_there_and_back_through_a_file(bits: int, group: int | None, tmp_path: Path):
    weights = checkpoint()
    rtn(weights, bits=bits, group=group).save(tmp_path / "q", threads=2)
    back = dequantize(tmp_path / "q")
    assert {n: (s.shape, s.dtype) for n, s in back.specs.items()} == {
        n: (s.shape, s.dtype) for n, s in weights.specs.items()
    }
    for name in weights:
        expected = weights[name]
        if name.startswith("layers"):
            expected = rtn.kernel(expected, grid=Integer(bits, group)).values()
        assert torch.equal(back[name], expected), name


def test_the_scale_is_stored_in_the_dtype_of_the_weights_or_the_one_asked_for():
    weights = {"w": normal(4, 8).bfloat16()}
    assert rtn(weights).spec("w_scale").dtype == torch.bfloat16
    assert rtn(weights, scale_dtype="float32").spec("w_scale").dtype == torch.float32
    assert rtn(weights, scale_dtype=torch.float16).spec("w_scale").dtype == torch.float16
    coded = rtn.kernel(weights["w"], grid=Integer(scale_dtype=torch.bfloat16))
    found = rtn(weights)
    assert torch.equal(found["w_scale"], coded.params["scale"].bfloat16())
    assert torch.equal(found["w_packed"], pack(coded.codes, 4))
    assert dequantize(found).spec("w").dtype == torch.bfloat16
    assert dequantize(found, "float32").spec("w").dtype == torch.float32
    assert torch.equal(dequantize(found, "float32")["w"], coded.values())


def test_convolutions_keep_their_shape():
    weight = normal(6, 3, 2, 2)
    back = dequantize(rtn({"conv.weight": weight}, bits=8, group=4))["conv.weight"]
    assert back.shape == weight.shape
    assert (back - weight).abs().max() < weight.abs().max() / 100


def test_empty_matrices():
    back = dequantize(rtn({"none": torch.zeros(0, 4), "wide": torch.zeros(3, 0)}))
    assert (back["none"].shape, back["wide"].shape) == ((0, 4), (3, 0))


def test_bits_and_groups_by_tensor(tmp_path: Path):
    found = rtn(checkpoint(), bits={"layers.0.*": 2, "*": 8}, group={"layers.0.*": 16, "*": None})
    assert found.spec("layers.0.up.weight_packed").shape == (24, 2)
    assert found.spec("layers.1.up.weight_packed").shape == (24, 8)
    assert found.spec("layers.0.up.weight_scale").shape == (24, 2)
    found.save(tmp_path / "q")
    back, weights = dequantize(tmp_path / "q"), checkpoint()
    for name, grid in {"layers.0.up.weight": Integer(2, 16), "layers.1.up.weight": Integer(8)}.items():
        assert torch.equal(back[name], rtn.kernel(weights[name], grid=grid).values())


def test_tied_matrices_are_coded_once_under_either_name():
    shared = normal(4, 8)
    weights = Weights.of({"first.weight": shared, "second.weight": shared})
    for pattern in (None, "second*", "*"):
        found = rtn(weights, pattern=pattern)
        assert found.ties == {f"second.weight_{word}": f"first.weight_{word}" for word in ("packed", "scale", "shape")}
        back = dequantize(found)
        assert back.ties == {"second.weight": "first.weight"}


def test_the_rest_is_untouched():
    weights = Weights.of({"w": normal(4, 8), "bias": normal(4), "n": torch.tensor(3)})
    found = rtn(weights)
    assert torch.equal(found["bias"], weights["bias"])
    assert found["n"] == 3
    assert torch.equal(weights["w"], normal(4, 8))


def test_values_that_no_grid_holds_are_refused_by_name(tmp_path: Path):
    weights = {"good": torch.ones(2, 4), "bad.weight": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(Error, match=r"bad\.weight.*not finite"):
        rtn(weights, pattern="*").save(tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, r"w \[4, 6\]: bits must be a whole number from 1 to 8, got 0"),
        ({"bits": {"w": 4, "*": 9}}, r"x \[4, 10\]: bits must be"),
        ({"group": 4}, r"w, x: groups of 4 do not fill a row of 6 inputs; use group=None; or say with indivisible="),
        ({"group": {"w": 3, "*": 3}}, r"x: groups of 3 do not fill a row of 10 inputs"),
        ({"group": 7, "indivisible": "skip"}, r"no tensor has rows that groups fill"),
        ({"indivisible": "trim"}, r"indivisible is one of error, ragged, pad, shrink, skip; got 'trim'"),
        ({"grid": "in"}, r"there is no grid 'in' \(did you mean 'int'\?\)"),
        ({"grid": Integer(3), "bits": 3}, r"is whole as it is: say bits in it"),
        ({"action": "floats"}, r"action is 'codes' or 'values', got 'floats'"),
        ({"bit": 4}, r"rtn has no option 'bit' \(did you mean 'bits'\?\)"),
        ({"scale_dtype": "flot16"}, r"unknown dtype 'flot16' \(did you mean 'float16'\?\)"),
        ({"scale_dtype": "int8"}, r"scales are floats; they cannot be stored as int8"),
        ({"pattern": "z*"}, r"no matrix to quantize fits pattern='z\*'"),
        ({"pattern": "s"}, r"s is a single number"),
    ],
)
def test_a_bad_option_is_found_before_anything_is_read(options: dict, message: str):
    with pytest.raises(Error, match=message):
        rtn(unread(w=(4, 6), x=(4, 10), s=()), **options)


def test_the_lineage():
    found = rtn(checkpoint(), bits=3)
    assert (found.lineage.method, found.lineage.options) == ("quantize.rtn", {"bits": 3})
    assert dequantize(found).lineage.record()["inputs"][0]["method"] == "quantize.rtn"


# config.json


def config_of(weights: Weights) -> dict[str, Any]:
    raw = weights.files["config.json"]
    assert isinstance(raw, bytes)
    return json.loads(raw)


def test_the_config_says_how_to_load_the_codes():
    config = config_of(rtn(checkpoint(), bits=4, group=16))
    assert CONFIG.items() <= config.items()
    said = config["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    assert said["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
    }
    assert said["ignore"] == ["embed_tokens", "lm_head"]
    assert config_of(rtn(checkpoint()))["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] == (
        "channel"
    )


def test_a_head_that_is_coded_is_not_ignored():
    said = config_of(rtn(checkpoint(), pattern=["layers.*", "lm_head*"]))["quantization_config"]
    assert said["ignore"] == ["embed_tokens"]


def test_matrices_that_stay_whole_are_named():
    said = config_of(rtn(checkpoint(), pattern="layers.0.*"))["quantization_config"]
    assert said["ignore"] == ["embed_tokens", r"re:(.*\.)?layers\.1\.up$", "lm_head"]


def test_the_way_back_takes_the_words_out_again():
    back = dequantize(rtn(checkpoint(), bits=4))
    assert config_of(back) == CONFIG
    assert METADATA not in back.metadata
    assert back.files["tokenizer.json"] == b"{}"


def test_settings_that_no_config_tells_are_left_to_the_header():
    found = rtn(checkpoint(), bits=3, symmetric=False)
    assert "config.json" not in found.files  # so that no other program takes the codes for what it knows
    assert json.loads(found.metadata[METADATA])["layers.0.up.weight"] == {"grid": "int", "bits": 3, "symmetric": False}
    assert config_of(dequantize(found)) == CONFIG


def test_a_config_of_several_settings_names_their_layers():
    found = rtn(checkpoint(), bits={"layers.0.*": 2, "*": 8}, group={"layers.0.*": 16, "*": None})
    groups = config_of(found)["quantization_config"]["config_groups"].values()
    said = {group["weights"]["num_bits"]: group["targets"] for group in groups}
    assert said == {2: [r"re:(.*\.)?layers\.0\.up$"], 8: [r"re:(.*\.)?layers\.1\.up$"]}


@pytest.mark.parametrize("raw", [b"", b"[1]", b"not json", b"\xff", b"[" * 100_000, b"3"])
def test_a_config_that_is_none_is_carried_as_it_is(raw: bytes):
    weights = Weights.of({"w": normal(4, 8)}).with_files({"config.json": raw})
    found = rtn(weights)
    assert found.files["config.json"] == raw
    assert dequantize(found).files["config.json"] == raw


# Folders that others made, or that lie


def foreign(bits: object = 4, **changes: Any) -> Weights:
    """Codes with a config.json and without our words in the header."""
    made = rtn(checkpoint(), bits=4, group=16)
    config = config_of(made)
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {"num_bits": bits} | changes
    return Weights({n: made.node(n) for n in made}, files={"config.json": json.dumps(config).encode()})


def test_what_others_made_is_read_by_its_config():
    name = "layers.0.up.weight"
    assert torch.equal(dequantize(foreign())[name], dequantize(rtn(checkpoint(), bits=4, group=16))[name])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (Weights.of({"w": torch.ones(2, 2)}), Error, "nothing here is quantized: no tensor ends in _packed"),
        (foreign(symmetric=False), Error, "weight_zero_point is missing"),
        (foreign(bits=16), FormatError, "num_bits = 16; known are 1 to 8"),
        (foreign(bits=-4), FormatError, "num_bits = -4"),
        (foreign(bits="many"), FormatError, "num_bits = 'many'"),
        (
            foreign(bits=8),
            FormatError,
            r"int32\[24, 4\], and layers.0.up.weight_shape says \[24, 32\] for codes of 8 bits",
        ),
        (foreign().with_files({"config.json": b"{}"}), FormatError, "no quantization_config"),
        (foreign().with_files({"config.json": b"[]"}), FormatError, "no quantization_config"),
        (foreign().drop("*0.up.weight_scale"), FormatError, "layers.0.up.weight_scale is missing"),
        (foreign().drop("*0.up.weight_shape"), FormatError, "layers.0.up.weight_shape is missing"),
        (
            foreign() | {"layers.0.up.weight_zero_point": torch.ones(1)},
            Error,
            "symmetric by its config, and has a layers.0.up.weight_zero_point",
        ),
        (foreign() | {"layers.0.up.weight_g_idx": torch.ones(1)}, Error, "inputs in another order .*weight_g_idx"),
    ],
)
def test_what_cannot_be_decoded(weights: Weights, error: type[Error], message: str):
    with pytest.raises(error, match=message):
        dequantize(weights)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": torch.tensor(24)},
        {"shape": torch.tensor([])},
        {"shape": torch.tensor([24.0, 32.0])},
        {"shape": torch.tensor([24, -32])},
        {"shape": torch.tensor([24, 2**40])},
        {"shape": torch.tensor([24, 33])},
        {"shape": torch.ones(10**6, dtype=torch.int64)},
        {"scale": torch.ones(24)},
        {"scale": torch.ones(23, 2)},
        {"scale": torch.ones(24, 5)},
        {"scale": torch.ones(24, 0)},
        {"packed": torch.ones(24, 4)},
        {"packed": torch.ones(24, 3, dtype=torch.int32)},
        {"packed": torch.ones(96, dtype=torch.int32)},
    ],
    ids=str,
)
def test_codes_that_lie(changed: dict[str, Tensor]):
    patch = {f"layers.0.up.weight_{word}": tensor for word, tensor in changed.items()}
    with pytest.raises(FormatError, match=r"layers.0.up.weight"):
        dequantize(foreign() | patch)


@pytest.mark.parametrize(
    "words", ["", "[]", "3", "{}", "[" * 100_000, '{"layers.0.up.weight": 4}', '{"layers.0.up.weight": {"bits": "x"}}']
)
def test_a_header_that_lies(words: str):
    made = rtn(checkpoint(), bits=4)
    lying = Weights({n: made.node(n) for n in made}, metadata={METADATA: words})
    with pytest.raises(FormatError):
        dequantize(lying)


def test_no_word_of_the_bits():
    made = rtn(checkpoint(), bits=4)
    with pytest.raises(Error, match="do not say how they are coded"):
        dequantize(Weights({n: made.node(n) for n in made}))


# The rest


def test_called_with_a_tensor_it_is_the_kernel():
    weight = normal(4, 8)
    found, expected = rtn(weight, bits=3, group=4), rtn.kernel(weight, grid=Integer(3, 4))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.params["scale"], expected.params["scale"])


def test_a_rounding_of_ones_own(tmp_path: Path):
    @card(paper="p", unit="row")
    def largest(weight: Tensor, *, grid: Grid = Integer(), gain: float = 1) -> Coded:  # noqa: B008
        if gain <= 0:
            raise Error(f"gain must be positive, got {gain}")
        codes = torch.full_like(weight, 2**grid.bits - 1, dtype=torch.uint8)
        return Coded(codes, {"scale": gain * weight.abs().mean(1, keepdim=True)}, grid)

    quantize = lift(largest)
    quantize({"w": torch.tensor([[1.0, -3.0]])}, bits=2, gain=2).save(tmp_path / "q")
    assert dequantize(tmp_path / "q")["w"].tolist() == [[4, 4]]
    with pytest.raises(Error, match=r"gain must be positive, got -1"):
        quantize(unread(w=(2, 4)), gain=-1)
    with pytest.raises(Error, match="largest takes no stats"):
        quantize(unread(w=(2, 4)), stats={"w": torch.eye(4)})


def test_values_take_the_place_of_the_tensor():
    weights = checkpoint()
    found = rtn(weights, bits=3, group=16, action="values")
    assert list(found) == list(weights)
    assert found.specs == weights.specs
    assert found.files == weights.files
    for name in weights:
        expected = dequantize(rtn(weights, bits=3, group=16))[name]
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("action", ["codes", "values"])
def test_statistics_go_to_the_kernel_with_their_tensor(action: str):
    weights = checkpoint()
    rows = normal(60, 32, seed=9)
    grams = {name: rows.T @ rows * (1 + i) for i, name in enumerate(weights.names("layers.*"))}
    for method in (gptq, rtn):
        options: dict[str, Any] = {"bits": 2, "group": 16, "clip": 4}
        found = method(weights, stats=grams, action=action, **options)
        found = dequantize(found) if action == "codes" else found
        for name, gram in grams.items():
            expected = method.kernel(weights[name], gram, grid=Integer(2, 16), clip=4)
            assert torch.equal(found[name], expected.values()), (method, name)
    with pytest.raises(Error, match="gptq needs stats="):
        gptq(weights)
    with pytest.raises(Error, match=r"layers\.1\.up\.weight"):
        gptq(weights, stats={"layers.0.up.weight": grams["layers.0.up.weight"]})


# Rows that groups do not fill


@pytest.mark.parametrize(("policy", "groups", "width"), [("ragged", 3, 10), ("pad", 3, 12), ("shrink", 5, 10)])
def test_rows_that_groups_do_not_fill(policy: str, groups: int, width: int, tmp_path: Path):
    weight = normal(6, 10)
    group = 4 if policy != "shrink" else 3
    rtn({"w": weight}, bits=3, group=group, symmetric=False, indivisible=policy, pattern="*").save(tmp_path / "q")
    saved = open(tmp_path / "q")
    assert saved.spec("w_scale").shape == (6, groups)
    assert saved.spec("w_packed").shape == (6, -(-width * 3 // 32))
    back = dequantize(saved)["w"]
    assert back.shape == weight.shape
    size = 2 if policy == "shrink" else 4
    runs = [weight[:, i : i + size] for i in range(0, 10, size)]
    whole = [torch.nn.functional.pad(run, (0, size - run.shape[1])) if policy == "pad" else run for run in runs]
    expected = torch.cat([rtn(run, bits=3, symmetric=False).values() for run in whole], 1)[:, :10]
    torch.testing.assert_close(back, expected)


def test_skipping_what_groups_do_not_fill():
    found = rtn({"w": normal(4, 8), "x": normal(4, 6)}, group=4, indivisible="skip", pattern="*")
    assert list(found) == ["w_packed", "w_scale", "w_shape", "x"]


def test_padded_inputs_do_not_change_what_gptq_finds():
    weight, rows = normal(6, 10), normal(50, 10, seed=1)
    gram = rows.T @ rows
    options: dict[str, Any] = {"bits": 3, "group": 4, "pattern": "*", "static": True}
    ragged = dequantize(gptq({"w": weight}, stats={"w": gram}, indivisible="ragged", **options))
    padded = dequantize(gptq({"w": weight}, stats={"w": gram}, indivisible="pad", **options))
    assert torch.equal(ragged["w"][:, :8], padded["w"][:, :8])


# Experts in one tensor


def test_fused_experts_are_quantized_as_the_matrices_that_they_are(tmp_path: Path):
    experts = normal(3, 8, 16)
    name = "layers.0.mlp.experts.gate_up_proj"
    rtn({name: experts}, bits=4, group=8).save(tmp_path / "q")
    back = dequantize(tmp_path / "q")
    assert back.spec(name).shape == (3, 8, 16)
    for index in range(3):
        assert torch.equal(back[name][index], rtn(experts[index], bits=4, group=8).values())
    rows = normal(3, 40, 16, seed=4)
    grams = rows.mT @ rows
    found = dequantize(gptq({name: experts}, stats={name: grams}, bits=2, group=8))
    for index in range(3):
        assert torch.equal(found[name][index], gptq(experts[index], grams[index], bits=2, group=8).values())


def test_what_a_user_sees():
    about = ["bits", "group", "grid", "symmetric", "scale_dtype", "indivisible", "pattern", "action"]
    assert list(inspect.signature(rtn).parameters) == ["weights", "stats", *about, "clip"]
    assert inspect.signature(rtn).parameters["stats"].default is None
    assert rtn.__module__ == "weightsmith.quantize"

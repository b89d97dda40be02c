"""GGUF: blocks by hand and by the package gguf, names and orders there and back, keys, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize._coded import coded
from weightsmith.quantize._layout import Layout
from weightsmith.quantize.formats import pack, unpack
from weightsmith.quantize.formats._gguf_blocks import blocks, kind_for
from weightsmith.quantize.formats._gguf_words import FILE_TYPES, split_word
from weightsmith.quantize.grids import Integer, Microscaling, Ternary
from weightsmith.weights import Spec, Weights
from weightsmith.weights._gguf_write import KINDS, WORDS

gguf = pytest.importorskip("gguf", reason="GGUF files are unpacked by the package gguf")

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 10, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def llama(**config: Any) -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (10, 64), "model.norm": (64,), "lm_head": (10, 64)}
    for i in range(2):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj": (64, 64), f"model.layers.{i}.self_attn.k_proj": (32, 64),
            f"model.layers.{i}.self_attn.v_proj": (32, 64), f"model.layers.{i}.self_attn.o_proj": (64, 64),
            f"model.layers.{i}.mlp.up_proj": (96, 64), f"model.layers.{i}.mlp.gate_proj": (96, 64),
            f"model.layers.{i}.mlp.down_proj": (64, 96), f"model.layers.{i}.input_layernorm": (64,),
            f"model.layers.{i}.post_attention_layernorm": (64,),
        }  # fmt: skip
    found = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Weights.of(found).with_files({"config.json": json.dumps(LLAMA | config).encode()})


HALF: dict[str, Any] = {"scale_dtype": torch.float16}
GRIDS: dict[str, Any] = {
    "Q4_0": Integer(4, group=32, span="signed", **HALF),
    "Q4_1": Integer(4, group=32, symmetric=False, zero="float", **HALF),
    "Q5_0": Integer(5, group=32, **HALF),
    "Q5_1": Integer(5, group=64, symmetric=False, zero="float", **HALF),
    "Q8_0": Integer(8, group=32, span="narrow", **HALF),
    "TQ2_0": Ternary(group=256, **HALF),
    "TQ1_0": Ternary(group=512, **HALF),
    "MXFP4": Microscaling("e2m1"),
}


def layout_of(weight: Tensor, grid: Any) -> Layout:
    return Layout.of("w", Spec(tuple(weight.shape), weight.dtype), grid)


@pytest.mark.parametrize("kind", GRIDS)
def test_blocks_are_what_gguf_unpacks_to_the_values_of_the_codes(kind: str):
    weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    grid = GRIDS[kind]
    found = coded(weight, grid)
    layout = layout_of(weight, grid)
    assert kind_for(layout, ternary="TQ1_0" if kind == "TQ1_0" else "TQ2_0") == kind
    made = blocks(found.codes, found.params, layout, kind)
    assert made.shape == (5, 512 // KINDS[kind][1] * KINDS[kind][2])
    back = gguf.quants.dequantize(made.numpy(), gguf.GGMLQuantizationType[kind])
    torch.testing.assert_close(torch.from_numpy(back), found.values().float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (Integer(2, group=64, **HALF), "Q4_0"),
        (Integer(3, group=None, **HALF), "Q4_0"),
        (Integer(6, group=256, span="narrow", **HALF), "Q8_0"),
        (Integer(7, group=32, span="signed", **HALF), "Q8_0"),
    ],
)
def test_narrower_codes_and_wider_groups_keep_their_values(grid: Integer, kind: str):
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    found, layout = coded(weight, grid), layout_of(weight, grid)
    assert kind_for(layout) == kind
    back = gguf.quants.dequantize(
        blocks(found.codes, found.params, layout, kind).numpy(), gguf.GGMLQuantizationType[kind]
    )
    torch.testing.assert_close(torch.from_numpy(back), found.values().float(), rtol=1e-6, atol=0)


def test_a_whole_zero_point_becomes_a_smallest_value():
    grid = Integer(5, group=32, symmetric=False, **HALF)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found, layout = coded(weight, grid), layout_of(weight, grid)
    back = gguf.quants.dequantize(
        blocks(found.codes, found.params, layout, "Q5_1").numpy(), gguf.GGMLQuantizationType.Q5_1
    )
    # The smallest value, -scale * zero, is rounded to float16.
    low = (found.params["scale"] * found.params["zero_point"]).abs().max()
    assert (torch.from_numpy(back) - found.values()).abs().max() <= low * 2**-11


@pytest.mark.parametrize(
    ("grid", "inputs"),
    [
        (Integer(4, group=16), 64), (Integer(4, group=48), 96), (Integer(4, per_tensor=True), 64), (Integer(4), 48),
        (Integer(6, group=32, symmetric=False), 64), (Ternary(group=128), 512), (Microscaling("e4m3"), 64),
    ],
)  # fmt: skip
def test_grids_that_no_packing_has(grid: Any, inputs: int):
    assert kind_for(layout_of(torch.zeros(2, inputs), grid)) == ""


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "MXFP4"])
@pytest.mark.usefixtures("small_pieces")
def test_there_and_back_through_a_file(kind: str, tmp_path: Path):
    made = ws.quantize.rtn(llama(), grid=GRIDS[kind])
    pack(made, "gguf", rest="F32").save(tmp_path / "model.gguf", threads=2)
    back, expected = ws.open(tmp_path / "model.gguf"), ws.quantize.dequantize(made, "float32")
    assert set(back) == set(expected)
    for name in expected:
        torch.testing.assert_close(back[name], expected[name].float(), rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(unpack(tmp_path / "model.gguf")["model.norm.weight"], expected["model.norm.weight"])


def test_floats_are_packed_without_codes(tmp_path: Path):
    for rest, error in (("F32", 0.0), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2)):
        pack(llama(), "gguf", rest=rest).save(tmp_path / rest / "model.gguf")
        back = ws.open(tmp_path / rest)
        worst = max(float((back[name].float() - llama()[name]).abs().max()) for name in llama())
        assert worst <= error, rest
        assert (worst > 0) == (rest != "F32")


def test_rows_that_blocks_do_not_fill_are_half_floats(tmp_path: Path):
    """96 inputs are no block of 256."""
    made = pack(llama(), "gguf", rest="TQ2_0")
    kinds = json.loads(made.files[WORDS])["kinds"]  # type: ignore[arg-type]
    assert kinds == {}
    assert made.spec("blk.0.ffn_down.weight").dtype == torch.float16
    assert made.spec("blk.0.attn_norm.weight").dtype == torch.float32


def test_codes_that_gguf_cannot_hold():
    made = ws.quantize.rtn(llama(), bits=4, group=16)
    with pytest.raises(Error, match=r"q_proj.*no packing of GGUF has this grid.*requantize"):
        pack(made, "gguf")
    packed = pack(made, "gguf", requantize="Q8_0")
    assert set(json.loads(packed.files[WORDS])["kinds"].values()) == {"Q8_0"}  # type: ignore[arg-type]
    assert packed.spec("blk.0.attn_q.weight").shape == (64, 2 * 34)
    assert packed.spec("token_embd.weight").dtype == torch.float16


def test_the_head_that_shares_the_embedding_is_left_out(tmp_path: Path):
    tied = llama()
    tied = Weights.of({**dict(tied), "lm_head.weight": tied["model.embed_tokens.weight"]}).with_files(tied.files)
    tensors = {name: tied[name] for name in tied}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    made = pack(Weights.of(tensors).with_files(tied.files), "gguf")
    assert "output.weight" not in made
    made.save(tmp_path / "a.gguf")
    assert ws.open(tmp_path / "a.gguf").ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_header_says_what_the_model_is(tmp_path: Path):
    made = pack(
        ws.quantize.rtn(llama(rope_theta=5e4), grid=GRIDS["Q4_0"]), "gguf", keys={"general.name": "tiny", "x.y": 3}
    )
    made.save(tmp_path / "folder")
    reader = gguf.GGUFReader(tmp_path / "folder" / "model.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert (said["general.name"], said["x.y"], said["general.file_type"]) == ("tiny", 3, 2)
    assert (said["llama.block_count"], said["llama.attention.head_count_kv"]) == (2, 2)
    assert said["llama.rope.freq_base"] == 5e4
    assert math.isclose(said["llama.attention.layer_norm_rms_epsilon"], 1e-5, rel_tol=1e-6)
    assert said["tokenizer.ggml.model"] == "no_vocab"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "Q4_0"
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [96, 64]


def test_what_is_laid_out_for_gguf_is_saved_as_nothing_else(tmp_path: Path):
    made = pack(llama(), "gguf")
    for place, format in (("a.safetensors", None), ("a", "safetensors"), ("a.pt", None)):
        with pytest.raises(Error, match="laid out for GGUF"):
            made.save(tmp_path / place, format=format)
    with pytest.raises(Error, match=r"cannot write gguf.*quantize\.formats\.pack"):
        llama().save(tmp_path / "a.gguf")
    made.save(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba2"}, "models of the type 'mamba2' are not written"),
        ({"rms_norm_eps": None}, "rms_norm_eps|float"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "scales positions by 'llama3'"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "sliding window"),
        ({"num_attention_heads": 7}, "rows are not 7 heads"),
    ],
)
def test_models_that_are_not_written(config: dict[str, Any], message: str):
    with pytest.raises((Error, TypeError), match=message):
        pack(llama(**config), "gguf")


def test_what_has_no_name_or_no_config_is_told():
    with pytest.raises(Error, match=r"model\.extra\.weight: GGUF has no name"):
        pack(llama() | {"model.extra.weight": torch.ones(2, 2)}, "gguf")
    with pytest.raises(Error, match=r"no config\.json"):
        pack({"w": torch.ones(2, 2)}, "gguf")
    with pytest.raises(Error, match="rest is one of"):
        pack(llama(), "gguf", rest="Q4_K")
    with pytest.raises(Error, match="the format awq has no option rest"):
        pack(llama(), "awq", rest="F16")


BPE = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]},
    "added_tokens": [{"id": 3, "content": "<s>", "special": True}, {"id": 5, "content": "<u>", "special": False}],
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
}  # fmt: skip


def keys_of(made: Weights) -> dict[str, Any]:
    return {key: value for key, _, value in json.loads(made.files[WORDS])["keys"]}  # type: ignore[arg-type]


def test_a_tokenizer_of_bytes():
    files = {"tokenizer.json": json.dumps(BPE).encode(), "chat_template.jinja": b"{{ x }}"}
    found = keys_of(pack(llama(bos_token_id=3).with_files(files), "gguf"))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert found["tokenizer.ggml.tokens"] == [
        "a",
        "b",
        "ab",
        "<s>",
        "[PAD4]",
        "<u>",
        *(f"[PAD{i}]" for i in range(6, 10)),
    ]
    assert found["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 5, 4, 5, 5, 5, 5]
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.chat_template"]) == (3, "{{ x }}")
    assert keys_of(pack(llama().with_files(files), "gguf", tokenizer=False))["tokenizer.ggml.model"] == "no_vocab"


def test_a_tokenizer_that_splits_in_its_own_way():
    own = {
        **BPE,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]},
    }
    weights = llama().with_files({"tokenizer.json": json.dumps(own).encode()})
    with pytest.raises(Error, match=r"splits text by Punctuation and ByteLevel.*tokenizer\.ggml\.pre"):
        pack(weights, "gguf")
    found = keys_of(pack(weights, "gguf", keys={"tokenizer.ggml.pre": "llama-bpe"}))
    assert (found["tokenizer.ggml.pre"], found["tokenizer.ggml.merges"]) == ("llama-bpe", ["a b"])
    made = {**BPE, "model": {"type": "Unigram", "vocab": []}}
    with pytest.raises(Error, match="its tokenizer is Unigram"):
        pack(llama().with_files({"tokenizer.json": json.dumps(made).encode()}), "gguf")
    with pytest.raises(Error, match=r"tokenizer\.json is not understood"):
        pack(llama().with_files({"tokenizer.json": b"{}"}), "gguf")


LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting(digits: str, regex: bool = False) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": LETTERS % digits}}
    return {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": regex}]}


@pytest.mark.parametrize(
    ("steps", "more", "word"),
    [
        ({"type": "ByteLevel"}, {}, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, {}, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True}, {}, ""),
        ({"type": "ByteLevel", "use_regex": False}, {}, ""),
        ({"type": "ByteLevel"}, {"model": {"ignore_merges": True}}, ""),
        ({"type": "ByteLevel"}, {"normalizer": {"type": "Lowercase"}}, ""),
        (BPE["pre_tokenizer"], {}, "smollm"),
        (splitting("{1,3}"), {"model": {"ignore_merges": True}}, "llama-bpe"),
        (splitting("{1,3}"), {"model": {"ignore_merges": False}}, ""),
        (splitting("{1,3}", regex=True), {"model": {"ignore_merges": True}}, ""),
        (splitting(""), {"normalizer": {"type": "NFC"}}, "qwen2"),
        (splitting("{1,2}"), {}, ""),
    ],
)
def test_the_word_for_how_text_is_split(steps: dict[str, Any], more: dict[str, Any], word: str):
    made = {"model": {}, "pre_tokenizer": steps, **more}
    if word:
        assert split_word(made) == word
    else:
        with pytest.raises(Error, match="splits text"):
            split_word(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "not understood"),
        ({"num_attention_heads": 0}, "heads of pairs"),
        ({"rms_norm_eps": "x"}, "not understood"),
        ({"intermediate_size": [1]}, "not understood"),
        ({"rope_parameters": {"rope_type": "linear"}}, "does not say factor"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "scales positions by 'llama3'"),
        ({"model_type": "mamba"}, "of the type 'mamba'"),
    ],
)
def test_configs_that_lie(change: dict[str, Any], message: str):
    with pytest.raises(Error, match=message):
        pack(llama(**change), "gguf")


def test_keys_of_the_wrong_kind(tmp_path: Path):
    made = pack(llama(), "gguf", keys={"x.low": -3, "x.high": 2**40, "x.yes": True})
    made.save(tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert [fields[key].contents() for key in ("x.low", "x.high", "x.yes")] == [-3, 2**40, True]
    with pytest.raises(Error, match=r"llama\.block_count.*'many'"):
        pack(llama(), "gguf", keys={"llama.block_count": "many"}).save(tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()
    with pytest.raises(Error, match="no tensors to write"):
        pack(Weights.of({}).with_files({"config.json": json.dumps(LLAMA).encode()}), "gguf")


def test_numbers_of_file_types_are_those_of_the_package():
    assert {
        name: int(gguf.LlamaFileType[PREFIX.get(name, "MOSTLY_") + TYPES.get(name, name)]) for name in FILE_TYPES
    } == (FILE_TYPES)
    for name, (number, block, nbytes) in KINDS.items():
        assert gguf.GGMLQuantizationType[name] == number
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (block, nbytes)


PREFIX, TYPES = {"F32": "ALL_"}, {"MXFP4": "MXFP4_MOE"}


def test_bert_and_its_pieces(tmp_path: Path):
    config = {
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 6, "max_position_embeddings": 8,
        "layer_norm_eps": 1e-12, "type_vocab_size": 2,
    }  # fmt: skip
    shapes = {
        "embeddings.word_embeddings.weight": (6, 32), "embeddings.token_type_embeddings.weight": (2, 32),
        "embeddings.position_embeddings.weight": (8, 32), "embeddings.LayerNorm.weight": (32,),
        "encoder.layer.0.attention.self.query.weight": (32, 32), "encoder.layer.0.attention.self.query.bias": (32,),
        "encoder.layer.0.intermediate.dense.weight": (64, 32), "pooler.dense.weight": (32, 32),
    }  # fmt: skip
    weights = Weights.of(
        {name: torch.randn(shape) for name, shape in shapes.items()} | {"embeddings.position_ids": torch.arange(8)}
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "go", "##ing"]
    made = {
        "model": {"type": "WordPiece", "vocab": {word: i for i, word in enumerate(words)}},
        "added_tokens": [{"id": i, "content": words[i], "special": True} for i in range(4)],
    }
    weights = weights.with_files(
        {"config.json": json.dumps(config).encode(), "tokenizer.json": json.dumps(made).encode()}
    )
    coded_ones = ws.quantize.rtn(weights, grid=GRIDS["Q8_0"], pattern="encoder*weight")
    found = pack(coded_ones, "gguf")
    said = keys_of(found)
    assert said["tokenizer.ggml.tokens"] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2581go", "ing"]
    assert (said["tokenizer.ggml.cls_token_id"], said["tokenizer.ggml.seperator_token_id"]) == (2, 3)
    assert said["bert.attention.causal"] is False
    assert found.spec("position_embd.weight").dtype == torch.float32
    found.save(tmp_path / "bert.gguf")
    back, expected = ws.open(tmp_path / "bert.gguf"), ws.quantize.dequantize(coded_ones)
    assert set(back) == set(shapes) - {"pooler.dense.weight"}
    for name in back:
        torch.testing.assert_close(back[name].float(), expected[name].float(), rtol=1e-3, atol=1e-6)

"""Quantized models in the programs that they are written for: transformers with compressed-tensors, and llama.cpp."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.quantize._parts import pack, unpack
from weightsmith.quantize.formats import _compressed_tensors as ours
from weightsmith.quantize.grids import Float, Integer, Microscaling, NvFloat4, Ternary

WHY = 'pip install "weightsmith[peers]"'
transformers = pytest.importorskip("transformers", reason=f"needs transformers: {WHY}", exc_type=ImportError)
tokenizers = pytest.importorskip("tokenizers", reason=f"needs tokenizers: {WHY}", exc_type=ImportError)

TOKENS = torch.tensor([[5, 60, 7, 33, 21, 12, 40, 3, 9]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights, with grouped heads, and a tokenizer of bytes."""
    return llama(tmp_path_factory.mktemp("formats") / "whole", hidden_size=64, intermediate_size=96)


def llama(folder: Path, **sizes: int) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=256, eos_token_id=257, max_position_embeddings=64, **sizes,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


def logits(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """Of a folder as transformers loads it; nothing may be missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model(TOKENS).logits.float()


# compressed-tensors

GRIDS = {
    "groups of 4 bits": ({"bits": 4, "group": 32}, torch.float32),
    "rows of 3 bits": ({"bits": 3}, torch.float32),
    "8 bits": ({"bits": 8, "group": 16}, torch.float32),
    "one step": ({"grid": Integer(8, per_tensor=True)}, torch.float32),
    "one step, affine": ({"grid": Integer(5, per_tensor=True, symmetric=False)}, torch.float32),
    "a negative step": ({"grid": Integer(4, group=32, span="signed")}, torch.float32),
    "several": ({"bits": {"*mlp*": 8, "*": 4}, "group": {"*mlp*": None, "*": 16}}, torch.float32),
    "some layers": ({"bits": 4, "group": 32, "pattern": "*layers.0.*proj*"}, torch.float32),
    "the head too": ({"bits": 6, "group": 32, "pattern": ["*proj*", "lm_head*"]}, torch.float32),
    "e4m3": ({"grid": Float("e4m3")}, torch.float32),
    "e4m3, one scale": ({"grid": Float("e4m3", per_tensor=True)}, torch.float32),
    "mxfp4": ({"grid": Microscaling("e2m1")}, torch.bfloat16),
    "mxfp6": ({"grid": Microscaling("e2m3")}, torch.bfloat16),
    "mxfp8": ({"grid": Microscaling("e4m3")}, torch.bfloat16),
    "nvfp4": ({"grid": NvFloat4()}, torch.bfloat16),
}


@pytest.mark.parametrize("case", GRIDS)
def test_transformers_computes_what_the_codes_say(case: str, whole: Path, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason=f"needs compressed-tensors: {WHY}")
    options, dtype = GRIDS[case]
    coded = ws.quantize.rtn(whole, **options)
    ws.quantize.formats.pack(coded).save(tmp_path / "coded")
    ws.quantize.dequantize(coded).cast(dtype).save(tmp_path / "floats")
    expected = logits(tmp_path / "floats", dtype)
    assert torch.equal(logits(tmp_path / "coded", dtype), expected)
    assert (expected - logits(whole)).abs().max() > 0.1  # something was quantized


@pytest.mark.parametrize("case", ["groups of 4 bits", "several", "some layers"])
def test_a_model_without_its_head_finds_the_same_layers(case: str, whole: Path, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason=f"needs compressed-tensors: {WHY}")
    coded = ws.quantize.rtn(whole, **GRIDS[case][0])
    ws.quantize.formats.pack(coded).save(tmp_path / "coded")
    ws.quantize.dequantize(coded).save(tmp_path / "floats")
    states = []
    for name in ("coded", "floats"):
        kind = transformers.AutoModel
        model, info = kind.from_pretrained(tmp_path / name, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            states.append(model(TOKENS).last_hidden_state)
    assert torch.equal(*states)


@pytest.mark.parametrize("group", [32, None])
def test_packed_zero_points_are_read_where_transformers_dequantizes(group: int | None, whole: Path, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason=f"needs compressed-tensors: {WHY}")
    coded = ws.quantize.rtn(whole, bits=5, group=group, symmetric=False)
    ws.quantize.formats.pack(coded).save(tmp_path / "coded")
    ws.quantize.dequantize(coded).save(tmp_path / "floats")
    how = transformers.CompressedTensorsConfig(dequantize=True)
    assert torch.equal(logits(tmp_path / "coded", quantization_config=how), logits(tmp_path / "floats"))
    with pytest.raises(RuntimeError):  # a refusal and not another model: its packed layout has no place for them
        logits(tmp_path / "coded")
    ws.quantize.formats.pack(coded, "naive-quantized").save(tmp_path / "bytes")
    assert torch.equal(logits(tmp_path / "bytes"), logits(tmp_path / "floats"))


@pytest.mark.parametrize(("format", "grid"), [("int-quantized", Integer(8)), ("float-quantized", Float("e4m3"))])
def test_formats_with_quantized_inputs(format: str, grid: Any, whole: Path, tmp_path: Path):
    """The weights are the same; the inputs of layers are rounded to 8 bits, which is seen and is small."""
    pytest.importorskip("compressed_tensors", reason=f"needs compressed-tensors: {WHY}")
    coded = ws.quantize.rtn(whole, grid=grid)
    ws.quantize.formats.pack(coded, format).save(tmp_path / "coded")
    ws.quantize.dequantize(coded).save(tmp_path / "floats")
    expected = logits(tmp_path / "floats")
    away = (logits(tmp_path / "coded") - expected).norm() / expected.norm()
    assert 1e-4 < away < 0.2


def test_their_packing_of_zero_points_and_small_floats():
    base = pytest.importorskip("compressed_tensors.compressors", reason=f"needs compressed-tensors: {WHY}")
    helpers = base.pack_quantized.helpers
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        codes = torch.randint(0, 2**bits, (9, 70), generator=generator).to(torch.uint8)
        signed = ours._signed(codes, bits)
        assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))
        assert torch.equal(pack(codes.t().contiguous(), bits).t(), helpers.pack_to_int32(signed, bits, packed_dim=0))
        assert torch.equal(ours._signed(unpack(pack(codes, bits), bits, 70), bits), signed)
    values = torch.tensor([[0.0, 0.5, 1, 1.5, 2, 3, 4, 6], [-0.5, -1, -1.5, -2, -3, -4, -6, 0]])
    grid = Microscaling("e2m1")
    found = ours._small(grid.encode(values, {"scale": torch.ones(2)}), {"scale": torch.ones(2, 1)}, "w", 4)
    assert torch.equal(found["w_packed"], base.nvfp4.helpers.pack_fp4_to_uint8(values))
    powers = 2.0 ** torch.tensor([[-20.0, -1, 0, 1, 30]])
    theirs = base.mx_utils.compress_mx_scale(powers, torch.uint8)
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    assert torch.equal(ours._small(codes, {"scale": powers}, "w", 4)["w_scale"], theirs)


def test_transformers_refuses_what_it_cannot_read(whole: Path, tmp_path: Path):
    """Formats of other programs are refused, and never loaded with random weights."""
    for format in ("gptq", "awq"):
        ws.quantize.formats.pack(ws.quantize.rtn(whole, bits=4, group=32), format).save(tmp_path / format)
        with pytest.raises((ImportError, RuntimeError)):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / format)


# llama.cpp

PACKINGS: dict[str, dict[str, Any]] = {
    "Q4_0": {"grid": Integer(4, group=32, span="signed", scale_dtype=torch.float16)},
    "Q4_1": {"grid": Integer(4, group=32, symmetric=False, zero="float", scale_dtype=torch.float16)},
    "Q5_0": {"grid": Integer(5, group=32, scale_dtype=torch.float16)},
    "Q5_1": {"grid": Integer(5, group=32, symmetric=False, zero="float", scale_dtype=torch.float16)},
    "Q8_0": {"grid": Integer(8, group=32, span="narrow", scale_dtype=torch.float16)},
    "MXFP4": {"grid": Microscaling("e2m1")},
}


def next_tokens(path: Path, prompt: list[int]) -> tuple[int, dict[int, float]]:
    """Logarithms of the probabilities of the likeliest next tokens, as llama.cpp computes them, and after how many.

    It tells none where the text ends, so the prompt is then cut.
    """
    llama = pytest.importorskip("xllamacpp", reason="runs GGUF files in llama.cpp: pip install xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = 1
    server = llama.Server(params)
    for length in range(len(prompt), 0, -1):
        asked = {"prompt": prompt[:length], "max_tokens": 1, "logprobs": 40, "temperature": 0.0, "cache_prompt": False}
        told = server.handle_completions(asked)
        words = (json.loads(told) if isinstance(told, str) else told)["choices"][0]["logprobs"]
        if words:
            return length, {int(one["id"]): float(one["logprob"]) for one in words["content"][0]["top_logprobs"]}
    raise AssertionError("llama.cpp told no probabilities")


def apart(found: dict[int, float], expected: Tensor) -> float:
    """Root mean squared distance of logarithms of probabilities, over the likeliest tokens."""
    return math.sqrt(sum((value - float(expected[token])) ** 2 for token, value in found.items()) / len(found))


@pytest.mark.parametrize("kind", ["F32", "F16", *PACKINGS])
def test_llama_cpp_computes_what_the_codes_say(kind: str, whole: Path, tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="runs GGUF files in llama.cpp: pip install xllamacpp")
    coded = ws.quantize.rtn(whole, **PACKINGS[kind]) if kind in PACKINGS else None
    floats = ws.open(whole) if coded is None else ws.quantize.dequantize(coded)
    floats.cast("float32").save(tmp_path / "floats")
    made = ws.quantize.formats.pack(whole if coded is None else coded, "gguf", rest=kind if coded is None else "F32")
    made.save(tmp_path / "model.gguf")
    length, found = next_tokens(tmp_path / "model.gguf", TOKENS[0].tolist())
    expected = logits(tmp_path / "floats")[0, length - 1].log_softmax(-1)
    error = apart(found, expected)
    plain = apart(dict(enumerate(logits(whole)[0, length - 1].log_softmax(-1).tolist())), expected)
    # Where weights are coded, llama.cpp rounds the inputs of layers to 8 bits, and other codes would be seen.
    assert error < (0.02 if coded is None else 0.25), (error, plain)
    assert coded is None or kind == "Q8_0" or error < plain / 2, (error, plain)


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
def test_llama_cpp_computes_with_three_values(kind: str, tmp_path: Path):
    """Rows of whole blocks of 256."""
    pytest.importorskip("xllamacpp", reason="runs GGUF files in llama.cpp: pip install xllamacpp")
    wide = llama(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    coded = ws.quantize.rtn(wide, grid=Ternary(group=256, scale_dtype=torch.float16))
    ws.quantize.dequantize(coded).cast("float32").save(tmp_path / "floats")
    ws.quantize.formats.pack(coded, "gguf", rest="F32", ternary=kind).save(tmp_path / "model.gguf")
    length, found = next_tokens(tmp_path / "model.gguf", TOKENS[0].tolist())
    expected = logits(tmp_path / "floats")[0, length - 1].log_softmax(-1)
    plain = dict(enumerate(logits(wide)[0, length - 1].log_softmax(-1).tolist()))
    # Its inputs of layers are rounded to 8 bits; other codes would be as far away as the whole model is.
    assert apart(found, expected) < apart(plain, expected) / 8


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_llama_cpp_runs_other_families(family: str, whole: Path, tmp_path: Path):
    """With biases, norms of heads, heads of their own width, and a head that shares the embedding."""
    pytest.importorskip("xllamacpp", reason="runs GGUF files in llama.cpp: pip install xllamacpp")
    torch.manual_seed(1)
    more = {"sliding_window": None} if family == "Mistral" else {}
    width = 16 if family == "Qwen2" else 32
    config = getattr(transformers, f"{family}Config")(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width, initializer_range=0.3, max_position_embeddings=64,
        tie_word_embeddings=family != "Mistral", bos_token_id=256, eos_token_id=257, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + ("norm" in name))
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((whole / name).read_bytes())
    ws.quantize.formats.pack(tmp_path / "model", "gguf", rest="F32").save(tmp_path / "model.gguf")
    length, found = next_tokens(tmp_path / "model.gguf", TOKENS[0].tolist())
    error = apart(found, logits(tmp_path / "model")[0, length - 1].log_softmax(-1))
    assert error < 0.02, error


def test_gguf_files_open_in_transformers_as_the_codes_say(whole: Path, tmp_path: Path):
    pytest.importorskip("gguf", reason="transformers reads GGUF by the package gguf")
    coded = ws.quantize.rtn(whole, **PACKINGS["Q4_0"])
    ws.quantize.formats.pack(coded, "gguf", rest="F32").save(tmp_path / "gguf" / "model.gguf")
    ws.quantize.dequantize(coded).cast("float32").save(tmp_path / "floats")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        found = model(TOKENS).logits
    torch.testing.assert_close(found, logits(tmp_path / "floats"), rtol=1e-4, atol=1e-4)


# bitsandbytes


def test_bitsandbytes_computes_what_the_codes_say(whole: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason=f"needs bitsandbytes: {WHY}")
    coded = ws.quantize.rtn(whole, grid="nf4", pattern=["*self_attn*proj*", "*up_proj*"])
    ws.quantize.formats.pack(coded, "bitsandbytes").save(tmp_path / "coded")
    ws.quantize.dequantize(coded).save(tmp_path / "floats")
    theirs = pytest.importorskip("bitsandbytes.functional")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "coded", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    floats = ws.quantize.dequantize(coded)
    read = 0
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        value = parameter if state is None else theirs.dequantize_4bit(parameter.data, state)
        torch.testing.assert_close(value.float(), floats[name].float(), rtol=1e-6, atol=1e-7)
        read += state is not None
    assert read == 10
    # Its products on a CPU are of less precision than its weights.
    away = (logits(tmp_path / "coded") - logits(tmp_path / "floats")).norm() / logits(tmp_path / "floats").norm()
    assert away < 0.05
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    packed, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = ws.quantize.formats.pack(ws.quantize.rtn({"w.weight": weight}, grid="nf4"), "bitsandbytes")
    assert torch.equal(ours["w.weight.absmax"], state.absmax)
    assert (ours["w.weight"] == packed).float().mean() > 0.99  # they may part where two points are as near

"""Codes, scales and folders as compressed-tensors and transformers know them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightsmith as ws
from weightsmith.quantize._parts import decode, pack, unpack

WHY = 'pip install "weightsmith[peers]"'
helpers = pytest.importorskip(
    "compressed_tensors.compressors.pack_quantized.helpers",
    reason=f"needs compressed-tensors: {WHY}",
    exc_type=ImportError,
)
quantization = pytest.importorskip(
    "compressed_tensors.quantization", reason=f"needs compressed-tensors: {WHY}", exc_type=ImportError
)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 130), st.integers(0, 99))
def test_packing(bits: int, rows: int, inputs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, inputs), generator=generator).to(torch.int8)
    theirs = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, inputs), codes)
    assert torch.equal(helpers.unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_scales_and_codes(size: float, group: int | None, bits: int):
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = size * torch.randn(12, 64, generator=torch.Generator().manual_seed(bits))
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    settings = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=True, **strategy)
    runs = weight.unflatten(1, (-1, group or 64))
    scale, zero = calculate_qparams(runs.amin(-1), runs.amax(-1), settings)
    theirs = quantize(weight, scale, zero, settings, dtype=torch.int8)
    codes, found = ws.quantize.rtn.kernel(weight, bits=bits, group=group)
    assert torch.equal(found, scale)
    assert torch.equal(codes, theirs)


def tiny_llama(folder: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason=f"needs transformers: {WHY}", exc_type=ImportError)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize(("bits", "group", "tied"), [(4, 32, False), (4, 32, True), (8, None, False)])
def test_a_quantized_folder_is_loaded_by_transformers(bits: int, group: int | None, tied: bool, tmp_path: Path):
    tiny_llama(tmp_path / "whole", tied)
    import transformers

    quantized = ws.quantize.rtn(ws.open(tmp_path / "whole"), bits=bits, group=group)
    quantized.save(tmp_path / "coded")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.float32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = plain(tokens).logits
        ws.quantize.dequantize(tmp_path / "coded").load_into(plain)
        expected = plain(tokens).logits
        found = loaded(tokens).logits
    assert not torch.allclose(expected, before, atol=1e-4)  # something was quantized
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_that_compressed_tensors_made_is_read(tmp_path: Path):
    """The other way round: codes packed by them, decoded by us."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = ws.quantize.rtn.kernel(weight, bits=4, group=32)
    coded = {
        "l.weight_packed": helpers.pack_to_int32(codes, 4),
        "l.weight_scale": scale,
        "l.weight_shape": torch.tensor([8, 64]),
    }
    ws.Weights.of(coded).save(tmp_path / "coded")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=32),
    )
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized")
    (tmp_path / "coded" / "config.json").write_text(f'{{"quantization_config": {config.model_dump_json()}}}')
    assert torch.equal(ws.quantize.dequantize(tmp_path / "coded")["l.weight"], decode(codes, scale))

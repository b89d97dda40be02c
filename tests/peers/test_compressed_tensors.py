"""Codes and scales as compressed-tensors computes them, and a folder that it made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightsmith as ws
from weightsmith.quantize._coded import coded
from weightsmith.quantize._parts import pack, unpack
from weightsmith.quantize.grids import Integer

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
    codes = torch.randint(0, 2**bits, (rows, inputs), generator=generator).to(torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, inputs), codes)
    assert torch.equal(helpers.unpack_from_int32(pack(codes, bits), bits, signed.shape), signed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_scales_and_codes(size: float, group: int | None, bits: int, symmetric: bool):
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = size * torch.randn(12, 64, generator=torch.Generator().manual_seed(bits))
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    asked = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    runs = weight.unflatten(1, (-1, group or 64))
    scale, zero = calculate_qparams(runs.amin(-1), runs.amax(-1), asked)
    theirs = quantize(weight, scale, zero, asked, dtype=torch.int8)
    found = coded(weight, Integer(bits, group=group, symmetric=symmetric))
    middle = 2 ** (bits - 1)
    torch.testing.assert_close(found.params["scale"], scale, rtol=1e-6, atol=0)
    if symmetric:
        assert torch.equal(found.params["scale"], scale)
    else:
        assert torch.equal(found.params["zero_point"], zero.float() + middle)
    assert torch.equal(found.codes.int() - middle, theirs.int())


def test_a_folder_that_compressed_tensors_made_is_read(tmp_path: Path):
    """The other way round: codes packed by them, decoded by us."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    found = coded(weight, Integer(4, group=32))
    tensors = {
        "l.weight_packed": helpers.pack_to_int32((found.codes.int() - 8).to(torch.int8), 4),
        "l.weight_scale": found.params["scale"],
        "l.weight_shape": torch.tensor([8, 64]),
    }
    ws.Weights.of(tensors).save(tmp_path / "coded")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=32),
    )
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized")
    (tmp_path / "coded" / "config.json").write_text(f'{{"quantization_config": {config.model_dump_json()}}}')
    assert torch.equal(ws.quantize.dequantize(tmp_path / "coded")["l.weight"], found.values())


@pytest.mark.parametrize(
    ("element", "format"),
    [("e2m1", "mxfp4-pack-quantized"), ("e2m3", "mxfp6-pack-quantized"), ("e4m3", "mxfp8-quantized")],
)
def test_floats_with_shared_powers_as_they_decompress_them(element: str, format: str):
    from compressed_tensors.compressors import BaseCompressor

    from weightsmith.quantize.grids import Microscaling

    if format not in BaseCompressor.registered_names():
        pytest.skip(f"this compressed-tensors has no {format}")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-4, 4)[:, None]
    codes = ws.quantize.rtn({"l.weight": weight}, grid=Microscaling(element), pattern="*")
    packed = ws.quantize.formats.pack(codes)
    args = quantization.QuantizationArgs(
        num_bits={"e2m1": 4, "e2m3": 6, "e4m3": 8}[element], type="float", strategy="group", group_size=32,
        scale_dtype=torch.uint8, zp_dtype=torch.uint8,
    )  # fmt: skip
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=format)
    theirs = BaseCompressor.get_value_from_registry(format).decompress(
        {name.removeprefix("l."): packed[name] for name in packed}, scheme
    )
    expected = ws.quantize.dequantize(codes)["l.weight"]
    torch.testing.assert_close(theirs["weight"].float(), expected, rtol=0, atol=0)
    assert torch.equal(ws.quantize.formats.unpack(packed)["l.weight"].float(), expected)

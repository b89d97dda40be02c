"""The block codec beside bitsandbytes: the same table, and codes that are as near."""

from __future__ import annotations

import pytest
import torch

from weightsmith.quantize.codecs import BlockCodec, dynamic_codebook

peer = pytest.importorskip("bitsandbytes.functional", reason="codes states of optimizers in blocks")


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_the_same_to_the_bit(signed: bool):
    assert torch.equal(dynamic_codebook(signed=signed), peer.create_dynamic_map(signed))


@pytest.mark.parametrize("block", [64, 256, 2048])
def test_codes_are_as_near(block: int):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator) * torch.randn(5000, generator=generator).exp()
    codec = BlockCodec(block=block)
    blocks = codec.encode(values)
    codes, state = peer.quantize_blockwise(values, blocksize=block)
    assert torch.equal(blocks.scale, state.absmax)
    own = (codec.decode(blocks) - values).abs()
    theirs = (peer.dequantize_blockwise(codes, state) - values).abs()
    assert bool((own <= theirs + 1e-6 * values.abs().max()).all())  # theirs is not always the nearest
    assert float((blocks.codes == codes).float().mean()) > 0.95
    torch.testing.assert_close(
        codec.decode(type(blocks)(codes, state.absmax, None, (5000,), torch.float32)),
        peer.dequantize_blockwise(codes, state),
    )

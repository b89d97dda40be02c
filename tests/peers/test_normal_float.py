"""NF4 beside bitsandbytes: the same points, codes and values."""

from __future__ import annotations

import pytest
import torch

from weightsmith.quantize.grids import NormalFloat
from weightsmith.quantize.grids._tables import NORMAL

peer = pytest.importorskip("bitsandbytes.functional", reason="quantizes to NF4")


def test_the_points_are_the_same_to_the_bit():
    assert torch.equal(peer.get_4bit_type("nf4", device="cpu"), torch.tensor(NORMAL))


@pytest.mark.parametrize("group", [64, 128])
def test_codes_and_values_are_the_same(group: int):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed, state = peer.quantize_4bit(weight, blocksize=group, quant_type="nf4")
    grid, runs = NormalFloat(group), weight.unflatten(1, (-1, group))
    params = grid.fit(runs)
    codes = grid.encode(runs, params)
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1)
    assert torch.equal(codes.flatten(), theirs.flatten())
    assert torch.equal(grid.decode(codes, params).flatten(1), peer.dequantize_4bit(packed, state))

"""Blocks of small floats, bit by bit against torchao."""

from __future__ import annotations

import pytest
import torch

from weightsmith.quantize.grids import Microscaling, NvFloat4

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = 2.0 ** torch.randint(-30, 30, (64, 4, 1), generator=generator)
    found = (torch.randn(64, 4, 32, generator=generator) * spread).flatten(1)
    found[3, :32] = 0
    return found


@pytest.mark.parametrize(
    ("element", "theirs"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("e2m1", None)]
)
def test_microscaling(element: str, theirs: torch.dtype | None):
    x = values()
    scale, data = mx_tensor.to_mx(x, theirs or torch.float4_e2m1fn_x2, 32)
    grid = Microscaling(element)
    runs = x.unflatten(1, (-1, 32))
    params = grid.fit(runs)
    alive = runs.abs().amax(-1) > 0
    mine = params["scale"].to(torch.float8_e8m0fnu).view(torch.uint8)
    assert torch.equal(mine[alive], scale.view(torch.uint8).reshape(64, 4)[alive])
    codes = grid.encode(runs, params).flatten(1)
    if theirs is None:
        packed = data.view(torch.uint8)
        other = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).reshape(64, 128)
    else:
        other = data.view(torch.uint8).reshape(64, 128)
    assert torch.equal(codes, other)


def test_nvfp4():
    from torchao.prototype.mx_formats import nvfp4_tensor

    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    grid = NvFloat4()
    shared = grid.shared(x)
    scale, data = nvfp4_tensor.nvfp4_quantize(x, per_tensor_scale=shared["tensor_scale"])
    runs = x.unflatten(1, (-1, 16))
    params = {**shared, **grid.fit(runs, shared)}
    torch.testing.assert_close(params["scale"], scale.float().reshape(16, 4), rtol=0, atol=0)
    packed = data.view(torch.uint8)
    other = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).reshape(16, 64)
    codes = grid.encode(runs, params).flatten(1)
    assert (codes != other).float().mean() < 0.002  # they multiply by an inverse, which moves a few halves

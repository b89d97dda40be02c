"""Any tensor at the points of a grid."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.quantize.grids import Integer, Levels, Microscaling, NvFloat4, quantized


def test_odd_ends_are_groups_of_their_own():
    x = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(0))
    found = quantized(x, "mxfp6")
    for start, stop in ((0, 32), (32, 64), (64, 70)):
        assert torch.equal(found[..., start:stop], quantized(x[..., start:stop], Microscaling("e2m3", None)))
    padded = quantized(torch.nn.functional.pad(x, (0, 26)), "mxfp6")
    assert torch.equal(padded[..., :70], found)  # zeros change nothing in a block


def test_another_axis_and_other_dtypes():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantized(x, "mxfp4", axis=0), quantized(x.t().contiguous(), "mxfp4").t())
    assert not torch.equal(quantized(x, "mxfp4", axis=0), quantized(x, "mxfp4"))
    half = quantized(x.bfloat16(), "mxfp8")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, quantized(x.bfloat16().float(), "mxfp8").bfloat16())
    assert quantized(x.double(), "int", bits=3).dtype == torch.float64
    assert not quantized(x.clone().requires_grad_(), "mxfp8").requires_grad


def test_the_tensor_shares_what_it_has_in_common():
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    x[0] *= 100
    grid = NvFloat4()
    shared = grid.shared(x)
    runs = x.unflatten(-1, (2, 16))
    params = {**shared, **grid.fit(runs, shared)}
    assert torch.equal(quantized(x, "nvfp4"), grid.decode(grid.encode(runs, params), params).flatten(-2))
    assert quantized(x, Levels(1, per_tensor=True)).unique().numel() == 2


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (5, 0), (2, 0, 3)])
def test_small_shapes(shape: tuple[int, ...]):
    assert quantized(torch.ones(shape), "mxfp8").shape == shape
    assert quantized(torch.ones(shape), Integer(4)).shape == shape


def test_what_is_not_finite_and_no_float_is_refused():
    with pytest.raises(Error, match="floats is rounded to a grid, got int64"):
        quantized(torch.tensor([1, 2]), "mxfp8")
    with pytest.raises(Error, match="not finite"):
        quantized(torch.tensor([1.0, float("nan")]), "mxfp8")

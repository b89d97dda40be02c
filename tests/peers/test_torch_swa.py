"""The same mean along a run as torch.optim.swa_utils.AveragedModel, and a better one in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import weightsmith as ws


def training(steps: int, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
    """A small regression at a rate that never settles; the module after each step."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(steps):
        x = torch.randn(16, 4).to(dtype)
        loss = (module(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield module


def test_float32():
    ours, theirs = ws.average.swa(), None
    for module in training(40):
        ours.update(module)
        theirs = theirs or AveragedModel(module)
        theirs.update_parameters(module)
    assert theirs is not None
    found = ours.weights()
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_the_float32_mean_rounded_once_where_theirs_drifts():
    ours, theirs = ws.average.swa(), None
    moments: list[dict[str, torch.Tensor]] = []
    for module in training(60, torch.bfloat16):
        moments.append({name: value.detach().clone() for name, value in module.named_parameters()})
        ours.update(module)
        theirs = theirs or AveragedModel(module)
        theirs.update_parameters(module)
    assert theirs is not None
    found, drift, error = ours.weights(), 0.0, 0.0
    for name, value in theirs.module.named_parameters():
        exact = torch.stack([moment[name].double() for moment in moments]).mean(0)
        step = exact.abs() * 2**-7  # at most: bfloat16 has 7 bits after the first
        assert found.spec(name).dtype == torch.bfloat16
        assert ((found[name].double() - exact).abs() <= 0.51 * step + 1e-7).all(), name
        drift = max(drift, float(((value.detach().double() - exact).abs() / (step + 1e-3)).max()))
        error = max(error, float(((found[name].double() - exact).abs() / (step + 1e-3)).max()))
    assert drift > 4 * error

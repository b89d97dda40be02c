"""Resampling: means against a loop, and draws that are even and do not depend on chunks."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.solve import draws, grouped, resampled_means


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_resampled_means_against_a_loop():
    values, weight = normal(5, 12), normal(12, seed=1).abs()
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6])
    for rows in (values, values[:2]):  # both ways of computing it
        found = resampled_means(rows, 9, seed=3, groups=groups, weight=weight)
        for b, chosen in enumerate(torch.cat(list(draws(7, 9, seed=3)))):
            members = torch.cat([torch.where(groups == int(g))[0] for g in chosen])
            expected = (rows[:, members] * weight[members]).sum(1) / weight[members].sum()
            torch.testing.assert_close(found[b], expected)


def test_draws_cover_everything_evenly():
    counts = torch.bincount(torch.cat(list(draws(7, 20000, seed=0))).flatten(), minlength=7) / 20000
    assert counts.sub(1).abs().max() < 0.03
    assert grouped(["b", "a", "b"], 3)[0].tolist() == [0, 1, 0]
    with pytest.raises(Error, match="do not fit"):
        grouped([1, 2], 3)

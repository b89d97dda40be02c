"""The same strengths as choix, and the same correlation of ranks as scipy."""

from __future__ import annotations

import numpy
import pytest
import torch

from weightsmith.inspect.ranking import kendall_tau, strengths


def wins(seed: int = 0, systems: int = 12, each: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(systems, generator=generator, dtype=torch.float64).exp()
    chance = value[:, None] / (value[:, None] + value[None])
    upper = torch.binomial(torch.full((systems, systems), float(each)).double(), chance, generator=generator).triu(1)
    return upper + (each - upper.T).tril(-1)


def test_strengths_against_choix():
    choix = pytest.importorskip("choix", reason="choix is not installed")
    table = wins()
    games = [(i, j) for i in range(12) for j in range(12) for _ in range(int(table[i, j]))]
    theirs = choix.ilsr_pairwise(12, games)
    ours = strengths(table).values.log().numpy()
    numpy.testing.assert_allclose(ours - ours.mean(), theirs - theirs.mean(), atol=1e-6)
    slow = choix.mm_pairwise(12, games, max_iter=5000, tol=1e-10)
    numpy.testing.assert_allclose(ours - ours.mean(), slow - slow.mean(), atol=1e-4)


def test_kendall_tau_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    generator = numpy.random.default_rng(0)
    for _ in range(5):
        a, b = generator.integers(0, 6, (2, 15))
        assert float(kendall_tau(a, b)) == pytest.approx(stats.kendalltau(a, b).statistic)

"""Singular values against a decomposition, and ranks of matrices whose rank is known."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.inspect import spectrum, summary
from weightsmith.solve import _singular
from weightsmith.weights import Weights


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7), (1, 9), (6, 2, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_equal_a_decomposition(shape, dtype, monkeypatch):
    monkeypatch.setattr(_singular, "_BLOCK", 10)  # several blocks
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = torch.linalg.svdvals(tensor.double().reshape(shape[0], -1))
    found = spectrum(tensor, keep=100)
    assert found is not None
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), exact, rtol=1e-7, atol=1e-7)
    assert found.full_rank == len(exact)
    assert found.stable_rank == pytest.approx(float(exact.square().sum() / exact[0] ** 2))
    shares = exact / exact.sum()
    assert found.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())))


def test_ranks_of_known_matrices():
    flat = spectrum(torch.eye(6) * 3)
    assert (flat.effective_rank, flat.stable_rank) == (pytest.approx(6), pytest.approx(6))
    line = spectrum(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 9)))
    assert (line.effective_rank, line.stable_rank) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5))
    nothing = spectrum(torch.zeros(3, 4))
    assert (nothing.effective_rank, nothing.stable_rank, nothing.values) == (0.0, 0.0, (0.0, 0.0, 0.0))


def test_which_tensors_have_one():
    weights = Weights.of(
        {
            "matrix": torch.randn(3, 4),
            "vector": torch.randn(4),
            "codes": torch.ones(3, 4, dtype=torch.int8),
            "empty": torch.empty(0, 4),
            "bad": torch.tensor([[1.0, math.inf], [0.0, 1.0]]),
        }
    )
    found = {tensor.name: tensor.spectrum for tensor in summary(weights, spectra=True).tensors}
    assert [name for name, shape in found.items() if shape] == ["matrix"]

"""The best values for a mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.prune.repair._admm import admm
from weightsmith.prune.repair._least_squares import least_squares
from weightsmith.prune.repair._sparsegpt import sparsegpt

Layer = Callable[..., tuple[Tensor, Tensor]]
Measure = Callable[[Tensor, Tensor, Tensor], float]


@pytest.mark.parametrize("exact", [True, False])
def test_it_is_least_squares_with_the_shrunk_and_lifted_matrix(layer: Layer, exact: bool):
    weight, gram = layer()
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    matrix = 0.7 * gram
    matrix.diagonal().copy_(gram.diagonal() + 0.01 * gram.diagonal().mean())
    found = least_squares(weight, gram, mask, exact=exact)
    for row, keep in enumerate(mask):
        expected = torch.zeros(8, dtype=torch.float64)
        expected[keep] = torch.linalg.solve(matrix[keep][:, keep], matrix[keep] @ weight[row])
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3 if not exact else 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_better_repair_has_the_smaller_error(layer: Layer, error: Measure, seed: int):
    weight, gram = layer(rows=12, inputs=24, data=100, seed=seed)
    score = weight.abs() * gram.diagonal().sqrt()
    mask = torch.zeros(12, 24, dtype=torch.bool).scatter(1, score.topk(12, dim=1).indices, True)
    ways = [
        least_squares(weight, gram, mask, damp=0, shrink=0, exact=True),
        least_squares(weight, gram, mask, damp=0, shrink=0),
        admm(weight, gram, mask, damp=0.01),
        sparsegpt(weight, gram, mask, damp=0.0),
        weight * mask,
    ]
    errors = [error(found, weight, gram) for found in ways]
    assert errors == sorted(errors)
    assert errors[1] < 1.0001 * errors[0]
    assert all(not found[~mask].any() for found in ways)


def test_the_slope_at_what_was_found_is_zero(layer: Layer):
    weight, gram = layer(rows=40, inputs=30, data=200)
    mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    found = least_squares(weight, gram, mask, damp=0, shrink=0, exact=True)
    slope = ((weight - found) @ gram)[mask]
    assert slope.abs().max() < 1e-9 * float((weight @ gram).abs().max())


def test_shrinking_helps_on_other_data(layer: Layer, error: Measure):
    weight, true = layer(rows=20, inputs=40, data=5000, seed=3)
    generator = torch.Generator().manual_seed(3)
    data = torch.linalg.cholesky(true).T  # 40 rows of which the Gram matrix is the true one
    few = torch.randn(60, 40, generator=generator, dtype=torch.float64) @ data / 40**0.5
    mask = torch.rand(20, 40, generator=generator) < 0.5
    fits = [least_squares(weight, few.T @ few, mask, damp=0, shrink=s, exact=True) for s in (0.0, 0.3)]
    on_data = [error(fit, weight, few.T @ few) for fit in fits]
    on_others = [error(fit, weight, true) for fit in fits]
    assert on_data[0] < on_data[1]
    assert on_others[1] < on_others[0]


def test_edges(layer: Layer):
    weight, gram = layer()
    everything, nothing = torch.ones(6, 8, dtype=torch.bool), torch.zeros(6, 8, dtype=torch.bool)
    for exact in (True, False):
        torch.testing.assert_close(least_squares(weight, gram, everything, exact=exact), weight)
        assert not least_squares(weight, gram, nothing, exact=exact).any()
        singular = layer(inputs=8, data=2)[1]
        assert least_squares(weight, singular, everything, damp=0, shrink=0, exact=exact).isfinite().all()
    gram[2] = gram[:, 2] = 0
    mask = everything.clone()
    mask[:, 0] = False
    torch.testing.assert_close(least_squares(weight, gram, mask)[:, 2], weight[:, 2])
    found = least_squares(weight.bfloat16(), gram.float(), mask)
    assert found.dtype == torch.bfloat16


def test_what_is_refused(layer: Layer):
    weight, gram = layer()
    with pytest.raises(Error, match="least_squares needs mask="):
        least_squares(weight, gram)
    with pytest.raises(Error, match="at least 1 step"):
        least_squares(weight, gram, weight > 0, steps=0)
    with pytest.raises(Error, match="NaN"):
        least_squares(weight, gram.fill_(torch.nan), weight > 0)

"""Fitting and masking by turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.prune.repair._admm import admm, ramped
from weightsmith.prune.repair._least_squares import least_squares

Layer = Callable[..., tuple[Tensor, Tensor]]
Measure = Callable[[Tensor, Tensor, Tensor], float]


def slowly(weight: Tensor, gram: Tensor, mask: Tensor | None, share: float, steps: int, rho: float) -> Tensor:
    """As the paper writes it, with columns for outputs."""
    norm = gram.diagonal().sqrt()
    matrix = gram / torch.outer(norm, norm) + 0.1 * torch.eye(len(gram), dtype=gram.dtype)
    start = (weight * norm).T
    inverse = torch.linalg.inv(matrix + rho * torch.eye(len(gram), dtype=gram.dtype))
    w, u = start.clone(), torch.zeros_like(start)
    keep = torch.empty(0) if mask is None else mask.T
    for step in range(steps):
        if mask is None and step < 15:
            now = share - share * (1 - (step + 1) / 15) ** 3
            order = (w + u).abs().flatten().argsort()[: round(now * w.numel())]
            keep = torch.ones(w.numel()).bool().scatter(0, order, False).view(w.shape)
        z = torch.where(keep, w + u, 0)
        u = u + w - z
        w = inverse @ (matrix @ start + rho * (z - u))
    return torch.where(keep, w + u, 0).T / norm


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [15, 20])
def test_by_the_paper(layer: Layer, steps: int, rho: float):
    weight, gram = layer()
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    found = admm(weight, gram, mask, steps=steps, rho=rho)
    torch.testing.assert_close(found, slowly(weight, gram, mask, 0, steps, rho))
    assert not found[~mask].any()
    found = admm(weight, gram, sparsity=0.5, steps=steps, rho=rho)
    torch.testing.assert_close(found, slowly(weight, gram, None, 0.5, steps, rho))


def test_with_many_steps_it_is_least_squares(layer: Layer):
    weight, gram = layer()
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    found = admm(weight, gram, mask, steps=2000, damp=0.0)
    torch.testing.assert_close(found, least_squares(weight, gram, mask, damp=0, shrink=0, exact=True))


def test_the_ramp():
    score = torch.arange(1.0, 9.0).view(2, 4)
    assert [int((~ramped(score, 0.5, t)).sum()) for t in (0.0, 0.25, 0.5, 1.0)] == [0, 2, 4, 4]  # 4 (1 - (1 - t)^3)
    assert [int((~ramped(score, (2, 4), t)).sum()) for t in (0.0, 0.25, 1.0)] == [0, 2, 4]
    # Of the first two of each four the lowest go first: 1 and 2, before 5 and 6.
    assert ramped(score, (2, 4), 0.25).tolist() == [[False, False, True, True], [True] * 4]
    assert ramped(score, (2, 4), 1.0).tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("choosing", [0, 1, 15, 20])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0, "2:4", "1:8"])
def test_exactly_what_was_asked_for_goes(layer: Layer, sparsity: Any, choosing: int):
    weight, gram = layer()
    found = admm(weight, gram, sparsity=sparsity, choosing=choosing)
    if isinstance(sparsity, str):
        keep, group = map(int, sparsity.split(":"))
        assert ((found != 0).view(6, -1, group).sum(-1) == keep).all()
    else:
        assert int((found == 0).sum()) == round(sparsity * 48)
    if sparsity == 0.0:
        torch.testing.assert_close(found, weight)


def test_chosen_at_once_its_mask_is_the_score_of_wanda(layer: Layer):
    weight, gram = layer()
    found = admm(weight, gram, sparsity=0.5, choosing=0)
    score = weight.abs() * gram.diagonal().sqrt()
    assert torch.equal(found != 0, score > score.flatten().sort().values[23])


def test_near_the_best_of_all_masks(layer: Layer, error: Measure, best_error: Callable[..., float]):
    ratios = []
    for seed in range(20):
        weight, gram = layer(rows=1, seed=seed)
        own, best = error(admm(weight, gram, sparsity=0.5), weight, gram), best_error(weight, gram, 4)
        assert best <= own * (1 + 1e-9)
        ratios.append(own / best)
    assert torch.tensor(ratios).median() < 1.5


def test_inputs_that_were_always_zero(layer: Layer):
    weight, gram = layer()
    gram[2] = gram[:, 2] = 0
    weight[:, 2] = 100
    found = admm(weight, gram, sparsity=0.5)
    assert not found[:, 2].any()
    assert found.isfinite().all()
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 0] = False
    torch.testing.assert_close(admm(weight, gram, mask)[:, 2], weight[:, 2])
    nothing = admm(weight, torch.zeros(8, 8), mask)
    torch.testing.assert_close(nothing, weight * mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_strides(layer: Layer, dtype: torch.dtype):
    weight, gram = layer(rows=8)
    given = weight.to(dtype).T
    before = given.clone()
    found = admm(given, gram.float(), sparsity="2:4")
    assert found.dtype == dtype
    assert torch.equal(given, before)
    torch.testing.assert_close(found, admm(given.contiguous(), gram.float(), sparsity="2:4"))


@pytest.mark.parametrize("change", [{"steps": 0}, {"rho": 0.0}, {"choosing": 21}, {"damp": -1.0}, {"sparsity": None}])
def test_what_is_refused(layer: Layer, change: dict[str, Any]):
    weight, gram = layer()
    with pytest.raises(Error, match="admm needs"):
        admm(weight, gram, **({"sparsity": 0.5} | change))


def test_nothing_to_prune():
    assert admm(torch.zeros(0, 4), torch.eye(4), sparsity=0.5).shape == (0, 4)
    assert admm(torch.zeros(3, 0), torch.zeros(0, 0), sparsity=0.5).shape == (3, 0)
    assert not admm(torch.zeros(3, 4), torch.eye(4), sparsity="2:4").any()

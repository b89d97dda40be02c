"""Column by column, with the columns after each making up for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.prune.repair._sparsegpt import sparsegpt

Layer = Callable[..., tuple[Tensor, Tensor]]
Measure = Callable[[Tensor, Tensor, Tensor], float]


def slowly(weight: Tensor, gram: Tensor, sparsity: Any, damp: float, block: int, mask: Tensor | None = None) -> Tensor:
    """The paper's loop with the inverse of what is left found anew for every column (the limit of its Cholesky)."""
    matrix = gram.clone()
    matrix.diagonal().add_(damp * gram.diagonal().mean())
    rows, inputs = weight.shape
    now, keep = weight.clone(), torch.ones(rows, inputs, dtype=torch.bool) if mask is None else mask
    removed = 0
    for column in range(inputs):
        inverse = torch.linalg.inv(matrix[column:, column:])
        if mask is None and isinstance(sparsity, float) and column % block == 0:
            width = min(block, inputs - column)
            own = torch.stack([torch.linalg.inv(matrix[j:, j:])[0, 0] for j in range(column, column + width)])
            score = now[:, column : column + width] ** 2 / own
            count = round(sparsity * rows * (column + width)) - removed
            removed += count
            order = score.flatten().argsort()[:count]
            keep[:, column : column + width] = torch.ones(score.numel()).bool().scatter(0, order, False).view(rows, -1)
        if mask is None and not isinstance(sparsity, float) and column % sparsity[1] == 0:
            width = sparsity[1]
            own = torch.stack([torch.linalg.inv(matrix[j:, j:])[0, 0] for j in range(column, column + width)])
            order = (now[:, column : column + width] ** 2 / own).argsort(dim=1)[:, : width - sparsity[0]]
            keep[:, column : column + width] = torch.ones(rows, width).bool().scatter(1, order, False)
        lost = torch.where(keep[:, column], 0.0, now[:, column])
        now[:, column:] -= torch.outer(lost / inverse[0, 0], inverse[0])
        now[:, column] = torch.where(keep[:, column], now[:, column], 0.0)
    return now


@pytest.mark.parametrize("block", [2, 3, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_shares_by_a_slow_loop(layer: Layer, sparsity: float, block: int):
    weight, gram = layer()
    found = sparsegpt(weight, gram, sparsity=sparsity, block=block)
    torch.testing.assert_close(found, slowly(weight, gram, sparsity, 0.01, block))
    assert int((found == 0).sum()) == round(sparsity * weight.numel())


@pytest.mark.parametrize("block", [1, 6, 128])
@pytest.mark.parametrize(("pattern", "pair"), [("2:4", (2, 4)), ("1:2", (1, 2)), ("1:8", (1, 8)), ("8:8", (8, 8))])
def test_patterns_by_a_slow_loop(layer: Layer, pattern: str, pair: tuple[int, int], block: int):
    weight, gram = layer()
    found = sparsegpt(weight, gram, sparsity=pattern, block=block)
    torch.testing.assert_close(found, slowly(weight, gram, pair, 0.01, block))
    assert ((found != 0).view(6, -1, pair[1]).sum(-1) == pair[0]).all()


def test_a_given_mask_by_a_slow_loop(layer: Layer):
    weight, gram = layer()
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    found = sparsegpt(weight, gram, mask, block=3)
    torch.testing.assert_close(found, slowly(weight, gram, None, 0.01, 3, mask))
    assert not found[~mask].any()


def test_with_a_diagonal_gram_it_is_magnitude_weighted_by_it():
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    energy = torch.tensor([1.0, 4.0, 0.25, 9.0, 1.0, 2.0])
    found = sparsegpt(weight, energy.diag(), sparsity=0.4, damp=0)
    score = (weight.square() * energy).flatten()
    keep = torch.ones(30, dtype=torch.bool).scatter(0, score.argsort()[:12], False).view(5, 6)
    assert torch.equal(found, weight * keep)


def test_shrunk_all_the_way_nothing_makes_up_for_anything(layer: Layer):
    weight, gram = layer()
    found = sparsegpt(weight, gram, sparsity=0.5, shrink=1.0)
    assert torch.equal(found[found != 0], weight[found != 0])


def test_near_the_best_of_all_masks(layer: Layer, error: Measure, best_error: Callable[..., float]):
    ratios, others = [], []
    for seed in range(20):
        weight, gram = layer(rows=1, seed=seed)
        own = error(sparsegpt(weight, gram, sparsity=0.5), weight, gram)
        best = best_error(weight, gram, 4)
        assert best <= own * (1 + 1e-9)
        ratios.append(own / best)
        others.append(
            error(torch.where(weight.abs() > weight.abs().sort().values[:, 3:4], weight, 0), weight, gram) / best
        )
    middle = torch.tensor([ratios, others]).median(dim=1).values
    assert middle[0] < 3
    assert middle[0] < middle[1] / 2


def test_inputs_that_were_always_zero_go_first_and_no_further(layer: Layer):
    weight, gram = layer()
    gram[2] = gram[:, 2] = 0
    weight[:, 2] = 100
    found = sparsegpt(weight, gram, sparsity=0.5)
    assert not found[:, 2].any()
    assert int((found == 0).sum()) == 24
    assert int((sparsegpt(weight, gram, sparsity=2 / 48)[:, 2] == 0).sum()) == 2
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 0] = False
    kept = sparsegpt(weight, gram, mask)
    assert torch.equal(kept[:, 2], weight[:, 2])
    assert kept.isfinite().all()


def test_fewer_rows_of_data_than_inputs(layer: Layer):
    weight, gram = layer(inputs=12, data=3)
    for damp in (0.01, 0.0):
        assert sparsegpt(weight, gram.float(), sparsity=0.5, damp=damp).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(layer: Layer, dtype: torch.dtype):
    weight, gram = layer()
    given = weight.to(dtype)
    found = sparsegpt(given, gram.float(), sparsity="2:4")
    assert found.dtype == dtype
    wide = sparsegpt(given.double(), gram.float().double(), sparsity="2:4")
    torch.testing.assert_close(found, wide.to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-3)


def test_blocks_of_a_gram_are_a_gram_of_blocks(layer: Layer):
    weight, gram = layer()
    blocks = torch.stack([gram[:4, :4], gram[4:, 4:]]).float()
    found = sparsegpt(weight, blocks, sparsity=0.5)
    torch.testing.assert_close(found, sparsegpt(weight, torch.block_diag(*blocks), sparsity=0.5))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sparsity": None}, "got neither"),
        ({"mask": torch.ones(6, 8, dtype=torch.bool)}, "got both"),
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"sparsity": "2:3"}, "cannot be cut into groups of 3"),
        ({"sparsity": "four"}, "is no pattern"),
        ({"gram": torch.eye(7)}, "Gram"),
        ({"gram": torch.ones(8)}, "not their diagonal"),
        ({"weight": torch.ones(6, 2, 4)}, "matrices"),
        ({"weight": torch.full((6, 8), torch.nan)}, "NaN"),
        ({"sparsity": None, "mask": torch.ones(6, 8)}, "boolean mask"),
        ({"sparsity": None, "mask": torch.ones(8, 6, dtype=torch.bool)}, "boolean mask"),
        ({"block": 0}, "block"),
    ],
)
def test_what_is_refused(layer: Layer, change: dict[str, Any], says: str):
    weight, gram = layer()
    given = {"weight": weight, "gram": gram, "sparsity": 0.5} | change
    with pytest.raises(Error, match=says):
        sparsegpt(**given)

"""Gram matrices made regular, and their factors."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.solve import cholesky, inverse_factor, steadied


def gram(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    data = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return data.T @ data


def test_what_is_steadied_by_hand():
    given = torch.tensor([[4.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    before = given.clone()
    found = steadied(given, damp=0.5, shrink=0.25)
    # The mean of what lives is 3; the dead input gets it whole.
    assert found.tolist() == [[5.5, 1.5, 0.0], [1.5, 3.5, 0.0], [0.0, 0.0, 3.0]]
    assert found.dtype == torch.float64
    assert torch.equal(given, before)
    wide = given.double()
    steadied(wide, shrink=1)
    assert torch.equal(wide, before.double())


def test_nothing_and_zeros():
    assert steadied(torch.zeros(0, 0)).shape == (0, 0)
    assert torch.equal(steadied(torch.zeros(2, 2), damp=0.1), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("bad", "options", "says"),
    [
        (torch.ones(2, 3), {}, "is square"),
        (torch.tensor([[torch.nan]]), {}, "NaN"),
        (torch.tensor([[-1.0]]), {}, "below zero"),
        (torch.ones(1, 1), {"damp": -1.0}, "damp must be"),
        (torch.ones(1, 1), {"shrink": 1.5}, "shrink between"),
        (torch.ones(1, 1), {"damp": float("nan")}, "damp must be"),
    ],
)
def test_what_is_refused(bad: torch.Tensor, options: dict[str, float], says: str):
    with pytest.raises(Error, match=says):
        steadied(bad, **options)


def test_a_singular_matrix_is_factored_nearly():
    matrix = gram(3, 6)
    factor = cholesky(matrix)
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-9 * float(matrix.diagonal().mean()))
    batch = torch.stack([gram(9, 6), matrix])
    both = cholesky(batch)
    assert torch.equal(both.tril(), both)
    torch.testing.assert_close(both @ both.mT, batch, rtol=0, atol=1e-9 * float(matrix.diagonal().mean()))


def test_a_matrix_with_negative_eigenvalues_is_refused():
    with pytest.raises(Error, match="negative eigenvalues"):
        cholesky(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


def test_the_factor_of_the_inverse_is_its_cholesky_factor():
    matrix = gram(30, 7)
    factor = inverse_factor(matrix)
    torch.testing.assert_close(factor, torch.linalg.cholesky(torch.linalg.inv(matrix)).mT)
    assert torch.equal(factor, factor.triu())


def test_nothing_of_a_given_matrix_is_changed_and_its_order_of_memory_does_not_matter():
    matrix = gram(30, 7)
    before = matrix.clone()
    found = inverse_factor(matrix)
    assert torch.equal(matrix, before)
    assert found.is_contiguous()
    assert torch.equal(inverse_factor(matrix.T.contiguous().T), found)
    assert inverse_factor(torch.zeros(0, 0)).shape == (0, 0)
    with pytest.raises(Error, match="NaN"):
        steadied(torch.tensor([[1.0, torch.inf], [0.0, 1.0]]))

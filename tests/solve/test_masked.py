"""Least squares with unknowns of each row's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.solve import _masked, masked_conjugate_gradients, masked_least_squares


def problem(rows: int = 9, inputs: int = 12, data: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(data, inputs, generator=generator, dtype=torch.float64)
    found[:, 1] += 2 * found[:, 0]
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, inputs, generator=generator) < torch.linspace(0, 1, rows)[:, None]
    return weight, found, found.T @ found, mask


def by_lstsq(weight: Tensor, data: Tensor, mask: Tensor) -> Tensor:
    found = torch.zeros_like(weight)
    for row, keep in enumerate(mask):
        if keep.any():
            found[row, keep] = torch.linalg.lstsq(data[:, keep], data @ weight[row]).solution
    return found


@pytest.mark.parametrize("size", [1, 2000, 2**27])
def test_both_are_least_squares(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_masked, "BYTES", size)
    weight, data, gram, mask = problem()
    expected = by_lstsq(weight, data, mask)
    exact = masked_least_squares(weight, gram, mask)
    torch.testing.assert_close(exact, expected)
    near = masked_conjugate_gradients(weight, gram, mask, tolerance=1e-12)
    torch.testing.assert_close(near, expected)
    for found in (exact, near):
        assert not found[~mask].any()
        assert torch.equal(found[0], torch.zeros(12, dtype=torch.float64))  # no unknown
        torch.testing.assert_close(found[-1], weight[-1])  # all of them


def test_few_steps_are_nearly_there_and_rows_that_rest_stay_where_they_are():
    weight, _, gram, mask = problem(rows=30, inputs=40, data=200)
    exact = masked_least_squares(weight, gram, mask)

    def error(found: Tensor) -> float:
        return float(((found - weight) @ gram * (found - weight)).sum())

    floor, start = error(exact), error(weight * mask)
    errors = [error(masked_conjugate_gradients(weight, gram, mask, steps=n, tolerance=0)) for n in (1, 3, 10)]
    assert start > errors[0] > errors[1] > errors[2] > floor * (1 - 1e-9)
    assert error(masked_conjugate_gradients(weight, gram, mask)) < floor * (1 + 1e-6)


def test_of_four_and_bfloat_weights():
    weight, _, gram, _ = problem()
    mask = torch.tensor([True, False, False, True]).repeat(9, 3)
    narrow = weight.bfloat16()
    found = masked_least_squares(narrow, gram, mask)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, masked_least_squares(narrow.double(), gram, mask))


@pytest.mark.parametrize("solver", [masked_least_squares, masked_conjugate_gradients])
def test_edges(solver: object):
    assert callable(solver)
    for rows, inputs in ((0, 3), (3, 0), (1, 1)):
        weight, mask = torch.ones(rows, inputs), torch.ones(rows, inputs, dtype=torch.bool)
        assert torch.equal(solver(weight, torch.eye(inputs), mask), weight)
        assert torch.equal(solver(weight, torch.eye(inputs), ~mask), torch.zeros(rows, inputs))


def test_a_direction_that_the_matrix_says_nothing_of_is_not_followed():
    off = 1 + 1e-6  # indefinite within rounding: along (1, -1) the square is -2e-6
    matrix = torch.tensor([[1.0, off, 0.5], [off, 1.0, -0.5], [0.5, -0.5, 1.0]])
    weight, mask = torch.ones(1, 3), torch.tensor([[True, True, False]])
    assert torch.equal(masked_conjugate_gradients(weight, matrix, mask), weight * mask)


def test_what_is_padded_does_not_count_where_a_matrix_is_lifted():
    gram = 1e-13 * torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = masked_least_squares(torch.ones(2, 3), gram, mask)
    torch.testing.assert_close(found[1], torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(found[0] @ gram, gram.sum(dim=0), rtol=1e-6, atol=0)

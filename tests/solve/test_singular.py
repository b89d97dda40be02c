"""The largest singular value against a decomposition: warm and cold, at the ends of the dtype, and near others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weightsmith import solve
from weightsmith.solve import effective_rank, gram_of, largest_singular, roots_of, singular_values, stable_rank


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (30, 7), (7, 30), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_first_of_a_decomposition(shape, dtype):
    matrix = drawn(*shape).to(dtype)
    _, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    value, vector = largest_singular(matrix)
    assert value == pytest.approx(float(values[0]), rel=1e-5)
    assert vector.shape == (shape[1],)
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    assert abs(float(vector.double() @ right[0])) == pytest.approx(1, abs=1e-3)


def test_equal_values_are_one_value():
    value, vector = largest_singular(3 * torch.linalg.qr(drawn(6, 6))[0])
    assert value == pytest.approx(3)
    assert float(vector.norm()) == pytest.approx(1)


def test_a_warm_start_takes_fewer_products(monkeypatch):
    calls = []
    kept = solve._singular.krylov

    def counted(apply, *given):
        def one(columns):
            calls[-1] += 1
            return apply(columns)

        calls.append(0)
        return kept(one, *given)

    monkeypatch.setattr(solve._singular, "krylov", counted)
    matrix = drawn(80, 60)
    _, vector = largest_singular(matrix)
    after = matrix + 1e-4 * drawn(80, 60, seed=1)
    cold, _ = largest_singular(after)
    warm, _ = largest_singular(after, vector)
    assert calls[2] < calls[1]
    assert warm == pytest.approx(cold, rel=1e-5)
    assert cold == pytest.approx(float(torch.linalg.svdvals(after)[0]), rel=1e-5)


def test_a_start_at_a_right_angle_hides_nothing():
    value, _ = largest_singular(torch.diag(torch.tensor([1.0, 5.0])), torch.tensor([1.0, 0.0]))
    assert value == pytest.approx(5, rel=1e-5)


@pytest.mark.parametrize("start", [torch.zeros(4), torch.full((4,), math.nan)])
def test_a_start_that_says_nothing_is_passed_over(start):
    matrix = drawn(5, 4).float()
    assert largest_singular(matrix, start)[0] == largest_singular(matrix)[0]


def test_the_vector_is_on_the_side_of_the_start():
    matrix = drawn(9, 9)
    _, vector = largest_singular(matrix)
    torch.testing.assert_close(largest_singular(matrix, -vector)[1], -vector, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_that_leave_the_dtype(size):
    matrix = drawn(6, 5).float()
    assert largest_singular(matrix * size)[0] == pytest.approx(size * largest_singular(matrix)[0], rel=1e-5)


def test_nothing_and_what_is_not_finite():
    value, vector = largest_singular(torch.zeros(3, 2))
    assert (value, vector.tolist()) == (0.0, [0.0, 0.0])
    assert largest_singular(torch.zeros(0, 2))[0] == 0.0
    for bad in (math.nan, math.inf):
        value, vector = largest_singular(torch.tensor([[1.0, bad]]))
        assert math.isnan(value)
        assert vector.isnan().all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_matrix_without_entries(shape):
    values = singular_values(torch.zeros(shape))
    assert values is not None
    assert not len(values)
    assert (effective_rank(values), stable_rank(values)) == (0.0, 0.0)


def test_all_values_and_their_ranks(monkeypatch):
    monkeypatch.setattr(solve._singular, "_BLOCK", 10)  # several blocks
    matrix = drawn(4, 9)
    values = torch.linalg.svdvals(matrix)
    found = singular_values(matrix)
    assert found is not None
    torch.testing.assert_close(found, values)
    torch.testing.assert_close(gram_of(matrix), matrix @ matrix.T)
    torch.testing.assert_close(roots_of(matrix @ matrix.T), values)
    shares = values / values.sum()
    assert effective_rank(found) == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
    assert stable_rank(found) == pytest.approx(float(values.square().sum() / values[0] ** 2))
    assert singular_values(torch.full((2, 2), math.nan)) is None

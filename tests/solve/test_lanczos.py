"""Eigenvalues, traces and spectra of matrices that are only multiplied with, against dense algebra."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.solve import (
    extreme_eigenpairs,
    hutch_plus_plus,
    hutchinson_diagonal,
    hutchinson_trace,
    krylov,
    signs,
    spectral_measure,
)

WIDE = torch.empty(0, dtype=torch.float64)


def symmetric(values: list[float], seed: int = 0) -> torch.Tensor:
    """A dense matrix of these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


class Counted:
    """A matrix as a function that counts."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix, self.calls, self.columns = matrix, 0, 0

    def __call__(self, columns: torch.Tensor) -> torch.Tensor:
        self.calls, self.columns = self.calls + 1, self.columns + columns.shape[1]
        return self.matrix @ columns


def start(size: int, width: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_krylov_is_the_matrix_in_an_orthonormal_basis(width: int):
    matrix = symmetric([float(i) for i in range(30)])
    found = krylov(Counted(matrix), start(30, width), steps=5)
    q = found.basis
    assert q.shape == (5 * width, 30)
    torch.testing.assert_close(q @ q.T, torch.eye(len(q), dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(found.inner, q @ matrix @ q.T, rtol=0, atol=1e-12)
    # what leaves the space has the length that is said
    values, vectors, off = found.ritz()
    for value, vector, residual in zip(values, vectors.T, off, strict=True):
        whole = q.T @ vector
        assert float((matrix @ whole - value * whole).norm()) == pytest.approx(float(residual), abs=1e-12)
    assert not found.exhausted
    assert found.products == 5 * width


def test_krylov_stays_orthogonal_where_plain_lanczos_does_not():
    matrix = symmetric([1e4, 5e3, *(i / 100 for i in range(98))])
    found = krylov(Counted(matrix), start(100), steps=60)
    gram = found.basis @ found.basis.T
    assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-13


def test_krylov_ends_early_when_nothing_is_left():
    matrix = symmetric([2.0] * 4 + [5.0] * 3 + [0.0] * 5)
    apply = Counted(matrix)
    found = krylov(apply, start(12), steps=10)
    assert found.exhausted
    assert apply.calls == 3  # three different eigenvalues
    torch.testing.assert_close(found.ritz()[0], torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64), rtol=0, atol=1e-12)
    whole = krylov(Counted(matrix), start(12, 12), steps=4)
    assert whole.exhausted
    torch.testing.assert_close(whole.ritz()[0], torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-12)


def test_krylov_of_a_zero_matrix_and_of_dependent_starts():
    zero = krylov(lambda v: torch.zeros_like(v), start(6), steps=4)
    assert zero.exhausted
    assert zero.ritz()[0].tolist() == [0.0]
    once = start(6)
    found = krylov(Counted(symmetric([1.0, 2, 3, 4, 5, 6])), torch.cat([once, 2 * once], dim=1), steps=1)
    assert len(found.basis) == 1


def test_krylov_stops_when_told():
    apply = Counted(symmetric([float(i) for i in range(50)]))
    krylov(apply, start(50), steps=40, done=lambda found: len(found.inner) >= 7)
    assert apply.calls == 7


def test_krylov_refuses():
    with pytest.raises(Error, match="not zero"):
        krylov(lambda v: v, torch.zeros(3, 1), 2)
    with pytest.raises(Error, match="at least 1 step"):
        krylov(lambda v: v, torch.ones(3, 1), 0)
    with pytest.raises(Error, match="not finite"):
        krylov(lambda v: v * math.nan, torch.ones(3, 1), 2)


VALUES = [-9.0, -4.0, *(i / 40 for i in range(40)), 3.0, 6.0, 8.0]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("largest", [8.0, 6.0, 3.0]),
        ("smallest", [0.0, -4.0, -9.0]),
        ("both", [8.0, 6.0, 3.0, 0.0, -4.0, -9.0]),
        ("magnitude", [-9.0, 8.0, 6.0]),
    ],
)
@pytest.mark.parametrize("block", [None, 1])
def test_extreme_eigenpairs_against_dense(ends, expected, block):
    matrix = symmetric(VALUES)
    found = extreme_eigenpairs(Counted(matrix), 45, 3, ends=ends, block=block, steps=45, tolerance=1e-9, like=WIDE)
    assert found.converged
    assert found.values.tolist() == pytest.approx(expected, abs=1e-7)
    assert found.vectors.dtype == torch.float64
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert float(vector.norm()) == pytest.approx(1, abs=1e-12)
        off = float((matrix @ vector - value * vector).norm())
        assert off == pytest.approx(float(residual), abs=1e-8)
        assert off < 1e-7


def test_equal_eigenvalues_are_found_as_often_as_they_occur():
    matrix = symmetric([7.0] * 3 + [5.0] * 2 + [i / 10 for i in range(20)])
    found = extreme_eigenpairs(Counted(matrix), 25, 5, tolerance=1e-8, like=WIDE)
    assert found.values.tolist() == pytest.approx([7, 7, 7, 5, 5], abs=1e-6)


def test_a_closed_space_is_widened_until_it_holds_the_pairs():
    found = extreme_eigenpairs(lambda v: 2 * v, 6, 4, block=1, like=WIDE)
    assert found.values.tolist() == pytest.approx([2.0] * 4)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    zero = extreme_eigenpairs(lambda v: 0 * v, 6, 2, ends="both", like=WIDE)
    assert zero.values.tolist() == [0.0] * 4
    assert extreme_eigenpairs(lambda v: 3 * v, 1, 1, like=WIDE).values.tolist() == pytest.approx([3.0])


def test_too_few_steps_are_said():
    matrix = symmetric([math.exp(-i / 5) for i in range(60)])
    rough = extreme_eigenpairs(Counted(matrix), 60, 2, steps=2, tolerance=1e-10, like=WIDE)
    assert not rough.converged
    assert rough.products == 4
    with pytest.raises(Error, match="more steps"):
        extreme_eigenpairs(Counted(matrix), 60, 5, block=1, steps=2, like=WIDE)
    with pytest.raises(Error, match="cannot find 4"):
        extreme_eigenpairs(Counted(matrix), 6, 4, ends="both")
    with pytest.raises(Error, match="ends is one of"):
        extreme_eigenpairs(Counted(matrix), 60, ends="top")  # type: ignore[arg-type]
    with pytest.raises(Error, match="block"):
        extreme_eigenpairs(Counted(matrix), 60, block=0)


def test_signs_are_plus_and_minus_one_and_do_not_hang_on_the_block():
    generator = torch.Generator().manual_seed(1)
    together = signs(100, 6, generator, WIDE)
    generator = torch.Generator().manual_seed(1)
    apart = torch.cat([signs(100, n, generator, WIDE) for n in (1, 2, 3)], dim=1)
    assert torch.equal(together, apart)
    assert set(together.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(together.mean())) < 0.15


def test_hutchinson_trace_is_the_mean_of_the_forms():
    matrix = symmetric([float(i) for i in range(20)])
    found = hutchinson_trace(Counted(matrix), 20, 7, seed=3, at_once=3, like=WIDE)
    z = signs(20, 7, torch.Generator().manual_seed(3), WIDE)
    forms = torch.tensor([float(z[:, i] @ matrix @ z[:, i]) for i in range(7)])
    assert found.value == pytest.approx(float(forms.mean()))
    assert found.error == pytest.approx(float(forms.std()) / 7**0.5, rel=1e-5)
    assert found.products == 7
    many = hutchinson_trace(Counted(matrix), 20, 4000, at_once=100, like=WIDE)
    assert abs(many.value - 190) < 4 * many.error
    assert math.isnan(hutchinson_trace(Counted(matrix), 20, 1, like=WIDE).error)


def test_hutch_plus_plus_is_exact_for_few_directions_and_unbiased():
    low = symmetric([50.0, -20.0, 8.0] + [0.0] * 37)
    apply = Counted(low)
    found = hutch_plus_plus(apply, 40, 12, like=WIDE, at_once=2)
    assert found.value == pytest.approx(38.0, abs=1e-9)
    assert apply.columns == found.products
    matrix = symmetric([100.0, 50.0, *(float(i % 3) for i in range(58))])
    truth = float(matrix.trace())
    estimates = torch.tensor([hutch_plus_plus(Counted(matrix), 60, 15, seed=s, like=WIDE).value for s in range(300)])
    plain = torch.tensor([hutchinson_trace(Counted(matrix), 60, 15, seed=s, like=WIDE).value for s in range(300)])
    assert abs(float(estimates.mean()) - truth) < 4 * float(estimates.std()) / 300**0.5
    assert float(estimates.std()) < float(plain.std()) / 2
    assert hutch_plus_plus(Counted(matrix), 60, 15, like=WIDE).products == 15
    assert hutch_plus_plus(lambda v: 0 * v, 40, 12, like=WIDE).value == 0.0
    with pytest.raises(Error, match="at least 3"):
        hutch_plus_plus(Counted(low), 40, 2, like=WIDE)


def test_hutchinson_diagonal_by_hand_and_in_the_long_run():
    matrix = symmetric([float(i) for i in range(10)])
    found = hutchinson_diagonal(Counted(matrix), 10, 5, seed=2, at_once=2, like=WIDE)
    z = signs(10, 5, torch.Generator().manual_seed(2), WIDE)
    by_hand = sum(z[:, i] * (matrix @ z[:, i]) for i in range(5)) / 5
    torch.testing.assert_close(found, by_hand)
    many = hutchinson_diagonal(Counted(matrix), 10, 20000, at_once=2000, like=WIDE)
    torch.testing.assert_close(many, matrix.diagonal(), rtol=0, atol=0.15)


def test_spectral_measure_integrates_polynomials_exactly():
    matrix = symmetric([math.sin(i) * 3 for i in range(40)])
    values, weights = spectral_measure(Counted(matrix), 40, 3, 4, seed=5, like=WIDE)
    assert len(values) == 12
    assert float(weights.sum()) == pytest.approx(1)
    assert bool((values.diff() >= 0).all())
    z = signs(40, 3, torch.Generator().manual_seed(5), WIDE)
    power = torch.eye(40, dtype=torch.float64)
    for degree in range(9):
        expected = sum(float(z[:, i] @ power @ z[:, i]) for i in range(3)) / 3 / 40
        exact = float(weights @ values**degree) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert exact == (degree <= 7), degree  # twice the steps, less one
        power = power @ matrix


def test_spectral_measure_of_few_values_is_exact():
    matrix = torch.diag(torch.tensor([1.0] * 3 + [4.0] * 9, dtype=torch.float64))
    values, weights = spectral_measure(Counted(matrix), 12, 1, 10, like=WIDE)
    assert values.tolist() == pytest.approx([1.0, 4.0])
    assert weights.tolist() == pytest.approx([0.25, 0.75])


def test_what_is_small_beside_the_largest_is_not_taken_for_rounding():
    size = 100_000  # one outlier, and a bulk a thousand times smaller
    diagonal = torch.rand(size, 1, generator=torch.Generator().manual_seed(0)) * 1e-3
    diagonal[0] = 1.0
    values, weights = spectral_measure(lambda v: diagonal * v, size, 1, 12, like=diagonal)
    assert len(values) == 12
    bulk = values < 0.5
    for share in (0.1, 0.5, 0.9):
        assert float(weights[bulk & (values <= share * 1e-3)].sum()) == pytest.approx(share, abs=0.1)

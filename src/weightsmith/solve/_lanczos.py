"""Eigenvalues, traces and diagonals of a symmetric matrix that can only be multiplied with.

A matrix is a function from columns ``[n, b]`` to columns ``[n, b]``. Lanczos' method looks at it in the
space that the products of a few vectors span; here every new vector is made orthogonal to all before,
twice, so no eigenvalue appears more often than it should. Several vectors at once (a block of b) see an
eigenvalue that occurs up to b times; one vector sees it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from weightsmith.errors import Error

Apply = Callable[[Tensor], Tensor]
"""``[n, b] -> [n, b]``: the columns times a symmetric matrix."""

Ends = Literal["largest", "smallest", "both", "magnitude"]


ROUNDING = 100.0
"""Of the dtype's precision: what a product is off by, against the matrix."""


@dataclass(frozen=True)
class Krylov:
    """A symmetric matrix, seen in the space that was built."""

    basis: Tensor
    """``[m, n]``, orthonormal rows."""
    inner: Tensor
    """``[m, m]`` float64: the matrix in this basis."""
    leaving: Tensor
    """``[b, m]`` float64: what the product of the basis has outside of the space; no rows when nothing has."""
    products: int
    """How many vectors were multiplied."""

    @property
    def exhausted(self) -> bool:
        """Whether the space is closed under the matrix: its eigenvalues are then exact."""
        return not len(self.leaving)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues ``[m]`` ascending, their vectors in the basis ``[m, m]``, and how far each is off ``[m]``."""
        values, vectors = torch.linalg.eigh(self.inner)
        return values, vectors, torch.linalg.vector_norm(self.leaving @ vectors, dim=0)


def krylov(
    apply: Apply,
    start: Tensor,
    steps: int,
    done: Callable[[Krylov], bool] | None = None,
) -> Krylov:
    r"""The block Lanczos method with full orthogonalisation.

    .. math:: A Q_j = Q_{j-1} B_{j-1}^\top + Q_j A_j + Q_{j+1} B_j

    Args:
        apply: the symmetric matrix A.
        start: ``[n, b]``, not all zero; columns that depend on others are left out.
        steps: how often ``apply`` is called at most. The basis takes ``steps * b * n`` numbers.
        done: asked after every step whether that is enough.

    Returns:
        Krylov: fewer steps where the space is exhausted before.

    Raises:
        ValueError: no step, a start of zeros, or products that are not finite.

    >>> found = krylov(lambda v: torch.tensor([[1.0], [2.0], [2.0]]) * v, torch.ones(3, 1), steps=5)
    >>> found.exhausted, found.ritz()[0].round(decimals=4).tolist()      # one vector sees the value 2 once
    (True, [1.0, 2.0])
    """
    if start.dim() != 2 or steps < 1:
        raise Error(f"krylov needs a start [n, b] and at least 1 step, got {list(start.shape)} and {steps}")
    block, _ = _independent(start, float(torch.linalg.matrix_norm(start)))
    if not block.shape[1]:
        raise Error("krylov needs a start that is not zero")
    basis = start.new_zeros(min(steps * block.shape[1], len(start)), len(start))
    inner = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    size = products = 0
    for _ in range(steps):
        block = block[:, : len(basis) - size]
        first, size = size, size + block.shape[1]
        basis[first:size] = block.T
        product = apply(block)
        products += block.shape[1]
        if not product.isfinite().all():
            raise Error("a product with the matrix is not finite; is the loss smooth and the model finite here?")
        seen = basis[:size]
        inside = seen @ product
        inner[:size, first:size] = inside.double()
        inner[first:size, :size] = inside.double().T
        inner[first:size, first:size] = _symmetric(inside[first:].double())
        product = product - seen.T @ inside
        product = product - seen.T @ (seen @ product)
        scale = float(torch.linalg.vector_norm(inner[:size, :size], dim=0).max())
        block, coupling = _independent(product, scale)
        leaving = torch.zeros(len(coupling) if size < len(start) else 0, size, dtype=torch.float64)
        leaving[:, first:] = coupling[: len(leaving)]
        found = Krylov(seen, inner[:size, :size], leaving, products)
        if found.exhausted or size == len(basis) or (done is not None and done(found)):
            return found
    return found


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _independent(columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis ``[n, r]`` of columns ``[n, b]``, and them in it ``[r, b]`` float64.

    What is below rounding, against ``scale``, is nothing. The bound does not grow with n: in float32 it would come to
    lie above all but the largest curvatures of a network.
    """
    orthonormal, triangle = torch.linalg.qr(columns)
    left, values, right = torch.linalg.svd(triangle)
    nothing = ROUNDING * torch.finfo(columns.dtype).eps * scale
    rank = int((values > nothing).sum())
    return orthonormal @ left[:, :rank], (values[:rank, None] * right[:rank]).double().cpu()


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenvalues of a symmetric matrix."""

    values: Tensor
    """``[k]`` float64: descending, or by falling size with ``"magnitude"``."""
    vectors: Tensor
    """``[k, n]``, of length one."""
    residuals: Tensor
    """``[k]`` float64, :math:`\\|A v - \\lambda v\\|`: an eigenvalue lies at most that far from each value."""
    products: int
    converged: bool


def extreme_eigenpairs(
    apply: Apply,
    size: int,
    count: int = 1,
    *,
    ends: Ends = "largest",
    block: int | None = None,
    steps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    like: Tensor | None = None,
) -> Eigenpairs:
    """The eigenvalues at the ends of the spectrum of a symmetric matrix.

    Args:
        apply: the matrix, ``[n, b] -> [n, b]``.
        size: n.
        count: how many pairs; at each end with ``"both"``.
        ends: ``"largest"`` (first), ``"smallest"``, ``"both"``, or the largest in ``"magnitude"``.
        block: vectors multiplied at once. An eigenvalue that occurs more often than that may be listed too
            seldom; by default as many as ``count``, which always suffices.
        steps: products of blocks at most.
        tolerance: of the residuals, against the largest eigenvalue found.
        seed: of the start.
        like: a tensor of the dtype and device to compute in; float32 on the CPU by default.

    >>> diagonal = torch.tensor([[5.0], [1.0], [5.0], [-7.0]])
    >>> extreme_eigenpairs(lambda v: diagonal * v, 4, 2).values.round(decimals=4).tolist()
    [5.0, 5.0]
    """
    if ends not in get_args(Ends):
        raise Error(f"ends is one of {', '.join(get_args(Ends))}; got {ends!r}")
    if count < 1 or count * (1 + (ends == "both")) > size:
        raise Error(f"cannot find {count} eigenvalues ({ends}) of a matrix of {size} rows")
    width = count if block is None else block
    if width < 1:
        raise Error(f"block is at least 1, got {block}")

    def chosen(values: Tensor) -> Tensor:
        last = len(values) - 1
        if ends == "magnitude":
            return values.abs().argsort(descending=True, stable=True)[:count]
        upper, lower = torch.arange(last, last - count, -1), torch.arange(count - 1, -1, -1)
        return {"largest": upper, "smallest": lower, "both": torch.cat([upper, lower])}[ends]

    def done(found: Krylov) -> bool:
        needed = count * (1 + (ends == "both"))
        if len(found.inner) < needed:
            return False
        values, _, off = found.ritz()
        return bool((off[chosen(values)] <= tolerance * values.abs().max()).all())

    form = torch.empty(0) if like is None else like
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, min(width, size), generator=generator, dtype=form.dtype).to(form.device)
    found = krylov(apply, start, steps, done)
    needed = count * (1 + (ends == "both"))
    while len(found.inner) < needed and found.exhausted:
        found = _widened(apply, found, needed - len(found.inner), steps, generator)
    if len(found.inner) < needed:
        raise Error(f"{steps} steps of {width} vectors cannot hold {needed} eigenvectors; give more steps=")
    values, vectors, off = found.ritz()
    order = chosen(values)
    pairs = (found.basis.T @ vectors[:, order].to(found.basis)).T
    return Eigenpairs(values[order], pairs, off[order], found.products, done(found))


def _widened(apply: Apply, found: Krylov, more: int, steps: int, generator: torch.Generator) -> Krylov:
    """A closed space together with one that is orthogonal to it."""
    start = torch.randn(found.basis.shape[1], more, generator=generator, dtype=found.basis.dtype).to(found.basis)

    def outside(columns: Tensor) -> Tensor:
        for _ in range(2):
            columns = columns - found.basis.T @ (found.basis @ columns)
        return columns

    other = krylov(lambda columns: outside(apply(columns)), outside(start), steps)
    inner = torch.block_diag(found.inner, other.inner)
    leaving = torch.cat([torch.zeros(len(other.leaving), len(found.inner), dtype=torch.float64), other.leaving], dim=1)
    return Krylov(torch.cat([found.basis, other.basis]), inner, leaving, found.products + other.products)


@dataclass(frozen=True)
class Estimate:
    """A number that was sampled."""

    value: float
    error: float
    """Its standard error; NaN from a single sample."""
    products: int


def signs(size: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs ``[n, count]``: of all vectors with independent entries, those of the least variance."""
    return torch.randint(0, 2, (count, size), generator=generator).T.to(like) * 2 - 1


def hutchinson_trace(
    apply: Apply, size: int, probes: int, *, seed: int = 0, at_once: int = 1, like: Tensor
) -> Estimate:
    r"""The trace of a symmetric matrix, from random signs.

    .. math:: \operatorname{tr} A \approx \frac1m \sum_{i=1}^m z_i^\top A z_i

    >>> matrix = torch.diag(torch.tensor([1.0, 2.0]))     # of a diagonal matrix it is exact
    >>> hutchinson_trace(lambda v: matrix @ v, 2, 3, like=matrix).value
    3.0
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for first in range(0, probes, at_once):
        z = signs(size, min(at_once, probes - first), generator, like)
        found.append((z * apply(z)).double().sum(dim=0).cpu())
    return _mean(torch.cat(found), probes)


def _mean(samples: Tensor, products: int, exact: float = 0.0) -> Estimate:
    spread = float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
    return Estimate(exact + float(samples.mean()), spread, products)


def hutch_plus_plus(apply: Apply, size: int, probes: int, *, seed: int = 0, at_once: int = 1, like: Tensor) -> Estimate:
    r"""The trace of a symmetric matrix: what a random sketch holds exactly, the rest from random signs.

    .. math:: \operatorname{tr} A = \operatorname{tr} Q^\top A Q
        + \operatorname{tr}\, (I - QQ^\top) A (I - QQ^\top), \qquad Q = \operatorname{orth}(A S)

    A third of the products each goes into the sketch, its exact part, and the rest (Meyer et al. 2021,
    'Hutch++: Optimal Stochastic Trace Estimation'). With few large eigenvalues its error is far smaller than that of
    random signs alone. ``size * probes / 3`` numbers are held some four times.
    """
    third = min(probes // 3, size)
    if third < 1:
        raise Error(f"Hutch++ needs at least 3 probes, got {probes}")
    generator = torch.Generator().manual_seed(seed)

    def applied(columns: Tensor) -> Tensor:
        return torch.cat([apply(part) for part in columns.split(at_once, dim=1)], dim=1)

    sketch = applied(signs(size, third, generator, like))
    q, _ = _independent(sketch, float(torch.linalg.matrix_norm(sketch)))
    exact = float((q * applied(q)).double().sum()) if q.shape[1] else 0.0
    left = max(probes - third - q.shape[1], 1)
    z = signs(size, left, generator, like)
    z = z - q @ (q.T @ z)
    return _mean((z * applied(z)).double().sum(dim=0).cpu(), third + q.shape[1] + left, exact)


def hutchinson_diagonal(
    apply: Apply, size: int, probes: int, *, seed: int = 0, at_once: int = 1, like: Tensor
) -> Tensor:
    r"""The diagonal of a symmetric matrix ``[n]``, from random signs.

    .. math:: \operatorname{diag} A \approx \frac1m \sum_{i=1}^m z_i \odot A z_i

    >>> matrix = torch.diag(torch.tensor([1.0, 2.0]))
    >>> hutchinson_diagonal(lambda v: matrix @ v, 2, 1, like=matrix)
    tensor([1., 2.])
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(size, dtype=torch.float64, device=like.device)
    for first in range(0, probes, at_once):
        z = signs(size, min(at_once, probes - first), generator, like)
        total += (z * apply(z)).double().sum(dim=1)
    return (total / probes).to(like.dtype)


def spectral_measure(
    apply: Apply, size: int, probes: int, steps: int, *, seed: int = 0, like: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The distribution of the eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature.

    .. math:: \frac1n \operatorname{tr} f(A) \approx \frac1p \sum_{i=1}^p \sum_j \tau_{ij}^2\, f(\theta_{ij})

    with :math:`\theta` the eigenvalues of the matrix in the Krylov space of a random vector of signs, and
    :math:`\tau` their first components. Polynomials up to degree ``2 * steps - 1`` are integrated exactly for each.

    Returns:
        Eigenvalues ``[q]`` ascending and weights ``[q]`` that sum to one, float64.

    >>> matrix = torch.diag(torch.tensor([0.0, 0.0, 0.0, 8.0]))
    >>> values, weights = spectral_measure(lambda v: matrix @ v, 4, 1, 10, like=matrix)
    >>> weights.round(decimals=4).tolist(), round(float(values[1]), 4)
    ([0.75, 0.25], 8.0)
    """
    generator = torch.Generator().manual_seed(seed)
    places, weights = [], []
    for _ in range(probes):
        values, vectors, _ = krylov(apply, signs(size, 1, generator, like), steps).ritz()
        places.append(values)
        weights.append(vectors[0].square() / probes)
    joined = torch.cat(places)
    order = joined.argsort()
    return joined[order], torch.cat(weights)[order]

"""Orthogonal matrices all of whose entries are equally large: what is large in one direction is spread over all.

Hadamard matrices are known for most multiples of four: products of those of 2, of one more than a prime (Paley's
first construction, primes 3 mod 4) and of twice one more than a prime (the second, primes 1 mod 4).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.solve import generator_for


def hadamard(size: int, *, seed: int | None = None) -> Tensor:
    r"""An orthogonal matrix with entries :math:`\pm 1 / \sqrt n`.

    Args:
        size: 1, 2, or a multiple of 4 that one of the constructions reaches: all powers of two, and among the usual
            widths 384, 576, 768, 1536, 2560, 3072, 3584, 4608 and 5120.
        seed: of signs for its columns; None for those that the construction gives.

    Returns:
        ``[size, size]`` float64.

    Raises:
        Error: no construction is known here.

    >>> hadamard(2) * 2**0.5
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    >>> turn = hadamard(576)
    >>> torch.allclose(turn @ turn.T, torch.eye(576, dtype=torch.float64)), turn.abs().std() < 1e-9
    (True, tensor(True))
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in orders(size):
        matrix = torch.kron(matrix, _base(order))
    matrix = matrix / math.sqrt(size)
    return matrix if seed is None else matrix * _signs(size, seed)


def hadamard_transform(values: Tensor, *, seed: int | None = None) -> Tensor:
    """``values @ hadamard(n, seed=seed).T`` without the matrix: ``n log n`` sums for a power of two.

    Args:
        values: ``[..., n]``.

    Returns:
        ``[..., n]``, float32 or wider.

    >>> hadamard_transform(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    size = values.shape[-1]
    found = values if values.dtype == torch.float64 else values.float()
    if seed is not None:
        found = found * _signs(size, seed).to(found)
    inner = size
    for order in orders(size):
        inner //= order
        parts = found.unflatten(-1, (-1, order, inner))
        if order == 2:
            parts = torch.stack([parts[..., 0, :] + parts[..., 1, :], parts[..., 0, :] - parts[..., 1, :]], dim=-2)
        else:
            parts = _base(order).to(found) @ parts
        found = parts.flatten(-3)
    return found / math.sqrt(size)


def random_orthogonal(size: int, *, seed: int = 0) -> Tensor:
    """An orthogonal matrix ``[size, size]`` float64, every one equally likely.

    >>> turn = random_orthogonal(5)
    >>> torch.allclose(turn @ turn.T, torch.eye(5, dtype=torch.float64))
    True
    """
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator_for(seed, "orthogonal"))
    turn, corner = torch.linalg.qr(normal)
    return turn * corner.diagonal().sign()


def spreading(size: int, *, seed: int = 0) -> Tensor:
    """A `hadamard` matrix with random signs, or a random orthogonal one where none is known."""
    return hadamard(size, seed=seed) if has_hadamard(size) else random_orthogonal(size, seed=seed)


def has_hadamard(size: int) -> bool:
    """Whether `hadamard` knows a matrix of this order."""
    return _found(size) is not None


def keeping_mean(turn: Tensor) -> Tensor:
    r"""An orthogonal matrix of one more unit that leaves the vector of ones where it is.

    A norm that takes the mean away sees the same mean and the same variance from both sides of it.

    Args:
        turn: ``[n - 1, n - 1]``, orthogonal: what becomes of the directions in which units differ.

    Returns:
        ``[n, n]``: :math:`V \operatorname{diag}(1, R)\, V^\top` with the first column of V a constant.

    >>> turn = keeping_mean(random_orthogonal(3))
    >>> turn @ torch.ones(4, dtype=torch.float64)
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    size = len(turn) + 1
    # The reflection that takes the first unit to the constant vector is orthogonal, with that as its first column.
    away = torch.full((size,), 1 / math.sqrt(size), dtype=turn.dtype, device=turn.device)
    away[0] -= 1
    length = away.dot(away)
    basis = torch.eye(size, dtype=turn.dtype, device=turn.device)
    if length > 0:
        basis = basis - 2 / length * away[:, None] * away
    return basis @ torch.block_diag(turn.new_ones(1, 1), turn) @ basis.T


def orders(size: int) -> tuple[int, ...]:
    """The orders of the matrices whose product `hadamard` is.

    >>> orders(576), orders(96)
    ((2, 2, 2, 72), (2, 48))
    """
    found = _found(size)
    if found is None:
        raise Error(f"no Hadamard matrix of order {size} is known here; take random_orthogonal({size})")
    return found


@functools.lru_cache(maxsize=256)
def _found(size: int) -> tuple[int, ...] | None:
    if size == 1:
        return ()
    if size == 2 or (size > 2 and size & (size - 1) and _kind(size)):
        return (size,)
    for divisor in range(2, math.isqrt(max(size, 0)) + 1):
        if size % divisor == 0:
            left, right = _found(divisor), _found(size // divisor)
            if left is not None and right is not None:
                return left + right
    return None


def _kind(size: int) -> int:
    """Which of Paley's constructions gives an order, 0 for none."""
    if size % 4:
        return 0
    if _prime(size - 1):
        return 1
    return 2 if _prime(size // 2 - 1) and size // 2 % 4 == 2 else 0


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@functools.lru_cache(maxsize=16)
def _base(order: int) -> Tensor:
    """The matrix of one order, with entries 1 and -1."""
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    first = _kind(order) == 1
    prime = order - 1 if first else order // 2 - 1
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if n in squares else -1.0 for n in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = character[(index[:, None] - index) % prime]
    if first:
        conference[1:, 0] = -1
        return torch.eye(order, dtype=torch.float64) + conference
    apart = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    together = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(torch.eye(prime + 1, dtype=torch.float64), apart) + torch.kron(conference, together)


def _signs(size: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator_for(seed, "signs")).double() * 2 - 1

"""How well a graph falls into parts: many edges inside them, few between."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.errors import Error

_GAIN = 1e-12  # of modularity; less is rounding
_MOVES = 10  # of single nodes, times their number: a division is good long before


def modularity(adjacency: Tensor) -> tuple[float, Tensor]:
    r"""The modularity of a graph, and the parts that reach it.

    .. math:: Q = \frac{1}{2m} \sum_{ij} \Big( A_{ij} - \frac{k_i k_j}{2m} \Big) [g_i = g_j]

    The parts are found by splitting in two along the leading eigenvector of the matrix in brackets, moving single
    nodes as long as that helps, and so on inside the parts (Newman 2006, 'Modularity and community structure in
    networks'). A good division, not always the best.

    Args:
        adjacency: ``[n, n]``, symmetric, no value below 0.

    Returns:
        Q, and ``[n]`` the number of each node's part. 0 and one part for a graph without edges.

    >>> block = torch.ones(3, 3) - torch.eye(3)
    >>> modularity(torch.block_diag(block, block))
    (0.5, tensor([0, 0, 0, 1, 1, 1]))
    """
    weights = adjacency.detach().double()
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not len(weights):
        raise Error(f"modularity needs a matrix [n, n], got {list(adjacency.shape)}")
    if not bool(((weights >= 0) & weights.isfinite()).all()) or not torch.allclose(weights, weights.T):
        raise Error("modularity needs a symmetric matrix of finite values, none below 0")
    labels = torch.zeros(len(weights), dtype=torch.long, device=weights.device)
    total = float(weights.sum())
    if not total:
        return 0.0, labels
    degrees = weights.sum(dim=1)
    excess = (weights - torch.outer(degrees, degrees) / total) / total
    waiting, done = [torch.arange(len(weights), device=weights.device)], []
    while waiting:
        part = waiting.pop()
        sides = _split(excess[part][:, part])
        if sides is None:
            done.append(part)
        else:
            waiting += [part[sides < 0], part[sides > 0]]
    for number, part in enumerate(sorted(done, key=lambda nodes: int(nodes.min()))):
        labels[part] = number
    return float(excess[labels[:, None] == labels].sum()), labels


def _split(excess: Tensor) -> Tensor | None:
    """-1 or 1 for each node of a part ``[n, n]``; None where no division makes the modularity larger."""
    inner = excess - excess.sum(dim=1).diag()
    sides = torch.where(torch.linalg.eigh(inner).eigenvectors[:, -1] < 0, -1.0, 1.0).double()
    diagonal = inner.diagonal()
    for _ in range(_MOVES * len(inner)):
        gains = diagonal - sides * (inner @ sides)  # half of what moving each node alone adds
        best = int(gains.argmax())
        if float(gains[best]) <= _GAIN:
            break
        sides[best] = -sides[best]
    return sides if float(sides @ inner @ sides) / 2 > _GAIN and bool(sides.min() < sides.max()) else None

"""Small layers with inputs that go together."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _layer(rows: int = 6, inputs: int = 8, data: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(data, inputs, generator=generator, dtype=torch.float64)
    mix = torch.eye(inputs, dtype=torch.float64) + 0.4 * torch.randn(inputs, inputs, generator=generator).double()
    found = found @ mix * torch.linspace(0.5, 2, inputs)
    return torch.randn(rows, inputs, generator=generator, dtype=torch.float64), found.T @ found


def _error(found: Tensor, weight: Tensor, gram: Tensor) -> float:
    change = (found - weight).double()
    return float(((change @ gram.double()) * change).sum())


@pytest.fixture
def layer() -> Callable[..., tuple[Tensor, Tensor]]:
    """A weight ``[rows, inputs]`` and the Gram matrix of its inputs, float64."""
    return _layer


@pytest.fixture
def error() -> Callable[[Tensor, Tensor, Tensor], float]:
    """The squared change of the outputs."""
    return _error


@pytest.fixture
def best_error() -> Callable[[Tensor, Tensor, int], float]:
    """The smallest error that any mask of so many weights of a row can have, by trying them all."""

    def found(weight: Tensor, gram: Tensor, count: int) -> float:
        places = torch.tensor(list(itertools.combinations(range(len(gram)), count)))
        small = gram[places[:, :, None], places[:, None, :]]
        right = (weight[0] @ gram)[places]
        energy = weight[0] @ gram @ weight[0]
        return float((energy - (right * torch.linalg.solve(small, right)).sum(dim=1)).min())

    return found

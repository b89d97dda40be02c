"""A rounding problem whose best answer can be found by trying all, shared by the tests of roundings that learn."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from weightsmith.quantize import fitted
from weightsmith.quantize._neighbours import neighbours
from weightsmith.quantize.grids import Integer


def posed(seed: int, rows: int = 1, inputs: int = 8) -> tuple[Tensor, Tensor]:
    """Weights, and a Gram matrix of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    given = torch.randn(64, inputs, generator=generator) @ (
        torch.arange(1, inputs + 1.0).reciprocal()[:, None] * turned
    )
    return torch.randn(rows, inputs, generator=generator), given.T @ given


def best_of_all(weight: Tensor, gram: Tensor, grid: Integer) -> float:
    """The least error of all choices of up and down."""
    around = neighbours(weight, grid, fitted(weight, grid))
    ups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=weight.shape[1])))
    error = around.low + ups * (around.high - around.low) - weight
    return float(((error @ gram) * error).sum(1).min())

"""SparseGPT as llm-compressor does it, on one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightsmith.prune.repair import sparsegpt

peer = pytest.importorskip(
    "llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify",
    reason="needs llm-compressor: pip install --no-deps llmcompressor loguru",
    exc_type=ImportError,
)


def layer(rows: int = 24, inputs: int = 160) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(inputs, rows, bias=False)
    made.weight.data = torch.randn(rows, inputs, generator=generator)
    mix = torch.eye(inputs) + 0.1 * torch.randn(inputs, inputs, generator=generator)
    return made, torch.randn(400, inputs, generator=generator) @ mix


def theirs(made: nn.Linear, data: Tensor, sparsity: float, pattern: tuple[int, int], **options: Any) -> Tensor:
    gram = {made: 2 * data.T @ data / len(data)}
    how = {"block_size": 128, "dampening_frac": 0.01, "preserve_sparsity_mask": False} | options
    return peer.sparsify_weight(made, gram, sparsity, *pattern, **how)[1]


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_patterns(pattern: tuple[int, int]):
    made, data = layer()
    removed, group = pattern
    found = sparsegpt(made.weight.data, data.T @ data, sparsity=f"{group - removed}:{group}")
    torch.testing.assert_close(found, theirs(made, data, removed / group, pattern), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("block", [32, 128])
def test_shares(sparsity: float, block: int):
    made, data = layer()
    expected = theirs(made, data, sparsity, (0, 0), block_size=block)
    # It removes one weight more a block, and so others after it; with its mask the weights are the same.
    found = sparsegpt(made.weight.data, data.T @ data, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    own = sparsegpt(made.weight.data, data.T @ data, sparsity=sparsity, block=block)
    assert int(((own != 0) != (expected != 0)).sum()) < 0.01 * own.numel()

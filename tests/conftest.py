"""Fixtures that several rooms share."""

from __future__ import annotations

import pytest
import torch

from weightsmith.weights import _execute, _lazy, _save

# The tensors of tests are small: threads inside PyTorch cost more than they bring, the more so beside xdist's.
torch.set_num_threads(1)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 elements and units of 32, so that small tensors are cut as large ones are."""
    for module in (_lazy, _execute, _save):
        monkeypatch.setattr(module, "CHUNK", 16)
    for module in (_lazy, _save):
        monkeypatch.setattr(module, "UNIT", 32)

"""Biases, norms, heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.prune.repair import reconstruct, trainable


class Norm(nn.Module):
    """A norm that PyTorch knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))


class Own(nn.Module):
    """A network with a tied head and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.norm = nn.Sequential(Norm())
        self.frozen = nn.Sequential(nn.Linear(3, 3, bias=False))
        self.frozen[0].weight.requires_grad_(False)
        self.inner = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.table.weight


@pytest.mark.parametrize(
    ("which", "names"),
    [
        (("biases",), {"inner.bias"}),
        (("norms",), {"norm.0.gain", "norm.0.shift"}),
        (("head",), {"table.weight"}),  # tied
        (("norms", "biases"), {"norm.0.gain", "norm.0.shift", "inner.bias"}),
    ],
)
def test_by_structure(which: Any, names: set[str]):
    module = Own()
    with trainable(module, which) as chosen:
        assert set(chosen) == names
        assert {name for name, p in module.named_parameters() if p.requires_grad} == names
        assert all(dict(module.named_parameters())[name] is p for name, p in chosen.items())
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"frozen.0.weight"}


def test_what_needed_no_gradient_needs_none_after_also_when_something_fails():
    module = Own()
    with pytest.raises(Error, match="loss is nan"), trainable(module, ("biases",)):
        reconstruct(module.inner, nn.Linear(3, 3), [torch.full((1, 3), torch.nan)])
    assert module.inner.weight.requires_grad
    assert not module.frozen[0].weight.requires_grad


def test_what_is_refused():
    with pytest.raises(Error, match="trainable knows"), trainable(Own(), ("bias",)):  # type: ignore[arg-type]
        pass
    with pytest.raises(Error, match="as a sequence"), trainable(Own(), "biases"):  # type: ignore[arg-type]
        pass
    with pytest.raises(Error, match="has no norms"), trainable(nn.Linear(2, 2), ("norms",)):
        pass

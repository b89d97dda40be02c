"""Allocations from shapes alone."""

from __future__ import annotations

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.allocation import erk, uniform

WEIGHTS = {
    "0.weight": torch.ones(8, 1, 3, 3),
    "0.bias": torch.ones(8),
    "1.weight": torch.ones(32, 8, 3, 3),
    "2.weight": torch.ones(10, 32),
}
SIZES = {"0.weight": 72, "1.weight": 2304, "2.weight": 320}


def removed(shares: dict[str, float]) -> float:
    return sum(SIZES[name] * share for name, share in shares.items()) / sum(SIZES.values())


def test_uniform_and_who_is_left_out_of_it():
    assert uniform(WEIGHTS, 0.3) == pytest.approx(dict.fromkeys(SIZES, 0.3))
    ends = uniform(WEIGHTS, 0.5, ends=True)
    assert ends["0.weight"] == ends["2.weight"] == 0
    most = uniform(WEIGHTS, 0.9, most={"2.weight": 0.8, "0.*": 0.0, "*": 1.0})
    assert most["2.weight"] == 0.8
    assert most["0.weight"] == 0
    assert most["1.weight"] > 0.9
    for shares, sparsity in ((ends, 0.5), (most, 0.9)):
        assert removed(shares) == pytest.approx(sparsity)
    assert uniform(WEIGHTS, 1.0) == dict.fromkeys(SIZES, 1.0)
    assert uniform(WEIGHTS, 0.0, ends=True) == dict.fromkeys(SIZES, 0.0)


def test_erk_by_hand():
    for sparsity in (0.0, 0.2, 0.5, 0.9, 0.99):
        shares = erk(WEIGHTS, sparsity)
        assert removed(shares) == pytest.approx(sparsity, abs=1e-12)
        raw = {"0.weight": (8 + 1 + 3 + 3) / 72, "1.weight": (32 + 8 + 3 + 3) / 2304, "2.weight": (10 + 32) / 320}
        ratio = {name: (1 - share) / raw[name] for name, share in shares.items()}
        free = [ratio[name] for name, share in shares.items() if share > 0]
        assert free == pytest.approx(free[:1] * len(free))
        for name, share in shares.items():  # dense ones would be denser still
            assert 0 <= share <= 1
            assert share > 0 or not free or ratio[name] <= free[0] + 1e-9
    assert erk(WEIGHTS, 0.5)["0.weight"] == 0
    assert erk(WEIGHTS, 1.0) == dict.fromkeys(SIZES, 1.0)


def test_they_go_straight_into_a_method():
    weights = {name: torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) for name, w in WEIGHTS.items()}
    for allocation in (uniform(weights, 0.8, ends=True), erk(weights, 0.8)):
        pruned = ws.prune.magnitude(weights, allocation)
        assert ws.prune.sparsity_of(pruned) == pytest.approx(0.8, abs=3 / sum(SIZES.values()))
        for name, share in allocation.items():
            assert int((pruned[name] == 0).sum()) == round(share * SIZES[name])


def test_empty_tensors_and_refusals():
    weights = {"a": torch.ones(0, 4), "b": torch.ones(4, 4)}
    assert erk(weights, 0.5)["b"] == 0.5
    assert uniform(weights, 0.5)["b"] == 0.5
    for method in (erk, uniform):
        assert method({"a": weights["a"]}, 0.5) == {"a": 0.0}
    for method in (erk, uniform):
        with pytest.raises(Error, match="shares one sparsity between 0 and 1"):
            method(WEIGHTS, 1.5)
        with pytest.raises(Error, match="no matrix to prune"):
            method({"bias": torch.ones(3)}, 0.5)
    with pytest.raises(Error, match=r"uniform: a sparsity of 0.95 in all cannot be had"):
        uniform(WEIGHTS, 0.95, ends=True)
    with pytest.raises(Error, match=r"most of 0.weight is a share"):
        uniform(WEIGHTS, 0.5, most={"0.*": 2.0, "*": 1.0})

"""Outliers by hand, and shares that fall with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.allocation import owl


def known() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights, stats = {}, {}
    for layer in range(4):
        for part, shape in (("q", (6, 10)), ("up", (12, 10))):
            name = f"layers.{layer}.{part}.weight"
            weights[name] = torch.randn(shape, generator=generator)
            stats[name] = torch.rand(10, generator=generator) * 10 ** torch.linspace(0, layer, 10)
    return weights, stats


def outliers(weights, stats, names, bar) -> float:
    scores = [abs(float(v)) * float(stats[n][j]) ** 0.5 for n in names for row in weights[n] for j, v in enumerate(row)]
    mean = sum(scores) / len(scores)
    return sum(score > bar * mean for score in scores) / len(scores)


def test_by_hand():
    weights, stats = known()
    shares = owl(weights, 0.7, stats=stats, outlier=3.0, reach=0.1)
    by_layer = [[name for name in weights if f"layers.{layer}." in name] for layer in range(4)]
    found = [outliers(weights, stats, names, 3.0) for names in by_layer]
    assert len(set(found)) > 2
    scaled = [0.2 * (value - min(found)) / (max(found) - min(found)) for value in found]
    density = [value - sum(scaled) / 4 + 0.3 for value in scaled]
    for names, kept in zip(by_layer, density, strict=True):
        for name in names:
            assert shares[name] == pytest.approx(1 - kept)


def test_layers_of_different_size_meet_the_budget_and_layers_can_be_told_otherwise():
    weights, stats = known()
    weights["head.weight"], stats["head.weight"] = torch.ones(50, 10), torch.ones(10)
    variants: list[dict[str, Any]] = [{}, {"layer": lambda name: name}, {"reach": 0.0}, {"reach": 1.0}]
    for options in variants:
        shares = owl(weights, 0.7, stats=stats, **options)
        total = sum(weight.numel() for weight in weights.values())
        assert sum(weights[n].numel() * s for n, s in shares.items()) == pytest.approx(0.7 * total)
        assert all(0 <= share <= 1 for share in shares.values())
    assert owl(weights, 0.7, stats=stats, reach=0.0) == pytest.approx(dict.fromkeys(weights, 0.7))
    apart = owl(weights, 0.7, stats=stats, layer=lambda name: name, outlier=2.0)
    assert apart["layers.3.q.weight"] != apart["layers.3.up.weight"]


def test_gram_matrices_do_as_well_as_their_diagonals_and_tied_names_are_found():
    weights, stats = known()
    whole = {name: diagonal.diag() for name, diagonal in stats.items()}
    assert owl(weights, 0.6, stats=whole) == owl(weights, 0.6, stats=stats)
    layer = nn.Linear(10, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert list(owl(model, 0.5, stats={"b.weight": torch.ones(10)})) == ["a.weight"]


def test_dead_inputs_and_refusals():
    weights, stats = known()
    dead = {name: torch.zeros(10) for name in stats}
    assert owl(weights, 0.5, stats=dead) == pytest.approx(dict.fromkeys(weights, 0.5))
    with pytest.raises(Error, match="stats say nothing of"):
        owl(weights, 0.5, stats={"layers.0.q.weight": torch.ones(10)})
    with pytest.raises(Error, match="not finite"):
        owl({"w": torch.tensor([[float("nan"), 1.0]])}, 0.5, stats={"w": torch.ones(2)})
    refused: list[dict[str, Any]] = [{"reach": -0.1}, {"outlier": 0.0}, {"outlier": float("nan")}]
    for wrong in refused:
        with pytest.raises(Error, match="owl needs a reach"):
            owl(weights, 0.5, stats=stats, **wrong)


def test_on_a_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    inputs = torch.randn(32, 8, generator=generator) * torch.tensor([30.0, 1, 1, 1, 1, 1, 1, 1])
    grams = ws.stats.gram(model, [inputs])
    shares = owl(model, 0.5, stats=grams, outlier=5.0)
    assert shares["0.weight"] < 0.5 < shares["2.weight"]  # one input of the first is far larger than its others
    assert 0.4 < ws.prune.sparsity_of(ws.prune.wanda(model, shares, stats=grams)) < 0.6

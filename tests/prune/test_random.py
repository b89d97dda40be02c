"""Scores by lot: uniform, by name and place alone."""

from __future__ import annotations

import pytest
import torch

import weightsmith as ws
from weightsmith.solve import uniform


def test_each_tensor_loses_its_share_in_places_of_its_own():
    weights = {name: torch.ones(40, 50) for name in ("a", "b")}
    masks = ws.prune.random(weights, 0.3, action="mask")
    assert [int((~masks[name]).sum()) for name in "ab"] == [600, 600]
    both = float((masks["a"] & masks["b"]).double().mean())
    assert both == pytest.approx(0.49, abs=0.03)  # independent


def test_the_scores_are_the_row_of_numbers_of_the_name():
    one, other = (ws.prune.random({"w": torch.ones(6, 5)}, 0.5, seed=seed, action="mask")["w"] for seed in (0, 1))
    score = uniform(30, start=0, seed=0, key="w").reshape(6, 5)
    assert torch.equal(one, score >= score.flatten().sort().values[15])
    assert not torch.equal(one, other)


def test_neither_values_nor_dtype_matter():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    kernel = ws.prune.random.kernel
    assert torch.equal(kernel(weight), kernel(weight.bfloat16() * float("nan")))
    assert kernel(torch.empty(0, 3)).shape == (0, 3)


def test_cut_into_chunks_it_is_the_same(small_pieces, tmp_path):
    weights = {"w": torch.arange(1.0, 201.0).reshape(10, 20)}
    ws.prune.random(weights, 0.5, pattern="*").save(tmp_path / "out.safetensors")
    score = uniform(200, start=0, seed=0, key="w").reshape(10, 20)
    kept = score >= score.flatten().sort().values[100]
    assert torch.equal(ws.open(tmp_path / "out.safetensors")["w"], weights["w"] * kept)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_patterns_and_scopes(sparsity, scope):
    mask = ws.prune.random({"w": torch.ones(16, 8)}, sparsity, scope=scope, action="mask")["w"]
    assert int(mask.sum()) == 64
    if sparsity == "2:4":
        assert (mask.reshape(16, 2, 4).sum(-1) == 2).all()

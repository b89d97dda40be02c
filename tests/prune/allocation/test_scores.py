"""Shares that one threshold gives: those that a global method removes."""

from __future__ import annotations

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.allocation import from_scores, global_magnitude, lamp


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{i}.weight": torch.randn(4 + i, 8, generator=generator) * (1 + 2 * i) for i in range(3)}


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8, 1.0])
def test_they_say_what_global_methods_remove_and_reproduce_it(sparsity):
    whole = weights()
    scores = {name: weight.abs() for name, weight in whole.items()}
    for shares, method in (
        (from_scores(scores, sparsity), ws.prune.magnitude),
        (global_magnitude(whole, sparsity), ws.prune.magnitude),
        (lamp(whole, sparsity), ws.prune.lamp),
    ):
        together = method(whole, sparsity, scope="global")
        for name in whole:
            assert shares[name] == pytest.approx(float((together[name] == 0).float().mean()))
            assert torch.equal(method(whole, shares)[name], together[name])


def test_layers_of_another_scale():
    whole = weights()
    scaled = whole | {"2.weight": whole["2.weight"] * 1000}
    assert lamp(scaled, 0.6) == lamp(whole, 0.6)
    assert global_magnitude(scaled, 0.6)["2.weight"] == 0 < global_magnitude(whole, 0.6)["2.weight"]


def test_some_of_the_scores_and_none():
    scores = {name: weight.abs() for name, weight in weights().items()}
    some = from_scores(scores, 0.5, pattern=["0.*", "1.*"])
    assert list(some) == ["0.weight", "1.weight"]
    assert sum(scores[name].numel() * share for name, share in some.items()) == pytest.approx(0.5 * (32 + 40))
    assert from_scores({"a": torch.zeros(0, 2), "b": torch.ones(2)}, 0.5) == {"a": 0.0, "b": 0.5}
    with pytest.raises(Error, match="at least 1 tensor"):
        from_scores({}, 0.5)
    for method in (from_scores, global_magnitude, lamp):
        with pytest.raises(Error, match="one sparsity between 0 and 1"):
            method(scores, "2:4")  # type: ignore[arg-type]

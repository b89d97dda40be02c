"""LAMP: shares of the energy of what is left."""

from __future__ import annotations

import torch

import weightsmith as ws


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    values = weight.double().flatten().tolist()
    scores = []
    for i, one in enumerate(values):
        # No smaller: larger ones, itself, and equal ones that come before it.
        left = sum(v * v for j, v in enumerate(values) if abs(v) > abs(one) or (abs(v) == abs(one) and j <= i))
        scores.append(one * one / left if left else 0.0)
    return torch.tensor(scores, dtype=torch.float32).reshape(weight.shape)


def test_by_hand():
    ties = torch.tensor([[2.0, -2.0, 0.0], [1.0, 0.0, 2.0]])
    for weight in (normal(5, 7), normal(2, 3, 4, seed=1), ties, normal(4, 4).T, normal(3).bfloat16()):
        torch.testing.assert_close(ws.prune.lamp.kernel(weight), by_hand(weight))


def test_of_any_size_and_none():
    small = normal(4, 5).double()
    expected = ws.prune.lamp.kernel(small)
    for factor in (2.0**-600, 2.0**600):
        assert torch.equal(ws.prune.lamp.kernel(small * factor), expected)
    assert ws.prune.lamp.kernel(torch.zeros(3, 2)).eq(0).all()
    assert ws.prune.lamp.kernel(torch.zeros(0, 2)).shape == (0, 2)


def test_what_is_not_finite_spoils_nothing_else():
    weight = torch.tensor([[1.0, float("nan"), 2.0, float("inf")]])
    found = ws.prune.lamp.kernel(weight)[0]
    assert found[0] == 0.2
    assert found[1].isnan()
    assert found[2] == 1
    assert found[3].isinf()


def test_within_a_tensor_it_is_magnitude_and_over_tensors_their_scale_does_not_matter():
    weights = {"a.weight": normal(6, 8), "b.weight": normal(6, 8, seed=1)}
    alone = ws.prune.lamp(weights, 0.5)
    for name in weights:
        assert torch.equal(alone[name], ws.prune.magnitude(weights, 0.5)[name])
    together = ws.prune.lamp(weights, 0.7, scope="global", action="mask")
    scaled = ws.prune.lamp(weights | {"b.weight": weights["b.weight"] * 1024}, 0.7, scope="global", action="mask")
    assert all(torch.equal(together[name], scaled[name]) for name in weights)


def test_the_largest_of_each_tensor_is_the_last_to_go():
    weights = {f"{i}.weight": normal(4, 4, seed=i) * 10.0**i for i in range(3)}
    pruned = ws.prune.lamp(weights, 1 - 3 / 48, scope="global")
    for name, weight in weights.items():
        left = pruned[name].abs()
        assert int((left > 0).sum()) == 1
        assert left.max() == weight.abs().max()

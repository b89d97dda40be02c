"""Rules of sparse training as pure functions: gmp, granet, rigl, soft_shrinkage, sparse_evolutionary, sparse_momentum,
static."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.prune.sparse import Moment, Rule, cosine, cubic, updated
from weightsmith.prune.sparse import highest as _highest

sparse = ws.prune.sparse


def moment(seed: int = 0, step: int = 1, density: float = 0.5, **fields: object) -> Moment:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 5), "b": (4, 10)}
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    weights = {name: torch.randn(shape, generator=generator) * masks[name] for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    momenta = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given = {"gradients": gradients, "momenta": momenta, **fields}
    return Moment(step, weights, masks, seed=seed, **given)  # type: ignore[arg-type]


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def lowest(score: Tensor, among: Tensor, count: int) -> set[int]:
    """Indices, by hand; of equal ones the last."""
    order = sorted(among.flatten().nonzero().flatten().tolist(), key=lambda i: (float(score.flatten()[i]), -i))
    return set(order[:count])


def top(score: Tensor, among: set[int], count: int) -> set[int]:
    return set(sorted(among, key=lambda i: (-float(score.flatten()[i]), i))[:count])


def indices(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


def exact(now: Moment) -> float:
    """The sparsity that the masks have."""
    total = sum(mask.numel() for mask in now.masks.values())
    return 1 - sum(int(mask.sum()) for mask in now.masks.values()) / total


def shares_of(now: Moment) -> dict[str, float]:
    return {name: float(mask.sum()) for name, mask in now.masks.items()}


def test_rigl_by_hand():
    now = moment(step=3)
    rule = sparse.rigl(exact(now), every=3, stop=12, fraction=0.4)
    found = updated(rule, now, shares_of(now))
    fraction = cosine(3, 0.4, 0, 12)
    for name, mask in now.masks.items():
        count = round(fraction * int(mask.sum()))
        assert count > 1
        stay = indices(mask) - lowest(now.weights[name].abs(), mask, count)
        free = set(range(mask.numel())) - stay
        assert indices(found[name]) == stay | top(now.gradients[name].abs(), free, count)


def test_sparse_evolutionary_drops_the_smallest_and_grows_as_many_at_random():
    now = moment(step=4)
    rule = sparse.sparse_evolutionary(exact(now), every=2, stop=8, fraction=0.5)
    found = updated(rule, now, shares_of(now))
    again = updated(rule, now, shares_of(now))
    other = updated(rule, Moment(4, now.weights, now.masks, seed=9), shares_of(now))
    later = updated(rule, Moment(6, now.weights, now.masks, seed=0), shares_of(now))
    assert counts(found) == counts(dict(now.masks))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert any(not torch.equal(found[name], other[name]) for name in found)
    assert any(not torch.equal(found[name], later[name]) for name in found)
    for name, mask in now.masks.items():
        stay = indices(mask) - lowest(now.weights[name].abs(), mask, round(0.5 * int(mask.sum())))
        assert stay <= indices(found[name])


def test_random_growth_reaches_every_place():
    weights = {"w": torch.cat([torch.ones(2), torch.zeros(8)])}
    masks = {"w": weights["w"] > 0}
    rule = sparse.sparse_evolutionary(0.8, every=1, stop=99, fraction=0.5)
    seen: dict[int, int] = {}
    for step in range(1, 99):
        (new,) = updated(rule, Moment(step, weights, masks), {"w": 2.0})["w"][1:].nonzero().flatten().tolist()
        seen[new] = seen.get(new, 0) + 1
    assert len(seen) == 9
    assert max(seen.values()) < 30


def test_sparse_momentum_by_hand():
    now = moment(step=2)
    rule = sparse.sparse_momentum(exact(now), every=2, stop=8, fraction=0.5)
    found = updated(rule, now, shares_of(now))
    fraction = cosine(2, 0.5, 0, 8)
    freed, left, means = 0, {}, {}
    for name, mask in now.masks.items():
        count = round(fraction * int(mask.sum()))
        left[name] = indices(mask) - lowest(now.weights[name].abs(), mask, count)
        means[name] = float(now.momenta[name][mask].abs().mean())
        freed += count
    grown = {name: freed * means[name] / sum(means.values()) for name in means}
    for name, mask in now.masks.items():
        count = len(indices(found[name]) - left[name])
        assert abs(count - grown[name]) < 1
        free = set(range(mask.numel())) - left[name]
        assert indices(found[name]) == left[name] | top(now.momenta[name].abs(), free, count)
    assert sum(counts(found).values()) == sum(counts(dict(now.masks)).values())


def test_sparse_momentum_moves_weights_to_the_layer_with_more():
    now = moment(step=2)
    momenta = {"a": now.momenta["a"] * 10, "b": now.momenta["b"]}
    rule = sparse.sparse_momentum(exact(now), every=2, stop=8)
    found = updated(rule, Moment(2, now.weights, now.masks, momenta=momenta), shares_of(now))
    before, after = counts(dict(now.masks)), counts(found)
    assert after["a"] > before["a"]
    assert after["b"] < before["b"]
    full = Moment(2, now.weights, now.masks, momenta={"a": now.momenta["a"] * 1e9, "b": now.momenta["b"]})
    crowded = updated(sparse.sparse_momentum(exact(now), every=2, stop=8, fraction=0.99), full, shares_of(now))
    assert crowded["a"].all()  # no more than there is room for; the rest goes elsewhere
    assert sum(counts(crowded).values()) == sum(before.values())


def test_without_any_momentum_weights_go_by_room():
    now = moment(step=2)
    still = {name: torch.zeros_like(value) for name, value in now.momenta.items()}
    rule = sparse.sparse_momentum(exact(now), every=2, stop=8)
    found = updated(rule, Moment(2, now.weights, now.masks, momenta=still), shares_of(now))
    assert sum(counts(found).values()) == sum(counts(dict(now.masks)).values())


def test_gmp_keeps_the_largest_exactly_as_scheduled():
    now = moment(density=2.0)
    rule = sparse.gmp(0.8, every=2, stop=10)
    masks = dict(now.masks)
    for step in (2, 4, 6, 8, 10):
        sparsity = cubic(step, 0.0, 0.8, 0, 10)
        keep = 70 - round(sparsity * 70)
        shares = {"a": 30 * (1 - sparsity), "b": 40 * (1 - sparsity)}
        found = updated(rule, Moment(step, now.weights, masks), shares)
        assert sum(counts(found).values()) == keep
        for name, mask in found.items():
            assert not (mask & ~masks[name]).any()  # none comes back
            assert torch.equal(mask, _highest(now.weights[name].abs(), int(mask.sum())))
            assert abs(int(mask.sum()) - shares[name]) < 1
        masks = found
    assert sum(counts(masks).values()) == 14


def test_gmp_of_all_tensors_together():
    now = moment(density=2.0)
    rule = sparse.gmp(0.8, every=1, stop=10, scope="global")
    found = updated(rule, Moment(10, now.weights, now.masks), {})
    alive = torch.cat([found[name].flatten() for name in ("a", "b")])
    values = torch.cat([now.weights[name].flatten().abs() for name in ("a", "b")])
    assert torch.equal(alive, _highest(values, 14))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_what_is_gone_does_not_come_back_where_weights_are_zero(scope: str):
    weights = {"w": torch.tensor([0.0, 0.0, 0.0, 5.0])}
    masks = {"w": torch.tensor([False, False, True, True])}
    rule = sparse.gmp(0.5, every=1, stop=1, scope=scope)  # type: ignore[arg-type]
    assert torch.equal(updated(rule, Moment(1, weights, masks), {"w": 2.0})["w"], masks["w"])
    fewer = sparse.gmp(0.4, every=1, stop=1, scope=scope)  # type: ignore[arg-type]
    weights = {"w": torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0])}
    masks = {"w": torch.tensor([False, True, True, True, True])}
    found = updated(fewer, Moment(1, weights, masks), {"w": 3.0})["w"]
    assert found.tolist() == [False, True, True, True, False]


def test_granet_by_hand():
    now = moment(step=4, density=0.9)
    rule = sparse.granet(0.8, every=2, stop=10, initial=0.1, fraction=0.5)
    found = updated(rule, now, {})
    keep = 70 - round(cubic(4, 0.1, 0.8, 0, 10) * 70)
    flat = torch.cat([now.weights[name].abs().flatten() for name in ("a", "b")])
    among = torch.cat([now.masks[name].flatten() for name in ("a", "b")])
    pruned = _highest(flat, keep, among)
    fraction = cosine(4, 0.5, 0, 10)
    for name, part in zip(("a", "b"), pruned.split([30, 40]), strict=True):
        count = round(fraction * int(part.sum()))
        stay = indices(part) - lowest(now.weights[name].abs(), part, count)
        free = set(range(len(part))) - stay
        assert indices(found[name]) == stay | top(now.gradients[name].abs(), free, count)
    assert sum(counts(found).values()) == keep


def test_granet_without_exchange_is_gmp():
    now = moment(step=4, density=0.9)
    one = updated(sparse.granet(0.8, every=2, stop=10, initial=0.1, fraction=0.0), now, {})
    other = updated(sparse.gmp(0.8, every=2, stop=10, initial=0.1, scope="global"), now, {})
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_soft_shrinkage_chooses_among_all_each_time():
    weights = {"w": torch.tensor([4.0, 1.0, 3.0, 2.0])}
    masks = {"w": torch.tensor([False, True, True, False])}
    found = updated(sparse.soft_shrinkage(0.5, stop=9), Moment(3, weights, masks), {"w": 2.0})
    assert found["w"].tolist() == [True, False, True, False]


def test_a_tensor_without_gradient_is_not_exchanged():
    now = moment(step=3)
    rule = sparse.rigl(exact(now), every=3, stop=12, fraction=0.4)
    found = updated(rule, Moment(3, now.weights, now.masks, {"a": now.gradients["a"]}), shares_of(now))
    assert torch.equal(found["b"], now.masks["b"])
    assert not torch.equal(found["a"], now.masks["a"])


def test_updated_changes_nothing_that_goes_in():
    now = moment(step=3)
    before = {name: (now.weights[name].clone(), mask.clone()) for name, mask in now.masks.items()}
    updated(sparse.rigl(exact(now), every=3, stop=12), now, shares_of(now))
    for name, (weight, mask) in before.items():
        assert torch.equal(now.weights[name], weight)
        assert torch.equal(now.masks[name], mask)


def test_when_masks_move():
    assert [s for s in range(20) if sparse.rigl(0.9, every=5, stop=13).due(s)] == [5, 10, 13]
    assert [s for s in range(20) if sparse.gmp(0.9, every=4, start=3, stop=12).due(s)] == [3, 7, 11, 12]
    assert [s for s in range(20) if sparse.granet(0.9, every=4, stop=8, last=16).due(s)] == [4, 8, 12, 16]
    uneven = sparse.granet(0.9, every=4, stop=7, last=15)
    assert [s for s in range(20) if uneven.due(s)] == [4, 7, 8, 12, 15]
    assert uneven.fraction_at(7) == pytest.approx(cosine(7, 0.5, 0, 15))  # goes on after the pruning has ended
    assert uneven.sparsity_at(7) == uneven.sparsity_at(12) == 0.9
    assert not any(sparse.static(0.9).due(s) for s in range(20))
    assert [s for s in range(9) if sparse.soft_shrinkage(0.9, stop=3).due(s)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sparse.rigl(1.0, stop=1000), "sparsity"),
        (lambda: sparse.rigl(-0.1, stop=1000), "sparsity"),
        (lambda: sparse.rigl(0.9, every=0, stop=10), "every"),
        (lambda: sparse.rigl(0.9, every=3, stop=0), "stop"),
        (lambda: sparse.rigl(0.9, stop=50), "no exchange before step 50"),
        (lambda: sparse.rigl(0.9, stop=1000, fraction=1.5), "fraction"),
        (lambda: sparse.gmp(0.5, every=1, stop=10, initial=0.6), "initial"),
        (lambda: sparse.gmp(0.5, every=1, stop=10, start=10), "start"),
        (lambda: sparse.gmp(0.5, every=1, stop=10, scope="row"), "scope"),  # type: ignore[arg-type]
        (lambda: sparse.soft_shrinkage(0.9, stop=5, amount=0.0), "amount"),
        (lambda: sparse.soft_shrinkage(0.9, stop=5, amount=1.5), "shrink"),
        (lambda: sparse.sparse_momentum(float("nan"), every=1, stop=5), "sparsity"),
        (lambda: Rule("mine", 0.5, grow="hope"), "grow"),  # type: ignore[arg-type]
        (lambda: sparse.static().sparsity_at(0), "masks="),
    ],
)
def test_what_makes_no_rule_is_refused(make: object, words: str):
    with pytest.raises(ws.Error, match=words):
        make()  # type: ignore[operator]

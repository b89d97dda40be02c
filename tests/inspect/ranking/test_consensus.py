"""Consensus of rankings: every order tried, distances against a loop, and attacks that do what they say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.ranking import (
    _consensus,
    breakdown,
    consensus_ranking,
    kemeny_order,
    pairwise,
    weak_order_distance,
)
from weightsmith.inspect.ranking._consensus import borda_places, kemeny_places, merged_places


def mallows(seed: int, items: int, count: int, spread: float) -> torch.Tensor:
    """Places by noisy scores about 0 < 1 < 2 ..."""
    noise = spread * torch.randn(count, items, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(items) + noise).argsort(1).argsort(1)


def test_pairwise_against_a_loop(monkeypatch: pytest.MonkeyPatch):
    rankings, weights = torch.tensor([[1, 2, 2], [3, 1, 2]]), torch.tensor([3.0, 1.0])
    found = pairwise(rankings, weights)
    for i, j in itertools.product(range(3), repeat=2):
        expected = sum(w / 4 * ((r[i] < r[j]) + 0.5 * (r[i] == r[j])) for r, w in
                       zip(rankings.tolist(), weights.tolist(), strict=True))  # fmt: skip
        assert float(found[i, j]) == pytest.approx(expected)
    torch.testing.assert_close(found + found.T, torch.ones(3, 3, dtype=torch.float64))
    monkeypatch.setattr(_consensus, "AT_ONCE", 1)  # a ranking at a time
    torch.testing.assert_close(pairwise(rankings, weights), found)


def test_distances_against_a_loop_and_all_refinements():
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        a, b = torch.randint(0, 3, (2, 4), generator=generator).tolist()
        half = 0.0
        for i, j in itertools.combinations(range(4), 2):
            x, y = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
            half += 1.0 if x * y < 0 else 0.5 if (x == 0) != (y == 0) else 0.0
        assert float(weak_order_distance(a, b)) == half
        # Hausdorff: the furthest that an order refining one can be from all that refine the other.
        orders = [torch.tensor(p) for p in itertools.permutations(range(4))]
        refining = [[o for o in orders if all(o[i] < o[j] for i, j in itertools.permutations(range(4), 2)
                                              if w[i] < w[j])] for w in (a, b)]  # fmt: skip
        away = [[float(weak_order_distance(x, y)) for y in refining[1]] for x in refining[0]]
        expected = max(max(map(min, away)), max(map(min, zip(*away, strict=True))))
        assert float(weak_order_distance(a, b, kind="hausdorff")) == expected


@pytest.mark.parametrize("seed", range(3))
def test_kemeny_places_cost_least(seed: int):
    shares = pairwise(mallows(seed, 6, 31, 3.0))
    order = kemeny_places(shares[None])[0].argsort().tolist()
    cost = sum(float(shares[b, a]) for k, a in enumerate(order) for b in order[k + 1 :])
    assert cost == pytest.approx(kemeny_order(shares)[1])
    larger = pairwise(mallows(seed, 8, 31, 3.0))
    assert kemeny_places(larger[None])[0].argsort().tolist() == kemeny_order(larger)[0]


def test_borda_places():
    shares = pairwise([[1, 2, 3], [1, 3, 2], [2, 1, 3]])
    assert borda_places(shares[None]).tolist() == [[0, 1, 2]]
    assert borda_places(torch.full((1, 3, 3), 0.5)).tolist() == [[0, 1, 2]]


def test_merging_by_hand():
    # Margins of neighbours .05, .3, .08; once 0 and 1 are one bucket, its margin above 2 is their mean.
    shares = torch.full((4, 4), 0.5, dtype=torch.float64)
    for i, j, p in ((0, 1, 0.55), (1, 2, 0.8), (2, 3, 0.58), (0, 2, 0.9), (0, 3, 1.0), (1, 3, 1.0)):
        shares[i, j], shares[j, i] = p, 1 - p
    start = torch.tensor([[0, 1, 2, 3]])
    expected = {0.01: [0, 1, 2, 3], 0.06: [0, 0, 1, 2], 0.1: [0, 0, 1, 1], 0.42: [0, 0, 1, 1], 0.43: [0, 0, 0, 0]}
    for threshold, places in expected.items():
        assert merged_places(shares[None], start, threshold)[0].tolist() == places, threshold
    assert merged_places(shares[None], start.flip(1), 0.0).tolist() == [[0, 0, 0, 0]]


def test_consensus_report():
    rankings = mallows(0, 5, 60, 0.6)
    plain = consensus_ranking(rankings, threshold=None, names=list("abcde"))
    assert plain["place"] == [1, 2, 3, 4, 5]
    assert [row["item"] for row in plain.table] == list("abcde")
    shares = pairwise(rankings)
    assert plain["before next"][:4] == pytest.approx([float(shares[i, i + 1]) for i in range(4)])
    distance = sum(float(weak_order_distance(torch.arange(5), one)) for one in rankings) / 60
    assert plain["distance"] == pytest.approx(distance)
    assert consensus_ranking(rankings, threshold=0.5)["buckets"] == 1
    assert consensus_ranking(rankings, statistic="borda", threshold=None)["place"] == [1, 2, 3, 4, 5]


def test_breakdown_of_two_is_the_margin():
    for first in (6, 8, 10):
        said = [[1, 2]] * first + [[2, 1]] * (10 - first)
        expected = (first - 5) / 10 + 0.01  # at half and half the first by index still leads
        assert breakdown(said)["breakdown"] == pytest.approx(expected)
        assert breakdown(said)["false ranking"] == [2, 1]


def test_an_attack_does_what_it_says():
    rankings = mallows(1, 4, 50, 1.5)
    for name, threshold in (("kemeny", None), ("borda", None), ("kemeny", 0.05)):
        found = breakdown(rankings, statistic=name, threshold=threshold, distance=2.0, steps=50)
        share, false = found["breakdown"], torch.tensor(found["false ranking"])
        assert 0 < share <= 1

        def order(rows: torch.Tensor, name: str = name, threshold: float | None = threshold) -> torch.Tensor:
            table = consensus_ranking(rows, statistic=name, threshold=threshold).table
            return torch.tensor([row["place"] for row in sorted(table, key=lambda row: int(row["item"]))])

        far = weak_order_distance(false, rankings).argsort(descending=True, stable=True)[: round(share * 50)]
        attacked = rankings.clone()
        attacked[far] = false - 1
        assert float(weak_order_distance(order(attacked), order(rankings))) >= 2.0
        assert max(found.plots[0].lines[0].y[:-1], default=0) < 2.0


def test_ties_hold_longer():
    # The first two are put either way by about half.
    rankings = torch.tensor([[0, 1, 2, 3]] * 52 + [[1, 0, 2, 3]] * 48)
    plain, tied = breakdown(rankings), breakdown(rankings, threshold=0.1, distance=1.0)
    assert plain["breakdown"] <= 0.04
    assert tied["breakdown"] > 0.1


def test_a_statistic_of_your_own_and_refusals():
    stubborn = breakdown([[1, 2]], statistic=lambda shares: torch.zeros(len(shares), 2), steps=5)
    assert stubborn["breakdown"] == math.inf
    assert stubborn["false ranking"] is None
    with pytest.raises(Error, match="7"):
        breakdown([list(range(8))])
    with pytest.raises(Error, match="distance"):
        breakdown([[1, 2]], distance=0)
    with pytest.raises(Error, match="kemeny or borda"):
        consensus_ranking([[1, 2]], statistic="mean")
    with pytest.raises(Error, match="threshold"):
        consensus_ranking([[1, 2]], threshold=0.7)
    with pytest.raises(Error, match="same items"):
        weak_order_distance([1, 2, 3], [1])
    with pytest.raises(Error, match="half or hausdorff"):
        weak_order_distance([1, 2], [1, 2], kind="full")
    for bad in ([[1.0]], [[1.0, math.nan]], []):
        with pytest.raises(Error):
            pairwise(bad)
    with pytest.raises(Error, match="weights"):
        pairwise([[1, 2]], [0.0])

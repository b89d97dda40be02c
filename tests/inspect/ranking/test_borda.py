"""Borda and Kemeny: by hand, by all orders, and what rescaling a task does."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.ranking import borda, kemeny, kemeny_order, kendall_tau
from weightsmith.inspect.ranking._parts import competition_ranks, places, shared_places


def table(seed: int = 0, systems: int = 5, tasks: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    quality = torch.linspace(1, 0, systems, dtype=torch.float64)[:, None]
    return quality + 0.5 * torch.randn(systems, tasks, generator=generator, dtype=torch.float64)


def by_name(report, column: str) -> list[float]:
    return [row[column] for row in sorted(report.table, key=lambda row: row["system"])]


def test_kendall_tau_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 4, (2, 9), generator=generator).tolist()
    product = x = y = 0
    for i, j in itertools.combinations(range(9), 2):
        first, second = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
        product, x, y = product + first * second, x + abs(first), y + abs(second)
    assert float(kendall_tau(a, b)) == pytest.approx(product / math.sqrt(x * y))
    assert kendall_tau(torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.arange(3.0)).tolist() == pytest.approx([1, -1])
    assert math.isnan(float(kendall_tau([1, 1], [1, 2])))
    with pytest.raises(Error, match="n >= 2"):
        kendall_tau([1], [1])


def test_borda_against_a_loop():
    scores = table().round(decimals=1)  # with ties
    expected = []
    for i in range(5):
        shares = []
        for t in range(12):
            better, equal = scores[:, t] < scores[i, t], scores[:, t] == scores[i, t]
            shares.append((int(better.sum()) + 0.5 * (int(equal.sum()) - 1)) / 4)
        expected.append(float(sum(shares)) / 12)
    assert by_name(borda(scores), "points") == pytest.approx(expected)
    assert by_name(borda(-scores, higher_is_better=False), "points") == pytest.approx(expected)
    assert by_name(borda(-scores, higher_is_better=False), "mean") == pytest.approx((-scores).mean(1).tolist())


def test_scales_do_not_matter_to_ranks_and_do_to_means():
    scores = table()
    scaled = scores.clone()
    scaled[:, 0] = scores[:, 0].exp() * 1000
    assert by_name(borda(scaled), "points") == by_name(borda(scores), "points")
    assert by_name(borda(scaled), "mean") != by_name(borda(scores), "mean")
    assert borda(scaled)["tau with the mean"] < 1


def test_two_levels_and_missing_scores():
    scores = table(1, 4, 9)
    tasks = ["x"] * 6 + ["y"] * 2 + ["z"]
    parts = [scores[:, :6], scores[:, 6:8], scores[:, 8:]]
    orders = torch.stack([torch.tensor(by_name(borda(part, samples=0), "points")) for part in parts], 1)
    expected = by_name(borda(orders, samples=0), "points")
    assert by_name(borda(scores, tasks=tasks), "points") == pytest.approx(expected)
    # Within a task, means over the columns where a system was: 1 of one column beats 1/2 and 1 of two.
    few = [[3.0, math.nan], [2.0, 2.0], [1.0, 1.0]]
    assert by_name(borda(few, tasks=["x", "x"], samples=0), "points") == [1.0, 0.5, 0.0]
    holed = scores.clone()
    holed[2, :3] = torch.nan
    found = borda(holed)
    there = by_name(borda(scores[:, 3:], samples=0), "points")[2]
    assert by_name(found, "points")[2] == pytest.approx(there)
    assert "3 scores are missing" in str(found)
    json.dumps(found.to_json(), allow_nan=False)


def test_intervals_shrink_with_tasks_and_hold_the_points():
    few, many = borda(table(0, 5, 8)), borda(table(0, 5, 200))
    widths = [[high - low for low, high in zip(r["low"], r["high"], strict=True)] for r in (few, many)]
    assert max(widths[1]) < min(widths[0])
    for row in few.table:
        assert row["low"] <= row["points"] <= row["high"]
        assert row["rank low"] <= row["rank"] <= row["rank high"]
    assert sum(many["first"]) == pytest.approx(1, abs=0.05)
    assert borda(table(), samples=0).rows()[0].keys() == {"system", "rank", "points", "mean"}
    assert borda(table(), seed=1) == borda(table(), seed=1)


def test_weights_of_tasks():
    scores = table()
    doubled = torch.cat([scores, scores[:, :1]], 1)
    weight = [2.0] + [1.0] * 11
    assert by_name(borda(scores, weights=weight), "points") == pytest.approx(by_name(borda(doubled), "points"))
    # Resamples draw tasks and keep their weights: with one task that counts there is nothing to vary.
    alone = borda(scores, weights=[1.0] + [0.0] * 11, samples=200)
    assert alone["low"] == alone["high"] == alone["points"]
    assert "left out" in alone.notes[-1]  # where the one task was not drawn


def test_places_and_ranks_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (7, 30), generator=generator).double()
    scores[torch.rand(7, 30, generator=generator) < 0.2] = torch.nan
    first, sharing = shared_places(scores)
    for t in range(30):
        for i in range(7):
            if math.isnan(float(scores[i, t])):
                assert math.isnan(float(places(scores)[i, t]))
                continue
            above, equal = int((scores[:, t] > scores[i, t]).sum()), int((scores[:, t] == scores[i, t]).sum())
            assert (int(first[i, t]), int(sharing[i, t])) == (above + 1, equal)
            assert float(places(scores)[i, t]) == above + (equal + 1) / 2
    points = torch.tensor([[0.3, 0.1 + 0.2, 0.5], [1.0, 3.0, 2.0]], dtype=torch.float64)
    assert competition_ranks(points).tolist() == [[2, 2, 1], [3, 1, 2]]


@pytest.mark.parametrize("seed", range(4))
def test_kemeny_against_all_orders(seed: int):
    scores = table(seed, 6, 5)
    against = (scores[:, None] > scores[None]).double().sum(2)

    def cost(order) -> float:
        return sum(float(against[b, a]) for k, a in enumerate(order) for b in order[k + 1 :])

    best = min(map(cost, itertools.permutations(range(6))))
    order, found = kemeny_order(against)
    assert (found, cost(order)) == (best, best)
    report = kemeny(scores)
    assert report["disagreement"] == best
    assert [int(name) for name in report["system"]] == order
    by_borda = [int(row["system"]) for row in borda(scores, samples=0).table]
    assert report["Borda's disagreement"] == cost(by_borda) >= best


def test_refusals():
    with pytest.raises(Error, match="16"):
        kemeny_order(torch.zeros(17, 17))
    with pytest.raises(Error, match="not finite"):
        kemeny_order([[0, math.nan], [1, 0]])
    with pytest.raises(Error, match="systems, tasks"):
        borda([1.0, 2.0])
    with pytest.raises(Error, match="weights"):
        borda(table(), weights=[math.inf] + [1.0] * 11)
    for bad in ([[1.0, 2.0]], [[1.0], [math.inf]], [[1.0, 2.0], [math.nan, math.nan]], [[1.0, math.nan]] * 2,
                [[1.0], [1.0, 2.0]]):  # fmt: skip
        with pytest.raises(Error):
            borda(bad)
    with pytest.raises(Error, match="weights"):
        borda(table(), weights=[1.0])
    with pytest.raises(Error, match="names"):
        borda(table(), names=["a"])

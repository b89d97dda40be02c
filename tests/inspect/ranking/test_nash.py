"""Nash averages: known games, copies that must not matter, and the flattest of many solutions."""

from __future__ import annotations

import json
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.ranking import hodge, nash_average

CYCLE = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])


def column(report, name: str) -> list[float]:
    return [row[name] for row in sorted(report.table, key=lambda row: row["system"])]


def doubled(payoffs: torch.Tensor, index: int) -> torch.Tensor:
    order = [*range(len(payoffs)), index]
    return payoffs[order][:, order]


def test_cycles_are_even_and_copies_share():
    found = nash_average(doubled(CYCLE, 1), against="agents")
    assert column(found, "rating") == [0.0] * 4
    assert column(found, "weight") == pytest.approx([1 / 3, 1 / 6, 1 / 3, 1 / 6], abs=1e-6)
    assert found["cyclic"] > 0.5
    # A biased cycle weighs its agents by their neighbours' stakes.
    biased = torch.tensor([[0.0, -2, 1], [2, 0, -3], [-1, 3, 0]])
    assert column(nash_average(biased, against="agents"), "weight") == pytest.approx([3 / 6, 1 / 6, 2 / 6], abs=1e-6)


def test_the_better_agent_takes_all():
    found = nash_average([[0, 2.0, 1], [-2, 0, 1], [-1, -1, 0]], against="agents", names=["a", "b", "c"])
    assert found["system"] == ["a", "c", "b"]
    assert column(found, "weight") == pytest.approx([1, 0, 0], abs=1e-6)
    assert column(found, "rating") == pytest.approx([0, -2, -1], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_against_tasks_copies_do_not_matter(seed: int):
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).double()
    found = nash_average(scores, standardise=False)
    copies = nash_average(torch.cat([scores, scores[:, [2, 2, 5]]], 1), standardise=False)
    assert column(copies, "rating") == pytest.approx(column(found, "rating"), abs=1e-6)
    assert column(copies, "weight") == pytest.approx(column(found, "weight"), abs=1e-6)
    again = nash_average(torch.cat([scores, scores[:1]]), standardise=False)
    assert column(again, "rating")[:5] == pytest.approx(column(found, "rating"), abs=1e-6)
    # It is a solution: no agent earns more than the value, no task takes more than it from the agents' mixture.
    tasks = torch.tensor(found["weights of tasks"], dtype=torch.float64)
    agents = torch.tensor(column(found, "weight"), dtype=torch.float64)
    assert float((scores @ tasks).max()) == pytest.approx(found["value"], abs=1e-6)
    assert float((agents @ scores).min()) == pytest.approx(found["value"], abs=1e-6)


def test_larger_tables_with_copies():
    for seed in range(12):
        scores = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)).double()
        scores = ((scores - scores.mean(0)) / scores.std(0)).round(decimals=1)  # many equal scores
        found = nash_average(scores, standardise=False)
        copies = nash_average(torch.cat([scores, scores[:, [seed] * 5]], 1), standardise=False)
        assert column(copies, "rating") == pytest.approx(column(found, "rating"), abs=1e-6), seed


def test_the_flattest_of_many_solutions():
    # Two tasks say the same of the first two agents; the third is worse on both.
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    found = nash_average(scores, standardise=False)
    assert column(found, "weight") == pytest.approx([0.5, 0.5, 0], abs=1e-6)
    assert found["effective agents"] == pytest.approx(2, abs=1e-5)
    level = nash_average(torch.ones(3, 4), standardise=False)
    assert level["weights of tasks"] == pytest.approx([0.25] * 4, abs=1e-6)


def test_standardised_tasks_and_resamples():
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    scaled = scores * torch.tensor([1.0, 100, 1, 1, 0.01, 1]) + 5
    assert column(nash_average(scaled), "rating") == pytest.approx(column(nash_average(scores), "rating"), abs=1e-6)
    assert column(nash_average(-scores, higher_is_better=False), "rating") == pytest.approx(
        column(nash_average(scores), "rating"), abs=1e-6
    )
    found = nash_average(scores, samples=30, tasks=list("uvwxyz"))
    assert all(row["low"] <= row["high"] for row in found.table)
    assert found.notes[0].startswith("Tasks that weigh most")
    json.dumps(found.to_json(), allow_nan=False)


def test_hodge_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(6, 6, generator=generator).double()
    payoffs = raw - raw.T
    found = hodge(payoffs)
    rating = torch.tensor(column(found, "rating"), dtype=torch.float64)
    assert rating.tolist() == pytest.approx(payoffs.mean(1).tolist())
    flow = rating[:, None] - rating[None]
    left = payoffs - flow
    assert float((left * flow).sum()) == pytest.approx(0, abs=1e-9)
    assert found["cyclic"] == pytest.approx(float(left.square().sum() / payoffs.square().sum()))
    assert nash_average(payoffs, against="agents")["cyclic"] == pytest.approx(found["cyclic"])
    assert hodge(CYCLE)["transitive"] == pytest.approx(0)
    # Where some never met, and games are unequal: against least squares.
    holed, weight = payoffs.clone(), torch.rand(6, 6, generator=generator).double()
    weight = weight + weight.T
    holed[0, 3] = holed[3, 0] = torch.nan
    rows, wanted = [], []
    for i in range(6):
        for j in range(i + 1, 6):
            if not math.isnan(float(holed[i, j])):
                row = torch.zeros(6, dtype=torch.float64)
                row[i], row[j] = 1, -1
                rows.append(row * weight[i, j].sqrt())
                wanted.append(holed[i, j] * weight[i, j].sqrt())
    best = torch.linalg.lstsq(
        torch.stack([*rows, torch.ones(6).double()]), torch.stack([*wanted, torch.tensor(0.0)])[:, None]
    )
    assert column(hodge(holed, weights=weight), "rating") == pytest.approx(best.solution[:, 0].tolist())


def test_refusals():
    with pytest.raises(Error, match="antisymmetric"):
        nash_average([[0, 1], [1, 0]], against="agents")
    with pytest.raises(Error, match="tasks or agents"):
        nash_average(CYCLE, against="humans")
    with pytest.raises(Error, match="missing"):
        nash_average([[1.0, math.nan], [0.0, 1.0]])
    with pytest.raises(Error, match="no tasks to resample"):
        nash_average(CYCLE, against="agents", samples=5)
    with pytest.raises(Error, match="connect"):
        hodge([[0, 1, math.nan, math.nan], [-1, 0, math.nan, math.nan], [math.nan, math.nan, 0, 1],
               [math.nan, math.nan, -1, 0]])  # fmt: skip
    with pytest.raises(Error, match="antisymmetric"):
        hodge([[0, 1], [1, 0]])

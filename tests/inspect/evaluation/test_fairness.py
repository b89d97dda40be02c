"""Thresholds by group: hulls by brute force, the linear program against a grid, and what randomising reaches."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import fair_thresholds, fairness_frontier, group_gap, roc_hull, unprocess


def data(seed: int = 0, count: int = 400) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    groups = (torch.rand(count, generator=generator) < 0.35).long()
    labels = (torch.rand(count, generator=generator) < torch.where(groups == 1, 0.3, 0.6)).long()
    noise = torch.randn(count, generator=generator) * torch.where(groups == 1, 1.4, 0.8)
    scores = torch.sigmoid(2 * labels - 1 + noise).round(decimals=2)
    return scores, labels, ["b" if g else "a" for g in groups.tolist()]


def test_hull_against_all_thresholds():
    scores, labels, _ = data()
    cuts, false, right = roc_hull(scores, labels)
    assert (cuts[0], false[0], right[0]) == (math.inf, 0.0, 0.0)
    assert (false[-1], right[-1]) == (1.0, 1.0)
    for cut, f, t in zip(cuts, false, right, strict=True):
        assert f == pytest.approx(float((scores[labels == 0].double() >= cut).double().mean()))
        assert t == pytest.approx(float((scores[labels == 1].double() >= cut).double().mean()))
    slopes = numpy.diff(right) / numpy.maximum(numpy.diff(false), 1e-300)
    assert (numpy.diff(slopes) < 0).all()
    for cut in scores.unique():
        f = float((scores[labels == 0] >= cut).double().mean())
        t = float((scores[labels == 1] >= cut).double().mean())
        assert t <= numpy.interp(f, false, right) + 1e-12


@pytest.mark.parametrize(
    "constraint", ["equalized odds", "equal opportunity", "predictive equality", "demographic parity"]
)
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.2])
def test_the_gap_is_kept_and_nothing_better_keeps_it(constraint: str, tolerance: float):
    scores, labels, groups = data()
    found = fair_thresholds(scores, labels, groups, tolerance=tolerance, constraint=constraint)
    assert found.gap <= tolerance + 1e-7
    free = unprocess(scores, labels, groups)
    assert found.accuracy <= free.accuracy + 1e-12
    # All pairs of single thresholds that keep the gap are no better.
    best, inside = 0.0, [torch.tensor([g == name for g in groups]) for name in "ab"]
    rows = []
    for part in inside:
        s, y = scores[part], labels[part]
        cut = s[None] >= torch.cat([torch.tensor([2.0]), s.unique()])[:, None]
        right = (cut == y.bool()).double().sum(1)
        rates = {"f": cut[:, y == 0].double().mean(1), "t": cut[:, y == 1].double().mean(1), "n": cut.double().mean(1)}
        rows.append((right, rates))
    keys = {"equalized odds": "ft", "equal opportunity": "t", "predictive equality": "f", "demographic parity": "n"}
    gap = torch.stack([(rows[0][1][k][:, None] - rows[1][1][k][None]).abs() for k in keys[constraint]]).amax(0)
    accuracy = (rows[0][0][:, None] + rows[1][0][None]) / 400
    best = float(accuracy[gap <= tolerance].max())
    assert found.accuracy >= best - 1e-9


def test_accuracy_and_rates_are_those_of_the_draws():
    scores, labels, groups = data()
    found = fair_thresholds(scores, labels, groups, tolerance=0.02)
    said = torch.stack([found.predict(scores, groups, seed=seed) for seed in range(300)]).double()
    right = (said == labels).double().mean(1)
    assert float(right.mean()) == pytest.approx(found.accuracy, abs=0.003)
    for name in "ab":
        inside = torch.tensor([g == name for g in groups])
        assert float(said[:, inside & (labels == 0)].mean()) == pytest.approx(found.rates[name][0], abs=0.01)
        assert float(said[:, inside & (labels == 1)].mean()) == pytest.approx(found.rates[name][1], abs=0.01)
    assert sum(weight for _, weight in found.thresholds["a"]) == pytest.approx(1)
    json.dumps(found.report().to_json(), allow_nan=False)
    with pytest.raises(Error, match="group 'c'"):
        found.predict([0.5], ["c"])


def test_unprocessing_finds_the_best_threshold_of_every_group():
    scores, labels, groups = data(1)
    right = 0
    for name in "ab":
        inside = torch.tensor([g == name for g in groups])
        cuts = torch.cat([scores[inside].unique(), torch.tensor([2.0])])
        right += max(int(((scores[inside] >= cut) == labels[inside].bool()).sum()) for cut in cuts)
    free = unprocess(scores, labels, groups)
    assert free.accuracy == pytest.approx(right / 400)
    assert float((free.predict(scores, groups) == labels.bool()).double().mean()) == pytest.approx(right / 400)
    # A rising function of the scores within each group undoes nothing and adds nothing.
    moved = torch.where(torch.tensor([g == "a" for g in groups]), scores * 0.2, scores + 3)
    assert unprocess(moved, labels, groups).accuracy == pytest.approx(free.accuracy)


def test_costs_and_three_groups():
    scores, labels, groups = data(2)
    groups = [g if i % 3 else "c" for i, g in enumerate(groups)]
    found = fair_thresholds(scores, labels, groups, tolerance=0.03)
    assert found.gap <= 0.03 + 1e-7
    assert set(found.thresholds) == {"a", "b", "c"}
    dear = fair_thresholds(scores, labels, groups, tolerance=0.03, false_positive_cost=20.0)
    assert all(dear.rates[g][0] <= found.rates[g][0] for g in "abc")


def test_frontier():
    scores, labels, groups = data(3)
    worse = torch.sigmoid(torch.logit(scores.clamp(0.01, 0.99)) + 2 * torch.randn(400))
    found = fairness_frontier({"good": scores, "worse": worse}, labels, groups)
    assert found["base"] == "good"
    for row in found.table:
        assert row["unprocessed"] >= row["accuracy"]
        assert row["base at this gap"] >= row["accuracy"] - 1e-9
        assert row["its gap"] <= row["gap"] + 1e-7
    first, second = (slice(0, 200), slice(200, 400))
    held = fairness_frontier({"good": scores[second]}, labels[second], groups[200:], fitting={"good": scores[first]},
                             fitting_labels=labels[first], fitting_groups=groups[:200])  # fmt: skip
    fitted = unprocess(scores[first], labels[first], groups[:200])
    said = fitted.predict(scores[second], groups[200:])
    assert held["unprocessed"] == [float((said == labels[second].bool()).double().mean())]
    assert "other examples" in held.notes[0]


def test_group_gap_and_refusals():
    assert group_gap([1, 1, 0, 0], [1, 0, 1, 0], ["a", "a", "b", "b"], "demographic parity") == 1
    assert group_gap([1, 0, 1, 1], [1, 0, 1, 0], ["a", "a", "b", "b"], "equal opportunity") == 0
    assert group_gap([1, 1, 0, 1], [1, 0, 1, 1], ["a", "a", "b", "b"], "demographic parity") == 0.5
    assert group_gap([1, 1, 0, 1], [1, 0, 1, 1], ["a", "a", "b", "b"], "equal opportunity") == 0.5
    assert group_gap([1, 0, 1, 1], [1, 0, 1, 0], ["a", "a", "b", "b"], "predictive equality") == 1
    with pytest.raises(Error, match="group 'b' has examples of one class"):
        group_gap([1, 1, 0, 1], [1, 0, 1, 1], ["a", "a", "b", "b"])
    with pytest.raises(Error, match="group_gap knows"):
        group_gap([1, 0], [1, 0], ["a", "a"], "parity")
    with pytest.raises(Error, match="group 'b'"):
        fair_thresholds([0.1, 0.9, 0.5], [0, 1, 1], ["a", "a", "b"])
    with pytest.raises(Error, match="did you mean 'equalized odds'"):
        fair_thresholds([0.1, 0.9], [0, 1], ["a", "a"], constraint="equalised odds")
    with pytest.raises(Error, match="tolerance"):
        fair_thresholds([0.1, 0.9], [0, 1], ["a", "a"], tolerance=-0.1)
    with pytest.raises(Error, match="groups for"):
        fair_thresholds([0.1, 0.9], [0, 1], ["a"])
    with pytest.raises(Error, match="both classes"):
        roc_hull([0.1, 0.2], [1, 1])

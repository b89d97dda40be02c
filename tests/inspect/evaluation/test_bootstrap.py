"""Intervals by resampling: against loops, against what is known of means, and by how often they hold the truth."""

from __future__ import annotations

import json
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import Interval, bootstrap, bootstrap_632, paired_interval
from weightsmith.inspect.evaluation._bootstrap import _corrected
from weightsmith.solve import resampled_means


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
@pytest.mark.parametrize("groups", [None, torch.arange(60) // 3])
def test_the_mean_is_a_metric_like_any_other(method: str, groups: torch.Tensor | None):
    values = normal(60).exp()
    fast = bootstrap(values, method=method, groups=groups, samples=300)
    slow = bootstrap(values, lambda x: x.mean(1), method=method, groups=groups, samples=300)
    for name in ("estimate", "low", "high", "error", "count"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name)), name


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
@pytest.mark.parametrize("groups", [None, torch.arange(60) // 3])
def test_weights_are_a_metric_of_two_tensors(method: str, groups: torch.Tensor | None):
    values, weight = normal(60).exp(), normal(60, seed=2).abs()
    fast = bootstrap(values, method=method, groups=groups, weight=weight, samples=300)
    slow = bootstrap(
        (values, weight), lambda x, w: (x * w).sum(1) / w.sum(1), method=method, groups=groups, samples=300
    )
    for name in ("estimate", "low", "high", "error", "count"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name)), name


def test_ends_by_hand():
    values = normal(40).exp()
    figures = resampled_means(values[None], 500, seed=0)[:, 0]
    low, high = torch.quantile(figures, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    found = bootstrap(values, confidence=0.9, samples=500)
    assert (found.low, found.high) == pytest.approx((low, high))
    basic = bootstrap(values, confidence=0.9, samples=500, method="basic")
    mean = float(values.mean())
    assert (basic.low, basic.high) == pytest.approx((2 * mean - high, 2 * mean - low))
    # bca: the mean of skewed values is pushed to the right, and by the textbook's formula.
    left_out = torch.stack([torch.cat([values[:i], values[i + 1 :]]).mean() for i in range(40)])
    around = left_out.mean() - left_out
    acceleration = float(around.pow(3).sum() / (6 * around.square().sum() ** 1.5))
    cumulative, inverse = torch.special.ndtr, torch.special.ndtri
    bias = float(inverse((figures < mean).double().mean()))
    tails = []
    for tail in (0.05, 0.95):
        z = bias + float(inverse(torch.tensor(tail, dtype=torch.float64)))
        tails.append(float(cumulative(torch.tensor(bias + z / (1 - acceleration * z), dtype=torch.float64))))
    expected = torch.quantile(figures, torch.tensor(tails, dtype=torch.float64)).tolist()
    bca = bootstrap(values, confidence=0.9, samples=500, method="bca")
    assert [bca.low, bca.high] == pytest.approx(expected)
    assert acceleration > 0.02
    assert bca.low > low


def test_coverage_and_the_standard_error():
    inside = 0
    for seed in range(300):
        found = bootstrap(1 + normal(60, seed=seed), samples=300, seed=seed)
        inside += not found.excludes(1.0)
        assert found.error == pytest.approx(1 / math.sqrt(60), rel=0.5)
    assert 0.9 <= inside / 300 <= 0.98


def test_clusters_widen_and_pairs_narrow():
    common = normal(30, seed=1).repeat_interleave(10)
    values = common + 0.1 * normal(300)
    groups = torch.arange(300) // 10
    alone, together = bootstrap(values), bootstrap(values, groups=groups)
    assert together.error > 2 * alone.error
    assert together.count == 30
    first, second = values + 0.05, values + 0.1 * normal(300, seed=4)
    apart = bootstrap(first).error + bootstrap(second).error
    paired = paired_interval(first, second)
    assert paired.error < apart / 5
    assert paired.estimate == pytest.approx(float((first - second).mean()))
    assert paired.excludes(0.0)


def test_weights_count_tokens():
    values, weight = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
    assert bootstrap(values, weight=weight, samples=10).estimate == 1.5
    ratio = paired_interval(values + 1, values, weight=weight, samples=10).map(math.exp)
    assert ratio.estimate == pytest.approx(math.e)
    wide = Interval(1.0, 0.0, 2.0, 0.95, "percentile", 0.5, 9).map(math.exp)
    assert (wide.low, wide.high, wide.error) == pytest.approx((1.0, math.e**2, 0.5 * math.e), rel=1e-5)


def test_metrics_of_several_tensors():
    targets = torch.arange(50) % 2
    predictions = torch.where(torch.arange(50) < 40, targets, 1 - targets)
    found = bootstrap((predictions, targets), lambda p, t: (p == t).double().mean(1), samples=200)
    assert found.estimate == pytest.approx(0.8)
    # A figure that is not always there.
    rare = torch.zeros(20, dtype=torch.bool)
    rare[0] = True
    odd = bootstrap(rare, lambda x: torch.where(x.any(1), 1.0, torch.nan), samples=200)
    assert 40 < odd.dropped < 110
    assert "left out" in str(odd.report())
    with pytest.raises(Error, match="no finite number"):
        bootstrap(rare, lambda x: torch.full((len(x),), torch.nan))
    with pytest.raises(Error, match=r"gives \[b\]"):
        bootstrap(rare, lambda x: x.double().mean())


def test_many_examples_are_left_out_in_blocks():
    values = normal(1200).exp()
    exact = bootstrap(values, method="bca", samples=200)
    blocks = bootstrap(values, lambda x: x.mean(1), method="bca", samples=200)
    assert (blocks.low, blocks.high) == pytest.approx((exact.low, exact.high), rel=0.02)


def test_edges():
    one = bootstrap([2.0], samples=5, method="bca")
    assert (one.estimate, one.low, one.high, one.error) == (2.0, 2.0, 2.0, 0.0)
    assert bootstrap(torch.tensor([2.0]), lambda x: x.amax(1), samples=5, method="bca") == one  # no max without it
    # A figure that is no number without one of the examples says nothing about the acceleration.
    figures, without = normal(50), normal(9, seed=1).exp()
    skewed = [_corrected(figures, 0.1, [0.05, 0.95], one) for one in (without, torch.cat([without, without.log() / 0]))]
    assert skewed[0] == skewed[1] != _corrected(figures, 0.1, [0.05, 0.95], without * 0)
    assert bootstrap([1.0, 2.0], lambda x: x.mean(1), samples=5).estimate == 1.5  # a list is one tensor
    with pytest.raises(Error, match="examples themselves"):
        bootstrap(normal(9), lambda x: torch.where((x.sort(1).values.diff(dim=1) == 0).any(1), 1.0, torch.nan))
    same = bootstrap(torch.ones(9, dtype=torch.bfloat16), method="bca", samples=20)
    assert (same.low, same.high) == (1.0, 1.0)
    assert json.loads(json.dumps(same.to_json()))["method"] == "bca"
    before = torch.random.get_rng_state()
    assert bootstrap(normal(9), seed=1) == bootstrap(normal(9), seed=1) != bootstrap(normal(9), seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    for bad in ([], [1.0, math.nan], [[1.0]]):
        with pytest.raises(Error):
            bootstrap(bad)
    for options in ({"method": "bac"}, {"confidence": 1.0}, {"samples": 1}, {"groups": [1]}, {"weight": [-1.0, 1.0]}):
        with pytest.raises(Error):
            bootstrap([1.0, 2.0], **options)
    with pytest.raises(Error, match="pair"):
        paired_interval([1.0], [1.0, 2.0])


def test_632_by_hand():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, generator=generator)
    y = (x + torch.randn(30, generator=generator) > 0).long()
    seen = []

    def nearest(chosen: torch.Tensor) -> torch.Tensor:
        """One neighbour: right on all that it was trained on."""
        seen.append(chosen)
        return y[chosen][(x[:, None] - x[chosen][None]).abs().argmin(1)]

    found = bootstrap_632(nearest, y, samples=40)
    assert found["training"] == 0
    assert torch.equal(seen[0], torch.arange(30))
    errors = [[] for _ in range(30)]
    for chosen in seen[1:]:
        said = y[chosen][(x[:, None] - x[chosen][None]).abs().argmin(1)]
        for i in set(range(30)) - set(chosen.tolist()):
            errors[i].append(float(said[i] != y[i]))
    out = sum(sum(e) / len(e) for e in errors if e) / sum(bool(e) for e in errors)
    none = float((y[:, None] != y[None]).double().mean())
    overfitting = out / none
    weight = 0.632 / (1 - 0.368 * overfitting)
    assert found["out of bag"] == pytest.approx(out)
    squared = bootstrap_632(lambda chosen: x, y.float(), loss=lambda p, t: (p - t) ** 2, samples=3)
    assert squared["no information"] == pytest.approx(float((x[:, None] - y[None]).square().mean()))
    assert found["no information"] == pytest.approx(none)
    assert found[".632"] == pytest.approx(0.632 * out)
    assert found["overfitting"] == pytest.approx(overfitting)
    assert found[".632+"] == pytest.approx(weight * out)
    with pytest.raises(Error, match="2 examples"):
        bootstrap_632(nearest, y[:1])


def test_632_without_overfitting_or_information():
    y = torch.arange(20) % 2
    perfect = bootstrap_632(lambda chosen: y, y, samples=5)
    assert (perfect[".632+"], perfect["overfitting"]) == (0.0, 0.0)
    memory = bootstrap_632(lambda chosen: torch.where(torch.isin(torch.arange(20), chosen), y, 1 - y), y, samples=20)
    assert memory["out of bag"] == 1.0
    assert memory[".632+"] == pytest.approx(0.5)  # no worse than no information

"""The figures of values against a loop written from their definitions, and where loops go wrong."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.inspect import _statistics, summary
from weightsmith.inspect._statistics import Moments, moments_of
from weightsmith.weights import UNIT, Weights

DTYPES = [
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "int64",
    "uint16",
    "bool",
]


def figures(values):
    return summary(Weights.of({"w": values}), stats=True).tensors[0].stats


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_a_slow_loop(dtype):
    values = (torch.randn(7, 13, generator=torch.Generator().manual_seed(0)) * 3).abs().to(getattr(torch, dtype))
    found, numbers = figures(values), values.double().flatten().tolist()
    mean = math.fsum(numbers) / len(numbers)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.std == pytest.approx(math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / len(numbers)), rel=1e-12)
    assert found.norm == pytest.approx(math.sqrt(math.fsum(x * x for x in numbers)), rel=1e-12)
    assert (found.min, found.max) == (min(numbers), max(numbers))
    assert found.zeros == numbers.count(0.0) / len(numbers)
    assert found.nonfinite == 0


def test_many_units_and_threads_give_one_answer():
    values = torch.randn(UNIT + 12_345, generator=torch.Generator().manual_seed(1))
    values[-1], values[5] = 99.0, -77.0
    alone = summary(Weights.of({"w": values}), stats=True, threads=1).tensors[0].stats
    together = summary(Weights.of({"w": values}), stats=True, threads=3).tensors[0].stats
    assert alone == together
    assert (alone.min, alone.max) == (-77.0, 99.0)
    assert alone.std == pytest.approx(float(values.double().std(correction=0)), rel=1e-12)


def test_a_small_spread_around_a_large_mean_is_not_lost():
    values = 1e8 + torch.linspace(-1, 1, 300_000, dtype=torch.float64)
    assert figures(values).std == pytest.approx(float((values - 1e8).std(correction=0)), rel=1e-6)


def test_what_is_not_finite_is_counted_and_left_out():
    found = figures(torch.tensor([math.nan, math.inf, -math.inf, 2.0, 0.0, 4.0]))
    assert (found.nan, found.inf, found.nonfinite) == (1, 2, 3)
    assert (found.mean, found.min, found.max) == (2.0, 0.0, 4.0)
    assert found.zeros == 1 / 6


def test_nothing_finite_and_nothing_at_all():
    nothing = figures(torch.full((3,), math.nan))
    assert (nothing.mean, nothing.std, nothing.min, nothing.max, nothing.nan) == (None, None, None, None, 3)
    empty = figures(torch.empty(0, 4))
    assert (empty.norm, empty.mean, empty.zeros, empty.nonfinite) == (0.0, None, 0.0, 0)
    assert figures(torch.tensor(3.0)).mean == 3.0


def test_large_float64_values_do_not_pass_for_infinite():
    found = figures(torch.tensor([1.5e308, 1.5e308, 1.0], dtype=torch.float64))
    assert (found.inf, found.max) == (0, 1.5e308)


def test_complex_values_count_by_magnitude():
    assert figures(torch.tensor([3 + 4j, 0j])).max == 5.0


def test_packed_values_have_no_figures():
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no packed floats")
    packed = torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert figures(packed) is None


def test_moments_add_up_in_any_grouping():
    parts = [moments_of(torch.randn(n, dtype=torch.float64) * n) for n in (1, 50, 3, 700)]
    left = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    right = parts[0] + (parts[1] + (parts[2] + parts[3]))
    assert left.statistics().std == pytest.approx(right.statistics().std, rel=1e-12)
    assert Moments() + parts[0] == parts[0]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_large_sums_are_added_up_a_few_at_a_time(count):
    asked, totals = [], []
    running = _statistics._in_runs(len, totals.append)
    wanted = next(running, None)
    while wanted is not None:
        units = list(wanted.units(count))
        assert 0 < len(units) <= _statistics.AT_ONCE
        asked += units
        try:
            wanted = running.send((sum(units), len(units)))
        except StopIteration:
            wanted = None
    assert totals == [(sum(range(count)), count)]
    assert asked == list(range(count))

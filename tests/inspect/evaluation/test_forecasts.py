"""Pools of forecasts: figures by hand, ranks against a loop, and a median among broken forecasters."""

from __future__ import annotations

import json
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import consensus, coverage_accuracy, forecast_pool, weighted_error
from weightsmith.solve import resampled_means


def test_consensus():
    pool = [[1.0, 8.0], [2.0, 6.0], [4.0, 7.0], [9.0, 5.0], [3.0, 100.0]]
    assert consensus(pool, "mean").tolist() == pytest.approx([3.8, 25.2])
    assert consensus(pool, "median").tolist() == [3.0, 7.0]
    assert consensus(pool[:4], "median").tolist() == [3.0, 6.5]
    assert consensus(pool, "trimmed", trim=0.4).tolist() == pytest.approx([3.0, 7.0])
    assert consensus(pool[:2], "trimmed", trim=1 - 1e-12).tolist() == consensus(pool[:2], "median").tolist()
    assert consensus(pool, "trimmed", trim=0.0).tolist() == consensus(pool, "mean").tolist()
    weighted = consensus(pool[:2], "inverse error", errors=[1.0, 2.0]).tolist()
    assert weighted == pytest.approx([(1 + 2 / 4) / 1.25, (8 + 6 / 4) / 1.25])
    for options in ({"how": "mode"}, {"how": "inverse error"}, {"how": "inverse error", "errors": [0.0] * 5},
                    {"how": "trimmed", "trim": 1.0}):  # fmt: skip
        with pytest.raises(Error):
            consensus(pool, **options)
    with pytest.raises(Error, match="finite"):
        consensus([[math.nan], [1.0]])


def test_errors_that_know_how_sure_a_forecast_was():
    found = weighted_error([1.0, 2.0], [0.0, 5.0], [0.0, 0.0], [2.0, 4.0])
    assert found == pytest.approx((0.5 * 1 + 0.25 * 3) / 0.75)
    assert coverage_accuracy([0, 0, 0, 0], [1, 1, 1, 1], [0.5, 1.0, 2, 3]) == 0
    assert coverage_accuracy([0, 0], [1, 1], [2, 2], stated=0.9) == pytest.approx(0.9)
    with pytest.raises(Error, match="empty"):
        weighted_error([1.0], [1.0], [2.0], [2.0])
    with pytest.raises(Error, match="stated"):
        coverage_accuracy([0], [1], [1], stated=1.0)


def test_pool_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(40, generator=generator, dtype=torch.float64)
    said = truth + torch.randn(4, 40, generator=generator, dtype=torch.float64) * torch.tensor([[0.5], [0.6], [1], [1]])
    found = forecast_pool(said, truth, names=list("abcd"), baseline="d", combine=("median",), samples=400)
    rows = {row["forecaster"]: row for row in found.table}
    middle = said[:3].median(0).values  # without the baseline
    errors = torch.cat([(said - truth).abs(), (middle - truth).abs()[None]])
    drawn = resampled_means(errors, 400, 0)
    for i, name in enumerate(["a", "b", "c", "d", "consensus: median"]):
        assert rows[name]["error"] == pytest.approx(float(errors[i].mean()))
        assert rows[name]["rank"] == 1 + int((errors.mean(1) < errors[i].mean()).sum())
        ranks = [1 + sum(float(b[j] < b[i]) for j in range(5)) for b in drawn]
        assert rows[name]["best"] == pytest.approx(sum(r == 1 for r in ranks) / 400)
        assert rows[name]["rank low"] <= rows[name]["rank"] <= rows[name]["rank high"]
        assert rows[name]["p"] == pytest.approx((1 + int((drawn[:, i] >= drawn[:, 3]).sum())) / 401)
    assert rows["a"]["p"] < 0.05 < rows["d"]["p"]
    assert found["error"] == sorted(found["error"])
    json.dumps(found.to_json(), allow_nan=False)


def test_a_median_among_broken_forecasters():
    near_top = mean_near_top = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(60, generator=generator)
        own = truth + 0.3 * torch.randn(60, generator=generator) + torch.randn(30, 60, generator=generator)
        own[:5] += 60 * (torch.rand(5, 1, generator=generator) + 0.5)
        ranks = dict(zip(*(forecast_pool(own, truth, samples=2)[c] for c in ("forecaster", "rank")), strict=True))
        near_top += ranks["consensus: median"] <= 3
        mean_near_top += ranks["consensus: mean"] <= 3
    assert near_top >= 36
    assert mean_near_top <= 4


def test_refusals():
    with pytest.raises(Error, match="did you mean"):
        forecast_pool({"last": [1.0]}, [1.0], baseline="lost")
    with pytest.raises(Error, match="2 samples"):
        forecast_pool({"last": [1.0]}, [1.0], samples=0)
    with pytest.raises(Error, match="finite numbers"):
        forecast_pool({"last": [1.0]}, [1.0], error=lambda said, came: (said - came).mean(1))
    with pytest.raises(Error, match="nobody to combine"):
        forecast_pool({"last": [1.0]}, [1.0], baseline="last")
    with pytest.raises(Error, match="pair"):
        forecast_pool({"a": [1.0], "b": [2.0]}, [1.0, 2.0])

"""Sensitivity to settings: coefficients by hand, planted effects, intervals that cover."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import sensitivity


def table(seed: int, count: int = 60, noise: float = 0.1):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, 3, generator=generator)
    wobble = torch.randn(count, generator=generator)
    return [
        {"rate": 10 ** float(-4 * a), "decay": float(b), "kind": "big" if c > 0.5 else "small",
         "score": -2.0 * float(a) + 0.2 * float(b) - (0.5 if c <= 0.5 else 0) + noise * float(e)}
        for (a, b, c), e in zip(draw, wobble, strict=True)
    ]  # fmt: skip


def test_coefficients_by_hand():
    runs = table(0, noise=0.0)
    found = sensitivity(runs, log=["rate"])
    logs = torch.tensor([math.log(run["rate"]) for run in runs], dtype=torch.float64)
    decays = torch.tensor([run["decay"] for run in runs], dtype=torch.float64)
    wanted = {
        "rate": 2 / (4 * math.log(10)) * float(logs.std()),
        "kind = small": -0.5,
        "decay": 0.2 * float(decays.std()),
    }
    assert found["setting"] == list(wanted)
    assert found["coefficient"] == pytest.approx(list(wanted.values()), abs=1e-5)
    assert found["R2"] == pytest.approx(1)
    assert all(found["certain"])


def test_intervals_cover_as_often_as_they_say():
    hits, wide = 0, []
    for seed in range(40):
        found = sensitivity(table(100 + seed, noise=0.5), log=["rate"], samples=200, confidence=0.9)
        row = {row["setting"]: row for row in found.rows()}["kind = small"]
        hits += row["low"] <= -0.5 <= row["high"]
        wide.append(row["high"] - row["low"])
    assert 30 <= hits <= 40
    assert 0.3 < sum(wide) / 40 < 0.6  # 2 x 1.64 x 0.5 x 2 / sqrt(60) = 0.42


def test_local_lines_see_the_slope_there():
    runs = [{"x": i / 100, "score": (i / 100 - 0.5) ** 2} for i in range(101)]
    assert abs(sensitivity(runs)["coefficient"][0]) < 1e-9
    spread = float(torch.tensor([run["x"] for run in runs], dtype=torch.float64).std())
    for place in (0.25, 0.75):
        found = sensitivity(runs, near={"x": place}, width=0.1)
        assert found["coefficient"][0] == pytest.approx(2 * (place - 0.5) * spread, rel=0.02)


def test_local_weights_by_hand():
    runs = [{"x": float(i), "z": float(i % 4), "score": math.exp(i / 10) + i % 4} for i in range(30)]
    found = sensitivity(runs, near={"x": 5.0, "z": 1.0}, width=0.7)
    x = torch.tensor([[run["x"], run["z"]] for run in runs], dtype=torch.float64)
    centre, spread = x.mean(0), x.std(0)
    away = (x - torch.tensor([5.0, 1.0])) / spread
    root = torch.exp(-away.square().sum(1) / (2 * 0.7**2)).sqrt()[:, None]
    design = torch.cat([torch.ones(30, 1, dtype=torch.float64), (x - centre) / spread], dim=1)
    scores = torch.tensor([run["score"] for run in runs], dtype=torch.float64)
    by_hand = torch.linalg.lstsq(design * root, scores[:, None] * root).solution[1:, 0]
    rows = {row["setting"]: row for row in found.rows()}
    assert [rows["x"]["coefficient"], rows["z"]["coefficient"]] == pytest.approx(by_hand.tolist(), rel=1e-5)
    assert rows["x"]["low"] < rows["x"]["coefficient"] < rows["x"]["high"]
    assert rows["x"]["high"] < sensitivity(runs)["coefficient"][0]  # the whole range is far steeper


def test_truth_values_settings_and_seed():
    runs = [{"on": i % 2 == 0, "idle": i % 3, "score": float(i % 2 == 0), "note": 1} for i in range(12)]
    found = sensitivity(runs, settings=["on", "idle"])
    assert found["most sensitive"] == "on = True"
    assert found["coefficient"][0] == pytest.approx(1)
    assert sensitivity(runs, settings=["on"]).rows() == sensitivity(runs, settings=["on"]).rows()


def test_refusals():
    runs = table(1)
    with pytest.raises(Error, match="log= names no setting"):
        sensitivity(runs, log=["rat"])
    with pytest.raises(Error, match="no setting 'score'"):
        sensitivity(runs, log=["score"])
    with pytest.raises(Error, match="has no logarithm"):
        sensitivity(runs, log=["kind"])
    with pytest.raises(Error, match="near= has 'huge' for 'kind'"):
        sensitivity(runs, near={"rate": 1e-2, "decay": 0.5, "kind": "huge"}, width=2)
    with pytest.raises(Error, match="not a finite number"):
        sensitivity([*runs, dict(runs[0], score=None)])
    with pytest.raises(Error, match="got none"):
        sensitivity([])
    with pytest.raises(Error, match="need at least 5 runs"):
        sensitivity(runs[:4])
    with pytest.raises(Error, match="never varies"):
        sensitivity([dict(run, decay=1.0) for run in runs])
    with pytest.raises(Error, match="above 0"):
        sensitivity([dict(run, rate=0.0) for run in runs], log=["rate"])
    with pytest.raises(Error, match="not a finite number"):
        sensitivity([*runs, dict(runs[0], score=math.nan)])
    with pytest.raises(Error, match="lack a setting"):
        sensitivity([*runs, {"score": 1.0}])
    with pytest.raises(Error, match="larger width"):
        sensitivity(runs, near={"rate": 1e-2, "decay": 0.5, "kind": "big"}, width=0.01)
    with pytest.raises(Error, match="names every setting"):
        sensitivity(runs, near={"rate": 1e-2})


def test_settings_that_always_change_together_are_told():
    runs = [dict(run, double=2 * run["decay"]) for run in table(2)]
    assert any("together" in note for note in sensitivity(runs, log=["rate"]).notes)
    assert not any("together" in note for note in sensitivity(table(2), log=["rate"]).notes)

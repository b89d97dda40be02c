"""What a law says of itself: intervals, standard errors, errors of runs left out, optima, and JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import scaling
from weightsmith.inspect.scaling import Law, Optimum, Prediction, fit, given, simulate

TRUTH = {"Nc": 8.8e13, "alpha_N": 0.076}


def sizes(n, seed=0):
    return {"N": 10 ** (5 + 4 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))}


@pytest.fixture(scope="module")
def law():
    return fit(simulate("kaplan-size", TRUTH, sizes(40), seed=0), "kaplan-size", bootstrap=300)


@pytest.fixture(scope="module")
def two():
    generator = torch.Generator().manual_seed(0)
    design = {name: 10 ** (7 + 3 * torch.rand(60, generator=generator, dtype=torch.float64)) for name in ("N", "D")}
    constants = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
    return fit(simulate("chinchilla", constants, design, seed=0), bootstrap=100)


def test_predictions_of_numbers_and_of_many(law):
    single = law.predict(N=1e7)
    assert isinstance(single, float)
    many = law.predict(N=[1e7, 1e8])
    assert many.shape == (2,)
    assert many[0].item() == pytest.approx(single, rel=1e-14)
    by_hand = (law.parameters["Nc"] / 1e7) ** law.parameters["alpha_N"]
    assert single == pytest.approx(by_hand, rel=1e-12)


def test_prediction_intervals_are_quantiles_of_the_bootstrap(law):
    told = law.predict(N=1e10, interval=True, level=0.8)
    assert isinstance(told, Prediction)
    every = sorted((torch.exp(row[0]).item() / 1e10) ** torch.exp(row[1]).item() for row in law.draws)
    assert told.low == pytest.approx(every[30], rel=2e-3)
    assert told.high == pytest.approx(every[269], rel=2e-3)
    assert told.low <= told.value <= told.high
    inside = law.predict(N=1e7, interval=True, level=0.8)
    run = law.predict(N=1e7, interval=True, level=0.8, of="run")
    assert run.high - run.low == pytest.approx(2 * 1.28 * 0.01 * run.value, rel=0.35)  # 1 % noise
    assert run.high - run.low > 1.5 * (inside.high - inside.low)


def test_one_more_run_has_the_noise_of_those_before():
    few = fit(simulate("kaplan-size", TRUTH, sizes(6), noise=0.05, seed=1), "kaplan-size", bootstrap=0)
    sure = dataclasses.replace(few, draws=few.theta.expand(2000, -1))  # no doubt of the constants: noise alone
    told = sure.predict(N=1e7, interval=True, level=0.98, of="run")
    seen = [told.value * math.exp(-residual * math.sqrt(6 / 4)) for residual in few.residuals.tolist()]
    assert [told.low, told.high] == pytest.approx([min(seen), max(seen)])
    assert max(seen) * min(seen) != pytest.approx(told.value**2, rel=1e-3)  # skewed, so that a sign is seen


def test_broadcasting_of_columns(two):
    told = two.predict(N=1e9, D=[1e9, 1e10], interval=True)
    assert told.value.shape == told.low.shape == (2,)
    assert told.value[0] > told.value[1]


def test_standard_errors_agree_with_the_bootstrap():
    law = fit(simulate("kaplan-size", TRUTH, sizes(400), seed=0), "kaplan-size", bootstrap=200)
    # Gaussian noise: the efficient error of a slope on known places is known, and a median-like fit pays pi / 2.
    places = law.columns["N"].log()
    alpha = law.parameters["alpha_N"]
    ideal = 0.01 / float((places - places.mean()).square().sum().sqrt())
    sandwich = law.standard_errors()["alpha_N"]
    assert sandwich == pytest.approx(ideal * math.sqrt(math.pi / 2), rel=0.2)
    assert float(law.form.natural(law.draws, "alpha_N").std()) == pytest.approx(sandwich, rel=0.25)
    assert alpha == pytest.approx(0.076, abs=4 * sandwich)


def test_kinds_of_intervals(law):
    percentile = law.interval("alpha_N", 0.9)
    draws = law.draws[:, 1]
    assert percentile == pytest.approx(draws.quantile(torch.tensor([0.05, 0.95]).double()).exp().tolist())
    basic = law.interval("alpha_N", 0.9, "basic")
    reflected = [2 * float(law.theta[1]) - math.log(end) for end in reversed(percentile)]
    assert [math.log(end) for end in basic] == pytest.approx(reflected)
    low, high = law.interval("alpha_N", 0.9, "bca")
    assert low < law.parameters["alpha_N"] < high
    assert high - low == pytest.approx(percentile[1] - percentile[0], rel=0.5)
    assert set(law.intervals()) == set(law.parameters)


def test_bca_without_bias_or_skewness_is_percentile():
    draws = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    from weightsmith.inspect.scaling._law import _corrected

    tails = torch.tensor([0.05, 0.95], dtype=torch.float64)
    same = _corrected(tails, torch.tensor(0.0), draws, torch.tensor([-1.0, 0.0, 1.0]).double())
    assert same.tolist() == pytest.approx([0.05, 0.95], abs=1e-3)
    # By hand, with Efron's formulas: bias z0 = -0.2, acceleration a = 0.1.
    from statistics import NormalDist

    normal, left = NormalDist(), torch.tensor([-1.0, 0.0, 0.1, 0.2, 0.3]).double()
    away = [float(left.mean()) - one for one in left.tolist()]
    skew = sum(x**3 for x in away) / (6 * sum(x * x for x in away) ** 1.5)
    z0 = normal.inv_cdf(801 / 2001)
    by_hand = [normal.cdf(z0 + (z0 + z) / (1 - skew * (z0 + z))) for z in (normal.inv_cdf(0.05), normal.inv_cdf(0.95))]
    found = _corrected(tails, draws[800] + 5e-4, draws, left)
    assert found.tolist() == pytest.approx(by_hand, abs=1e-6)
    # A run that alone pulls the estimate down when left out skews it upwards: Efron's acceleration is positive.
    skewed = _corrected(tails, torch.tensor(0.0), draws, torch.tensor([-1.0, 0.0, 0.1, 0.2, 0.3]).double())
    assert bool((skewed > tails + 1e-3).all())
    # More draws below the estimate than above: both ends move up.
    moved = _corrected(tails, torch.tensor(0.3), draws, torch.tensor([-1.0, 0.0, 1.0]).double())
    assert bool((moved > tails).all())


def test_each_run_left_out_is_told_by_a_fit_without_it(law):
    errors = law.errors()
    table = {"N": law.columns["N"].tolist(), "loss": law.observed.tolist()}
    for out in (0, 17):
        rest = {name: column[:out] + column[out + 1 :] for name, column in table.items()}
        told = fit(rest, "kaplan-size", bootstrap=0).predict(N=table["N"][out])
        assert errors[out].item() == pytest.approx(told / table["loss"][out] - 1, abs=1e-6)
    assert errors.abs().mean() > law.residuals.abs().mean()


def test_the_residuals_and_the_objective(law):
    told = law.told(law.columns)
    assert torch.allclose(law.residuals, told.log() - law.observed.log())
    by_hand = sum(r * r / 2 if abs(r) < 1e-3 else 1e-3 * (abs(r) - 5e-4) for r in law.residuals.tolist())
    assert law.loss == pytest.approx(by_hand)


def test_optima_with_intervals(two):
    best = two.optimal(compute=1e21, interval=True)
    assert isinstance(best, Optimum)
    assert best.columns["N"] * best.columns["D"] * 6 == pytest.approx(1e21)
    assert best.low["N"] < best.columns["N"] < best.high["N"]
    assert best.low["D"] < best.columns["D"] < best.high["D"]
    assert best.value == pytest.approx(two.predict(**best.columns))
    same = two.optimal(compute=1e21, closed=False)
    assert same.columns["N"] == pytest.approx(best.columns["N"], rel=1e-4)
    assert two.shared(1e21).columns == two.optimal(compute=1e21).columns


def test_work_in_parts_is_the_same_work(law, monkeypatch):
    from weightsmith.inspect.scaling import _law

    table = {"N": law.columns["N"].tolist(), "loss": law.observed.tolist()}
    whole = fit(table, "kaplan-size", bootstrap=10)
    monkeypatch.setattr(_law, "_CHUNK", 40 * 7)
    parts = fit(table, "kaplan-size", bootstrap=10)
    assert torch.allclose(parts.errors(), law.errors(), atol=1e-9)
    assert torch.allclose(parts.draws, whole.draws, atol=1e-9)


def test_a_search_finds_the_optimum_in_any_unit(two):
    constants = dict(two.parameters)
    constants["A"] /= 1e12 ** constants["alpha"]  # sizes in units of 1e12 parameters
    small = given("chinchilla", **constants)
    for closed in (True, False):
        best = small.optimal(compute=1e21 / 1e12, closed=closed).columns["N"]
        assert best == pytest.approx(two.optimal(compute=1e21).columns["N"] / 1e12, rel=1e-4)


def test_standard_errors_where_no_run_is_near():
    runs = {"N": [1.0, 1.0, 2.0, 2.0], "loss": [math.exp(0.5), math.exp(-0.5)] * 2}
    law = fit(runs, "kaplan-size", delta=0.4, bootstrap=0, duplicates=True)
    assert all(error > 0 for error in law.standard_errors().values())


def test_json(two):
    data = json.loads(json.dumps(two.to_json()))
    assert data["law"] == "chinchilla"
    assert data["parameters"] == pytest.approx(two.parameters)
    assert data["intervals"]["E"][0] < data["parameters"]["E"] < data["intervals"]["E"][1]
    assert given("kaplan-size", **TRUTH).to_json()["objective"] is None


def test_refusals(law, two):
    with pytest.raises(Error, match="D is missing"):
        two.predict(N=1.0)
    with pytest.raises(Error, match="not 'M'"):
        law.predict(N=1.0, M=2.0)
    with pytest.raises(Error, match="above 0"):
        law.predict(N=-1.0)
    with pytest.raises(Error, match="above 0"):
        law.predict(N=[1.0, float("nan")])
    with pytest.raises(Error, match="shares no budget"):
        law.optimal(compute=1e20)
    with pytest.raises(Error, match=r"compute=\.\.\."):
        two.optimal(size=1e9)
    with pytest.raises(Error, match="above 0"):
        two.optimal(compute=0)
    with pytest.raises(Error, match="has no 'alpha'"):
        law.interval("alpha")
    with pytest.raises(Error, match="kind"):
        law.interval("alpha_N", kind="student")
    with pytest.raises(Error, match="level"):
        law.predict(N=1e6, interval=True, level=1.5)
    with pytest.raises(Error, match="level"):
        law.interval("alpha_N", level=0.0)
    with pytest.raises(Error, match="of='law' or 'run'"):
        law.predict(N=1e6, interval=True, of="runs")
    with pytest.raises(Error, match="one length"):
        two.predict(N=[1.0, 2.0], D=[1.0, 2.0, 3.0])
    known = given("kaplan-size", **TRUTH)
    for what in (known.errors, known.standard_errors, lambda: known.residuals):
        with pytest.raises(Error, match="was given, not fitted"):
            what()
    with pytest.raises(Error, match="finite"):
        given("kaplan-size", Nc=math.inf, alpha_N=0.1)


def test_a_law_is_a_plain_record(law):
    assert isinstance(law, Law)
    with pytest.raises(AttributeError):
        law.delta = 3.0
    assert scaling.METHODS["fit"] is fit

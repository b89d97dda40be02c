"""The report of a law: what stands in it, with and without runs, bootstraps and budgets."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.inspect import scaling
from weightsmith.inspect.scaling import fit, given, simulate
from weightsmith.inspect.scaling._pictures import report

CONSTANTS = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}


@pytest.fixture(scope="module")
def law():
    generator = torch.Generator().manual_seed(0)
    design = {name: 10 ** (7 + 3 * torch.rand(50, generator=generator, dtype=torch.float64)) for name in ("N", "D")}
    return fit(simulate("chinchilla", CONSTANTS, design, seed=0), bootstrap=60)


def test_figures_and_table(law):
    made = law.report()
    assert made["constant"] == list(CONSTANTS)
    assert made["value"] == pytest.approx(list(law.parameters.values()))
    assert made["low"][0] == pytest.approx(law.interval("E")[0])
    assert made["sandwich error"][3] == pytest.approx(law.standard_errors()["alpha"])
    assert made["runs"] == 50
    assert made["mean error, each run left out"] == pytest.approx(float(law.errors().abs().mean()))
    exponent = law.parameters["beta"] / (law.parameters["alpha"] + law.parameters["beta"])
    assert made["best N grows as compute to the"] == pytest.approx(exponent)


def test_plots(law):
    made = report(law)
    titles = [plot.title for plot in made.plots]
    assert titles == ["Fit", "Residuals", "Curves of equal compute", "Best allocation"]
    curves, best = made.plots[2].lines[:-1], made.plots[2].lines[-1]
    for index, curve in enumerate(curves):
        assert min(curve.y) == pytest.approx(best.y[index], rel=1e-3)
        assert min(curve.y) >= best.y[index] * (1 - 1e-12)
    allocation = made.plots[3].lines
    for spent, n, d in zip(allocation[0].x, allocation[0].y, allocation[1].y, strict=True):
        assert 6 * n * d == pytest.approx(spent)
    ends = zip(allocation[0].low, allocation[0].y, allocation[0].high, strict=True)
    assert all(low <= y <= high for low, y, high in ends)


def test_it_can_be_saved(law, tmp_path):
    pytest.importorskip("matplotlib", reason="drawings")
    page = law.report().save(tmp_path / "law.html").read_text()
    assert "Curves of equal compute" in page
    assert law.report().save(tmp_path / "law.csv").read_text().startswith("constant,value,low,high")


def test_budgets_of_ones_own(law):
    made = law.report(budgets=[1e20, 1e22])
    assert [line.label for line in made.plots[2].lines] == ["compute 1e+20", "compute 1e+22", "best"]


def test_without_runs_or_bootstraps():
    known = given("chinchilla", **CONSTANTS).report()
    assert known["low"] == [None] * 5
    assert not known.plots
    assert given("chinchilla", **CONSTANTS).report(budgets=[1e20]).plots
    plain = fit({"N": [1.0, 2.0, 4.0, 7.0], "loss": [4.0, 3.0, 2.4, 2.0]}, "kaplan-size", bootstrap=0).report()
    assert any("No bootstrap" in note for note in plain.notes)
    assert all(isinstance(value, float) for value in plain["value"])


def test_a_split_of_sizes_stays_below_the_whole():
    generator = torch.Generator().manual_seed(0)
    design = {name: 10 ** (6 + 2 * torch.rand(40, generator=generator, dtype=torch.float64)) for name in ("Ne", "Nd")}
    constants = {"amount": 700.0, "pe": 0.18, "pd": 0.31, "floor": 1.2}
    law = fit(simulate("encoder-decoder", constants, design, noise=0.001), "encoder-decoder", bootstrap=0)
    curve = law.report().plots[2].lines[0]
    assert all(math.isfinite(value) for value in curve.y)


def test_what_the_runs_do_not_tell_is_said():
    runs = scaling.simulate("kaplan-size", {"Nc": 8.8e13, "alpha_N": 0.076}, {"N": [1e6, 1.3e6, 1.6e6, 2e6, 2.2e6]})
    made = fit(runs, "kaplan-size", bootstrap=50).report()
    assert any("hardly tell" in note and "Nc" in note for note in made.notes)

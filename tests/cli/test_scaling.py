"""``weightsmith scaling``: fits, questions, reports and clear errors."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from weightsmith.inspect import scaling

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


@pytest.fixture
def runs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    design = {name: 10 ** (7 + 3 * torch.rand(50, generator=generator, dtype=torch.float64)) for name in ("N", "D")}
    made = scaling.simulate("chinchilla", TRUTH, design, noise=0.002)
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["params", "D", "loss"])
        writer.writerows(zip(*made.values(), strict=True))
    return path


def test_fit_in_words(run, runs, tmp_path):
    page = tmp_path / "report.html"
    asking = ("--predict", "N=7e9,D=1e12", "--optimal", "1e24", "--bootstrap", "40", "-o", page)
    status, out, err = run("scaling", "fit", runs, "-c", "N=params", *asking)
    assert (status, err) == (0, "")
    assert "L = E + A / N^alpha + B / D^beta" in out
    assert "\nN 7e+09, D 1e+12: loss 2." in out
    assert "\ncompute 1e+24: N " in out
    assert "Curves of equal compute" in page.read_text()


def test_fit_as_json_is_what_the_library_says(run, runs):
    asking = ("--predict", "N=7e9,D=1e12", "--optimal", "1e24", "--bootstrap", "40", "--seed", "3", "--json")
    status, out, _ = run("scaling", "fit", runs, "-c", "N=params", *asking)
    data = json.loads(out)
    law = scaling.fit(runs, columns={"N": "params"}, bootstrap=40, seed=3)
    assert status == 0
    assert data["parameters"] == pytest.approx(law.parameters)
    assert data["intervals"]["alpha"] == pytest.approx(list(law.interval("alpha")))
    told = law.predict(N=7e9, D=1e12, interval=True)
    answer = data["predictions"][0]
    assert [answer["value"], answer["low"], answer["high"]] == pytest.approx([told.value, told.low, told.high])
    best = law.optimal(compute=1e24, interval=True)
    assert data["optima"][0]["N"] == pytest.approx([best.columns["N"], best.low["N"], best.high["N"]])
    assert data["comparison"] is None


def test_several_laws_are_compared_and_the_best_is_used(run, runs):
    names = ("--law", "kaplan-size", "--law", "chinchilla", "-c", "N=params", "--bootstrap", "0")
    data = json.loads(run("scaling", "fit", runs, *names, "--json")[1])
    assert data["law"] == "chinchilla"
    assert {row["law"] for row in data["comparison"]} >= {"kaplan-size", "chinchilla"}
    assert data["intervals"] == {}
    assert "Laws compared on" in run("scaling", "fit", runs, *names)[1]


def test_fixed_constants(run, runs):
    out = run("scaling", "fit", runs, "-c", "N=params", "--fixed", "E=1.8172", "--bootstrap", "0", "--json")[1]
    assert json.loads(out)["parameters"]["E"] == 1.8172


def test_laws(run):
    status, out, _ = run("scaling", "laws")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(scaling.FORMS)
    rows = json.loads(run("scaling", "laws", "--json")[1])
    assert rows[0]["constants"] == ["E", "A", "B", "alpha", "beta"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no column 'N'"),
        (("-c", "N=params", "--law", "chinchila"), "did you mean 'chinchilla'"),
        (("-c", "N"), "--column takes NAME=VALUE"),
        (("-c", "N=params", "--predict", "N=much,D=1"), "'much' is no number"),
        (("-c", "N=params", "--predict", "N=1e9"), "D is missing"),
        (("-c", "N=params", "--optimal", "-3"), "--optimal takes budgets above 0"),
        (("-c", "N=params", "--law", "chinchilla", "--law", "kaplan-size", "--fixed", "E=1"), "goes with one --law"),
        (("-c", "N=params", "--law", "kaplan-size", "--optimal", "1e20"), "shares no budget"),
        (("-c", "N=params", "-o", "report.doc"), "report.doc: a report is written as"),
        (("-c", "N=params", "--level", "90"), "--level lies between 0 and 1"),
    ],
)
def test_errors_are_one_line(run, runs, arguments, says):
    status, out, err = run("scaling", "fit", runs, "--bootstrap", "10", *arguments)
    assert status == 2
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


def test_a_bad_line_is_named(run, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("N,D,loss\n1,2,3\n4,5,nan\n")
    status, _, err = run("scaling", "fit", path)
    assert status == 2
    assert "bad.csv, line 3: loss is nan" in err
    assert run("scaling", "fit", tmp_path / "nowhere.csv")[0] == 2

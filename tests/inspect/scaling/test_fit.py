"""Fitting: known truth comes back, for every law; the bootstrap, comparisons and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.scaling import FORMS, Form, compare, fit, given, simulate
from weightsmith.inspect.scaling._fit import known, resamples

REPLICATION = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def spread(low, high, n, seed, log=True):
    share = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 10 ** (low + (high - low) * share) if log else low + (high - low) * share


def design(n=240, seed=0):
    return {"N": spread(7.5, 10.2, n, seed), "D": spread(8.5, 11.5, n, seed + 1000)}


TRUTHS = {
    "chinchilla": (REPLICATION, design(60)),
    "kaplan-size": ({"Nc": 8.8e13, "alpha_N": 0.076}, {"N": spread(5, 9, 20, 0)}),
    "kaplan-data": ({"Dc": 5.4e13, "alpha_D": 0.095}, {"D": spread(7, 10, 20, 0)}),
    "kaplan-joint": ({"Nc": 6.4e13, "Dc": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}, design(60)),
    "kaplan-steps": (
        {"Nc": 6.5e13, "Sc": 2.1e3, "alpha_N": 0.077, "alpha_S": 0.76},
        {"N": spread(5, 9, 60, 0), "S": spread(3, 6, 60, 1)},
    ),
    "critical-batch": ({"B_star": 2e8, "alpha_B": 0.21}, {"loss": spread(2, 4, 20, 0, log=False)}),
    "batch-tradeoff": ({"S_min": 2e3, "E_min": 4e5}, {"B": spread(1, 4, 20, 0)}),
    "over-training": ({"E": 1.84, "a": 60.0, "b": 90.0, "eta": 0.136}, design(60)),
    "downstream-error": ({"eps": 0.85, "k": 2.1, "gamma": 0.78}, {"loss": spread(2, 4.5, 30, 0, log=False)}),
    "accuracy": ({"a": 0.65, "k": 6.0, "L0": 0.8, "b": 0.25}, {"loss": spread(0.4, 1.4, 30, 0, log=False)}),
    "loss-to-loss": ({"K": 1.2, "kappa": 0.8, "E0": 1.5, "E1": 1.1}, {"loss": spread(1.7, 4, 30, 0, log=False)}),
    "annealing": (
        {"L0": 2.2, "A": 0.6, "alpha": 0.5, "C": 0.3},
        {"S1": spread(-1, 1, 60, 0), "S2": spread(0, 1, 60, 1, log=False)},
    ),
    "encoder-decoder": (
        {"amount": 700.0, "pe": 0.18, "pd": 0.31, "floor": 1.2},
        {"Ne": spread(6, 9, 40, 0), "Nd": spread(6, 9, 40, 1)},
    ),
    "performance": (
        {"w1": 8.0, "w2": 5.0, "w3": -2.0, "w4": 6.0, "b": -190.0},
        {
            "depth": spread(1, 2, 30, 0),
            "width": spread(2.5, 4, 30, 1),
            "ffn": spread(3, 4.5, 30, 2),
            "tokens": spread(11, 13, 30, 3),
        },
    ),
    "step-time": (
        {"fixed": 2e-3, "per_byte": 1e-10, "per_flop": 2e-12},
        {"bytes": spread(6, 9, 30, 0), "flops": spread(7, 11, 30, 1)},
    ),
}


def test_every_form_has_a_truth_here():
    assert set(TRUTHS) == set(FORMS)


@pytest.mark.parametrize("name", TRUTHS)
def test_the_truth_comes_back_without_noise(name):
    constants, columns = TRUTHS[name]
    law = fit(simulate(name, constants, columns, noise=0.0), name, bootstrap=0)
    assert law.parameters == pytest.approx(constants, rel=2e-3)
    assert law.loss < 1e-12
    assert law.agreeing >= 1


def test_the_replications_constants_come_back_within_their_intervals():
    law = fit(simulate("chinchilla", REPLICATION, design(), seed=3), bootstrap=150)
    inside = [low <= REPLICATION[name] <= high for name, (low, high) in law.intervals(0.98).items()]
    assert sum(inside) >= 4
    exponent = law.parameters["beta"] / (law.parameters["alpha"] + law.parameters["beta"])
    assert exponent == pytest.approx(0.3658 / (0.3478 + 0.3658), abs=0.03)


def test_intervals_shrink_with_the_root_of_the_runs():
    def width(n):
        widths = []
        for seed in range(4):
            law = fit(
                simulate("kaplan-size", *TRUTHS["kaplan-size"][:1], {"N": spread(5, 9, n, seed)}, seed=seed),
                "kaplan-size",
                bootstrap=100,
            )
            low, high = law.interval("alpha_N")
            widths.append(high - low)
        return sum(widths)

    assert width(60) / width(960) == pytest.approx(4, rel=0.4)


def test_a_run_gone_wrong_does_not_matter():
    runs = simulate("chinchilla", REPLICATION, design(), noise=0.002, seed=1)
    clean = fit(runs, bootstrap=0).parameters
    runs["loss"][17] *= 3
    assert fit(runs, bootstrap=0).parameters == pytest.approx(clean, rel=0.03)


def test_units_only_move_the_constants_that_carry_them():
    runs = simulate("chinchilla", REPLICATION, design(80), seed=2)
    law = fit(runs, bootstrap=0)
    other = fit(runs | {"N": [n / 1e6 for n in runs["N"]]}, bootstrap=0)
    assert other.parameters["alpha"] == pytest.approx(law.parameters["alpha"], rel=1e-3)
    assert other.parameters["A"] == pytest.approx(law.parameters["A"] / 1e6 ** law.parameters["alpha"], rel=2e-2)
    assert other.loss == pytest.approx(law.loss, rel=1e-6)


def test_fixed_constants_stay_and_the_rest_is_fitted():
    runs = simulate("chinchilla", REPLICATION, design(80), noise=0.0)
    law = fit(runs, fixed={"E": 1.8172, "beta": 0.3658}, bootstrap=10)
    assert law.parameters == pytest.approx(REPLICATION, rel=1e-3)
    assert law.interval("E") == (1.8172, 1.8172)
    assert law.standard_errors()["beta"] == 0
    whole = fit(runs, fixed=REPLICATION, bootstrap=0)
    assert whole.parameters == pytest.approx(REPLICATION)


def test_the_same_seed_gives_the_same_intervals_and_randomness_stays_outside():
    runs = simulate("kaplan-size", *TRUTHS["kaplan-size"], seed=1)
    before = torch.get_rng_state()
    first, second = (fit(runs, "kaplan-size", bootstrap=20, seed=5) for _ in range(2))
    assert torch.equal(first.draws, second.draws)
    assert not torch.equal(first.draws, fit(runs, "kaplan-size", bootstrap=20, seed=6).draws)
    assert torch.equal(before, torch.get_rng_state())


def test_resamples_draw_runs_or_groups():
    counts = resamples(torch.arange(7), 50, seed=0)
    assert counts.sum(dim=1).tolist() == [7.0] * 50
    assert counts.std() > 0.5
    grouped = resamples(torch.tensor([0, 0, 1, 1, 1, 2]), 50, seed=0)
    assert torch.equal(grouped[:, 0], grouped[:, 1])
    assert torch.equal(grouped[:, 2], grouped[:, 4])
    assert ((grouped[:, 0] + grouped[:, 2] + grouped[:, 5]) == 3).all()
    with pytest.raises(Error, match="at least 2"):
        fit({"N": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.0], "day": [1, 1, 1]}, "kaplan-size", groups="day")


def test_groups_widen_intervals_of_curves():
    rows = {"N": [], "loss": [], "curve": []}
    generator = torch.Generator().manual_seed(0)
    for curve, n in enumerate(spread(5, 9, 12, 0).tolist()):
        shared = 0.02 * torch.randn(1, generator=generator).item()
        for point in range(20):
            rows["N"].append(n)
            rows["loss"].append((8.8e13 / n) ** 0.076 * math.exp(shared + 1e-6 * point))
            rows["curve"].append(curve)
    alone = fit(rows, "kaplan-size", bootstrap=100).interval("alpha_N")
    together = fit(rows, "kaplan-size", bootstrap=100, groups="curve").interval("alpha_N")
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


def test_runs_of_a_group_are_left_out_together():
    runs = simulate("kaplan-size", TRUTHS["kaplan-size"][0], {"N": spread(5, 9, 12, 0)}, seed=4)
    law = fit(runs | {"day": ["x", "y", "z"] * 4}, "kaplan-size", groups="day", bootstrap=0)
    rest = {name: [value for i, value in enumerate(column) if i % 3 != 1] for name, column in runs.items()}
    without = fit(rest, "kaplan-size", bootstrap=0)
    for place in (1, 4, 7, 10):
        by_hand = without.predict(N=runs["N"][place]) / runs["loss"][place] - 1
        assert law.errors()[place].item() == pytest.approx(by_hand, abs=1e-6)
    assert any("left out and resampled together" in note for note in law.report().notes)


def test_simulate_adds_noise_of_the_size_that_is_asked_for():
    constants, columns = {"Nc": 8.8e13, "alpha_N": 0.076}, {"N": spread(5, 9, 4000, 0)}
    exact = torch.tensor(simulate("kaplan-size", constants, columns, noise=0)["loss"])
    noisy = torch.tensor(simulate("kaplan-size", constants, columns, noise=0.05, seed=1)["loss"])
    ratio = (noisy / exact).log()
    assert float(ratio.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(ratio.mean())) < 0.004
    by_seed = {"N": 10 ** torch.randn(4000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}
    made = torch.tensor(simulate("kaplan-size", constants, by_seed, noise=0.05, seed=5)["loss"])
    noise = (made / torch.tensor(simulate("kaplan-size", constants, by_seed, noise=0)["loss"])).log()
    together = torch.stack([by_seed["N"].log(), noise])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.06  # one seed for both ties nothing
    with pytest.raises(Error, match="N is missing"):
        simulate("kaplan-size", constants, {"M": [1.0]})


def test_given_predicts_without_runs():
    law = given("chinchilla", **REPLICATION)
    assert law.predict(N=70e9, D=1.4e12) == pytest.approx(1.8172 + 482.01 / 70e9**0.3478 + 2085.43 / 1.4e12**0.3658)
    with pytest.raises(Error, match="bootstrap"):
        law.predict(N=1.0, D=1.0, interval=True)


def test_compare_finds_the_law_that_made_the_runs():
    runs = simulate("chinchilla", REPLICATION, design(120), noise=0.004, seed=0)
    laws = ["kaplan-size", "kaplan-joint", "chinchilla"]
    for how in ("largest", "each"):
        found = compare(runs, laws, hold_out=how)
        assert found["best"] == "chinchilla"
        assert len(found.table) == 4
        assert found["law"][-1] in ("kaplan-size", "constant: the best fitted run")


def test_compare_holds_out_what_it_says():
    runs = {"N": [1.0, 2.0, 4.0, 8.0, 16.0], "loss": [5.0, 4.0, 3.2, 2.6, 9.0]}
    found = compare(runs, ["kaplan-size"], share=0.2)
    law = fit({name: column[:4] for name, column in runs.items()}, "kaplan-size", bootstrap=0)
    row = next(row for row in found.table if row["law"] == "kaplan-size")
    assert row["mean error"] == pytest.approx(abs(law.predict(N=16.0) / 9 - 1), rel=1e-6)
    constant = next(row for row in found.table if row["law"].startswith("constant"))
    assert constant["bias"] == pytest.approx(2.6 / 9 - 1)
    each = compare(runs, ["kaplan-size"], hold_out="each")
    constant = next(row for row in each.table if row["law"].startswith("constant"))
    off = [best / loss - 1 for best, loss in zip([2.6, 2.6, 2.6, 3.2, 2.6], runs["loss"], strict=True)]
    assert constant["bias"] == pytest.approx(sum(off) / 5)
    with pytest.raises(Error, match="no column 'dya'"):
        compare(runs, ["kaplan-size"], by="dya")
    by = compare(runs | {"day": [9.0, 1.0, 2.0, 3.0, 4.0]}, ["kaplan-size"], share=0.2, by="day")
    assert next(r for r in by.table if r["law"].startswith("constant"))["bias"] == pytest.approx(2.6 / 5 - 1)


def test_compare_measures_all_laws_in_one_unit_and_puts_those_that_cannot_tell_last():
    straight = Form("straight", lambda N, a, b: a + b * N.log(), ("N",), {"a": (0.0,), "b": (-1.0,)}, free=("a", "b"),
                    scale="linear")  # fmt: skip
    runs = simulate("kaplan-size", *TRUTHS["kaplan-size"], seed=2)
    for how in ("largest", "each"):
        found = {row["law"]: row for row in compare(runs, ["kaplan-size", straight], hold_out=how, share=0.3).table}
        order = sorted(range(20), key=lambda i: runs["N"][i])
        held = order[-6:] if how == "largest" else order
        law = fit({name: [column[i] for i in order[:-6]] for name, column in runs.items()}, straight, bootstrap=0)
        if how == "largest":
            by_hand = [law.predict(N=runs["N"][i]) / runs["loss"][i] - 1 for i in held]
        else:
            errors = fit(runs, straight, bootstrap=0).errors()
            by_hand = [float(errors[i]) / runs["loss"][i] for i in held]
        assert found["straight"]["bias"] == pytest.approx(sum(by_hand) / len(held), rel=1e-4, abs=1e-6)
    lost = Form("lost", lambda N, a: a * torch.where(N < 1e8, 1.0, torch.nan), ("N",), {"a": (1.0, 3.0)})
    table = compare({"N": [1e5, 1e6, 1e7, 1e9], "loss": [4.0, 3.0, 2.5, 2.0]}, [lost, "kaplan-size"]).table
    assert [row["law"] for row in table].index("lost") == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"law": "chinchila"}, "did you mean 'chinchilla'"),
        ({"fixed": {"F": 1.0}}, "no constant 'F'"),
        ({"delta": 0.0}, "delta must be above 0"),
        ({"bootstrap": 1}, "bootstrap is 0, or 2 and more"),
        ({"columns": {"N": "params"}}, "no column 'params'"),
        ({"target": "perplexity"}, "no column 'perplexity'"),
        ({"groups": "curve"}, "no column 'curve'"),
        ({"delta": math.inf}, "delta must be above 0 and finite"),
        ({"starts": {"A": [0.0]}}, "A cannot be or start from 0.0"),
        ({"fixed": {"E": math.nan}}, "E cannot be or start from nan"),
        ({"columns": {"tokens": "D"}}, "not of 'tokens'"),
        ({"fixed": {"E": 99.0}, "starts": {"A": [1e300], "alpha": [5.0]}}, None),
    ],
)
def test_refusals(options, says):
    runs = simulate("chinchilla", REPLICATION, design(20))
    if says is None:
        assert fit(runs, bootstrap=0, **options).loss > 0  # far off, but it can be computed
        return
    with pytest.raises(Error) as caught:
        fit(runs, **options)
    assert says in str(caught.value)


def test_more_refusals():
    with pytest.raises(Error, match="2 runs cannot tell the 5 constants"):
        fit({"N": [1.0, 2.0], "D": [1.0, 2.0], "loss": [1.0, 2.0]})
    with pytest.raises(Error, match="cannot be computed"):
        fit({"loss": [1.0, 2.0, 3.0, 4.0], "other": [1.0, 2.0, 3.0, 4.0]}, "loss-to-loss", fixed={"E0": 5.0})
    with pytest.raises(Error, match="hold_out"):
        compare({"N": [1.0]}, ["kaplan-size"], hold_out="some")
    with pytest.raises(Error, match="holds out"):
        compare({"N": [1.0, 2.0], "loss": [1.0, 2.0]}, ["kaplan-size"], share=0.9)
    assert known(FORMS["accuracy"]) is FORMS["accuracy"]


def test_low_precision_columns_are_read_as_they_are():
    runs = simulate("kaplan-size", *TRUTHS["kaplan-size"], noise=0.0)
    half = {name: torch.tensor(column, dtype=torch.bfloat16) for name, column in runs.items()}
    law = fit(half, "kaplan-size", bootstrap=0, duplicates=True)
    assert law.observed.dtype == torch.float64
    assert law.parameters["alpha_N"] == pytest.approx(0.076, rel=0.1)

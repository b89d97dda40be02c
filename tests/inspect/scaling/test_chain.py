"""Two laws in a row, and one loss from another."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.scaling import Chain, accuracy, fit_chain, given, shifted_power, simulate, translate

LOSS = {"E": 0.5, "A": 60.0, "B": 200.0, "alpha": 0.3, "beta": 0.33}
SCORE = {"a": 0.65, "k": 6.0, "L0": 0.9, "b": 0.25}


def ladder(n=40, noise=0.002, seed=0):
    generator = torch.Generator().manual_seed(seed)
    design = {name: 10 ** (6 + 3 * torch.rand(n, generator=generator, dtype=torch.float64)) for name in ("N", "D")}
    runs = simulate("chinchilla", LOSS, design, noise=noise, seed=seed)
    scored = simulate("accuracy", SCORE, {"loss": runs["loss"]}, noise=noise, seed=seed + 1)
    return runs | {"accuracy": scored["accuracy"]}


def test_a_larger_models_score_is_told():
    chain = fit_chain(ladder(), bootstrap=60)
    assert isinstance(chain, Chain)
    true = given("accuracy", **SCORE).predict(loss=given("chinchilla", **LOSS).predict(N=1e11, D=1e12))
    told = chain.predict(N=1e11, D=1e12, interval=True)
    assert told.value == pytest.approx(true, abs=0.05)
    assert abs(told.value - true) < abs(max(ladder()["accuracy"]) - true) / 3
    assert told.low < told.value < told.high
    losses = [chain.first.form.predict(row[None], {"N": torch.tensor([1e11]), "D": torch.tensor([1e12])}) for row in
              chain.first.draws]  # fmt: skip
    by_hand = [chain.second.form.predict(row[None], {"loss": loss[0]}).item() for row, loss in
               zip(chain.second.draws, losses, strict=True)]  # fmt: skip
    tails = torch.tensor([0.05, 0.95], dtype=torch.float64)
    assert [told.low, told.high] == pytest.approx(torch.tensor(by_hand).double().quantile(tails).tolist(), rel=1e-4)
    assert chain.predict(N=1e11, D=1e12) == told.value
    assert chain.predict(N=[1e9, 1e11], D=1e12).shape == (2,)


def test_the_chain_is_one_law_after_the_other():
    chain = fit_chain(ladder(), bootstrap=0)
    loss = chain.first.predict(N=1e10, D=1e11)
    by_hand = accuracy(torch.tensor(loss).double(), *(torch.tensor(v) for v in chain.second.parameters.values()))
    assert chain.predict(N=1e10, D=1e11) == pytest.approx(float(by_hand), rel=1e-6)


def test_errors_from_over_training_and_columns_of_other_names():
    runs = ladder()
    runs["task"] = runs.pop("loss")
    runs["error"] = simulate("downstream-error", {"eps": 0.9, "k": 0.9, "gamma": 1.1}, {"loss": runs["task"]})["error"]
    chain = fit_chain(runs, "over-training", "downstream-error", loss="task", bootstrap=0)
    assert chain.second.form.name == "downstream-error"
    assert 0 < chain.predict(N=1e10, D=1e11) < 0.9
    named = fit_chain(runs | {"wrong": runs.pop("error")}, "over-training", "downstream-error", loss="task",
                      score="wrong", bootstrap=0)  # fmt: skip
    assert named.predict(N=1e10, D=1e11) == chain.predict(N=1e10, D=1e11)


def test_the_second_law_may_have_its_own_table():
    runs = ladder()
    link = {"loss": runs["loss"][:30], "accuracy": runs["accuracy"][:30]}
    chain = fit_chain(runs, link=link, bootstrap=0)
    assert len(chain.first.observed) == 40
    assert len(chain.second.observed) == 30


def test_the_report_says_when_a_score_cannot_be_trusted():
    chain = fit_chain(ladder(), bootstrap=20)
    report = chain.report()
    assert report["scatter about the second law"] < 0.01
    assert not any("do not trust" in note for note in report.notes)
    assert {row["law"] for row in report.table} == {"chinchilla", "accuracy"}
    noisy = ladder()
    noisy["accuracy"] = (0.5 + 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(0))).tolist()
    assert any("do not trust" in note for note in fit_chain(noisy, bootstrap=0).report().notes)


def test_a_chain_ends_in_a_law_of_a_loss():
    with pytest.raises(Error, match="one column loss"):
        fit_chain(ladder(), "chinchilla", "kaplan-size", score="accuracy", bootstrap=0)
    runs = ladder()
    del runs["accuracy"]
    with pytest.raises(Error, match="no column 'accuracy'"):
        fit_chain(runs, bootstrap=0)


def test_one_loss_from_another_beyond_the_largest_run():
    known = torch.linspace(3.5, 2.2, 20, dtype=torch.float64)
    constants = [torch.tensor(v, dtype=torch.float64) for v in (1.2, 0.8, 1.6, 1.1)]
    wanted = shifted_power(known, *constants)
    law = translate(known, wanted, floor=1.6, wanted_floor=1.1, bootstrap=20)
    assert law.parameters == pytest.approx({"K": 1.2, "kappa": 0.8, "E0": 1.6, "E1": 1.1}, rel=1e-4)
    assert law.predict(loss=1.8) == pytest.approx(1.2 * 0.2**0.8 + 1.1, rel=1e-4)
    free = translate(known, wanted, bootstrap=0)
    assert free.parameters["kappa"] == pytest.approx(0.8, rel=0.01)


def test_translate_refuses():
    twins = {"known": [3.0, 3.0, 2.5, 2.2, 2.0, 1.8], "wanted": [2.0, 2.0, 1.8, 1.7, 1.6, 1.5], "bootstrap": 0}
    with pytest.raises(Error, match="stands twice"):
        translate(**twins)
    assert translate(**twins, duplicates=True, floor=1.0).parameters["E0"] == 1.0
    with pytest.raises(Error, match="cannot be paired"):
        translate([1.0, 2.0], [1.0])
    with pytest.raises(Error, match="floor must lie below"):
        translate([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], floor=2.5)

"""Part of the way from a model to its fine-tune, and the search for how far."""

from __future__ import annotations

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._interpolate import Trial, Update, backward_compatible, held, importance_of, init, step, wise_ft
from weightsmith.weights import Weights


def at(*places: float) -> list[Weights]:
    return [Weights.of({"w": torch.tensor([place])}) for place in places]


def quality_up_to(goal: float):
    """Grows with the weight up to a goal, and is flat from there on."""
    return lambda weights: min(float(weights["w"]), goal)


@pytest.mark.parametrize("amount", [0.0, 0.25, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("k", [1, 3])
def test_the_line(k: int, amount: float):
    base, *models = torch.randn(k + 1, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(4, 5)
    for place in range(20):
        new = sum(float(model.flatten()[place]) for model in models) / k
        expected.view(-1)[place] = (1 - amount) * float(base.flatten()[place]) + amount * new
    torch.testing.assert_close(wise_ft(torch.stack(models), base, amount=amount), expected, rtol=1e-5, atol=1e-6)


def test_the_ends_are_exact():
    base, model = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wise_ft(model.unsqueeze(0), base, amount=0), base)
    assert torch.equal(wise_ft(model.unsqueeze(0), base, amount=1), model)


def test_the_amount_may_depend_on_the_tensor():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    found = ws.merge.wise_ft([{"a": torch.ones(2), "b": torch.ones(2)}], base, amount={"a": 0.25, "*": 1.0})
    assert found["a"].tolist() == [0.25, 0.25]
    assert found["b"].tolist() == [1, 1]


def test_refusals_of_wise_ft():
    with pytest.raises(Error, match="wise_ft: amount must be a finite number, got nan"):
        ws.merge.wise_ft([{"w": torch.ones(2)}], {"w": torch.ones(2)}, amount=float("nan"))
    with pytest.raises(Error, match="wise_ft needs base="):
        ws.merge.wise_ft([{"w": torch.ones(2)}])
    with pytest.raises(Error, match="wise_ft needs at least 1 model, got 0"):
        wise_ft(torch.ones(0, 2), torch.ones(2))


@pytest.mark.parametrize(
    ("goal", "amount"), [(8.0, 0.0), (7.0, 0.0), (6.0, 0.25), (5.0, 0.25), (2.0, 0.75), (0.0, 1.0)]
)
def test_the_largest_amount_on_the_grid_that_loses_nothing(goal: float, amount: float):
    (new, old), told = at(8.0, 0.0), []
    found = backward_compatible([new], old, quality_up_to(goal), steps=4, on_step=told.append)
    assert found.lineage.options["amount"] == amount
    assert found.lineage.options["least"] == min(8.0, goal)
    assert found["w"].item() == pytest.approx(8 * (1 - amount))
    assert [trial.amount for trial in told] == [a for a in (1.0, 0.75, 0.5, 0.25) if a >= amount]
    assert [trial.accepted for trial in told[:-1]] == [False] * (len(told) - 1)
    assert told[-1].accepted == (amount > 0)


def test_where_quality_is_not_monotone_the_largest_amount_wins():
    new, old = at(1.0, 0.0)
    good = {1.0, 0.25}
    found = backward_compatible([new], old, lambda w: float(float(w["w"]) in good), steps=4)
    assert found.lineage.options["amount"] == 0.75


def test_a_tolerance_lets_it_go_further():
    new, old = at(8.0, 0.0)
    exact = backward_compatible([new], old, quality_up_to(6.0), steps=8)
    further = backward_compatible([new], old, quality_up_to(6.0), steps=8, tolerance=1.0)
    assert (exact.lineage.options["amount"], further.lineage.options["amount"]) == (0.25, 0.375)


def test_several_new_models_are_averaged():
    *new, old = at(6.0, 10.0, 0.0)
    assert backward_compatible(new, old, quality_up_to(100.0))["w"].item() == 8
    assert backward_compatible(new, old, quality_up_to(4.0), steps=4)["w"].item() == 4


def test_an_update_that_cannot_be_judged_is_left_as_it_is():
    """NaN is no worse and no better than anything: nothing is taken on its word."""
    new, old = at(8.0, 0.0)
    found = backward_compatible([new], old, lambda w: float("nan"), steps=2)
    assert found.lineage.options["amount"] == 0
    assert found["w"].item() == 8


def test_steps_do_not_change_what_went_in():
    (new, old), judge = at(8.0, 0.0), quality_up_to(5.0)
    update = init([new], old, judge, tolerance=0.5)
    assert update == Update(new, old, 4.5)
    mixed, trial = step(update, 0.25, judge)
    assert trial == Trial(0.25, 5.0, True)
    assert mixed["w"].item() == 6
    assert step(update, 0.5, judge)[1] == Trial(0.5, 4.0, False)
    assert new["w"].item() == 8


# With Fisher information


def told(*information: float, name: str = "w") -> Weights:
    return Weights.of({name: torch.tensor(information)})


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.9, 1.0])
def test_the_formula_with_importance(amount: float):
    old, new = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    f = torch.rand(12, generator=torch.Generator().manual_seed(1)) * 3
    f[4] = 0
    expected = []
    for o, n, weight in zip(old.tolist(), new.tolist(), f.tolist(), strict=True):
        under = amount * weight + 1 - amount
        expected.append((amount * weight * o + (1 - amount) * n) / under if under else o)
    torch.testing.assert_close(held(new, old, f, amount=amount), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_only_the_ratio_of_information_counts():
    """Divided by its mean: 1 and 3 are a half and three halves, however large."""
    new, old = {"w": torch.tensor([4.0, 4.0])}, {"w": torch.zeros(2)}
    by_hand = [(0.25 * 4) / (0.75 * f + 0.25) for f in (0.5, 1.5)]
    for size in (1e-8, 1.0, 1e6):
        seen: list[list[float]] = []

        def score(weights: Weights, seen: list[list[float]] = seen) -> float:
            seen.append(weights["w"].tolist())
            return -float(len(seen) == 2)  # the old model alone is worse

        found = backward_compatible([new], old, score, steps=4, stats=told(size, 3 * size))
        assert seen[:2] == [[4, 4], [0, 0]]
        assert seen[2] == pytest.approx(by_hand, rel=1e-5)
        assert found["w"].tolist() == pytest.approx(by_hand, rel=1e-5)
        assert found.lineage.options["amount"] == 0.75


def test_equal_information_is_the_straight_line():
    new, old = at(8.0, 0.0)
    plain = backward_compatible([new], old, quality_up_to(5.0), steps=8)
    same = backward_compatible([new], old, quality_up_to(5.0), steps=8, stats=told(0.3))
    assert same["w"].item() == pytest.approx(plain["w"].item())
    assert same.lineage.options == plain.lineage.options


def test_a_weight_that_does_not_matter_stays_new_until_all_go_back():
    new, old = {"w": torch.tensor([4.0, 4.0])}, {"w": torch.zeros(2)}
    update = init(
        [Weights.of(new)], Weights.of(old), lambda w: 0.0, 0.0, importance_of(told(0.0, 2.0), Weights.of(old))
    )
    for amount in (0.25, 0.5, 0.99):
        mixed, _ = step(update, amount, lambda w: 0.0)
        assert mixed["w"][0].item() == 4
        assert mixed["w"][1].item() == pytest.approx(4 * (1 - amount) / (1 + amount))
    assert step(update, 1.0, lambda w: 0.0)[0]["w"].tolist() == [0, 0]


def test_the_mean_is_over_the_whole_model_and_what_is_not_told_of_goes_along_the_line():
    new = {"a": torch.ones(3), "b": torch.ones(1), "buffer": torch.ones(2), "n": torch.tensor(7)}
    old = {"a": torch.zeros(3), "b": torch.zeros(1), "buffer": torch.zeros(2), "n": torch.tensor(3)}
    stats = Weights.of({"a": torch.full((3,), 1.0), "b": torch.tensor([5.0])})  # mean 2
    update = init([Weights.of(new)], Weights.of(old), lambda w: 0.0, 0.0, importance_of(stats, Weights.of(old)))
    mixed, _ = step(update, 0.5, lambda w: 0.0)
    assert mixed["a"].tolist() == pytest.approx([1 / 1.5] * 3)
    assert mixed["b"].tolist() == pytest.approx([1 / 3.5])
    assert mixed["buffer"].tolist() == [0.5, 0.5]
    assert mixed["n"].item() == 3


def test_information_of_a_module_and_a_soup_of_new_ones(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        old, *new = (torch.nn.Linear(3, 2) for _ in range(3))
    stats = ws.stats.fisher(old, [torch.randn(16, 3, generator=torch.Generator().manual_seed(0))])
    stats.save(tmp_path / "fisher.safetensors")
    found = backward_compatible(new, old, lambda w: 0.0, steps=2, stats=tmp_path / "fisher.safetensors")
    assert torch.equal(found["weight"], old.weight.detach())  # nothing is lost: all the way back
    soup = ws.merge.mean(new)
    found = backward_compatible(new, old, lambda w: -float((w["weight"] - soup["weight"]).norm()), stats=stats)
    assert found.lineage.options["amount"] == 0


def test_bfloat16_is_computed_in_float32():
    new, old = torch.tensor([1.0, 3.0]).bfloat16(), torch.tensor([0.5, 1.0]).bfloat16()
    made = {"w": new}, {"w": old}
    stats = told(1.0, 2.0)
    update = init(
        [Weights.of(made[0])], Weights.of(made[1]), lambda w: 0.0, 0.0, importance_of(stats, Weights.of(made[1]))
    )
    mixed = step(update, 0.3, lambda w: 0.0)[0]
    assert mixed.spec("w").dtype == torch.bfloat16
    expected = held(new.float(), old.float(), torch.tensor([2 / 3, 4 / 3]), amount=0.3)
    assert torch.equal(mixed["w"], expected.bfloat16())


def test_information_that_cannot_serve_is_refused_before_anything_is_asked():
    asked: list[Weights] = []
    for stats, message in (
        (told(-1.0), "Fisher information must be finite and not negative; w is not"),
        (told(float("nan")), "must be finite and not negative; w is not"),
        (told(0.0), "the Fisher information is zero everywhere"),
        (told(1.0, name="v"), "stats say nothing of any weight; they have v"),
        (told(1.0, 2.0), r"stats\.fisher of w is \[2\], but its weight \[1\]"),
    ):
        with pytest.raises(Error, match=message):
            backward_compatible(at(1.0), at(1.0)[0], asked.append, stats=stats)  # type: ignore[arg-type]
    assert asked == []


def test_files_are_opened(tmp_path):
    for name, model in zip(("new", "old"), at(8.0, 0.0), strict=True):
        model.save(tmp_path / f"{name}.safetensors")
    found = backward_compatible([tmp_path / "new.safetensors"], tmp_path / "old.safetensors", quality_up_to(4), steps=4)
    found.save(tmp_path / "update.safetensors")
    written = ws.open(tmp_path / "update.safetensors")
    assert written["w"].item() == 4
    assert "merge.backward_compatible(amount=0.5" in str(written.lineage)


def test_what_is_wrong_is_refused_before_anything_is_asked():
    asked = []
    with pytest.raises(Error, match="backward_compatible: model 1 and the base differ in shape: w"):
        backward_compatible([{"w": torch.ones(2)}], {"w": torch.ones(3)}, asked.append)  # type: ignore[arg-type]
    with pytest.raises(Error, match="backward_compatible needs at least 1 model, got 0"):
        backward_compatible([], {"w": torch.ones(3)}, asked.append)  # type: ignore[arg-type]
    with pytest.raises(Error, match="backward_compatible needs at least 1 step, got 0"):
        backward_compatible(at(1.0), at(1.0)[0], asked.append, steps=0)  # type: ignore[arg-type]
    with pytest.raises(Error, match="tolerance must be at least 0, got -1"):
        backward_compatible(at(1.0), at(1.0)[0], asked.append, tolerance=-1)  # type: ignore[arg-type]
    assert asked == []

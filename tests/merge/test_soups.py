"""The greedy soup: who is taken, in which order, and what is asked for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._soups import Soup, Tasting, greedy_soup, init, step
from weightsmith.weights import Weights


def at(*places: float) -> list[Weights]:
    return [Weights.of({"w": torch.tensor([place])}) for place in places]


class Judge:
    """Nearer to the goal is better; remembers what it was shown."""

    def __init__(self, goal: float = 0.0):
        self.goal = goal
        self.seen: list[float] = []

    def __call__(self, weights: Weights) -> float:
        self.seen.append(float(weights["w"]))
        return -abs(self.seen[-1] - self.goal)


def by_hand(places: list[float], goal: float) -> tuple[list[int], float]:
    """Recipe 1, written from its text. The means are ours, so that what rounding makes unequal is so here as well."""
    order = sorted(range(len(places)), key=lambda i: abs(places[i] - goal))
    members: list[int] = []
    best = float("inf")
    for i in order:
        tried = [*members, i]
        distance = abs(float(ws.merge.mean(torch.tensor([[places[j]] for j in tried]))) - goal)
        if not members or distance <= best:
            members, best = tried, distance
    return members, best


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=6, unique=True), st.sampled_from([0.0, 0.3, 2.0]))
def test_the_recipe(places: list[int], goal: float):
    judge = Judge(goal)
    told: list[Tasting] = []
    soup = greedy_soup(at(*map(float, places)), judge, told.append)
    members, distance = by_hand([float(p) for p in places], goal)
    assert soup.lineage.options["members"] == members
    assert abs(float(soup["w"]) - goal) == pytest.approx(distance, abs=1e-5)
    assert abs(float(soup["w"]) - goal) <= min(abs(p - goal) for p in places) + 1e-5  # never worse than the best
    assert len(judge.seen) == 2 * len(places) - 1
    assert len(told) == len(places) - 1
    assert [t.candidate for t in told if t.taken] == members[1:]


def test_members_and_what_is_told_of_each_step():
    told: list[Tasting] = []
    soup = greedy_soup(at(1.0, -2.0, 4.0), Judge(), told.append)
    assert told == [Tasting(1, -0.5, True), Tasting(2, -1.0, False)]
    assert soup["w"].item() == -0.5
    assert soup.lineage.method == "merge.greedy_soup"
    assert soup.lineage.options == {"members": [0, 1], "score": -0.5}


def test_equals_are_taken_in_the_order_given():
    soup, others = init(at(2.0, -1.0, 1.0, -1.0), Judge())
    assert soup.members == (1,)
    assert others == [2, 3, 0]


def test_one_that_changes_nothing_is_taken():
    """No worse, not better: the paper's rule."""
    soup = greedy_soup(at(1.0, 3.0), lambda weights: 1.0)
    assert soup["w"].item() == 2


def test_one_model_is_its_own_soup_and_is_asked_for_once():
    judge = Judge()
    assert greedy_soup(at(3.0), judge)["w"].item() == 3
    assert judge.seen == [3]


def test_a_diverged_model_comes_last_and_is_not_taken():
    places = at(float("nan"), 2.0, 1.0)
    soup, others = init(places, Judge())
    assert soup.members == (2,)
    assert others == [1, 0]
    found = greedy_soup(places, Judge())
    assert found["w"].item() == 1


def test_steps_do_not_change_what_went_in():
    models, judge = at(1.0, -1.0), Judge()
    soup, _ = init(models, judge)
    after, tasting = step(soup, 1, models, judge)
    assert soup == Soup((0,), -1.0, soup.weights)
    assert tasting == Tasting(1, 0.0, True)
    assert after.members == (0, 1)
    assert after.weights["w"].item() == 0
    assert float(models[0]["w"]) == 1
    spoilt, tasting = step(after, 0, [*at(5.0), models[1]], judge)
    assert not tasting.taken
    assert spoilt is after


def test_scores_may_be_tensors():
    assert greedy_soup(at(1.0, -2.0), lambda w: -w["w"].abs())["w"].item() == -0.5  # type: ignore[arg-type, return-value]


def test_files_are_opened(tmp_path):
    for number, model in enumerate(at(1.0, -1.0)):
        model.save(tmp_path / f"{number}.safetensors")
    soup = greedy_soup([tmp_path / "0.safetensors", str(tmp_path / "1.safetensors")], Judge())
    soup.save(tmp_path / "soup.safetensors")
    written = ws.open(tmp_path / "soup.safetensors")
    assert written["w"].item() == 0
    assert "merge.greedy_soup(members=[0, 1]" in str(written.lineage)


def test_unlike_models_are_refused_before_anything_is_asked():
    judge = Judge()
    with pytest.raises(Error, match="greedy_soup: model 1 and model 2 differ in shape: w"):
        greedy_soup([{"w": torch.ones(2)}, {"w": torch.ones(3)}], judge)
    with pytest.raises(Error, match="greedy_soup needs at least 1 model, got 0"):
        greedy_soup([], judge)
    assert judge.seen == []

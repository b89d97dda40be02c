"""Combinations found by evolution: where the search starts, how it goes on, and what it promises."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightsmith as ws
from weightsmith.average import lcsc
from weightsmith.average._lcsc import DECAYS, Population, Trial, child, init, starts, step
from weightsmith.errors import Error
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


def exponential(places: list[float], decay: float) -> float:
    """An exponential average along the run, from its text."""
    mean = places[0]
    for place in places[1:]:
        mean = decay * mean + (1 - decay) * place
    return mean


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_what_a_search_starts_with(count: int):
    found = starts(count)
    assert all(math.fsum(coefficients) == pytest.approx(1) for coefficients in found)
    assert all(len(coefficients) == count for coefficients in found)
    assert found[0] == (*[0.0] * (count - 1), 1.0)  # the last
    assert len(found) == (1 if count == 1 else count + 1 + len(DECAYS) - (count == 2))  # half is the mean of two
    places = torch.randn(count, generator=torch.Generator().manual_seed(0)).double()
    values = [float(torch.tensor(c, dtype=torch.float64) @ places) for c in found]
    wanted = [*places.tolist(), float(places.mean()), *(exponential(places.tolist(), decay) for decay in DECAYS)]
    for value in wanted:
        assert min(abs(value - one) for one in values) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=6), st.sampled_from([0.0, 0.3, 9.0]), st.integers(0, 99))
def test_never_worse_than_what_needs_no_search(places: list[int], goal: float, seed: int):
    judge, run = Judge(goal), [float(place) for place in places]
    best = lcsc(at(*run), judge, budget=30, seed=seed)
    others = [*run, sum(run) / len(run), *(exponential(run, decay) for decay in DECAYS)]
    assert abs(float(best["w"]) - goal) <= min(abs(other - goal) for other in others) + 1e-5
    assert best.lineage.options["score"] == max(-abs(seen - goal) for seen in judge.seen)
    assert len(judge.seen) == (30 if len(run) > 1 else 1)


def test_the_goal_may_lie_outside_of_all_averages():
    best = lcsc(at(5.0, 3.0, 2.0), Judge(0.0), budget=200)
    assert abs(float(best["w"])) < 0.05
    assert min(best.lineage.options["coefficients"]) < 0


def test_many_directions_at_once():
    """A quadratic valley whose bottom is a known combination: the search gets most of the way."""
    generator = torch.Generator().manual_seed(0)
    run = torch.randn(6, 40, generator=generator)
    wanted = torch.tensor([-0.3, 0.1, -0.2, 0.4, 0.3, 0.7])
    goal = wanted @ run
    best = lcsc([{"w": moment} for moment in run], lambda w: -float((w["w"] - goal).norm()), budget=600, seed=1)
    start = min(float((torch.tensor(c) @ run - goal).norm()) for c in starts(6))
    assert -best.lineage.options["score"] < 0.25 * start
    assert torch.allclose(torch.tensor(best.lineage.options["coefficients"]), wanted, atol=0.25)


def test_the_coefficients_are_those_of_the_result():
    run = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    best = lcsc([{"w": moment} for moment in run], lambda w: float(w["w"].sum()), budget=40)
    options = best.lineage.options
    assert best.lineage.method == "average.lcsc"
    assert (options["evaluations"], options["seed"]) == (40, 0)
    assert math.fsum(options["coefficients"]) == pytest.approx(1)
    torch.testing.assert_close(best["w"], torch.tensor(options["coefficients"]) @ run)
    assert options["score"] == float(best["w"].sum())


def test_what_is_told_of_each_step():
    told: list[Trial] = []
    judge = Judge(0.5)
    lcsc(at(4.0, 2.0, 1.0), judge, budget=20, on_step=told.append)
    assert [trial.evaluation for trial in told] == list(range(9, 21))
    for trial in told:
        assert trial.score == -abs(judge.seen[trial.evaluation - 1] - 0.5)
        assert trial.best == max(-abs(seen - 0.5) for seen in judge.seen[: trial.evaluation])
        assert judge.seen[trial.evaluation - 1] == pytest.approx(
            sum(c * place for c, place in zip(trial.coefficients, (4.0, 2.0, 1.0), strict=True)), abs=1e-5
        )


def test_a_seed_is_a_search():
    first, same, other = (lcsc(at(4.0, 2.0, 1.0), Judge(), budget=20, seed=seed) for seed in (3, 3, 4))
    assert first.lineage.options == same.lineage.options
    assert first.lineage.options["coefficients"] != other.lineage.options["coefficients"]
    state = torch.random.get_rng_state()
    lcsc(at(4.0, 2.0), Judge(), budget=12)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_steps_do_not_change_what_went_in():
    def score(coefficients: tuple[float, ...]) -> float:
        return -abs(coefficients[0] - 0.3)

    before = init(3, score)
    copy = Population(before.members, before.evaluations)
    after, trial = step(before, score, 5, 0.1, 0)
    assert before == copy
    assert (after.evaluations, len(after.members)) == (before.evaluations + 1, 5)
    assert [found for _, found in after.members] == sorted((found for _, found in after.members), reverse=True)
    assert step(before, score, 5, 0.1, 0) == (after, trial)
    assert step(before, score, 5, 0.1, 1) != (after, trial)


def test_a_child_lies_between_its_parents_and_then_moves():
    parents = [(0.0, 0.0, 1.0), (1.0, 2.0, -2.0)]
    children = torch.tensor([child(parents, 1e-12, torch.Generator().manual_seed(seed)) for seed in range(300)])
    assert torch.allclose(children.sum(1), torch.ones(300))
    assert torch.allclose(children[:, 1], 2 * children[:, 0], atol=1e-6)
    assert ((children[:, 0] > -1e-6) & (children[:, 0] < 1 + 1e-6)).all()
    assert (children[:, 0] < 1e-6).float().mean() > 0.5  # both parents are the better one
    assert ((children[:, 0] > 0.1) & (children[:, 0] < 0.9)).float().mean() > 0.2
    alone = torch.tensor([child(parents[:1], 0.2, torch.Generator().manual_seed(seed)) for seed in range(2000)])
    torch.testing.assert_close(alone[:, :2].std(0), torch.tensor([0.2, 0.2]), rtol=0.1, atol=0)
    torch.testing.assert_close(alone[:, :2].mean(0), torch.zeros(2), rtol=0, atol=0.02)


@pytest.mark.parametrize("diverged", [0, 1, 2, 3])
def test_a_diverged_checkpoint_is_survived(diverged: int):
    places = [4.0, 3.0, 2.0, 1.0]
    places[diverged] = float("nan")
    judge = Judge()
    best = lcsc(at(*places), judge, budget=60)
    scores = [-abs(seen) for seen in judge.seen if not math.isnan(seen)]
    assert best.lineage.options["score"] == max(scores)


def test_a_score_of_nan_is_the_worst():
    scores = iter([float("nan"), 1.0, float("nan"), 3.0, 2.0, float("nan"), 0.0])
    members = init(2, lambda coefficients: next(scores)).members
    assert [score for _, score in members[:3]] == [3, 2, 1]
    assert all(math.isnan(score) for _, score in members[3:])


def test_equals_keep_the_last():
    best = lcsc(at(1.0, 2.0, 3.0), lambda weights: 0.5, budget=30)
    assert best.lineage.options["coefficients"] == [0, 0, 1]


def test_what_is_refused_before_anything_is_asked(tmp_path: Path):
    judge = Judge()
    for options, message in (
        ({"budget": 7}, "lcsc needs budget= of at least 8 for 3 checkpoints, got 7"),
        ({"population": 1}, "population= of at least 2"),
        ({"spread": 0.0}, "spread above 0, got 0"),
        ({"spread": float("nan")}, "spread above 0, got nan"),
    ):
        with pytest.raises(Error, match=message):
            lcsc(at(1.0, 2.0, 3.0), judge, **options)
    with pytest.raises(Error, match="lcsc: model 1 and model 2"):
        lcsc([{"w": torch.ones(2)}, {"w": torch.ones(3)}], judge)
    with pytest.raises(Error, match="lcsc needs at least 1 checkpoint"):
        lcsc([], judge)
    assert judge.seen == []


def test_an_evaluation_that_says_nothing():
    with pytest.raises(Error, match="the best of 20 combinations scored nan; is evaluate right"):
        lcsc(at(1.0, 2.0, 3.0), lambda weights: float("nan"), budget=20)


def test_files(tmp_path: Path):
    for number, one in enumerate(at(4.0, 2.0, 1.0)):
        one.save(tmp_path / f"{9 + number}.safetensors")
    best = lcsc(sorted(tmp_path.iterdir()), Judge(), budget=40)
    best.save(tmp_path / "best.safetensors")
    assert torch.equal(ws.open(tmp_path / "best.safetensors")["w"], best["w"])
    assert "average.lcsc(coefficients=[" in str(ws.open(tmp_path / "best.safetensors").lineage)
    assert [step.options["path"][-14:] for step in _opened(best)] == [
        "/9.safetensors",
        "10.safetensors",
        "11.safetensors",
    ]


def _opened(weights: Weights) -> list:
    """The files of a combination's lineage, as it names them."""
    found, todo = [], [weights.lineage]
    while todo:
        made = todo.pop(0)
        found += [made] if made.method == "open" else []
        todo = [*made.inputs, *todo]
    return found

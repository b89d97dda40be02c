"""Rules of social choice on known profiles, each against a plain loop, and weights that make a winner."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.ranking import condorcet_winner, vote, winning_weights
from weightsmith.inspect.ranking._votes import RULES


def profile(*ballots: tuple[int, str]) -> dict[str, list[float]]:
    """Tasks that order systems as on so many ballots, the best first."""
    names = sorted(ballots[0][1])
    columns = [[-ballot.index(name) for name in names] for count, ballot in ballots for _ in range(count)]
    return {name: [float(column[i]) for column in columns] for i, name in enumerate(names)}


# Tennessee's capital: Memphis, Nashville, Chattanooga, Knoxville.
CAPITAL = profile((42, "MNCK"), (26, "NCKM"), (15, "CKNM"), (17, "KCNM"))


def points(scores, rule: str, **options) -> dict[str, float]:
    found = vote(scores, rule, samples=0, **options)
    return dict(zip(found["system"], found["points"], strict=True))


def test_the_textbook_profile():
    assert condorcet_winner(CAPITAL) == "N"
    assert points(CAPITAL, "plurality") == {"M": 42, "N": 26, "K": 17, "C": 15}
    assert points(CAPITAL, "borda") == {"N": 194, "C": 173, "M": 126, "K": 107}
    assert points(CAPITAL, "copeland") == {"N": 3, "C": 1, "K": -1, "M": -3}
    assert points(CAPITAL, "minimax") == {"N": 58 - 42, "C": -36, "K": -66, "M": -16}
    assert points(CAPITAL, "dowdall")["M"] == pytest.approx(42 + 58 / 4)
    assert next(iter(points(CAPITAL, "baldwin"))) == "N"
    assert points(CAPITAL, "threshold") == {"N": 3, "C": 2, "K": 1, "M": 0}  # last places: 0, 0, 42, 58


def test_baldwin_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(5, 11, generator=generator)
    left, out = list(range(5)), []
    while left:
        rated = {i: sum(int(scores[i, t] > scores[j, t]) for j in left for t in range(11)) for i in left}
        low = min(rated.values())
        gone = [i for i in left if rated[i] == low]
        out.append(gone)
        left = [i for i in left if i not in gone]
    found = points(scores, "baldwin")
    ranked = sorted(found, key=lambda name: found[name])
    assert ranked == [str(i) for gone in out for i in gone]


def test_ties_share_places():
    scores = {"a": [1.0, 1.0], "b": [1.0, 0.0], "c": [0.0, 0.0]}
    assert points(scores, "plurality") == pytest.approx({"a": 1.5, "b": 0.5, "c": 0})
    assert points(scores, "dowdall") == pytest.approx({"a": 0.75 + 1, "b": 0.75 + 5 / 12, "c": 1 / 3 + 5 / 12})
    assert points(scores, "borda") == pytest.approx({"a": 1.5 + 2, "b": 1.5 + 0.5, "c": 0.5})


def test_of_shared_places_the_worst_counts_for_threshold():
    # Three share the last place on the first task, one has it on the second: the place before it decides.
    scores = {"a": [1.0, 0.0], "b": [0.0, 3.0], "c": [0.0, 2.0], "d": [0.0, 1.0]}
    assert points(scores, "threshold") == {"a": 2, "b": 2, "c": 1, "d": 0}


def test_there_need_not_be_a_condorcet_winner():
    assert condorcet_winner(profile((1, "abc"), (1, "bca"), (1, "cab"))) is None
    assert condorcet_winner({"a": [1.0], "b": [1.0]}) is None
    assert condorcet_winner(profile((1, "ab"), (2, "ba")), weights=[5, 1, 1]) == "a"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean"])
def test_laws(rule: str):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 9, generator=generator).double()
    before = points(scores, rule)
    rescaled = scores.clone()
    rescaled[:, 2] = (rescaled[:, 2] * 3).exp()
    assert points(rescaled, rule) == before
    order = torch.randperm(5, generator=generator)
    mixed = points(scores[order], rule, names=[str(int(i)) for i in order])
    assert mixed == pytest.approx(before)
    best = torch.cat([scores, torch.full((1, 9), 9.0)])
    assert vote(best, rule, samples=0)["system"][0] == "5"  # who wins every task wins
    repeated = points(scores.repeat(1, 2), rule)
    assert sorted(repeated, key=repeated.get) == sorted(before, key=before.get)
    assert points(scores, rule, weights=[2.0] * 9) == pytest.approx(repeated)


@pytest.mark.parametrize("rule", ["plurality", "borda", "dowdall", "copeland", "minimax", "baldwin"])
def test_missing_scores(rule: str):
    scores = torch.tensor([[3.0, 3, math.nan, 3], [2, 2, 2, math.nan], [1, 1, 1, 1]])
    found = vote(scores, rule, samples=50)
    assert found["system"] == ["0", "1", "2"]
    assert "2 scores are missing" in str(found)
    for refusing in ("mean", "threshold"):
        with pytest.raises(Error, match="missing"):
            vote(scores, refusing)


def test_resamples_are_weights_of_tasks():
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    for rule in RULES:
        found = vote(scores, rule, samples=40)
        assert all(row["rank low"] <= row["rank"] <= row["rank high"] for row in found.table)
        assert all(row["low"] <= row["points"] <= row["high"] for row in found.table if rule in ("mean", "borda"))


def test_winning_weights_win():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(6):
        scores = torch.randn(4, 5, generator=generator).double()
        for rule, system in itertools.product(("plurality", "borda", "dowdall", "mean", "condorcet"), range(4)):
            found = winning_weights(scores, system, rule)
            seen.add(found["wins"])
            assert sum(found["weight"]) == pytest.approx(1)
            if not found["wins"]:
                # No vertex and no random weights do either.
                for row in [*torch.eye(5).tolist(), *torch.rand(30, 5, generator=generator).tolist()]:
                    if rule != "condorcet":
                        others = points(scores, rule, weights=row)
                        assert others[str(system)] <= max(v for k, v in others.items() if k != str(system)) + 1e-9
                continue
            if rule == "condorcet":
                assert condorcet_winner(scores, weights=found["weight"]) == str(system)
                continue
            reached = points(scores, rule, weights=found["weight"])
            ahead = reached[str(system)] - max(v for k, v in reached.items() if k != str(system))
            assert ahead == pytest.approx(found["margin"], abs=1e-6)
            near = points(scores, rule, weights=[max(w, 0.0) for w in found["nearest"]])
            assert near[str(system)] >= max(near.values()) - 1e-6
            assert found["change"] == pytest.approx(sum(abs(w - 0.2) for w in found["nearest"]) / 2, abs=1e-6)
            equal = points(scores, rule)
            leads = equal[str(system)] >= max(equal.values()) - 1e-9
            assert (found["change"] < 1e-6) == leads
    assert seen == {True, False}


def test_refusals():
    with pytest.raises(Error, match="did you mean 'borda'"):
        vote(CAPITAL, "bords")
    with pytest.raises(Error, match="knows mean"):
        winning_weights(CAPITAL, "M", "copeland")
    for system in ("Memphis", 4, -1):
        with pytest.raises(Error, match="no system"):
            winning_weights(CAPITAL, system)


def test_winning_does_not_depend_on_the_unit():
    scores = torch.tensor([[3.0, 1, 2], [1, 3, 2], [2, 2, 1]]).double()
    one, tiny = (winning_weights(unit * scores, 2, "mean") for unit in (1.0, 1e-12))
    assert one["wins"] == tiny["wins"]
    assert tiny["margin"] == pytest.approx(1e-12 * one["margin"])

"""Bradley-Terry strengths: stationary likelihood, both iterations, ties, priors, and games that connect nobody."""

from __future__ import annotations

import json
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.ranking import bradley_terry, components, strengths
from weightsmith.inspect.ranking._bradley_terry import _resampled


def games(
    seed: int = 0, systems: int = 8, each: int = 20, tie: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(systems, generator=generator, dtype=torch.float64).exp()
    wins, ties = torch.zeros(systems, systems, dtype=torch.float64), torch.zeros(systems, systems, dtype=torch.float64)
    for i in range(systems):
        for j in range(i):
            root = tie * (value[i] * value[j]).sqrt()
            chances = torch.stack([value[i], value[j], 2 * root])
            drawn = torch.multinomial(chances, each, replacement=True, generator=generator)
            counts = torch.bincount(drawn, minlength=3).double()
            wins[i, j], wins[j, i] = counts[0], counts[1]
            ties[i, j] = ties[j, i] = counts[2]
    return wins, ties, value


def column(report, name: str) -> list[float]:
    return [row[name] for row in sorted(report.table, key=lambda row: int(row["system"]))]


@pytest.mark.parametrize("prior", [False, True])
def test_wins_are_what_the_strengths_expect(prior: bool):
    wins, _, _ = games()
    found = strengths(wins, prior=prior).values
    chance = found[:, None] / (found[:, None] + found[None])
    expected = ((wins + wins.T) * chance).sum(1)
    extra = 1 - 2 * found / (found + 1) if prior else 0.0  # a win and a loss against a system of strength 1
    torch.testing.assert_close(wins.sum(1) + extra, expected, rtol=1e-7, atol=1e-7)
    if not prior:
        assert float(found.log().sum()) == pytest.approx(0, abs=1e-9)


def test_two_iterations_one_answer_and_fewer_sweeps():
    wins, _, _ = games(systems=12, each=7)
    fast, slow = strengths(wins), strengths(wins, update="zermelo")
    torch.testing.assert_close(fast.values, slow.values, rtol=1e-6, atol=1e-8)
    assert 3 * fast.sweeps < slow.sweeps
    with_prior = [strengths(wins, prior=True, update=update).values for update in ("newman", "zermelo")]
    torch.testing.assert_close(*with_prior, rtol=1e-6, atol=1e-8)


def test_ties_maximise_davidsons_likelihood():
    wins, ties, value = games(1, systems=6, each=400, tie=0.4)
    found = strengths(wins, ties)

    def likelihood(log_values: torch.Tensor, log_tie: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in range(6):
            for j in range(6):
                if i == j:
                    continue
                mine, theirs = log_values[i].exp(), log_values[j].exp()
                root = 2 * log_tie.exp() * (mine * theirs).sqrt()
                total = total + wins[i, j] * (mine / (mine + theirs + root)).log()
                total = total + ties[i, j] / 2 * (root / (mine + theirs + root)).log()
        return total

    at = (found.values.log().requires_grad_(), found.tie.log().requires_grad_())
    reached = likelihood(*at)
    slopes = torch.autograd.grad(reached, at)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-4
    assert bradley_terry(wins, ties, samples=0)["log likelihood"] == pytest.approx(float(reached.detach()))
    assert float(found.tie) == pytest.approx(0.4, abs=0.05)
    wanted = value / value.log().mean().exp()
    assert float((found.values.log() - wanted.log()).abs().max()) < 0.25


def test_only_shares_of_wins_matter_and_batches_are_rows():
    wins, ties, _ = games(2, tie=0.3)
    one = strengths(wins, ties).values
    torch.testing.assert_close(strengths(5 * wins, 5 * ties).values, one)
    other = games(3, tie=0.3)
    both = strengths(torch.stack([wins, other[0]]), torch.stack([ties, other[1]])).values
    torch.testing.assert_close(both[0], one, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(both[1], strengths(other[0], other[1]).values, rtol=1e-7, atol=1e-9)


def test_report_and_intervals():
    wins, _, value = games(4, systems=5, each=200)
    found = bradley_terry(wins, samples=100)
    truth = (value / value.log().mean().exp()).log().tolist()
    assert (
        sum(low <= t <= high for low, t, high in zip(column(found, "low"), truth, column(found, "high"), strict=True))
        >= 4
    )
    assert column(found, "played") == [800.0] * 5
    assert found["games"] == 2000
    assert found["log strength"] == sorted(found["log strength"], reverse=True)
    assert bradley_terry(wins, samples=20, seed=3) == bradley_terry(wins, samples=20, seed=3)
    json.dumps(found.to_json(), allow_nan=False)
    wide = bradley_terry(games(4, systems=5, each=20)[0], samples=100, prior=True)
    assert column(wide, "high")[0] - column(wide, "low")[0] > 2 * (column(found, "high")[0] - column(found, "low")[0])


def test_resampled_games_are_as_many_and_of_the_same_kinds():
    # Wins and ties that contradict each other: strengths tell how much either is drawn.
    wins = torch.tensor([[0.0, 600, 100], [200, 0, 100], [400, 100, 0]], dtype=torch.float64)
    ties = torch.tensor([[0.0, 0, 0], [0, 0, 2000], [0, 2000, 0]], dtype=torch.float64)
    made = strengths(wins, ties).values.log()
    drawn = _resampled(wins, ties, 100, 0, {"prior": False})
    torch.testing.assert_close(drawn.mean(0), made, rtol=0, atol=0.02)


def test_whole_and_half_numbers_are_as_good():
    wins, ties, _ = games(5, systems=4, tie=0.3)
    for dtype in (torch.int64, torch.bfloat16):
        found = strengths(wins.to(dtype), ties.to(dtype))
        assert bool(found.converged)
        torch.testing.assert_close(found.values, strengths(wins, ties).values)


def test_components():
    wins = torch.zeros(5, 5)
    wins[0, 1] = wins[1, 2] = wins[2, 0] = 1  # a cycle
    wins[0, 3] = wins[3, 4] = wins[4, 3] = 1
    assert components(wins) == [[0, 1, 2], [3, 4]]
    assert components(torch.zeros(2, 2)) == [[0], [1]]


def test_games_that_do_not_connect_are_named():
    wins = [[0, 1, 3, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    with pytest.raises(Error, match=r"2 groups .*a, b; c, d.*prior=True"):
        bradley_terry(wins, names=list("abcd"))
    found = bradley_terry(wins, names=list("abcd"), prior=True, samples=20)
    assert found["rank"][0] == 1
    assert {row["system"] for row in found.table[:2]} == {"a", "b"}
    assert all(math.isfinite(one) for one in found["log strength"])
    # Resamples that lose the connection are left out and counted.
    thin = bradley_terry([[0, 1, 1], [1, 0, 1], [1, 1, 0]], samples=100)
    assert "left out" in thin.notes[0]


def test_refusals():
    good = [[0.0, 1.0], [1.0, 0.0]]
    for bad in ([[0, -1], [1, 0]], [[0, math.nan], [1, 0]], [[1, 1], [1, 0]], [[0]], [[0, 1, 2], [1, 0, 1]]):
        with pytest.raises(Error):
            bradley_terry(bad)
    with pytest.raises(Error, match="nobody has played"):
        bradley_terry(torch.zeros(2, 2), prior=True)
    with pytest.raises(Error, match="symmetric"):
        bradley_terry(good, [[0, 1], [2, 0]])
    with pytest.raises(Error, match="zermelo"):
        bradley_terry(good, [[0, 1], [1, 0]], update="zermelo")
    with pytest.raises(Error, match="no convergence"):
        bradley_terry(games()[0], limit=1)

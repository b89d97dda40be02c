"""How many fewer sweeps Newman's iteration takes than Zermelo's, to one answer.

As in the paper, strengths are drawn from a logistic distribution and games between random pairs; beside it, eight
networks that play each other on every test digit (the higher probability of the right class wins).
"""

import torch
from _leaderboard import board

from weightsmith.claims import Claim
from weightsmith.inspect.ranking import components, strengths

CLAIM = Claim(
    key="fast-bradley-terry",
    statement="Newman's iteration needs less than a fifth of the sweeps of Zermelo's to change log-strengths by less "
    "than 1e-8 a sweep, for 30 players and 3000 games",
    method="5 x sweeps, Newman",
    baseline="sweeps, Zermelo",
    higher_is_better=False,
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Sweeps, and by how much the two answers differ."""
    wins = drawn(seed)
    fast = strengths(wins, tolerance=1e-8)
    slow = strengths(wins, update="zermelo", tolerance=1e-8)
    right = board(seed).right
    played = (right[:, None] > right[None]).double().sum(2)
    digits = [strengths(played, update=update, tolerance=1e-8).sweeps for update in ("newman", "zermelo")]
    return {
        "5 x sweeps, Newman": 5.0 * fast.sweeps,
        "sweeps, Zermelo": slow.sweeps,
        "difference": float((fast.values.log() - slow.values.log()).abs().max()),
        "sweeps on digits, Newman": digits[0],
        "sweeps on digits, Zermelo": digits[1],
    }


def drawn(seed: int, players: int = 30, games: int = 3000) -> torch.Tensor:
    """Wins of players who are all connected."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        uniform = torch.rand(players, generator=generator, dtype=torch.float64)
        value = uniform / (1 - uniform)
        first = torch.randint(players, (games,), generator=generator)
        second = (first + torch.randint(1, players, (games,), generator=generator)) % players
        won = torch.rand(games, generator=generator, dtype=torch.float64) < value[first] / (
            value[first] + value[second]
        )
        winner, loser = torch.where(won, first, second), torch.where(won, second, first)
        wins = torch.zeros(players, players, dtype=torch.float64)
        wins.index_put_((winner, loser), torch.ones(games, dtype=torch.float64), accumulate=True)
        if len(components(wins)) == 1:
            return wins

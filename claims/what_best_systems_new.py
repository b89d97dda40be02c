"""Is a ranking by ranks nearer to the true order than one by mean scores, where tasks have different scales?"""

import torch
from _leaderboard import board, points, standardised, tasks

from weightsmith.claims import Claim
from weightsmith.inspect.ranking import borda, kemeny, kendall_tau

CLAIM = Claim(
    key="what-best-systems-new",
    statement="Borda's order of eight networks over twelve tasks of three scales is nearer to the true one (Kendall's "
    "tau) than the order by mean scores",
    method="tau, Borda",
    baseline="tau, mean",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Taus with the order by accuracy on all test digits, means over eight draws of tasks."""
    systems = board(seed)
    found = {
        "tau, Borda": [],
        "tau, mean": [],
        "tau, mean of standardised": [],
        "tau, Kemeny": [],
        "Borda is Kemeny": [],
    }
    for draw in range(8):
        scores = tasks(systems, 100 * seed + draw)
        by_ranks = points(borda(scores, samples=0), "points", len(scores))
        exact = kemeny(scores)
        order = -points(exact, "rank", len(scores))
        found["tau, Borda"].append(kendall_tau(by_ranks, systems.truth))
        found["tau, mean"].append(kendall_tau(scores.mean(1), systems.truth))
        found["tau, mean of standardised"].append(kendall_tau(standardised(scores).mean(1), systems.truth))
        found["tau, Kemeny"].append(kendall_tau(order, systems.truth))
        found["Borda is Kemeny"].append(torch.tensor(float(exact["tau with Borda"] == 1.0)))
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}

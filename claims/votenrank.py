"""Do rules by pairs lose less than a mean where a fifth of the scores is missing?

The mean is that of scores brought to one scale task by task, over those that are there: a mean of raw scores would be
no rival on tasks of different scales.
"""

import torch
from _leaderboard import board, points, standardised, tasks

from weightsmith.claims import Claim
from weightsmith.inspect.ranking import kendall_tau, vote

CLAIM = Claim(
    key="votenrank",
    statement="with a fifth of the scores missing, Copeland's order is nearer to the true one (Kendall's tau) than the "
    "order by the mean of the standardised scores that are there",
    method="tau, Copeland",
    baseline="tau, mean of standardised",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    needs=("sklearn",),
)
RULES = ("copeland", "borda", "minimax", "baldwin", "plurality", "dowdall")


def measure(seed: int) -> dict[str, float]:
    """Means over eight draws of tasks and of what is missing."""
    systems = board(seed)
    names = [f"tau, {'Copeland' if rule == 'copeland' else rule}" for rule in RULES]
    found = {name: [] for name in [*names, "tau, mean of standardised", "tau, raw mean"]}
    for draw in range(8):
        scores = tasks(systems, 100 * seed + draw)
        generator = torch.Generator().manual_seed(100 * seed + draw)
        scores[torch.rand(scores.shape, generator=generator) < 0.2] = torch.nan
        for rule, name in zip(RULES, names, strict=True):
            made = points(vote(scores, rule, samples=0), "points", len(scores))
            found[name].append(kendall_tau(made, systems.truth))
        found["tau, mean of standardised"].append(kendall_tau(standardised(scores).nanmean(1), systems.truth))
        found["tau, raw mean"].append(kendall_tau(scores.nanmean(1), systems.truth))
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}

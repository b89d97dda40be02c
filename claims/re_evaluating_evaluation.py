"""What happens to a ranking when one task is entered six times: Nash averages against means.

Both see scores brought to one scale. Whether the Nash average is also nearer to the true order is measured beside it.
"""

import torch
from _leaderboard import board, points, standardised, tasks

from weightsmith.claims import Claim
from weightsmith.inspect.ranking import kendall_tau, nash_average

CLAIM = Claim(
    key="re-evaluating-evaluation",
    statement="with a task entered six times the order by Nash average stays nearer to what it was (Kendall's tau) "
    "than the order by mean",
    method="tau with itself, Nash",
    baseline="tau with itself, mean",
    needs=("sklearn", "scipy"),
)


def measure(seed: int) -> dict[str, float]:
    """Means over eight draws of tasks."""
    systems = board(seed)
    found = {name: [] for name in ("tau with itself, Nash", "tau with itself, mean", "tau with truth, Nash",
                                   "tau with truth, mean", "ratings moved by")}  # fmt: skip
    for draw in range(8):
        scores = standardised(tasks(systems, 100 * seed + draw))
        copied = torch.cat([scores, scores[:, [draw] * 5]], 1)
        first, second = (points(nash_average(one), "rating", len(scores)) for one in (scores, copied))
        # What differs by rounding is equal.
        first, second = first.round(decimals=7), second.round(decimals=7)
        found["tau with itself, Nash"].append(kendall_tau(first, second))
        found["tau with itself, mean"].append(kendall_tau(scores.mean(1), copied.mean(1)))
        found["tau with truth, Nash"].append(kendall_tau(first, systems.truth))
        found["tau with truth, mean"].append(kendall_tau(scores.mean(1), systems.truth))
        found["ratings moved by"].append((first - second).abs().max())
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}

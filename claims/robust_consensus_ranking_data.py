"""Does a median with ties withstand more false rankings than one without?

Rankings are the orders of five networks by their log-likelihood on thirty test digits each; two pairs of the networks
were trained on the same digits from different starts, so little speaks for either order of these. The attack counts as
successful when the median moves by a whole pair (Kendall distance 1). The threshold is the function's default.
"""

import torch
from _leaderboard import board

from weightsmith.claims import Claim
from weightsmith.inspect.ranking import breakdown, consensus_ranking

CLAIM = Claim(
    key="robust-consensus-ranking-data",
    statement="a larger share of rankings must be replaced to move the Kemeny median with ties by a Kendall distance "
    "of 1 than to move the one without",
    method="breakdown, with ties",
    baseline="breakdown, without",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Shares of 200 rankings."""
    systems = board(seed, (80, 80, 140, 240, 240))
    generator = torch.Generator().manual_seed(seed)
    n = len(systems.labels)
    rankings = torch.stack(
        [
            (-systems.right[:, torch.randperm(n, generator=generator)[:30]].mean(1)).argsort().argsort()
            for _ in range(200)
        ]
    )
    found = {
        "breakdown, with ties": breakdown(rankings, threshold=0.05)["breakdown"],
        "breakdown, without": breakdown(rankings)["breakdown"],
        "breakdown, with more ties": breakdown(rankings, threshold=0.15)["breakdown"],
        "breakdown, Borda without": breakdown(rankings, statistic="borda")["breakdown"],
    }
    # Where no attack moves it at all, all rankings were replaced in vain.
    shares = {name: min(value, 1.0) for name, value in found.items()}
    return shares | {"buckets": float(consensus_ranking(rankings, threshold=0.05)["buckets"])}

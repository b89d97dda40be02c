"""Do intervals hold the truth as often as they say, with as many runs as the paper had?

Synthetic: runs are made from the replication's published constants (E 1.8172, A 482.01, B 2085.43, alpha 0.3478,
beta 0.3658) with 1 % noise on 240 sizes and budgets spread as widely as the original's. Per seed, five such tables are
fitted, each with a bootstrap of 120; counted is how many of the 25 intervals of 90 % hold their constant.
"""

import torch

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="chinchilla-replication",
    statement="of the 90 % intervals of a bootstrap over 240 runs at least 80 % hold the constant that made the runs",
    method="share of intervals that hold the truth",
    baseline="80 %",
    seeds=(0, 1, 2, 3, 4, 5),
)
TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
TABLES = 5


def runs_of(seed: int, count: int = 240) -> dict[str, list[float]]:
    """Budgets of 1e18 to 1e22 operations, 2 to 200 tokens a parameter."""
    generator = torch.Generator().manual_seed(seed)
    compute = 10 ** (18 + 4 * torch.rand(count, generator=generator, dtype=torch.float64))
    ratio = 10 ** (0.3 + 2 * torch.rand(count, generator=generator, dtype=torch.float64))
    sizes = (compute / 6 / ratio).sqrt()
    return scaling.simulate("chinchilla", TRUTH, {"N": sizes, "D": ratio * sizes}, noise=0.01, seed=seed)


def measure(seed: int) -> dict[str, float]:
    """Shares of intervals, by kind, and how far the best exponent of size is off."""
    held, sandwiched, exponents = [], [], []
    for table in range(TABLES):
        law = scaling.fit(runs_of(100 * seed + table), bootstrap=120, seed=table)
        errors = law.standard_errors()
        for name, true in TRUTH.items():
            low, high = law.interval(name, 0.9)
            held.append(low <= true <= high)
            sandwiched.append(abs(law.parameters[name] - true) <= 1.645 * errors[name])
        found = law.parameters
        exponents.append(found["beta"] / (found["alpha"] + found["beta"]) - 0.3658 / (0.3478 + 0.3658))
    return {
        "share of intervals that hold the truth": sum(held) / len(held),
        "80 %": 0.8,
        "share, from standard errors": sum(sandwiched) / len(sandwiched),
        "largest error of the exponent": max(map(abs, exponents)),
    }

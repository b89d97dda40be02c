"""Do exact loss curves of random features show the predicted compute-optimal exponents?

One point in each of phases Ia, II and III, sizes 32 to 512 with four times as many inputs, and half the largest stable
learning rate. Measured is the share by which the measured exponent of the loss misses the predicted one, the mean over
the three phases, against 0.25; each draw of the features is a seed. In phases Ib, Ic and IV such sizes are far from the
limit: one point of IVa is told and not counted.
"""

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="4-plus3-phases-compute-optimal-neural",
    statement="in phases Ia, II and III the measured loss exponents miss the predicted ones by less than a quarter",
    method="exponent's error, mean of Ia, II, III",
    baseline="0.25",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
POINTS = {"Ia": (1.0, 0.25), "II": (1.0, 0.7), "III": (0.7, 1.0), "IVa": (0.4, 0.8)}


def measure(seed: int) -> dict[str, float]:
    """Relative errors of loss exponents, and measured exponents of size."""
    figures = {"0.25": 0.25}
    for name, (alpha, beta) in POINTS.items():
        found = ws.inspect.theory.compute_optimal(alpha, beta, [32, 64, 128, 256, 512], seed=seed)
        figures[f"error, {name}"] = abs(found["loss exponent, measured"] / found["loss exponent"] - 1)
        figures[f"size exponent, {name}"] = found["size exponent, measured"]
        figures[f"size exponent predicted, {name}"] = found["size exponent"]
    figures["exponent's error, mean of Ia, II, III"] = sum(figures[f"error, {n}"] for n in ("Ia", "II", "III")) / 3
    return figures

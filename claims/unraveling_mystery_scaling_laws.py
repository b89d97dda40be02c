"""Estimated step by step from small models, are curves of a larger one at an unseen batch told?

Synthetic: nine curves (three sizes at three batches) and three converged losses are made from planted constants, with
1 % noise on the curves; told is the curve of a model 19 times larger at another batch. The baseline is one law of
size and steps fitted to the same points, which knows nothing of batches. This tests the estimation, not whether
language models follow the law.
"""

import torch

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="unraveling-mystery-scaling-laws",
    statement="on planted curves with 1 % noise, a larger model's curve at an unseen batch is told better than without "
    "the critical batch",
    method="error of the steps together",
    baseline="error without batches",
    higher_is_better=False,
)
TRUTH = {"Nc": 1e13, "alpha_N": 0.08, "B_star": 2e5, "alpha_B": 0.25, "Sc": 1500.0, "alpha_S": 0.7}
SIZES, BATCHES = (1e6, 4e6, 1.6e7), (200.0, 800.0, 3200.0)


def measure(seed: int) -> dict[str, float]:
    """Mean relative errors along the unseen curve, and of the constants' exponents."""
    true = scaling.Trajectory(planted("kaplan-size"), planted("critical-batch"), planted("kaplan-steps"))
    steps = torch.logspace(2, 5, 60, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    curves, rows = [], {"N": [], "S": [], "loss": []}
    for size in SIZES:
        for batch in BATCHES:
            noise = 0.01 * torch.randn(60, generator=generator, dtype=torch.float64)
            losses = true.curve(size, batch, steps) * noise.exp()
            curves.append({"N": size, "B": batch, "S": steps, "loss": losses})
            for name, values in (("N", [size] * 60), ("S", steps.tolist()), ("loss", losses.tolist())):
                rows[name] += values
    converged = {"N": list(SIZES), "loss": [(TRUTH["Nc"] / size) ** TRUTH["alpha_N"] for size in SIZES]}
    found = scaling.fit_trajectory(curves, converged)
    plain = scaling.fit(rows, "kaplan-steps", bootstrap=0)
    unseen = true.curve(3e8, 1600.0, steps)
    told = found.curve(3e8, 1600.0, steps)
    without = plain.predict(N=3e8, S=steps)
    return {
        "error of the steps together": float((told / unseen - 1).abs().mean()),
        "error without batches": float((without / unseen - 1).abs().mean()),
        "error of alpha_S": abs(found.parameters["alpha_S"] / TRUTH["alpha_S"] - 1),
        "error of alpha_B": abs(found.parameters["alpha_B"] / TRUTH["alpha_B"] - 1),
    }


def planted(law: str) -> scaling.Law:
    """A law with those of the constants that it has."""
    return scaling.given(law, **{name: TRUTH[name] for name in scaling.FORMS[law].names})

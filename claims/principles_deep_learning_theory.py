"""Does the critical start keep a deep network's signal, where a start that is 10 % off does not?

For ReLU, tanh and GELU, 30 networks of 50 layers, 128 wide. Measured is how many powers of e the last layer's kernel
lies from where theory puts it at the critical start (1 for ReLU, falling as one over the depth for tanh, the fixed
point for GELU), at the critical variance of weights and at 1.1 of it; the mean over activations. The kurtosis of 2,000
networks of 10 layers, 100 wide, and its slope against the predicted one are told beside it.
"""

import math

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="principles-deep-learning-theory",
    statement="through 50 layers the kernel stays nearer to its critical course than at 1.1 of the critical variance",
    method="off course, critical",
    baseline="off course, 1.1 x critical",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
ACTIVATIONS = ("relu", "tanh", "gelu")


def measure(seed: int) -> dict[str, float]:
    """Distances in powers of e; the slope of kurtosis and its R2 for ReLU."""
    theory = ws.inspect.theory
    figures: dict[str, float] = {}
    widths = [128] * 51
    for activation in ACTIVATIONS:
        start = theory.critical_start(activation)
        course = theory.depth_theory(widths, activation)["kernel"][-1]
        for name, factor in (("critical", 1.0), ("1.1 x critical", 1.1)):
            found = theory.depth_ensemble(
                widths, activation, networks=30, weight_scale=factor * start.weight_scale,
                bias_variance=start.bias_variance, kernel=start.kernel or 1.0, seed=seed,
            )  # fmt: skip
            figures[f"{activation}, {name}"] = abs(math.log(found["kernel"][-1] / course))
    for name in ("critical", "1.1 x critical"):
        figures[f"off course, {name}"] = sum(figures[f"{one}, {name}"] for one in ACTIVATIONS) / len(ACTIVATIONS)
    narrow = theory.depth_ensemble([100] * 11, "relu", networks=2000, seed=seed)
    figures["kurtosis, ReLU: depth over width"] = narrow["excess kurtosis a layer"] * 100
    figures["kurtosis, R2"] = narrow["its R2"]
    return figures

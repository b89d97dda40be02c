"""Does strong superposition make the loss fall as 1 / width, where weak superposition leaves it to the frequencies?

The toy model of the paper with 512 features of frequencies 1 / i is trained at five widths, once with a decay that
makes every feature's vector about 1 long and once with one that pulls them to zero. The exponent is that of the
straight line through the logarithms of loss and width. Nothing was chosen after seeing figures but the number of
steps, which is what two minutes allow; the paper's model has 1,000 features and takes 20,000 steps.
"""

import math

from weightsmith.claims import Claim
from weightsmith.inspect import superposition

CLAIM = Claim(
    key="superposition-yields-robust-neural",
    statement="the exponent of loss over width is nearer to 1 under strong superposition than under weak",
    method="distance from 1, strong",
    baseline="distance from 1, weak",
    higher_is_better=False,
    seeds=(0, 1, 2),
)
FEATURES = 512
WIDTHS = (8, 12, 16, 24, 32)


def measure(seed: int) -> dict[str, float]:
    """Exponents, their distances from 1, and the mean squared overlap times the width."""
    strong = [superposition(width, features=FEATURES, decay=-1.0, steps=600, batch=384, seed=seed) for width in WIDTHS]
    weak = [superposition(width, features=FEATURES, decay=1.0, steps=600, batch=384, seed=seed) for width in WIDTHS]
    exponents = [exponent_of([one.loss for one in models]) for models in (strong, weak)]
    return {
        "distance from 1, strong": abs(exponents[0] - 1),
        "distance from 1, weak": abs(exponents[1] - 1),
        "exponent, strong": exponents[0],
        "exponent, weak": exponents[1],
        "represented, strong": strong[2].represented,
        "represented, weak": weak[2].represented,
        "mean squared overlap x width, strong": strong[2].report()["times 1/m"],
    }


def exponent_of(losses: list[float]) -> float:
    """Minus the slope of log loss over log width, by least squares."""
    x, y = [math.log(width) for width in WIDTHS], [math.log(loss) for loss in losses]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    return -sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)

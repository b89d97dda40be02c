"""Does a power law in size tell a larger model's loss?

Real runs: character models of five widths on the sources of Python's library, all with the same data. The law is
fitted to the four smaller ones and tells the largest; the baseline is a line in the logarithm of the size.
"""

import math

from _ladder import MARKS, table

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="kaplan-scaling-laws",
    statement="a power law in size tells the largest model's loss better than a line in the logarithm of size",
    method="error of the power law",
    baseline="error of the line",
    higher_is_better=False,
)


def measure(seed: int) -> dict[str, float]:
    """Relative errors of the largest model's loss, averaged over four amounts of data, and how straight a law is."""
    power, straight, constant, fits = [], [], [], []
    for mark in range(len(MARKS)):
        runs = table(seed)[mark :: len(MARKS)]
        sizes, losses = [run["N"] for run in runs], [run["loss"] for run in runs]
        rows = {"N": sizes[:-1], "loss": losses[:-1]}
        law = scaling.fit(rows, "kaplan-size", bootstrap=0)
        power.append(abs(law.predict(N=sizes[-1]) / losses[-1] - 1))
        slope, start = line([math.log(size) for size in sizes[:-1]], losses[:-1])
        straight.append(abs((start + slope * math.log(sizes[-1])) / losses[-1] - 1))
        constant.append(abs(min(losses[:-1]) / losses[-1] - 1))
        fits.append(explained([math.log(size) for size in sizes], [math.log(loss) for loss in losses]))
    return {
        "error of the power law": sum(power) / len(power),
        "error of the line": sum(straight) / len(straight),
        "error of the best smaller run": sum(constant) / len(constant),
        "share explained in logarithms": sum(fits) / len(fits),
    }


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and start of the least-squares line."""
    middle, level = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    return slope, level - slope * middle


def explained(x: list[float], y: list[float]) -> float:
    """R squared of that line."""
    slope, start = line(x, y)
    level = sum(y) / len(y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return 1 - left / sum((b - level) ** 2 for b in y)

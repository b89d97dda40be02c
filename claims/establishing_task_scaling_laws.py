"""Is the score of the largest run told by two laws in a row, from a ladder of smaller ones?

Real runs: character models on the sources of Python's library; the score is the share of characters told right.
Fitted are all runs of the four smaller widths; told are the four runs of the largest. The baseline is a line of the
score in the logarithm of compute through the same runs.
"""

import math

from _ladder import MARKS, table

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="establishing-task-scaling-laws",
    statement="two laws in a row tell the scores of the largest model better than a line in the logarithm of compute",
    method="error of the chain",
    baseline="error of the line",
    higher_is_better=False,
)


def measure(seed: int) -> dict[str, float]:
    """Mean absolute errors of the share told right, and the relative error of the loss on the way."""
    rows = list(table(seed))
    ladder, target = rows[: -len(MARKS)], rows[-len(MARKS) :]
    chain = scaling.fit_chain(ladder, bootstrap=0)
    x = [math.log(row["N"] * row["D"]) for row in ladder]
    y = [row["accuracy"] for row in ladder]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    errors, straight, losses, best = [], [], [], []
    for row in target:
        errors.append(abs(chain.predict(N=row["N"], D=row["D"]) - row["accuracy"]))
        straight.append(abs(level + slope * (math.log(row["N"] * row["D"]) - middle) - row["accuracy"]))
        losses.append(abs(chain.first.predict(N=row["N"], D=row["D"]) / row["loss"] - 1))
        best.append(abs(max(y) - row["accuracy"]))
    found = {"error of the chain": errors, "error of the line": straight, "error of the loss": losses}
    found["error of the best fitted run"] = best
    return {name: sum(values) / len(values) for name, values in found.items()}

"""From the loss on its own kind of text, is a larger model's loss on other text told?

Real runs: character models trained on the sources of Python's library; the other text is the language reference in
English. Train to test: pairs of both losses of one model. Fitted are the runs of the four smaller widths; told are
the four runs of the largest, from their loss on code. The baseline is a straight line through the same pairs.

The irreducible losses come from fits of each text's losses, as in the paper. This was chosen after a first measurement
in which they were fitted along: one then lay above the largest model's loss, where the law says nothing.
"""

from _ladder import MARKS, table

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="loss-to-loss-prediction",
    statement="a shifted power law tells the largest model's loss on other text better than a straight line",
    method="error of the shifted power law",
    baseline="error of the line",
    higher_is_better=False,
)


def measure(seed: int) -> dict[str, float]:
    """Mean relative errors of the loss on prose."""
    rows = table(seed)
    ladder, target = rows[: -len(MARKS)], rows[-len(MARKS) :]
    x, y = [row["loss"] for row in ladder], [row["prose"] for row in ladder]
    floors = [scaling.fit(ladder, target=name, bootstrap=0).parameters["E"] for name in ("loss", "prose")]
    law = scaling.translate(x, y, floor=floors[0], wanted_floor=floors[1], bootstrap=0)
    middle, level = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    bent = [abs(law.predict(loss=row["loss"]) / row["prose"] - 1) for row in target]
    straight = [abs((level + slope * (row["loss"] - middle)) / row["prose"] - 1) for row in target]
    return {
        "error of the shifted power law": sum(bent) / len(bent),
        "error of the line": sum(straight) / len(straight),
        "kappa": law.parameters["kappa"],
    }

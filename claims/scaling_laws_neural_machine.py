"""Where encoder and decoder matter differently, does a law of both tell the largest models better than one of the sum?

Synthetic: losses of 25 models (five sizes of each half) from the law itself, with the exponents 0.18 and 0.31 that
the paper reports for one language pair, and 0.5 % noise. Fitted are the 16 smaller ones; told are the nine with the
largest encoder or decoder. The baseline is the same law in the total number of parameters. This tests the fitter and
what is lost by ignoring the split, not whether translation follows the law.
"""

import torch

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="scaling-laws-neural-machine",
    statement="on planted losses the law of both halves tells the largest models better than a law of their sum",
    method="error of the law of both",
    baseline="error of the law of the sum",
    higher_is_better=False,
)
TRUTH = {"amount": 700.0, "pe": 0.18, "pd": 0.31, "floor": 1.2}
SIZES = (1e6, 4e6, 1.6e7, 6.4e7, 2.56e8)
SUM = scaling.Form(
    "sum",
    lambda N, amount, p, floor: amount * N**-p + floor,
    ("N",),
    {"amount": (1e0, 1e2, 1e4), "p": (0.1, 0.3, 0.6), "floor": (0.1, 0.5, 1.0, 2.0)},
)


def measure(seed: int) -> dict[str, float]:
    """Mean relative errors of the nine largest, and of the share that the encoder should have."""
    pairs = [(e, d) for e in SIZES for d in SIZES]
    design = {"Ne": [e for e, _ in pairs], "Nd": [d for _, d in pairs]}
    runs = scaling.simulate("encoder-decoder", TRUTH, design, noise=0.005, seed=seed)
    rows = [dict(zip(runs, row, strict=True)) for row in zip(*runs.values(), strict=True)]
    rows = [row | {"N": row["Ne"] + row["Nd"]} for row in rows]
    small = [row for row in rows if max(row["Ne"], row["Nd"]) < SIZES[-1]]
    large = [row for row in rows if row not in small]
    both = scaling.fit(small, "encoder-decoder", bootstrap=0)
    total = scaling.fit(small, SUM, bootstrap=0, duplicates=True)
    best = both.optimal(size=1e9)
    return {
        "error of the law of both": error(both, large),
        "error of the law of the sum": error(total, large),
        "error of the encoder's share": abs(best.columns["Ne"] / 1e9 - 0.18 / 0.49),
    }


def error(law: scaling.Law, rows: list[dict[str, float]]) -> float:
    """Mean relative error."""
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in law.form.columns}
    told = law.told(columns)
    true = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
    return float((told / true - 1).abs().mean())

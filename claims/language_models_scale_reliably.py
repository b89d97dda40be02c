"""Fitted on small and short runs, does the law of compute and over-training tell larger and longer ones?

Real runs: character models on the sources of Python's library. Fitted are the three smaller of five widths on the
three smaller of four amounts of data; told are the eleven other runs. The baseline is a power law of compute alone
with a floor, which knows nothing of how compute is shared.
"""

import torch
from _ladder import MARKS, table

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="language-models-scale-reliably",
    statement="the law of compute and over-training tells larger and longer runs better than a law of compute alone",
    method="error of the law",
    baseline="error of a law of compute",
    higher_is_better=False,
)
COMPUTE_ALONE = scaling.Form(
    "compute",
    lambda C, E, A, alpha: E + A * C**-alpha,
    ("C",),
    {"E": (0.1, 0.5, 1.0, 2.0), "A": (1e0, 1e1, 1e2, 1e3, 1e4), "alpha": (0.05, 0.1, 0.2, 0.4)},
)


def measure(seed: int) -> dict[str, float]:
    """Mean relative errors on held-out losses; and of the share of wrong characters, through the loss."""
    rows = [{**run, "C": 6 * run["N"] * run["D"]} for run in table(seed)]
    small = [row for index, row in enumerate(rows) if index // len(MARKS) < 3 and index % len(MARKS) < 3]
    large = [row for row in rows if row not in small]
    laws = {
        "error of the law": scaling.fit(small, "over-training", bootstrap=0),
        "error of a law of compute": scaling.fit(small, COMPUTE_ALONE, bootstrap=0),
        "error of chinchilla": scaling.fit(small, "chinchilla", bootstrap=0),
    }
    found = {name: error(law, large) for name, law in laws.items()}
    best = min(row["loss"] for row in small)
    found["error of the best fitted run"] = sum(abs(best / row["loss"] - 1) for row in large) / len(large)
    chain = scaling.fit_chain(small, "over-training", "downstream-error", bootstrap=0)
    sizes, data = [row["N"] for row in large], [row["D"] for row in large]
    wrong = torch.tensor([row["error"] for row in large], dtype=torch.float64)
    found["error of the share wrong"] = float((chain.predict(N=sizes, D=data) - wrong).abs().mean())
    return found


def error(law: scaling.Law, rows: list[dict[str, float]]) -> float:
    """Mean relative error."""
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in law.form.columns}
    told = law.told(columns)
    true = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
    return float((told / true - 1).abs().mean())

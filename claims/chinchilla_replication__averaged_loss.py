"""The trap: the same loss, averaged over runs instead of summed, with an optimizer that stops at a fixed tolerance.

Synthetic: 240 runs from the replication's constants with 1 % noise. The baseline is scipy's L-BFGS-B with its default
tolerances on the mean of the Huber losses, from 32 starts of which the best is kept; a second one sums. Compared is by
how many percent each ends above the least objective that any of the three found.
"""

import itertools

import torch

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="chinchilla-replication",
    variant="averaged loss",
    statement="an optimizer that stops at a fixed tolerance ends above the least objective when the loss is averaged",
    method="percent above the least",
    baseline="percent above the least, averaged",
    higher_is_better=False,
    needs=("scipy",),
)
TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
STARTS = ((-0.5, 0.5), (5.0, 15.0), (5.0, 15.0), (-2.0, -0.5), (-2.0, -0.5))


def measure(seed: int) -> dict[str, float]:
    """Objectives, and the exponent of the best size each gives."""
    from scipy.optimize import minimize

    generator = torch.Generator().manual_seed(seed)
    compute = 10 ** (18 + 4 * torch.rand(240, generator=generator, dtype=torch.float64))
    ratio = 10 ** (0.3 + 2 * torch.rand(240, generator=generator, dtype=torch.float64))
    sizes = (compute / 6 / ratio).sqrt()
    runs = scaling.simulate("chinchilla", TRUTH, {"N": sizes, "D": ratio * sizes}, noise=0.01, seed=seed)
    law = scaling.fit(runs, bootstrap=0)

    def objective(theta, share):
        at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        told = law.form.predict(at[None], law.columns)[0]
        residuals = told.log() - law.observed.log()
        total = torch.nn.functional.huber_loss(residuals, torch.zeros_like(residuals), reduction="sum", delta=1e-3)
        (share * total).backward()
        return share * total.item(), at.grad.numpy()  # type: ignore[union-attr]

    ends = {}
    for name, share in (("averaged", 1 / 240), ("summed", 1.0)):
        found = [
            minimize(objective, start, args=(share,), jac=True, method="L-BFGS-B")
            for start in itertools.product(*STARTS)
        ]
        best = min(found, key=lambda one: one.fun)
        ends[name] = (best.fun / share, best.x)
    least = min(law.loss, *(value for value, _ in ends.values()))
    true = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])

    def exponent(theta) -> float:
        alpha, beta = float(theta[3]), float(theta[4])
        return abs(1 / (1 + 2.718281828459045 ** (alpha - beta)) - true)

    return {
        "percent above the least": 100 * (law.loss / least - 1),
        "percent above the least, averaged": 100 * (ends["averaged"][0] / least - 1),
        "percent above the least, summed by the same optimizer": 100 * (ends["summed"][0] / least - 1),
        "error of the exponent": exponent(law.theta),
        "error of the exponent, averaged": exponent(ends["averaged"][1]),
    }

"""Fitted on a constant and a cosine schedule, does the law tell the curve of a schedule that holds and then decays?

Real runs: a character model of width 64 on the sources of Python's library, 800 steps, tested every 20. Left out are
the first 100 steps. The baseline is the same fit without the annealing term: a power law of the sum of learning rates.
"""

import math

import torch
from _ladder import code, held_out, model, train

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="lr-annealing-law",
    statement="the final loss of an unseen schedule is told better with the annealing term than without it",
    method="error of the law",
    baseline="error without annealing",
    higher_is_better=False,
)
STEPS, EVERY, SKIP, RATE = 800, 20, 100, 4e-3
SCHEDULES = {
    "constant": [RATE] * STEPS,
    "cosine": [RATE * (0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS))) for step in range(STEPS)],
    "hold, then decay": [RATE * min(1.0, 0.05 + 0.95 * (STEPS - step) / 200) for step in range(STEPS)],
}


def measure(seed: int) -> dict[str, float]:
    """Relative errors of the last loss of the third schedule, and of its whole curve."""
    curves = {name: curve(rates, seed) for name, rates in SCHEDULES.items()}
    known = {name: curves[name] for name in ("constant", "cosine")}
    law = scaling.fit_annealing(known, SCHEDULES, skip=SKIP)
    rows: dict[str, list[float]] = {"S1": [], "S2": [], "loss": []}
    for name, points in known.items():
        forward, _ = scaling.areas(SCHEDULES[name])
        for step, loss in points.items():
            if step >= SKIP:
                rows["S1"].append(float(forward[step]))
                rows["S2"].append(0.0)
                rows["loss"].append(loss)
    plain = scaling.fit(rows, "annealing", fixed={"C": 0.0}, bootstrap=0, duplicates=True)
    unseen = curves["hold, then decay"]
    at = torch.tensor([step for step in unseen if step >= SKIP])
    true = torch.tensor([unseen[int(step)] for step in at], dtype=torch.float64)
    told = law.predict(SCHEDULES["hold, then decay"])[at]
    forward, _ = scaling.areas(SCHEDULES["hold, then decay"])
    without = plain.predict(S1=forward[at], S2=torch.zeros(len(at)))
    final = {name: points[STEPS - 1] for name, points in curves.items()}
    order = [name for name, _ in law.best(SCHEDULES)]
    return {
        "error of the law": abs(float(told[-1] / true[-1] - 1)),
        "error without annealing": abs(float(without[-1] / true[-1] - 1)),
        "error of the curve": float((told / true - 1).abs().mean()),
        "error of the curve, without annealing": float((without / true - 1).abs().mean()),
        "best schedule is the best": float(order[0] == min(final, key=lambda name: final[name])),
        "what annealing brings (C)": law.law.parameters["C"],
    }


def curve(rates: list[float], seed: int) -> dict[int, float]:
    """Step, from 0 -> test loss after it."""
    train_text, test_text = code()
    made, points = model(64, seed), {}

    def look(done: int) -> None:
        if done % EVERY == 0:
            points[done - 1] = held_out(made, test_text)[0]

    train(made, train_text, STEPS, seed, batch=256, rate=lambda step: rates[step], after=look)
    return points

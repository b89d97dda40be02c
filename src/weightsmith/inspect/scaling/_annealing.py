"""The loss along training from the learning rates alone: how much was learned, and what annealing brings on top.

Two areas of the schedule tell the curve: the sum of the learning rates so far, which is how far training went, and
the sum of what they have fallen, remembered with a decay, which is how much noise has been let out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Report
from weightsmith.inspect.scaling._fit import fit
from weightsmith.inspect.scaling._law import Law

DECAYS = (0.95, 0.99, 0.995, 0.999)
"""Memories of the fall of the learning rate that are tried, a step."""


@card(
    paper="Tissue, Wang, Wang 2024, 'Scaling Law with Learning Rate Annealing'",
    covers=("lr-annealing-law",),
    unit="model",
    departs="what the rate rises before its first fall (warm-up) is not remembered",
)
def areas(schedule: Sequence[float] | Tensor, decay: float = 0.999) -> tuple[Tensor, Tensor]:
    r"""The forward area and the annealing area of a schedule, at each of its steps.

    .. math::
        S_1(s) = \sum_{i \le s} \eta_i, \qquad
        S_2(s) = \sum_{i \le s} m_i, \quad m_i = \lambda m_{i-1} + (\eta_{i-1} - \eta_i)

    Args:
        schedule: ``[s]`` learning rates, one a step, 0 or more, the first above 0.
        decay: lambda, in [0, 1).

    Returns:
        ``[s]`` and ``[s]``, float64.

    Raises:
        Error: no rates, a rate below 0 or not finite, a first rate of 0, a decay outside [0, 1).

    >>> forward, annealed = areas([1.0, 1.0, 0.5], decay=0.5)
    >>> forward.tolist(), annealed.tolist()
    ([1.0, 2.0, 2.5], [0.0, 0.0, 0.5])
    """
    rates = torch.as_tensor(schedule, dtype=torch.float64, device="cpu")
    if rates.ndim != 1 or not len(rates) or not bool((rates >= 0).all()) or not bool(rates.isfinite().all()):
        raise Error("a schedule is a sequence of learning rates, 0 or more, one for each step")
    if not 0 <= decay < 1:
        raise Error(f"the decay of the memory lies in [0, 1), got {decay}")
    forward = rates.cumsum(0)
    if not forward[0] > 0:
        raise Error("the first learning rate of a schedule must be above 0; leave out steps that do nothing")
    falls = (-rates.diff(prepend=rates[:1])).tolist()
    memory, remembered, fallen = 0.0, [], False
    for fall in falls:
        fallen = fallen or fall > 0
        memory = decay * memory + fall if fallen else 0.0
        remembered.append(memory)
    return forward, torch.tensor(remembered, dtype=torch.float64).cumsum(0)


class AnnealingLaw:
    """A fitted `annealing` law with its memory: it predicts curves of schedules.

    Attributes:
        law: the fitted `Law`.
        decay: the memory that was chosen.
        objectives: the objective of each memory that was tried.
    """

    def __init__(self, law: Law, decay: float, objectives: Mapping[float, float]):
        self.law, self.decay, self.objectives = law, decay, dict(objectives)

    def predict(self, schedule: Sequence[float] | Tensor) -> Tensor:
        """``[s]``: the loss after each step of a schedule."""
        forward, annealed = areas(schedule, self.decay)
        return self.law.predict(S1=forward, S2=annealed)

    def best(self, schedules: Mapping[str, Sequence[float] | Tensor]) -> list[tuple[str, float]]:
        """Names of schedules with their predicted final losses, the lowest first."""
        final = {name: float(self.predict(schedule)[-1]) for name, schedule in schedules.items()}
        return sorted(final.items(), key=lambda pair: pair[1])

    def report(self, level: float = 0.9) -> Report:
        """The law's report, and which memory was chosen."""
        made = self.law.report(level)
        figures = dict(made.figures) | {"memory of the fall (decay)": self.decay}
        alone = len(self.law.groups.unique()) == len(self.law.observed)
        said = "errors of points left out are too small" if alone else "curves are resampled and left out whole"
        notes = [*made.notes, f"Points of one curve are not independent: {said}."]
        return dataclasses.replace(made, figures=figures, notes=notes)


@card(
    paper="Tissue, Wang, Wang 2024, 'Scaling Law with Learning Rate Annealing'",
    covers=("lr-annealing-law",),
    unit="model",
    departs="the memory is chosen by the objective from a few values instead of being set by hand",
)
def fit_annealing(
    curves: Mapping[str, Mapping[int, float] | Sequence[float]],
    schedules: Mapping[str, Sequence[float] | Tensor],
    *,
    decays: Sequence[float] = DECAYS,
    skip: int = 0,
    bootstrap: int = 0,
    seed: int = 0,
    delta: float = 1e-3,
) -> AnnealingLaw:
    """The annealing law from one or more loss curves and the schedules they were trained with.

    Args:
        curves: name -> losses: ``step -> loss`` (steps counted from 0), or one loss for each step.
        schedules: name -> learning rates, one for each step.
        decays: memories that are tried; the one with the least objective is kept.
        skip: steps at the start that are left out, such as the warm-up.
        bootstrap: resamples of whole curves; needs at least two.
        seed, delta: as in `fit`.

    Raises:
        Error: a curve without a schedule, or with a step that its schedule does not have; no decays; a bootstrap of one
            curve.

    >>> rates = [0.1] * 50 + [0.1 * (1 - i / 50) for i in range(1, 50)]
    >>> forward, annealed = areas(rates, decay=0.95)
    >>> curve = (1.0 + 2.0 * forward**-0.5 - 0.3 * annealed).tolist()
    >>> found = fit_annealing({"run": curve}, {"run": rates}, decays=(0.9, 0.95), skip=5)
    >>> found.decay, round(found.law.parameters["C"], 3)
    (0.95, 0.3)
    """
    if not decays:
        raise Error("fit_annealing needs at least one decay to try")

    def fitted(decay: float, times: int) -> Law:
        rows: dict[str, list[Any]] = {"S1": [], "S2": [], "loss": [], "curve": []}
        for name, curve in curves.items():
            if name not in schedules:
                raise Error(f"curve {name!r} has no schedule; give the learning rate of each of its steps")
            forward, annealed = areas(schedules[name], decay)
            points = curve.items() if isinstance(curve, Mapping) else enumerate(curve)
            for step, loss in points:
                if not 0 <= step < len(forward):
                    raise Error(f"curve {name!r} has a step {step}, its schedule {len(forward)} steps from 0")
                if step >= skip:
                    rows["S1"].append(float(forward[step]))
                    rows["S2"].append(float(annealed[step]))
                    rows["loss"].append(float(loss))
                    rows["curve"].append(name)
        shared: dict[str, Any] = {"duplicates": True, "seed": seed, "delta": delta}
        return fit(rows, "annealing", bootstrap=times, groups="curve" if len(curves) > 1 else None, **shared)

    if bootstrap and len(curves) < 2:
        raise Error(f"a bootstrap of whole curves needs at least 2 of them, got {len(curves)}; give bootstrap=0")
    tried = {decay: fitted(decay, 0) for decay in decays}
    best = min(tried, key=lambda one: tried[one].loss)
    law = fitted(best, bootstrap) if bootstrap else tried[best]
    return AnnealingLaw(law, best, {one: each.loss for one, each in tried.items()})

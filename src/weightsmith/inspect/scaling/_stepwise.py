"""Whole training curves of large models from small ones, a few constants at a time.

Converged losses of small models give the power law of size. Curves at several batch sizes give, loss by loss, how
steps trade against examples, and from that the critical batch. With both known, every point of every curve says how
many steps a large batch would have needed, which gives the power law of steps. Then the loss of any size, batch and
step follows from one equation that is solved for the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.scaling._fit import fit
from weightsmith.inspect.scaling._law import Law


@dataclass(frozen=True)
class Trajectory:
    """The laws of size, of the critical batch and of steps, together: whole curves."""

    size: Law
    batch: Law
    steps: Law
    tradeoffs: tuple[dict[str, float], ...] = ()
    """For each loss at which curves were cut: the least steps and examples, and the critical batch."""

    @property
    def parameters(self) -> dict[str, float]:
        """The six constants."""
        return self.size.parameters | self.batch.parameters | self.steps.parameters

    def critical_batch(self, loss: Any) -> Any:
        """The critical batch at a loss."""
        return self.batch.predict(loss=loss)

    def min_steps(self, N: Any, loss: Any) -> Any:
        """Steps that a model of size N needs for a loss, in batches far above the critical one; infinite if never."""
        constants = self.parameters
        size, goal = _plain(N), _plain(loss)
        left = goal - (constants["Nc"] / size) ** constants["alpha_N"]
        found = torch.where(
            left > 0, constants["Sc"] * left.clamp(min=1e-300) ** (-1 / constants["alpha_S"]), torch.inf
        )
        return found.item() if found.ndim == 0 else found

    def steps_to(self, N: Any, B: Any, loss: Any) -> Any:
        """Steps in batches of B: :math:`S = S_{min}\\,(1 + B_{crit}(L) / B)`."""
        return self.min_steps(N, loss) * (1 + self.critical_batch(loss) / B)

    def curve(self, N: float, B: float, steps: Sequence[float] | Tensor) -> Tensor:
        """``[s]``: the loss of a model of size N after each of these steps in batches of B.

        The one loss at which the steps are those that `steps_to` asks for, found by halving.
        """
        constants = self.parameters
        at = _plain(steps).reshape(-1)
        if not (N > 0 and B > 0 and bool((at > 0).all())):
            raise Error("a curve needs a size, a batch and steps above 0")
        floor = (constants["Nc"] / N) ** constants["alpha_N"]

        def needed(loss: Tensor) -> Tensor:
            critical = constants["B_star"] * loss ** (-1 / constants["alpha_B"])
            least = constants["Sc"] * (loss - floor) ** (-1 / constants["alpha_S"])
            return least * (1 + critical / B)

        low, high = torch.full_like(at, floor), torch.full_like(at, 2 * floor + 1)
        while bool((needed(high) > at).any()):
            high = torch.where(needed(high) > at, high * 2, high)
        for _ in range(200):
            middle = (low + high) / 2
            more = needed(middle) > at
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return (low + high) / 2

    def report(self, level: float = 0.9) -> Report:
        """The constants, the tradeoffs they come from, and curves of growing models."""
        rows = [{"law": law.form.name, **row} for law in (self.size, self.batch, self.steps) for row in _constants(law)]
        losses = [row["loss"] for row in self.tradeoffs]
        batches = Line("from curves", losses, [row["B_crit"] for row in self.tradeoffs], style="points")
        told = Line("law", losses, [float(self.critical_batch(loss)) for loss in losses])
        plots = [Plot("Critical batch", "loss", "critical batch", [told, batches], log="xy")] if losses else []
        return Report("Law of whole training curves", dict(self.parameters), rows, plots, ["Fitted step by step."])


def _plain(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _constants(law: Law) -> list[dict[str, Any]]:
    return [{"constant": name, "value": value, "runs": len(law.observed)} for name, value in law.parameters.items()]


@card(
    paper="Su et al. 2024, 'Unraveling the Mystery of Scaling Laws: Part I'",
    covers=("unraveling-mystery-scaling-laws",),
    unit="model",
    claim="on planted curves with 1 % noise, a larger model's curve at an unseen batch is told better than without the "
    "critical batch",
    departs="contours of equal loss are cut from curves by interpolation in log steps; each step is the room's robust "
    "fit; constants of a finished step are not revisited",
)
def fit_trajectory(
    curves: Sequence[Mapping[str, Any]],
    converged: Mapping[str, Sequence[float]],
    *,
    losses: Sequence[float] | None = None,
    skip: float = 0.0,
    delta: float = 1e-3,
) -> Trajectory:
    """The three laws, one after the other.

    Args:
        curves: records ``{"N", "B", "S", "loss"}``: a model's size and batch, its steps ``[s]`` (rising), and its
            losses ``[s]``. Some sizes must stand at three batches or more.
        converged: columns ``N`` and ``loss``: sizes and what they converge to.
        losses: at which the curves are cut for the critical batch; nine between what all curves of a size reach
            if None.
        skip: points before this step are left out (warm-up).
        delta: of the Huber loss.

    Raises:
        Error: curves that do not fit, or fewer than two losses that three batches of one size reach.
    """
    size = fit(converged, "kaplan-size", bootstrap=0, delta=delta)
    read = [_curve(record, index, skip) for index, record in enumerate(curves)]
    tradeoffs = []
    for n in dict.fromkeys(one["N"] for one in read):
        tradeoffs += _tradeoffs([one for one in read if one["N"] == n], losses)
    if len(tradeoffs) < 2:
        raise Error("the critical batch needs at least two losses that curves of one size reach at three batches")
    table = {"loss": [row["loss"] for row in tradeoffs], "batch": [row["B_crit"] for row in tradeoffs]}
    batch = fit(table, "critical-batch", bootstrap=0, delta=delta, duplicates=True)
    rows: dict[str, list[float]] = {"N": [], "S": [], "loss": []}
    for one in read:
        least = one["S"] / (1 + batch.predict(loss=one["loss"]) / one["B"])
        rows["N"] += [one["N"]] * len(least)
        rows["S"] += least.tolist()
        rows["loss"] += one["loss"].tolist()
    steps = fit(rows, "kaplan-steps", fixed=size.parameters, bootstrap=0, delta=delta, duplicates=True)
    return Trajectory(size, batch, steps, tuple(tradeoffs))


def _curve(record: Mapping[str, Any], index: int, skip: float) -> dict[str, Any]:
    absent = [name for name in ("N", "B", "S", "loss") if name not in record]
    if absent:
        raise Error(f"curve {index + 1} has no {absent[0]}; a curve is a record of N, B, S and loss")
    steps, losses = (_plain(record[name]).reshape(-1) for name in ("S", "loss"))
    if len(steps) != len(losses) or len(steps) < 2 or not bool((steps.diff() > 0).all()):
        raise Error(f"curve {index + 1}: steps must rise, and there must be a loss for each of at least two")
    if not bool(losses.isfinite().all()) or not bool((losses > 0).all()):
        raise Error(f"curve {index + 1}: losses must be above 0 and finite")
    size, batch = float(record["N"]), float(record["B"])
    if not (0 < size < math.inf and 0 < batch < math.inf):
        raise Error(f"curve {index + 1}: N and B must be above 0 and finite, got {size:g} and {batch:g}")
    keep = steps >= max(skip, 1e-300)
    if not bool(keep.any()):
        raise Error(f"curve {index + 1} ends at step {float(steps[-1]):g}, before skip={skip:g}: nothing is left of it")
    return {"N": size, "B": batch, "S": steps[keep], "loss": losses[keep]}


def _tradeoffs(curves: list[dict[str, Any]], losses: Sequence[float] | None) -> list[dict[str, float]]:
    """For losses that all curves of one size cross: least steps, least examples, critical batch."""
    if len({one["B"] for one in curves}) < 3:
        return []
    top = min(float(one["loss"][0]) for one in curves)
    bottom = max(float(one["loss"].min()) for one in curves)
    if losses is None:
        inner = torch.linspace(0.15, 0.85, 9, dtype=torch.float64)
        cuts = (bottom + (top - bottom) * inner).tolist() if top > bottom else []
    else:
        cuts = [cut for cut in losses if bottom < cut < top]
    found = []
    for cut in cuts:
        table = {"B": [one["B"] for one in curves], "S": [_crossing(one, cut) for one in curves]}
        law = fit(table, "batch-tradeoff", bootstrap=0, duplicates=True)
        least, examples = law.parameters["S_min"], law.parameters["E_min"]
        found.append({"N": curves[0]["N"], "loss": cut, "S_min": least, "E_min": examples, "B_crit": examples / least})
    return found


def _crossing(curve: Mapping[str, Any], cut: float) -> float:
    """The step at which a curve first comes down to a loss, between two points in log steps."""
    after = int((curve["loss"] <= cut).nonzero()[0])
    if after == 0:
        return float(curve["S"][0])
    (high, low), (first, second) = curve["loss"][after - 1 : after + 1], curve["S"][after - 1 : after + 1].log()
    return float((first + (second - first) * (high - cut) / (high - low)).exp())

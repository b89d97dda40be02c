"""Two laws in a row: from size and data to a loss, and from that loss to what is wanted.

The link between the two is a loss; so the second law may be fitted on other runs (or on checkpoints along them) than
the first, and scores that show nothing in small models are still told through losses that do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.scaling import _runs
from weightsmith.inspect.scaling._fit import fit, known
from weightsmith.inspect.scaling._form import Form
from weightsmith.inspect.scaling._law import Law, Prediction, _quantiles
from weightsmith.inspect.scaling._runs import Runs, Table


@dataclass(frozen=True)
class Chain:
    """A law of a loss, and a law of a score from that loss."""

    first: Law
    second: Law

    def predict(self, *, interval: bool = False, level: float = 0.9, **columns: Any) -> Any:
        """The score at other sizes; with ``interval`` a `Prediction` with both laws' uncertainty.

        Where both laws were fitted to the same runs with one seed, each bootstrap of one goes with the same
        resample of the other.
        """
        made, single = self.first._columns(columns)
        value = self._through(self.first.theta[None], self.second.theta[None], made)[0]
        if not interval:
            return value.item() if single else value
        count = min(len(self.first._draws()), len(self.second._draws()))
        spread = self._through(self.first.draws[:count], self.second.draws[:count], made)
        ends = _quantiles(spread, level)
        return Prediction(*(end.item() if single else end for end in (value, *ends)))

    def _through(self, first: Tensor, second: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        return self.second._at(second, {"loss": self.first._at(first, columns)})

    def report(self, level: float = 0.9) -> Report:
        """Both laws' constants and fits, and how much the score's law can be trusted."""
        one, two = self.first.report(level), self.second.report(level)
        scatter = float(self.second.residuals.square().mean().sqrt())
        scores = self.second.observed
        spread = float(scores.std())
        figures = {
            "first law": self.first.form.about,
            "second law": self.second.form.about,
            "mean error of the loss, each run left out": one["mean error, each run left out"],
            "mean error of the score, each run left out": two["mean error, each run left out"],
            "scatter about the second law": scatter,
            "spread of the scores": spread,
        }
        notes = [*one.notes]
        if scatter > spread / 2:
            notes.append("The score scatters about its law by more than half of what it spans: do not trust it far.")
        rows = [
            {"law": law.form.name, **row} for law, made in ((self.first, one), (self.second, two)) for row in made.table
        ]
        losses = torch.linspace(
            float(self.second.columns["loss"].min()) * 0.8, float(self.second.columns["loss"].max()), 41
        )
        told = self.second.predict(loss=losses)
        link = Plot(
            "The second law",
            "loss",
            self.second.form.target,
            [
                Line("law", losses.tolist(), told.tolist()),
                Line("runs", self.second.columns["loss"].tolist(), scores.tolist(), style="points"),
            ],
        )
        return Report("Two laws in a row", figures, rows, [*one.plots[:2], link], notes)


@card(
    paper="Bhagia et al. 2024, 'Establishing Task Scaling Laws via Compute-Efficient Model Ladders'; Gadre et al. "
    "2024, 'Language models scale reliably with over-training and on downstream tasks'",
    covers=("establishing-task-scaling-laws", "language-models-scale-reliably"),
    unit="model",
    claim="the scores of the largest model are told better than by a line in the logarithm of compute",
)
def fit_chain(
    runs: Table | Runs,
    first: str | Form = "chinchilla",
    second: str | Form = "accuracy",
    *,
    loss: str = "loss",
    score: str | None = None,
    link: Table | Runs | None = None,
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    bootstrap: int = 200,
    duplicates: bool = False,
    seed: int = 0,
) -> Chain:
    """Both laws from a ladder of small runs.

    Args:
        runs: a table with the first law's columns, the loss and the score.
        first: ``chinchilla`` or ``over-training``, or another law of a loss.
        second: ``accuracy`` or ``downstream-error``, or another law with the one column ``loss``.
        loss: the column of the loss that links them: best that of the task's own right answers.
        score: the column of the score; the second form's target if None.
        link: another table with losses and scores for the second law, such as checkpoints along the runs.
        columns, delta, bootstrap, duplicates, seed: as in `fit`.

    Raises:
        Error: the second law is not of one column ``loss``; as `fit`, for either law.
    """
    end = known(second)
    if end.columns != ("loss",):
        raise Error(f"the second law of a chain has the one column loss; {end.name} has {', '.join(end.columns)}")
    table = _runs.read(runs, columns)
    shared: dict[str, Any] = {"delta": delta, "bootstrap": bootstrap, "seed": seed, "duplicates": duplicates}
    one = fit(table, first, target=loss, **shared)
    other = table if link is None else _runs.read(link)
    renamed = {"loss": loss} if loss != "loss" else None
    return Chain(one, fit(other, end, target=score, columns=renamed, **shared))


@card(
    paper="Brandfonbrener, Anand, Vyas, Malach, Kakade 2024, 'Loss-to-Loss Prediction: Scaling Laws for All Datasets'",
    covers=("loss-to-loss-prediction",),
    unit="model",
    departs="irreducible losses may be given (from fits of each data set) or fitted along",
)
def translate(
    known: Sequence[float] | Tensor,
    wanted: Sequence[float] | Tensor,
    *,
    floor: float | None = None,
    wanted_floor: float | None = None,
    delta: float = 1e-3,
    bootstrap: int = 200,
    duplicates: bool = False,
    seed: int = 0,
) -> Law:
    """The law from one loss to another, of the same runs in the same order.

    The three uses differ only in what is paired. Train to train: models of equal compute on two data sets. Train to
    test: one model's loss on its own data and on other data. Test to test: two models of equal compute on a third
    data set.

    Args:
        known, wanted: ``[n]`` losses.
        floor, wanted_floor: the irreducible parts, such as ``fit(...).parameters["E"]`` of each; fitted if None.
        delta, bootstrap, duplicates, seed: as in `fit`.

    Returns:
        A law with ``predict(loss=...)``; NaN for a loss below the irreducible part. Give ``floor`` where you will ask
        for losses much below those here: one that is fitted may lie anywhere up to the least of them.

    Raises:
        Error: losses that cannot be paired, an irreducible part that does not lie below all of them; as `fit`.

    >>> known = [3.0, 2.5, 2.2, 2.0, 1.8, 1.7]
    >>> law = translate(known, [1.2 * (x - 1.5) ** 0.8 + 1.1 for x in known], floor=1.5, bootstrap=0)
    >>> round(law.parameters["kappa"], 3)
    0.8
    """
    if len(known) != len(wanted):
        raise Error(f"{len(known)} known losses and {len(wanted)} wanted ones cannot be paired")
    table = _runs.read({"loss": known, "other": wanted})
    least, other_least = float(table.numbers("loss").min()), float(table.numbers("other").min())
    for name, given_, value in (("floor", floor, least), ("wanted_floor", wanted_floor, other_least)):
        if given_ is not None and not 0 <= given_ < value:
            raise Error(f"{name} must lie below every loss, the least of which is {value:g}; got {given_:g}")
    fixed = {name: value for name, value in (("E0", floor), ("E1", wanted_floor)) if value is not None}
    shares = (0.01, 0.4, 0.8, 0.95)
    starts = {"E0": [least * share for share in shares], "E1": [other_least * share for share in shares]}
    open_ = {name: values for name, values in starts.items() if name not in fixed}
    options: dict[str, Any] = {"delta": delta, "bootstrap": bootstrap, "duplicates": duplicates, "seed": seed}
    return fit(table, "loss-to-loss", fixed=fixed, starts=open_, **options)

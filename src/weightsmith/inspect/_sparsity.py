"""How much of a checkpoint could be zero: what the small weights hold together, layer by layer.

The energy (sum of squares) that is lost when the smallest weights go tells how far the matrix moves. It
grows slowly at first and then steeply; the knee between is where removing one more weight begins to cost
more than its share.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._parts import Source, by_kind, grid, matrices, named
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._statistics import streamed
from weightsmith.weights import Pattern, open

_BUCKETS = 2**15  # of the high halves of the bits of magnitudes in float32; each is at most 1/128 of its values wide
_PLACES = tuple(step / 50 for step in range(1, 51))


@card(
    paper="Jaiswal et al. 2023, 'The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that "
    "Matter' (the knee of one-shot magnitude pruning); Satopää et al. 2011, 'Finding a Kneedle in a Haystack' (a knee "
    "as the point furthest from the chord)",
    unit="element",
    claim="the knee of Gaussian weights is at 68 %; heavier tails move it up",
    departs="the curve is of the energy that is lost, which needs no data, not of a loss",
)
def sparsity_knees(
    weights: Source,
    *,
    energy: Sequence[float] = (0.001, 0.01, 0.1),
    sparsity: float = 0.5,
    pattern: Pattern = "*",
    threads: int | None = None,
) -> Report:
    r"""How many of the smallest weights can go for a share of the energy, by matrix and overall, and the knee.

    .. math:: L(s) = \frac{\sum_{i \le s n} w_{(i)}^2}{\sum_i w_i^2}, \qquad |w_{(1)}| \le |w_{(2)}| \le \dots

    The knee is the share :math:`s` at which :math:`L` lies furthest below its chord: there its slope is 1, so it is
    the share of the weights that are smaller than the root mean square.

    Args:
        weights: a checkpoint; anything that `weightsmith.open` opens.
        energy: shares of the energy that may be lost.
        sparsity: the share of all weights that a single threshold over all matrices removes.
        pattern: names of tensors; float tensors of two axes or more.
        threads: workers; default one a core. Values are read once, in small pieces, and never sorted: they are
            counted by magnitude in steps of less than 1 %, with the exact energy of each step.

    Returns:
        Report: a row a matrix, and one for all: ``zeros``, the sparsity that loses each share of the energy,
        ``knee`` and the energy ``lost at knee``, and ``removed`` by the one threshold. Plots: energy lost by kind,
        sparsity at the middle share by layer and kind, removed by the one threshold.

    Raises:
        ValueError: shares outside (0, 1), or no matrix that fits.

    >>> found = sparsity_knees({"w": torch.tensor([[0.0, 0.0, 1.0, 3.0]])}, energy=(0.1,))
    >>> found["zeros"], found["sparsity at 10 %"]
    (0.5, 0.75)
    """
    if not energy or not all(0 < share < 1 for share in (*energy, sparsity)):
        raise Error(f"energy and sparsity are shares between 0 and 1, got {list(energy)} and {sparsity}")
    opened = open(weights)
    names = matrices(opened, pattern)
    groups = [(opened.node(name),) for name in names]
    found: list[_Histogram] = streamed(_counted, groups, "counting magnitudes", threads, solve=_packed)
    whole = functools.reduce(_Histogram.__add__, found)
    threshold = whole.quantile(sparsity)
    keys = [f"sparsity at {100 * share:g} %" for share in energy]
    sized = [(named(name), opened.spec(name).numel, one) for name, one in zip(names, found, strict=True)]
    rows = [_row(name, values, one, keys, energy, threshold) for name, values, one in sized]
    together = _row({"tensor": "all", "layer": "all", "kind": "all"}, whole.total, whole, keys, energy, threshold)
    middle = keys[len(keys) // 2]
    plots = [
        _curves(rows, dict(zip(names, found, strict=True)), whole),
        grid(f"{middle} of the energy", rows, lambda row: row[middle]),
        grid(f"removed when {100 * sparsity:g} % of all go", rows, lambda row: row["removed"]),
    ]
    skipped = sum(one.bad for one in found)
    return Report(
        "Sparsity of weights",
        figures={name: value for name, value in together.items() if name not in ("tensor", "layer", "kind", "removed")},
        table=[*rows, together],
        plots=plots,
        notes=[
            "Energy says how far a matrix moves, not what its network loses: that is up to the inputs it meets.",
            *([f"{skipped:,} values are not finite and were left out."] if skipped else []),
        ],
    )


@dataclass(frozen=True)
class _Histogram:
    """Magnitudes by the high half of their bits: only the buckets in use."""

    buckets: Tensor
    counts: Tensor
    energies: Tensor
    zeros: int
    bad: int

    def __add__(self, other: _Histogram) -> _Histogram:
        buckets, places = torch.cat([self.buckets, other.buckets]).unique(return_inverse=True)
        counts = torch.zeros(len(buckets), dtype=torch.int64).index_add_(
            0, places, torch.cat([self.counts, other.counts])
        )
        energies = torch.zeros(len(buckets), dtype=torch.float64)
        energies.index_add_(0, places, torch.cat([self.energies, other.energies]))
        return _Histogram(buckets, counts, energies, self.zeros + other.zeros, self.bad + other.bad)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def lost(self, sparsity: float) -> float:
        """The share of the energy that goes with this share of the weights."""
        energy = float(self.energies.sum())
        return _along(self.counts, self.energies, sparsity * self.total) / energy if energy else 0.0

    def sparsity(self, lost: float) -> float:
        """The share of the weights that can go for this share of the energy."""
        energy = float(self.energies.sum())
        return _along(self.energies, self.counts, lost * energy) / self.total if energy else 1.0

    def quantile(self, share: float) -> float:
        """The place on the axis of buckets, with a fraction, below which this share of the weights lies."""
        if not self.total:
            return 0.0
        reached = self.counts.cumsum(0).double()
        place = min(int(torch.searchsorted(reached, share * self.total)), len(reached) - 1)
        before = float(reached[place - 1]) if place else 0.0
        return float(self.buckets[place]) + (share * self.total - before) / float(self.counts[place])

    def below(self, place: float) -> float:
        """The share of the weights below a place on the axis of buckets."""
        inside = (place - self.buckets.double()).clamp(0, 1)
        return float((inside * self.counts).sum()) / self.total if self.total else 0.0

    def knee(self) -> float:
        """The share of the weights whose square is below the mean square."""
        if not float(self.energies.sum()):
            return 1.0
        mean = float(self.energies.sum()) / self.total
        # The bucket in which a weight is as large as the root mean square, and how far into it that is.
        key = torch.tensor(mean**0.5, dtype=torch.float32).view(torch.int32).item()
        return self.below(key / 2**16)


def _along(steps: Tensor, others: Tensor, amount: float) -> float:
    """The sum of ``others`` where that of ``steps`` reaches ``amount``; in proportion inside a step."""
    reached = steps.cumsum(0).double()
    place = int(torch.searchsorted(reached, amount, right=True))
    if place >= len(reached):
        return float(others.sum())
    before = float(reached[place - 1]) if place else 0.0
    inside = (amount - before) / float(steps[place])
    return float(others[:place].sum()) + inside * float(others[place])


def _counted(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts and energies ``[buckets]``, and how many are zero and how many not finite."""
    values = values.reshape(-1).abs().float()
    finite = values.isfinite()
    bad = 0
    if not finite.all():
        bad = int((~finite).sum())
        values = values[finite]
    key = values.contiguous().view(torch.int32) >> 16
    counts = torch.bincount(key, minlength=_BUCKETS)
    energies = torch.bincount(key, weights=values.double().square(), minlength=_BUCKETS)
    zeros = values.numel() - int(values.count_nonzero())
    return counts, energies, torch.tensor([zeros, bad])


def _packed(total: tuple[Tensor, Tensor, Tensor]) -> _Histogram:
    counts, energies, (zeros, bad) = total[0].cpu(), total[1].cpu(), total[2].tolist()
    used = counts.nonzero().flatten()
    return _Histogram(used, counts[used], energies[used].double(), zeros, bad)


def _row(
    names: Mapping[str, str],
    values: int,
    found: _Histogram,
    keys: Sequence[str],
    energy: Sequence[float],
    threshold: float,
) -> dict[str, Any]:
    known = found.total > 0
    row: dict[str, Any] = {**names, "values": values, "zeros": found.zeros / found.total if known else None}
    row |= {key: found.sparsity(share) if known else None for key, share in zip(keys, energy, strict=True)}
    knee = found.knee() if known else None
    return row | {
        "knee": knee,
        "lost at knee": None if knee is None else found.lost(knee),
        "removed": found.below(threshold) if known else None,
    }


def _curves(rows: Sequence[Mapping[str, Any]], found: Mapping[str, _Histogram], whole: _Histogram) -> Plot:
    pooled = {
        kind: functools.reduce(_Histogram.__add__, (found[row["tensor"]] for row in members))
        for kind, members in by_kind(rows, most=7).items()
    }
    every = {"all": whole, **(pooled if len(pooled) > 1 else {})}
    lines = [Line(kind, _PLACES, [one.lost(place) for place in _PLACES]) for kind, one in every.items() if one.total]
    return Plot("Energy lost by sparsity", "share of the weights removed", "share of the energy lost", lines, log="y")

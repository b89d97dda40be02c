"""Inputs that are large are rounded finely: they are made smaller, and their weights larger, before rounding.

A group of weights shares its steps, and few inputs of a layer carry most of what it computes. Weights that are
multiplied before rounding and divided after it have smaller errors; how far to go is found by trying, with the
outputs of the layer as the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import stats as _stats
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.graph import UnitGraph
from weightsmith.quantize import _rtn
from weightsmith.quantize._coded import energy_of
from weightsmith.quantize.room import Plan, planned
from weightsmith.quantize.transforms._parts import Reading, floored, gathered, graph_of, readings, sizes_of
from weightsmith.quantize.transforms._places import Place, places, scaled
from weightsmith.stats import Batch, Forward
from weightsmith.weights import Pattern, Weights, open

ROWS = 64
"""So many rows of a matrix tell nearly which exponent is best."""


@card(
    paper="Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2024, 'AWQ: Activation-aware Weight Quantization "
    "for LLM Compression and Acceleration'",
    covers=("awq",),
    needs=("data", "graph"),
    unit="model",
    claim="rounding to nearest leaves less error on held-out text with its factors than without",
    departs="errors are those of the matrices that read a place, through their Gram matrix, not of the whole module "
    "around them, and of large ones the best exponent is sought near that of a share of their rows; every place is "
    "searched on weights that no other place has changed; the exponent 1 is tried too; values and outputs of grouped "
    "heads are a place too; the search for a clipping range is the rounding's own (clip=)",
)
def awq(
    weights: Any,
    batches: Iterable[Batch] | None = None,
    *,
    graph: UnitGraph | None = None,
    stats: Mapping[str, Tensor] | None = None,
    sizes: Mapping[str, Tensor] | None = None,
    steps: int = 20,
    gains: Mapping[str, Sequence[str]] | None = None,
    offset: float = 0.0,
    pattern: Pattern | None = None,
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> Weights:
    r"""The same network with large inputs of its matrices made smaller, as far as rounding gains by it.

    .. math:: s_j = \frac{\bar x_j^{\,\alpha}}{\sqrt{\max_k \bar x_k^{\,\alpha}\,\min_k \bar x_k^{\,\alpha}}}, \qquad
        \alpha = \operatorname{arg\,min}_\alpha \sum_W
        \operatorname{tr}\big((W - Q_\alpha)\, H\, (W - Q_\alpha)^\top\big), \qquad
        Q_\alpha = Q(W \operatorname{diag} s) \operatorname{diag}(s)^{-1}

    with :math:`\bar x_j` the mean of :math:`|x_j|`, :math:`H` the Gram matrix of the inputs, :math:`Q` rounding to
    nearest on the grid that comes after, and the sum over all that read the place. With :math:`\alpha = 0` nothing
    changes, so on the calibration data no place loses by it. Of large matrices
    a share of the rows is rounded for every exponent, and all of them only for those near the best.

    Args:
        weights: what `weightsmith.open` opens: a folder, a module.
        batches: ``inputs``, ``(inputs, labels)`` or mappings. Statistics are gathered block after block with what the
            unchanged blocks give; those of one block are in memory at a time.
        graph: the units; by default of the family of a folder, or traced from a module.
        stats: Gram matrices in place of ``batches``, all at once.
        sizes: with ``stats``, the mean of ``|x|`` of each input, as `weightsmith.stats.activations` has it; by default
            the root of the Gram matrix's diagonal.
        steps: how many exponents above 0 are tried, up to 1.
        gains, offset: as `places` takes them.
        pattern: which tensors will be rounded; by default those that `weightsmith.quantize.rtn` rounds.
        model, blocks, dtype, device, forward: as in `weightsmith.stats.walk`.
        options: of the grid and of rounding to nearest: ``bits``, ``group``, ``grid``, ``symmetric``, ``clip``,
            possibly by tensor. Say those that the rounding will be called with.

    Returns:
        Weights: lazy, of the same shapes and names; give them to `weightsmith.quantize.rtn`, `gptq` or `sequential`.

    Raises:
        Error: no place reads a tensor that is rounded, a block that computes something else with its weights
            rescaled, weights or statistics that are not finite, or options and data that do not fit.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> data = [torch.rand(16, 4) * torch.tensor([1.0, 1.0, 1.0, 50.0])]
    >>> new = awq(net, data, bits=3, group=4)
    >>> again = net.__class__(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> _ = new.load_into(again)
    >>> torch.allclose(again(data[0]), net(data[0]), rtol=1e-4, atol=1e-4)
    True
    """
    if steps < 1:
        raise Error(f"awq tries at least one exponent, got steps={steps}")
    if (batches is None) == (stats is None):
        raise Error("awq is given batches of data, or Gram matrices with stats=")
    opened = open(weights)
    if graph is None:
        graph, batches = graph_of(weights, opened, model, batches)
    plans = planned(_rtn.rtn, opened, {**options, "pattern": pattern})
    every = [
        place
        for place in places(opened, graph, gains, offset=offset)
        if any(side.tensor in plans and side.dim == 1 for side in place.readers)
    ]
    if not every:
        raise Error("no tensor that is rounded reads a place that can be rescaled; see quantize.transforms.places")
    if stats is not None:
        found = {place.name: _found(place, opened, plans, stats, sizes or {}, steps) for place in every}
        factors = {name: factor for name, factor in found.items() if factor is not None}
    else:
        wanted = {side.tensor for place in every for side in place.readers if side.tensor in plans}
        asked = {
            "gram": _stats.Gram(wanted.__contains__, sums=torch.float32),
            "sizes": _stats.Activations("mean_absolute", pattern=wanted.__contains__),
        }
        factors = gathered(
            opened, batches or (), every, asked,
            lambda place, own, seen: _found(place, own, plans, seen["gram"], seen["sizes"], steps),
            module=weights if isinstance(weights, nn.Module) else model,
            blocks=blocks, dtype=dtype, device=device, forward=forward,
        )  # fmt: skip
    return scaled(opened, every, factors, "awq")


def _found(
    place: Place,
    weights: Weights,
    plans: Mapping[str, Plan],
    grams: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    steps: int,
) -> Tensor | None:
    """The factors of a place, or None where it stays as it is."""
    counted = readings(place, weights, plans, grams)
    if not counted:
        return None
    known = sizes_of(place, sizes, "mean")
    if known is None:
        names = [side.tensor for side in place.readers]
        roots = {name: energy_of(grams[name]).clamp(min=0).sqrt() for name in names if name in grams}
        known = sizes_of(place, roots, "mean")
    if known is None:
        return None
    exponent, factor = searched(known, counted, steps)
    return factor if exponent else None


def searched(sizes: Tensor, counted: Sequence[Reading], steps: int = 20) -> tuple[float, Tensor]:
    """The exponent of least error among ``steps + 1`` from 0 to 1, the smallest of equals, and its factors.

    Args:
        sizes: ``[units]``, how large the inputs are.
        counted: what reads them. `ROWS` rows of each are rounded for every exponent; where there are more, all are
            rounded for the best exponent of those, and on from it as long as a neighbour is better.
    """
    factors = [factors_for(sizes, step / steps) for step in range(steps + 1)]
    some = [reading.share(ROWS) for reading in counted]
    errors = [_total(some, factor) for factor in factors]
    best = min(range(steps + 1), key=errors.__getitem__)
    if any(part is not whole for part, whole in zip(some, counted, strict=True)):
        best = _descended(best, lambda step: _total(counted, factors[step]), steps)
    return best / steps, factors[best]


def _descended(start: int, error: Callable[[int], float], most: int) -> int:
    """The lowest whole number downhill from a start within 0 to ``most``; 0 where that is no worse."""
    known = {step: error(step) for step in {0, start}}
    place = start
    while True:
        around = [step for step in (place - 1, place, place + 1) if 0 <= step <= most]
        known |= {step: error(step) for step in around if step not in known}
        lowest = min(around, key=known.__getitem__)
        if lowest == place:
            return place if known[place] < known[0] else 0
        place = lowest


def _total(counted: Sequence[Reading], factor: Tensor) -> float:
    return float(sum(reading.error(factor) for reading in counted))


def factors_for(sizes: Tensor, exponent: float) -> Tensor:
    """Sizes to a power, with the largest and the smallest equally far from one.

    >>> factors_for(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    tensor([0.5000, 1.0000, 2.0000])
    """
    power = floored(sizes) ** exponent
    return power / (power.max() * power.min()).sqrt() if len(power) else power

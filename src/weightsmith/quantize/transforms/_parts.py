"""What the rescaling transforms share: statistics block by block, and the error that a factor leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith import stats
from weightsmith.errors import Error
from weightsmith.graph import UnitGraph, of, trace
from weightsmith.quantize import _rtn
from weightsmith.quantize._coded import output_error
from weightsmith.quantize.room import Plan, rounded
from weightsmith.quantize.transforms._places import Place, by_unit, scaled, spread
from weightsmith.solve import generator_for
from weightsmith.stats import Batch
from weightsmith.stats.room import NoneFits
from weightsmith.weights import Weights

FLOOR = 1e-4
"""Inputs that are smaller than this share of the largest, or always zero, count as this large."""

OFF = 1e-3
"""How far, as a share of its size, a block's output may be off after rescaling in float32."""


def graph_of(
    weights: Any, opened: Weights, model: nn.Module | None, batches: Iterable[Batch] | None
) -> tuple[UnitGraph, Iterable[Batch] | None]:
    """The graph of a checkpoint of a known family, or of a module by its first batch; and all the batches."""
    module = weights if isinstance(weights, nn.Module) else model
    if module is None:
        return of(opened), batches
    if batches is None:
        raise Error("the graph of a module is traced with a batch: give batches=, or graph=")
    if isinstance(batches, Sequence):
        first = batches[0] if batches else None
    else:
        rest = iter(batches)
        first = next(rest, None)
        batches = itertools.chain([] if first is None else [first], rest)
    if first is None:
        raise Error("a transform needs at least one batch of data, got none")
    if isinstance(first, Mapping):
        first = {name: value for name, value in first.items() if name != "labels"}
    elif isinstance(first, list | tuple):
        first = first[0]
    return trace(module, first, verify=False), batches


# Statistics of one block at a time


def gathered(
    opened: Weights,
    batches: Iterable[Batch],
    every: Sequence[Place],
    statistics: Mapping[str, Any],
    find: Callable[[Place, Weights, Mapping[str, Weights]], Tensor | None],
    *,
    module: nn.Module | None,
    **how: Any,
) -> dict[str, Tensor]:
    """The factors of places, each found while the block that reads it is visited; its statistics are then dropped.

    Memory is that of `weightsmith.stats.walk`, with the statistics of one block. What each block gives with its
    rescaled weights is compared with what it gave, so that a graph that is wrong is an error and not a broken model.

    Args:
        statistics: name -> what to gather, as in `weightsmith.stats.walk`.
        find: ``(place, weights, {name: statistics}) -> [units]`` or None.
        how: of `weightsmith.stats.walk`.
    """
    factors: dict[str, Tensor] = {}

    def visit(block: stats.Block) -> None:
        own = set(block.names)
        here = [place for place in every if any(side.tensor in own for side in place.readers)]
        found = {place.name: find(place, block.weights, block.statistics) for place in here}
        new = {name: factor for name, factor in found.items() if factor is not None}
        _check(block, [place for place in here if place.name in new], new)
        factors.update(new)

    try:
        stats.walk(
            opened, batches, visit, model=module, statistics=statistics, propagate="dense", keep=False, **how
        )  # fmt: skip
    except NoneFits as error:
        raise Error(f"no block has a layer that can be rescaled: {error}") from None
    return factors


def _check(block: stats.Block, here: Sequence[Place], factors: Mapping[str, Tensor]) -> None:
    """An error where the block computes something else with rescaled weights."""
    own = set(block.names)
    inside = [place for place in here if {side.tensor for side in (*place.writers, *place.readers)} <= own]
    known = dict(block.module.named_parameters())
    if not inside or next(iter(known.values())).dtype.itemsize < 4:
        return
    cut = len(block.name) + 1 if block.name else 0
    after = scaled(block.weights, inside, {place.name: factors[place.name] for place in inside})
    touched = {side.tensor for place in inside for side in (*place.writers, *place.readers)}
    if any(name[cut:] not in known for name in touched):
        return  # the module has other names than the weights
    new = {name[cut:]: after[name].to(known[name[cut:]]) for name in touched}

    def called(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block.module, new, args, kwargs)

    with torch.no_grad():
        before = block.forward(block.module, block.batches[0]).float()
        off = (block.forward(called, block.batches[0]).float() - before).norm() / before.norm().clamp(min=1e-30)
    if not off <= OFF:
        raise Error(
            f"{block.name} computes something else with its weights rescaled (off by {off:.1e}) at "
            f"{'; '.join(map(str, inside))}: the graph does not tell all that happens there, or gains are stored less "
            "one (offset=1)"
        )


# What a factor does to the rounding of what reads it


@dataclass(frozen=True, eq=False)
class Reading:
    """A matrix that reads a place, with what is needed to round it.

    Attributes:
        rows: ``[out, in]``, float32 or wider.
        units: ``[in]``, the unit of each input.
        gram: of its inputs, any form.
        plan: its grid, and the options of rounding to nearest.
        stands_for: how many rows of the whole matrix each of these stands for.
    """

    rows: Tensor
    units: Tensor
    gram: Tensor
    plan: Plan
    stands_for: float = 1.0

    def share(self, count: int) -> Reading:
        """The same with so many of its rows, drawn without regard to their order (heads repeat in it); itself if fewer.

        A grid that shares parameters in the whole tensor is fitted to these rows alone.
        """
        if len(self.rows) <= count:
            return self
        drawn = torch.randperm(len(self.rows), generator=generator_for(0, "rows"))[:count]
        rows = self.rows[drawn.to(self.rows.device)]
        return replace(self, rows=rows, stands_for=self.stands_for * len(self.rows) / count)

    def error(self, factor: Tensor) -> Tensor:
        """The squared error of the outputs when the matrix is rounded with its inputs' factors ``[units]`` in it."""
        by = spread(self.units, factor.to(self.rows))
        told = divided(self.gram, by.to(self.gram)) if self.plan.options.get("clip") else None
        found = rounded(_rtn.rtn, self.plan.layout, self.plan.options, self.rows * by, told)
        return self.stands_for * output_error(self.rows, found.values()[:, : len(by)] / by, self.gram)


def divided(gram: Tensor, factors: Tensor) -> Tensor:
    """The Gram matrix of inputs that are divided by factors ``[in]``."""
    if gram.dim() == 1:
        return gram / factors.square()
    by = factors.unflatten(0, gram.shape[:2]) if gram.dim() == 3 else factors
    return gram / by.unsqueeze(-1) / by.unsqueeze(-2)


def readings(place: Place, weights: Weights, plans: Mapping[str, Plan], grams: Mapping[str, Tensor]) -> list[Reading]:
    """Those readers of a place that are rounded and whose Gram matrix is known; experts in one tensor are not."""
    found = []
    for side in place.readers:
        plan = plans.get(side.tensor)
        if plan is None or side.tensor not in grams or side.tensor not in weights or side.dim != 1:
            continue
        if plan.layout.experts > 0:
            continue
        gram = grams[side.tensor]
        rows = plan.layout.matrix(weights[side.tensor].to(gram.device))[:, : plan.layout.inputs]
        if not (gram.isfinite().all() and rows.isfinite().all()):
            raise Error(f"{side.tensor}: the weight or the Gram matrix of its inputs has entries that are not finite")
        units = side.units.to(gram.device).repeat_interleave(rows.shape[1] // max(len(side.units), 1))
        found.append(Reading(rows, units, gram, plan))
    return found


def sizes_of(place: Place, known: Mapping[str, Tensor], how: str) -> Tensor | None:
    """``[units]`` from a number for each input of a reader (of a convolution, for each place of the kernel too)."""
    for side in place.readers:
        if side.tensor in known and side.dim == 1:
            values = known[side.tensor]
            if not values.isfinite().all():
                raise Error(f"{side.tensor}: the sizes of its inputs are not all finite")
            values = values.unflatten(0, (len(side.units), -1)).mean(1) if len(values) != len(side.units) else values
            return by_unit(side, values, how)
    return None


def floored(sizes: Tensor) -> Tensor:
    """Sizes of which none is far below the largest; ones where all are zero."""
    largest = sizes.max() if len(sizes) else sizes.sum()
    return sizes.clamp(min=float(largest) * FLOOR) if largest > 0 else torch.ones_like(sizes)

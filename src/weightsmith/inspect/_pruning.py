"""What pruning has done to a checkpoint: zeros by layer, how far its outputs move, and what that saves."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.inspect._parts import Source, by_kind, grid, in_order, named, short
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._statistics import streamed
from weightsmith.prune import prunable
from weightsmith.prune.allocation import output_energy
from weightsmith.prune.room import of_targets
from weightsmith.weights import Inputs, Pattern, Reduction, Weights, open, single, solve_all


@card(
    paper="Sun, Liu, Bair, Kolter 2024, 'A Simple and Effective Pruning Approach for Large Language Models' (the "
    "change of a layer's outputs on calibration data as what counts, not that of its weights)",
    unit="row",
    claim="the change of outputs is what running the layer on the data gives",
)
def pruning(
    before: Source,
    after: Source,
    *,
    stats: Source | None = None,
    pattern: Pattern | None = None,
    threads: int | None = None,
) -> Report:
    r"""Zeros, the relative change of weights and of outputs, and bytes, matrix by matrix.

    .. math:: e_W = \frac{\lVert W' - W \rVert_F}{\lVert W \rVert_F}, \qquad
        e_Y = \sqrt{\frac{\operatorname{tr}\, (W' - W)\, G\, (W' - W)^\top}{\operatorname{tr}\, W G W^\top}}

    Args:
        before: the checkpoint as it was.
        after: as it is.
        stats: of the inputs on data (`weightsmith.stats.gram`): Gram matrices, their blocks or diagonals; of some of
            the matrices is enough.
        pattern: names of tensors; by default matrices and convolutions without embeddings and the head.
        threads: workers; default one a core. Read by runs of rows.

    Returns:
        Report: a row a matrix: ``zeros``, the relative ``change``, the relative ``output change`` where data tell,
        ``rows gone`` and ``inputs gone`` (all zero, so that they can be cut), ``bytes`` and ``packed bytes`` (values
        that are left and a bit for each place). The figures are of all together, None where they are no number; the
        ``output change`` is of the matrices that data tell of.

    Raises:
        Error: no matrix, other names or shapes, or stats of none of the matrices or of other shapes.

    >>> found = pruning({"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[0.0, 4.0]])}, pattern="*")
    >>> found["zeros"], found["change"]
    (0.5, 0.6)
    """
    old, new = open(before), open(after)
    names = prunable(old) if pattern is None else old.names(pattern, floating=True)
    names = [name for name in names if len(old.spec(name).shape) >= (2 if pattern is None else 1)]
    for name in names:
        if name not in new or new.spec(name).shape != old.spec(name).shape:
            raise Error(f"{name}: is {old.spec(name)} before, and after pruning it is {_said(new, name)}")
    if not names:
        raise Error(f"no matrix to look at among {listed(old)}; say which with pattern=")
    known = {} if stats is None else known_of(open(stats), old, names, "pruning")
    sums = sums_of(old, new, names, known, threads)
    rows = [_row(old, name, sums[name]) for name in names]
    together = {
        word: torch.stack(
            [sums[name][word] for name in (known if word in _OF_DATA else names)] or [torch.zeros(())]
        ).sum()
        for word in ("zeros", "change", "energy", *_OF_DATA)
    }
    values = sum(row["values"] for row in rows)
    figures = {
        "matrices": len(rows),
        "zeros": float(together["zeros"]) / max(values, 1),
        "change": relative(together["change"], together["energy"]),
        "output change": relative(together["outputs"], together["output energy"]) if known else None,
        "rows gone": sum(row["rows gone"] for row in rows),
        "inputs gone": sum(row["inputs gone"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "packed bytes": sum(row["packed bytes"] for row in rows),
    }
    plots = [_by_layer(rows, "zeros")]
    if known:
        plots.append(grid("output change", rows, lambda row: row["output change"]))
    else:
        plots.append(grid("change", rows, lambda row: row["change"]))
    notes = ["Zeros make a model neither smaller nor faster by themselves: packed bytes are what a bitmask would take."]
    return Report("What pruning has changed", figures, rows, plots, notes)


def _said(weights: Weights, name: str) -> str:
    return str(weights.spec(name)) if name in weights else "not there"


def known_of(told: Weights, weights: Weights, names: Sequence[str], method: str) -> dict[str, Any]:
    """What the data say of a matrix, under whichever of its names."""
    nodes = {id(weights.node(name)) for name in weights if name in told}
    known = of_targets(told, "stats.gram", weights, [name for name in names if id(weights.node(name)) in nodes], method)
    if not known:
        raise Error(f"{method}: stats say nothing of {listed(names)}; they are of {listed(told)}")
    return known


def sums_of(
    old: Weights, new: Weights, names: Sequence[str], known: Mapping[str, Any], threads: int | None
) -> dict[str, dict[str, Tensor]]:
    """By name, what adds up over rows."""
    plain = [name for name in names if name not in known]
    found = dict(
        zip(
            plain,
            streamed(_compared, [(old.node(n), new.node(n)) for n in plain], "comparing", threads, "row"),
            strict=True,
        )
    )
    reductions = {
        name: Reduction(
            [Inputs([old.node(name), new.node(name), gram], "row")], functools.partial(single, _compared, _found)
        )
        for name, gram in known.items()
    }
    solve_all(list(reductions.values()), threads)
    found |= {name: reduction.value() for name, reduction in reductions.items()}
    return {name: _named(found[name]) for name in names}


_WORDS = ("zeros", "change", "energy", "outputs", "output energy", "rows gone")
_OF_DATA = ("outputs", "output energy")


def _compared(before: Tensor, after: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[6]`` sums, and for each input how many rows use it, float64."""
    flat = before.reshape(len(before), before.shape[1:].numel()).double()
    left = after.reshape(flat.shape).double()
    apart, there = left - flat, left != 0
    outputs = energy = flat.new_full((), math.nan)
    if gram is not None:
        gram = gram.to(flat.device)
        outputs, energy = (flat.new_tensor(output_energy(rows, gram)) for rows in (apart, flat))
    rows_gone = (~there.any(dim=1)).sum() if flat.shape[1] else flat.new_zeros(())
    plain = [(~there).sum(), apart.square().sum(), flat.square().sum(), outputs, energy, rows_gone]
    return torch.stack([value.double() for value in plain]), there.sum(dim=0).double()


def _found(total: Any) -> Any:
    return total


def _named(found: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    if found is None:  # a tensor without values
        return dict.fromkeys((*_WORDS, "inputs gone"), torch.zeros((), dtype=torch.float64))
    sums, users = found
    return dict(zip(_WORDS, sums.cpu(), strict=True)) | {"inputs gone": (users == 0).sum().double().cpu()}


def relative(error: Tensor, energy: Tensor) -> float | None:
    if not energy.isfinite() or not error.isfinite():
        return None
    return math.sqrt(float(error / energy)) if energy else (0.0 if not error else None)


def _row(weights: Weights, name: str, sums: Mapping[str, Tensor]) -> dict[str, Any]:
    spec = weights.spec(name)
    left = spec.numel - int(sums["zeros"])
    return {
        **named(name),
        "rows": spec.shape[0],
        "inputs": math.prod(spec.shape[1:]),
        "values": spec.numel,
        "zeros": float(sums["zeros"]) / max(spec.numel, 1),
        "change": relative(sums["change"], sums["energy"]),
        "output change": relative(sums["outputs"], sums["output energy"]),
        "rows gone": int(sums["rows gone"]),
        "inputs gone": int(sums["inputs gone"]),
        "bytes": spec.nbytes,
        "packed bytes": left * spec.dtype.itemsize + -(-spec.numel // 8),
    }


def _by_layer(rows: Sequence[Mapping[str, Any]], what: str) -> Plot:
    layers = in_order(row["layer"] for row in rows)
    lines = []
    for kind, members in by_kind(rows).items():
        at = {row["layer"]: row[what] for row in members}
        lines.append(Line(kind, short(layers), [at.get(layer, math.nan) for layer in layers]))
    return Plot(f"{what.capitalize()} by layer and kind", "layer", f"share of {what}", lines)

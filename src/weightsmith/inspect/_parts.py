"""What functions on checkpoints share: which matrix a name speaks of, and drawings by layer and kind."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, listed
from weightsmith.inspect._plain import layer_of
from weightsmith.inspect._report import Line, Plot, Surface
from weightsmith.inspect._spectra import has_spectrum
from weightsmith.weights import Pattern, Weights

if TYPE_CHECKING:
    from weightsmith.inspect.evaluation import Interval

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module
"""Anything that `weightsmith.open` opens."""

MOST_LINES = 8
"""Lines that a plot can hold and still be read."""

MOST_BARS = 24
"""Bars with long names that a plot can hold."""

_NUMBER = re.compile(r"(?<![^._/])\d+(?![^._/])")
_TRAILING = re.compile(r"\.?(?<![^.])weight$")


def kind_of(name: str) -> str:
    """What is left of a name once its layer is taken off: what the tensor is in its layer, whatever the layer.

    >>> kind_of("model.layers.7.self_attn.q_proj.weight"), kind_of("h.0.experts.3.up.weight"), kind_of("embed.weight")
    ('self_attn.q_proj', 'experts.*.up', 'embed')
    """
    layer = layer_of(name)
    rest = name[len(layer) + 1 :] if _is_numbered(layer) else name
    return _NUMBER.sub("*", _TRAILING.sub("", rest)) or "weight"


def named(name: str) -> dict[str, str]:
    """The first columns of a row about one tensor."""
    return {"tensor": name, "layer": layer_of(name), "kind": kind_of(name)}


def matrices(weights: Weights, pattern: Pattern) -> list[str]:
    """The float matrices that fit, tied ones under their first name; tensors of more axes count as matrices.

    Raises:
        Error: there is none.
    """
    ties = weights.ties
    fitting = list(dict.fromkeys(ties.get(name, name) for name in weights.names(pattern, floating=True)))
    found = [name for name in fitting if has_spectrum(weights.spec(name))]
    if not found:
        raise Error(f"no float matrix fits pattern={pattern!r}; there are {listed(weights)}")
    return found


def by_kind(rows: Sequence[Mapping[str, Any]], most: int = MOST_LINES) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by their kind, the kinds of most values first and no more of them than a plot can hold."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["kind"], []).append(row)
    largest = sorted(groups, key=lambda kind: -sum(row.get("values", 1) for row in groups[kind]))[:most]
    return {kind: groups[kind] for kind in groups if kind in largest}


def grid(what: str, rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]) -> Plot:
    """A value by layer and kind: colours where there are several of both, else bars."""
    title = what[:1].upper() + what[1:]
    placed = [row for row in rows if _is_numbered(row["layer"])]
    layers = in_order(row["layer"] for row in placed)
    kinds = list(dict.fromkeys(row["kind"] for row in placed))
    if len(layers) < 2 or len(kinds) < 2:
        largest = sorted(rows, key=lambda row: -row.get("values", 1))[:MOST_BARS]
        shown = [row for row in rows if row in largest]
        line = Line(what, [row["tensor"] for row in shown], [_number(value(row)) for row in shown], style="bars")
        return Plot(title, "tensor", what, [line])
    sums: dict[tuple[str, str], list[float]] = {}
    for row in placed:
        sums.setdefault((row["kind"], row["layer"]), []).append(_number(value(row)))
    cells = [[_mean(sums.get((kind, layer), [])) for layer in layers] for kind in kinds]
    return Plot(title, "layer", "kind", surface=Surface(short(layers), kinds, cells))


def in_order(layers: Iterable[str]) -> list[str]:
    """Names of layers, each once: numbered ones by their numbers (files have 10 before 2), others as they come.

    >>> in_order(["h.0", "h.10", "h.2", "h.2", "norm"])
    ['h.0', 'h.2', 'h.10', 'norm']
    """
    names = list(dict.fromkeys(layers))
    stems = [name.rpartition(".")[0] if _is_numbered(name) else name for name in names]
    numbers = [int(name.rpartition(".")[2]) if _is_numbered(name) else 0 for name in names]
    places = sorted(range(len(names)), key=lambda i: (stems.index(stems[i]), numbers[i]))
    return [names[i] for i in places]


def decoded(weights: Weights) -> Weights:
    """The weights as floats, where `weightsmith.quantize` has packed them; lazy."""
    if not any(name.endswith("_packed") for name in weights):
        return weights
    from weightsmith.quantize import dequantize

    return dequantize(weights)


def with_ends(name: str, found: Interval | None) -> dict[str, float | None]:
    """The columns of a figure and of the ends of its interval; empty ones without it."""
    if found is None:
        return dict.fromkeys((name, f"{name} low", f"{name} high"))
    return {name: found.estimate, f"{name} low": found.low, f"{name} high": found.high}


def values_of(*numbers: float | None) -> list[float]:
    """Those that are there and finite."""
    return [number for number in numbers if number is not None and math.isfinite(number)]


def mean_of(numbers: Sequence[float | None]) -> float | None:
    """Their mean without what is missing; None where all are."""
    found = values_of(*numbers)
    return sum(found) / len(found) if found else None


def ranked(values: Tensor) -> Tensor:
    """Ranks along the last axis, equals sharing the mean of theirs.

    >>> ranked(torch.tensor([[3.0, 1.0, 3.0]]))
    tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    ordered, values = values.sort(dim=-1).values.contiguous(), values.contiguous()
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + upto + 1).double() / 2


def median_of(numbers: Sequence[float | None]) -> float | None:
    """Their median without what is missing; None where all are."""
    found = sorted(values_of(*numbers))
    return (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2 if found else None


def _is_numbered(layer: str) -> bool:
    return layer.rpartition(".")[2].isdigit()


def short(layers: Sequence[str]) -> list[str]:
    """The numbers alone, where that is all that tells the numbered layers apart; the last part of other names.

    >>> short(["model.embed", "model.layers.0", "model.layers.1"])
    ['embed', '0', '1']
    """
    stems = {layer.rpartition(".")[0] for layer in layers if _is_numbered(layer)}
    made = [layer.rpartition(".")[2] if len(stems) == 1 or not _is_numbered(layer) else layer for layer in layers]
    return made if len(set(made)) == len(made) else list(layers)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan

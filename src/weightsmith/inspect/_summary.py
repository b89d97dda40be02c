"""What is in a checkpoint: names, shapes, sizes, and on request what the values are like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith import progress
from weightsmith.inspect._parts import short
from weightsmith.inspect._plain import layer_of, plain
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._spectra import Spectrum, has_spectrum, spectrum
from weightsmith.inspect._statistics import Statistics, statistics_of
from weightsmith.text import number
from weightsmith.weights import Weights, dtype_name, materialize


@dataclass(frozen=True)
class TensorSummary:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    tied_to: str | None = None
    """The first name of the same tensor. Totals count a tied tensor once."""
    stats: Statistics | None = None
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class Layer:
    """The tensors whose names are equal up to their first number."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What `summary` found, in the order of the weights."""

    tensors: tuple[TensorSummary, ...]

    @property
    def parameters(self) -> int:
        """Each tied tensor once."""
        return sum(tensor.parameters for tensor in self.tensors if tensor.tied_to is None)

    @property
    def bytes(self) -> int:
        """Each tied tensor once."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.tied_to is None)

    @property
    def dtypes(self) -> dict[str, int]:
        """Parameters by dtype, the most common first."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.tied_to is None:
                found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.parameters
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def layers(self) -> list[Layer]:
        """The tensors added up by layer, in the order of their first tensors."""
        groups: dict[str, list[TensorSummary]] = {}
        for tensor in self.tensors:
            groups.setdefault(layer_of(tensor.name), []).append(tensor)
        return [_layer(name, tensors) for name, tensors in groups.items()]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a tensor; statistics and spectrum under their own names where they were asked for."""
        return [_row(tensor) for tensor in self.tensors]

    def to_json(self) -> dict[str, Any]:
        """Everything as data that JSON can hold."""
        return {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": self.dtypes,
            "layers": plain(self.layers()),
            "tensors": self.rows(),
        }

    def report(self) -> Report:
        """Totals, a row a tensor, and parameters by layer; norms by layer where statistics were asked for."""
        layers = self.layers()
        names = [layer.name for layer in layers]
        plots = [_bars("Parameters by layer", "parameters", names, [layer.parameters for layer in layers])]
        if any(tensor.stats is not None for tensor in self.tensors):
            squares = dict.fromkeys(names, 0.0)
            for tensor in self.tensors:
                if tensor.stats is not None and tensor.tied_to is None:
                    squares[layer_of(tensor.name)] += tensor.stats.norm**2
            plots.append(_bars("Norm by layer", "norm", names, [value**0.5 for value in squares.values()]))
        return Report(
            "What is in the weights",
            figures={
                "tensors": len(self.tensors),
                "parameters": self.parameters,
                "bytes": self.bytes,
                **{f"parameters in {dtype}": count for dtype, count in self.dtypes.items()},
            },
            table=_table(self.tensors),
            plots=plots if self.tensors else (),
        )


def summary(weights: Weights, stats: bool = False, spectra: bool = False, threads: int | None = None) -> Summary:
    """What is in ``weights``: shapes, dtypes, sizes and ties, without reading a value unless asked.

    Args:
        weights: any weights.
        stats: norm, mean, deviation, extremes, zeros and non-finite counts, in one streamed reading.
        spectra: singular values and ranks of the matrices. Holds one matrix at a time; a matrix
            whose shorter side is n takes about n³ steps.
        threads: workers of the streamed reading; default one a core.

    >>> import torch
    >>> found = summary(Weights.of({"a.0.w": torch.ones(2, 3)}), stats=True)
    >>> found.parameters, found.tensors[0].stats.mean, found.layers()[0].name
    (6, 1.0, 'a.0')
    """
    names, ties = list(weights), weights.ties
    nodes = [weights.node(name) for name in names]
    figures = statistics_of(nodes, threads) if stats else [None] * len(names)
    shapes = _spectra(weights, [name for name in names if name not in ties]) if spectra else {}
    return Summary(
        tuple(
            TensorSummary(
                name=name,
                shape=node.spec.shape,
                dtype=dtype_name(node.spec.dtype),
                parameters=node.spec.numel,
                bytes=node.spec.nbytes,
                tied_to=ties.get(name),
                stats=figure,
                spectrum=shapes.get(ties.get(name, name)),
            )
            for name, node, figure in zip(names, nodes, figures, strict=True)
        )
    )


def _spectra(weights: Weights, names: Iterable[str]) -> dict[str, Spectrum | None]:
    matrices = [name for name in names if has_spectrum(weights.spec(name))]
    found = {}
    with progress.task("singular values", len(matrices)) as advance:
        for name in matrices:
            found[name] = spectrum(materialize(weights.node(name)))
            advance(1)
    return found


def _bars(title: str, what: str, names: list[str], values: list[Any]) -> Plot:
    return Plot(title, "layer", what, [Line(what, short(names), values, style="bars")])


def _table(tensors: Sequence[TensorSummary]) -> list[dict[str, Any]]:
    """Records with the same columns, None where a tensor has no such figure; shapes and singular values as words."""
    rows = [_row(tensor) for tensor in tensors]
    columns = dict.fromkeys(key for row in rows for key in row if row[key] is not None)
    made: list[dict[str, Any]] = [{key: row.get(key) for key in columns} for row in rows]
    for row in made:
        if row["shape"] is not None:
            row["shape"] = " x ".join(map(str, row["shape"]))
        if row.get("singular_values") is not None:
            row["singular_values"] = " ".join(map(number, row["singular_values"]))
    return made


def _layer(name: str, tensors: list[TensorSummary]) -> Layer:
    own = [tensor for tensor in tensors if tensor.tied_to is None]
    return Layer(
        name,
        len(tensors),
        sum(tensor.parameters for tensor in own),
        sum(tensor.bytes for tensor in own),
        tuple(sorted({tensor.dtype for tensor in tensors})),
    )


def _row(tensor: TensorSummary) -> dict[str, Any]:
    row = plain(tensor)
    stats, shape = row.pop("stats"), row.pop("spectrum")
    row |= stats or {}
    if shape is not None:
        row |= {"singular_values": shape.pop("values"), **shape}
    return row

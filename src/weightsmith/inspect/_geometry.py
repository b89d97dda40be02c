"""How fine-tunes lie to their base and to each other: what merging them can hope for.

Task vectors that point elsewhere can be added; those that share directions but not signs fight. Where in
the network they do is told layer by layer: by lengths, angles, signs, and by the directions in which the
changes write (left singular vectors) and read (right ones).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._diff import Sums, diff
from weightsmith.inspect._parts import MOST_LINES, Source, decoded, grid, in_order, mean_of, named, short
from weightsmith.inspect._report import Line, Plot, Report, Surface
from weightsmith.inspect._spectra import has_spectrum
from weightsmith.inspect._statistics import streamed
from weightsmith.solve import effective_rank, gram_of
from weightsmith.weights import Pattern, Weights, open, same_names


@card(
    paper="Ilharco et al. 2023, 'Editing Models with Task Arithmetic' (cosines of task vectors); Yadav et "
    "al. 2023, 'TIES-Merging' (sign conflicts); Björck, Golub 1973 (angles between subspaces)",
    needs=("base",),
    unit="tensor",
    claim="task vectors of different tasks are nearly orthogonal, their leading subspaces less so",
)
def geometry(
    models: Sequence[Source], base: Source, *, top: int | None = 8, pattern: Pattern = "*", threads: int | None = None
) -> Report:
    r"""Task vectors by layer: lengths, cosines, agreement of signs, and subspaces that they share.

    .. math:: \delta_i = w_i - w_0, \qquad c_{ij} = \frac{\langle \delta_i, \delta_j \rangle}
              {\lVert \delta_i \rVert \lVert \delta_j \rVert}, \qquad
              o_{ij} = \frac{1}{t} \lVert U_i^\top U_j \rVert_F^2

    with :math:`U_i` the first :math:`t` singular vectors of a matrix of :math:`\delta_i`: the overlap is 1 for one
    subspace, and :math:`t / n` on average for two random ones of ``n`` dimensions. Where one change has fewer
    directions, the overlap is over its own, and the chance over those of the other.

    Args:
        models: k >= 1 fine-tunes; anything that `weightsmith.open` opens.
        base: what they were all started from.
        top: singular directions that are compared (t); fewer where a change has fewer. None to leave subspaces and
            ranks out, which is faster.
        pattern: names of tensors, of floats.
        threads: workers; default one a core. With ``top`` each holds k + 1 matrices of one name.

    Returns:
        Report: a row a tensor, with means over models (``relative change``, ``effective rank``) and over pairs of
        models (``cosine``; ``sign agreement``: of the values that both change, the share changed in one direction;
        ``left overlap``, ``right overlap`` and their ``chance``), and ``conflict``: of the values that any changes,
        the share that some raise and others lower. The figures are of all tensors together. None where there is no
        pair, or nothing changed. Plots: change by layer, cosines of the whole models, overlap by layer and kind.

    Raises:
        ValueError: no model, other names or shapes, or no tensor that fits.

    >>> base = {"w": torch.zeros(2, 2)}
    >>> found = geometry([{"w": torch.eye(2)}, {"w": torch.tensor([[1.0, 0.0], [0.0, -1.0]])}], base, top=1)
    >>> found["cosine"], found["sign agreement"], found["conflict"]
    (0.0, 0.5, 0.5)
    """
    if not models or (top is not None and top < 1):
        raise Error(f"geometry needs at least 1 model and 1 direction, got {len(models)} and top={top}")
    origin, opened = open(base), [open(model) for model in models]
    names = _shared(opened, origin, pattern)
    groups = [(origin.node(name), *(model.node(name) for model in opened)) for name in names]
    sums = dict(zip(names, streamed(_sums, groups, "comparing", threads), strict=True))
    spaces: dict[str, _Spaces | None] = {}
    if top is not None:
        wide = [name for name in names if has_spectrum(origin.spec(name))]
        groups = [(origin.node(name), *(model.node(name) for model in opened)) for name in wide]
        found = streamed(functools.partial(_spaces, top=top), groups, "singular directions", threads, unit="tensor")
        spaces = dict(zip(wide, found, strict=True))
    rows = [_row(name, sums[name], spaces.get(name)) for name in names]
    together = functools.reduce(_add, sums.values())
    cosines = _cosines(together)
    plots = [_change_by_layer(rows, sums)]
    if len(models) > 1:
        labels = [str(index) for index in range(len(models))]
        shown = Surface(labels, labels, [[math.nan if c is None else c for c in row] for row in cosines])
        plots.append(Plot("Cosines of task vectors", "model", "model", surface=shown))
        wide_rows = [row for row in rows if has_spectrum(origin.spec(row["tensor"]))]
        if wide_rows:
            plots.append(grid("cosine, mean over pairs", wide_rows, lambda row: row["cosine"]))
        if spaces:
            plots.append(grid("left overlap, mean over pairs", wide_rows, lambda row: row["left overlap"]))
    bad = sum(int(one[4]) for one in sums.values())
    return Report(
        "Geometry of task vectors",
        figures=_figures(together, cosines),
        table=rows,
        plots=plots,
        notes=[f"{bad:,} values are not finite somewhere and were left out."] if bad else [],
    )


@card(
    paper="Zhang, Bengio, Singer 2019, 'Are All Layers Created Equal?' (layers by how far they moved); the distance is "
    "the plain relative Frobenius norm",
    unit="element",
    claim="fine-tuning moves some kinds of matrices several times as far as others",
)
def relative_change(before: Source, after: Source, *, pattern: Pattern = "*", threads: int | None = None) -> Report:
    r"""How far each tensor moved, relative to its length, by layer and kind.

    .. math:: r = \frac{\lVert w_{\text{after}} - w_{\text{before}} \rVert}{\lVert w_{\text{before}} \rVert}

    Args:
        before, after: checkpoints with some names and shapes in common; anything that `weightsmith.open` opens.
            Those that `weightsmith.quantize` packed are decoded first.
        pattern: names of tensors.
        threads: workers; default one a core.

    Returns:
        Report: a row a tensor that both have, the most changed first; infinite where only ``before`` is zero. Plots:
        by layer, and by layer and kind.

    Raises:
        ValueError: no tensor of one name and shape that fits.

    >>> relative_change({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 3.0])})["relative change"]
    0.2
    """
    found = diff(decoded(open(before)), decoded(open(after)), pattern, threads)
    compared = [(tensor.name, tensor.sums) for tensor in found.tensors if tensor.sums is not None]
    if not compared:
        raise Error(f"the two checkpoints have no tensor of one name and shape that fits {pattern!r}")
    rows = [_changed(name, sums) for name, sums in compared]
    layers: dict[str, Sums] = {}
    for name, sums in compared:
        layer = named(name)["layer"]
        layers[layer] = layers.get(layer, Sums()) + sums
    layers = {layer: layers[layer] for layer in in_order(layers)}
    bars = Line("relative change", short(list(layers)), [one.distance for one in layers.values()], style="bars")
    others = len(found.tensors) - len(rows)
    return Report(
        "Relative change of weights",
        figures={
            "tensors": len(rows),
            "tensors that changed": sum(row["changed"] > 0 for row in rows),
            "relative change": found.overall.distance,
            "cosine": found.overall.cosine,
            "not compared": others,
        },
        table=sorted(rows, key=lambda row: -row["relative change"]),
        notes=[f"{others:,} tensors are on one side only, or of another shape, and no figure is of them."]
        if others
        else (),
        plots=[
            Plot("Relative change by layer", "layer", "relative change", [bars]),
            grid("relative change of matrices", _wide(found.tensors, rows), lambda row: row["relative change"]),
        ],
    )


def _changed(name: str, sums: Sums) -> dict[str, Any]:
    return {
        **named(name),
        "values": sums.count,
        "relative change": sums.distance,
        "cosine": sums.cosine,
        "largest": sums.largest,
        "changed": sums.share,
    }


def _wide(tensors: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of matrices; all where there is none."""
    wide = {tensor.name for tensor in tensors if tensor.a is not None and "," in tensor.a}
    return [row for row in rows if row["tensor"] in wide] or list(rows)


def _shared(models: Sequence[Weights], base: Weights, pattern: Pattern) -> list[str]:
    for model in models:
        same_names(base, model, "geometry needs models with the tensors of their base")
    ties = base.ties
    names = [name for name in base.names(pattern, floating=True) if name not in ties and base.spec(name).numel]
    if not names:
        raise Error(f"no float tensor fits pattern={pattern!r}")
    for name in names:
        for index, model in enumerate(models):
            if model.spec(name).shape != base.spec(name).shape:
                raise Error(f"{name} is {base.spec(name)} in the base and {model.spec(name)} in model {index}")
    return names


_Totals = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _sums(base: Tensor, *models: Tensor) -> _Totals:
    """Of one chunk: Gram of the deltas, squares of the base, sign counts of pairs, conflicts, what is not finite.

    Shapes: ``[k, k]``, ``[]``, ``[2, k, k]`` (both change, in one direction), ``[2]`` (any changes, in both), ``[]``.
    """
    origin = base.reshape(-1).double()
    deltas = torch.stack([model.reshape(-1).double() for model in models]) - origin
    finite = deltas.isfinite().all(dim=0)
    bad = finite.numel() - int(finite.count_nonzero())
    if bad:
        deltas, origin = deltas[:, finite], origin[finite]
    signs = deltas.sign()
    moved = signs.abs()
    both, balance = moved @ moved.T, signs @ signs.T
    counts = torch.stack([both, (both + balance) / 2])
    ups, downs = (signs > 0).any(dim=0), (signs < 0).any(dim=0)
    conflicts = torch.stack([(ups | downs).sum(), (ups & downs).sum()]).double()
    return deltas @ deltas.T, origin.dot(origin), counts, conflicts, torch.tensor(float(bad))


def _add(one: _Totals, other: _Totals) -> _Totals:
    return tuple(a + b for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def _cosines(sums: _Totals) -> list[list[float | None]]:
    gram = sums[0]
    lengths = gram.diagonal().sqrt()
    pairs = [[float(gram[i, j]) for j in range(len(gram))] for i in range(len(gram))]
    scale = torch.outer(lengths, lengths).tolist()
    return [[_ratio(pairs[i][j], scale[i][j]) for j in range(len(gram))] for i in range(len(gram))]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _over_pairs(matrix: Sequence[Sequence[float | None]]) -> float | None:
    return mean_of([matrix[i][j] for i, j in itertools.combinations(range(len(matrix)), 2)])


def _changes(sums: _Totals) -> list[float | None]:
    """Of each model: the length of its delta over that of the base."""
    base = math.sqrt(float(sums[1]))
    return [_ratio(math.sqrt(max(square, 0.0)), base) for square in sums[0].diagonal().tolist()]


def _agreement(sums: _Totals) -> float | None:
    both, same = sums[2].tolist()
    return _over_pairs([[_ratio(s, b) for s, b in zip(*pair, strict=True)] for pair in zip(same, both, strict=True)])


def _figures(sums: _Totals, cosines: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    changes = _changes(sums)
    any_changed, conflict = sums[3].tolist()
    return {
        "models": len(changes),
        **{f"relative change of model {index}": change for index, change in enumerate(changes)},
        "cosine": _over_pairs(cosines),
        "sign agreement": _agreement(sums),
        "conflict": _ratio(conflict, any_changed) if len(changes) > 1 else None,
    }


def _row(name: str, sums: _Totals, spaces: _Spaces | None) -> dict[str, Any]:
    found = _figures(sums, _cosines(sums))
    return {
        **named(name),
        "relative change": mean_of(_changes(sums)),
        **{key: found[key] for key in ("cosine", "sign agreement", "conflict")},
        "left overlap": spaces and spaces.left,
        "right overlap": spaces and spaces.right,
        "left chance": spaces and spaces.left_chance,
        "right chance": spaces and spaces.right_chance,
        "effective rank": spaces and spaces.effective,
    }


def _change_by_layer(rows: Sequence[Mapping[str, Any]], sums: Mapping[str, _Totals]) -> Plot:
    layers: dict[str, _Totals] = {}
    for row in rows:
        one = sums[row["tensor"]]
        layers[row["layer"]] = _add(layers[row["layer"]], one) if row["layer"] in layers else one
    layers = {layer: layers[layer] for layer in in_order(layers)}
    changes = [_changes(one) for one in layers.values()]
    shown = min(len(changes[0]), MOST_LINES)
    lines = [
        Line(
            f"model {index}",
            short(list(layers)),
            [math.nan if (c := one[index]) is None else c for one in changes],
            style="bars",
        )
        for index in range(shown)
    ]
    return Plot("Relative change by layer", "layer", "length of the task vector over that of the base", lines)


# Directions


@dataclass(frozen=True)
class _Spaces:
    """Of the changes of one matrix: means over pairs, and over models."""

    left: float | None
    right: float | None
    left_chance: float | None
    right_chance: float | None
    effective: float | None


def _spaces(base: Tensor, *models: Tensor, top: int) -> _Spaces | None:
    rows = base.shape[0]
    pairs, ranks = [], []
    for model in models:
        delta = (model.double() - base.double()).reshape(rows, -1)
        if not delta.isfinite().all():
            return None
        left, right, values = directions(delta, top)
        pairs.append((left, right))
        if len(values) and float(values[0]):
            ranks.append(effective_rank(values))
    lefts, rights = ([pair[side] for pair in pairs] for side in (0, 1))
    return _Spaces(
        left=_mean_overlap(lefts),
        right=_mean_overlap(rights),
        left_chance=_chance(lefts),
        right_chance=_chance(rights),
        effective=mean_of(ranks),
    )


def directions(matrix: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors of ``[m, n]``, left ``[m, t]`` and right ``[n, t]``, and all singular values.

    ``t`` is at most ``top``, and the rank. From the Gram matrix of the shorter side, in float64.

    >>> left, right, values = directions(torch.tensor([[0.0, 3.0], [0.0, 0.0]]), 2)
    >>> left.shape, right.shape, values.tolist()
    (torch.Size([2, 1]), torch.Size([2, 1]), [3.0, 0.0])
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    squares, vectors = torch.linalg.eigh(gram_of(wide))
    values = squares.flip(0).clamp(min=0).sqrt()
    # Directions whose values are lost in the rounding of their squares are no directions.
    count = min(top, int((values > values[0] * 1e-7).sum()) if len(values) else 0)
    near = vectors.flip(1)[:, :count]
    far = wide.double().T @ near / values[:count]
    return (far, near, values) if tall else (near, far, values)


def overlap(one: Tensor, other: Tensor) -> float | None:
    r"""Mean squared cosine of the angles between two subspaces, given by orthonormal columns ``[n, t]``, ``[n, s]``.

    .. math:: \frac{\lVert U^\top V \rVert_F^2}{\min(t, s)}

    None where one of them is empty.

    >>> overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
    0.5
    """
    smaller = min(one.shape[1], other.shape[1])
    return float((one.T @ other).square().sum()) / smaller if smaller else None


def _chance(spaces: Sequence[Tensor]) -> float | None:
    """The mean `overlap` of random subspaces of these dimensions: that of the larger over all."""
    pairs = [(one, other) for one, other in itertools.combinations(spaces, 2) if one.shape[1] and other.shape[1]]
    return mean_of([max(one.shape[1], other.shape[1]) / len(one) for one, other in pairs])


def _mean_overlap(spaces: Sequence[Tensor]) -> float | None:
    return mean_of([overlap(one, other) for one, other in itertools.combinations(spaces, 2)])

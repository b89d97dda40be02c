"""Which parts of a network work together, told in a basis that does not depend on how its layers are written.

Activations are told in directions that the data take and that matter for the next layer; edges say how strongly
one such direction drives another. If the network does two things, the graph of these edges falls into two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._modularity import modularity
from weightsmith.inspect._plain import plain
from weightsmith.inspect._report import Line, Plot, Report, Surface

Basis = Literal["interaction", "principal", "neuron"]

_CHUNK = 128  # examples whose Jacobians are held at once


@dataclass(frozen=True)
class Interactions:
    """Layers of activations in a basis each, and how strongly they drive one another."""

    bases: tuple[Tensor, ...] = field(repr=False)
    """Per layer ``[width, r]``: ``(activation - mean) @ basis`` are its coordinates, uncorrelated but for neurons."""
    steps: tuple[Tensor, ...] = field(repr=False)
    """Per layer ``[r, width]``: how the activation changes as a coordinate moves by one standard deviation."""
    edges: tuple[Tensor, ...] = field(repr=False)
    """Between neighbours ``[r of the next, r]``: the mean squared change of one coordinate by a step of another."""
    modularity: float
    parts: tuple[Tensor, ...] = field(repr=False)
    """Per layer ``[r]``: the part that each direction belongs to."""

    def rows(self) -> list[dict[str, Any]]:
        """One record a layer."""
        count = 1 + max(int(one.max()) for one in self.parts if len(one))
        return [
            {"layer": i, "width": len(basis), "directions": basis.shape[1]}
            | {f"in part {number}": int((self.parts[i] == number).sum()) for number in range(count)}
            for i, basis in enumerate(self.bases)
        ]

    def to_json(self) -> dict[str, Any]:
        """The modularity, the layers and the edges as plain data."""
        edges = [one.tolist() for one in self.edges]
        return plain({"modularity": self.modularity, "layers": self.rows(), "edges": edges})

    def report(self) -> Report:
        """Modularity, parts by layer, and the edges between neighbours, sorted by part."""
        rows = self.rows()
        plots = [Plot("Directions", "layer", "count", [_bars(rows, "width"), _bars(rows, "directions")])]
        for index, edge in enumerate(self.edges):
            here, there = (self.parts[i].argsort(stable=True) for i in (index, index + 1))
            cells = edge[there][:, here].clamp(min=1e-12).tolist()
            numbered = Surface(list(range(len(here))), list(range(len(there))), cells, log=True)
            plots.append(Plot(f"Edges {index} to {index + 1}", "from, by part", "to, by part", surface=numbered))
        return Report(
            "Interactions in a network",
            figures={"modularity": self.modularity, "parts": sum(key.startswith("in part") for key in rows[0])},
            table=rows,
            plots=plots,
        )


@card(
    paper="Bushnaq et al. 2024, 'Using Degeneracy in the Loss Landscape for Mechanistic Interpretability' "
    "(Interaction Basis); Newman 2006, 'Modularity and community structure in networks'",
    covers=("degeneracy-loss-landscape-mechanistic",),
    needs=("data",),
    unit="model",
    claim="in a network of two independent tasks the graph falls into clearer parts than in neurons or principal axes",
    departs="Jacobians to the next layer's coordinates, which carry what lies behind them, not to the last layer",
)
def interactions(
    stages: Sequence[Callable[[Tensor], Tensor]],
    inputs: Tensor,
    *,
    basis: Basis = "interaction",
    tolerance: float = 1e-5,
) -> Interactions:
    r"""The interaction graph of a chain of layers.

    .. math:: c_l = (a_l - \bar a_l)\, V \Lambda^{-1/2} U \Sigma^{1/2}, \qquad
              U \Sigma U^\top = \frac1n \sum_x J_x^\top J_x, \qquad
              E_{ij} = \frac{\sigma_j^2}{n} \sum_x \Big( \frac{\partial c_{l+1,i}}{\partial c_{l,j}} \Big)^2

    with :math:`V \Lambda V^\top` the covariance of the activations without its null directions, :math:`J` the
    Jacobian of the next layer's coordinates by whitened ones, without null directions either, and :math:`\sigma_j`
    the standard deviation of :math:`c_{l,j}`. The last layer keeps its principal axes.

    Args:
        stages: what leads from one layer to the next, each ``[n, in] -> [n, out]`` and by example; the model's parts,
            such as ``[model[:2], model[2:4], model[4:]]``. The first graph layer is what the first stage makes.
        inputs: ``[n, in]``; all examples are held, and the Jacobians of 128 at a time.
        basis: ``"interaction"``; ``"principal"`` for the principal axes as they are, ``"neuron"`` for neurons (those
            that never change left out), to compare with.
        tolerance: directions are null whose standard deviation, or root mean square effect on the next layer, is below
            this share of the largest.

    Returns:
        Interactions: bases, edges, and the modularity of the whole graph with its parts.

    Raises:
        ValueError: fewer than two stages, fewer than two examples, or a layer that never changes.

    >>> stage = torch.nn.Linear(3, 3)
    >>> found = interactions([torch.nn.Identity(), stage], torch.randn(50, 3), basis="neuron")
    >>> [tuple(edge.shape) for edge in found.edges]
    [(3, 3)]
    """
    if len(stages) < 2 or inputs.ndim != 2 or len(inputs) < 2:
        raise Error(
            f"interactions needs 2 stages and inputs [n, in] of 2 or more, got {len(stages)}, {list(inputs.shape)}"
        )
    if basis not in ("interaction", "principal", "neuron"):
        raise Error(f"basis is interaction, principal or neuron, got {basis!r}")
    with torch.no_grad():
        layers, value = [], inputs
        for stage in stages:
            value = stage(value)
            layers.append(value)
    axes = [_axes(layer, index, basis, tolerance) for index, layer in enumerate(layers)]
    bases, steps = [vectors for vectors, _ in axes], [(vectors * scale).T for vectors, scale in axes]
    if basis == "interaction":
        for index in reversed(range(len(layers) - 1)):
            vectors, scale = axes[index]
            gram = _summed(stages[index + 1], layers[index], bases[index + 1], steps[index], _gram)
            effects, turn = torch.linalg.eigh(gram)
            effects, turn = effects.flip(0).clamp(min=0).sqrt(), turn.flip(1)
            kept = effects > tolerance * effects[0]
            if not kept.any():
                raise Error(f"layer {index} has no effect on the next")
            bases[index] = (vectors / scale) @ turn[:, kept] * effects[kept]
            steps[index] = turn[:, kept].T @ steps[index]
    edges = [
        _summed(stages[index + 1], layers[index], bases[index + 1], steps[index], _squares)
        for index in range(len(layers) - 1)
    ]
    score, labels = modularity(_graph(edges, [one.shape[1] for one in bases]))
    parts = labels.split([one.shape[1] for one in bases])
    return Interactions(tuple(bases), tuple(steps), tuple(edges), score, tuple(parts))


def _axes(layer: Tensor, index: int, basis: Basis, tolerance: float) -> tuple[Tensor, Tensor]:
    """Orthonormal directions ``[width, r]`` and the standard deviation along each ``[r]``."""
    wide = layer.double()
    if not wide.isfinite().all():
        raise Error(f"layer {index} has activations that are not finite")
    centred = wide - wide.mean(dim=0)
    covariance = centred.T @ centred / len(layer)
    if basis == "neuron":
        values, vectors = covariance.diagonal(), torch.eye(len(covariance)).to(covariance)
    else:
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0), vectors.flip(1)
    deviations = values.clamp(min=0).sqrt()
    kept = deviations > tolerance * deviations.max()
    if not kept.any():
        raise Error(f"layer {index} does not change over the inputs")
    return vectors[:, kept], deviations[kept]


def _summed(
    stage: Callable[[Tensor], Tensor],
    layer: Tensor,
    basis: Tensor,
    steps: Tensor,
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean over examples of a function of ``[n, r of the next, r]``: how coordinates there change by steps here."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: stage(one[None])[0]))
    total = torch.zeros((), dtype=torch.float64)
    for part in layer.split(_CHUNK):
        found = jacobian(part).detach().double()
        total = total + function(torch.einsum("noi,or,si->nrs", found, basis, steps))
    return total / len(layer)


def _gram(jacobians: Tensor) -> Tensor:
    return torch.einsum("nrs,nrt->st", jacobians, jacobians)


def _squares(jacobians: Tensor) -> Tensor:
    return jacobians.square().sum(dim=0)


def _graph(edges: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The symmetric matrix of all edges, layers one after another."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    made = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for index, edge in enumerate(edges):
        low, high = starts[index], starts[index + 1]
        made[high : high + len(edge), low : low + edge.shape[1]] = edge
    return made + made.T


def _bars(rows: Sequence[dict[str, Any]], key: str) -> Line:
    return Line(key, [str(row["layer"]) for row in rows], [row[key] for row in rows], style="bars")

"""Sparse and larger for the price of dense and small: layers are replaced by families with as many multiplications.

A layer that keeps a share of its weights can have more units, branches or factors at the same cost, and which of its
connections are there is learnt too. Trained from fresh weights by a rule whose masks move, such as `rigl`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.graph import UnitGraph
from weightsmith.prune.room import chosen_targets
from weightsmith.weights import Pattern, open

Kind = Literal["wide", "parallel", "factorised", "doped"]
Activation = Callable[[], nn.Module] | None | Literal["usual"]


@dataclass(frozen=True)
class IsoFlop:
    """A larger module, and how sparse it must be."""

    module: nn.Module
    """With fresh weights, still dense: `control` with ``densities=`` makes it sparse."""
    densities: Mapping[str, float]
    """Weight -> share to keep; what is not named stays dense."""
    before: int
    """Multiplications of the replaced layers for one input (or position)."""
    after: int
    """The same of what replaces them, at these densities."""


class Branches(nn.Module):
    """The sum of several layers side by side, each bent by itself."""

    def __init__(self, layers: list[nn.Module], activation: Callable[[], nn.Module] | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = nn.Identity() if activation is None else activation()

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        total = self.activation(self.layers[0](inputs))
        for layer in list(self.layers)[1:]:
            total = total + self.activation(layer(inputs))
        return total


@card(
    paper="Saxena, Thangarasa, Lie, Agarwal 2023, 'Sparse Iso-FLOP Transformations for Maximizing Training Efficiency'",
    covers=("sparse-iso-flop-transformations-maximizing",),
    needs=("graph",),
    unit="model",
    claim="a sparse wide network trained by RigL beats the dense one of as many multiplications",
    departs="densities are exact for each layer, also at the first and the last, which grow on one side only; fresh "
    "weights are divided by the root of the density, so that values are as large as in a dense layer",
)
def iso_flop(
    module: nn.Module,
    sparsity: float,
    kind: Kind = "wide",
    *,
    example: Any = None,
    graph: UnitGraph | None = None,
    pattern: Pattern | None = None,
    activation: Activation = "usual",
    seed: int = 0,
) -> IsoFlop:
    r"""A sparse module of another family with as many multiplications as a dense one, layer by layer.

    With :math:`n` inputs and :math:`m` outputs of a layer and sparsity s:

    - ``"wide"``: every inner space has :math:`1 / \sqrt{1 - s}` times as many units,
    - ``"parallel"``: :math:`1 / (1 - s)` layers side by side, each bent before they are summed,
    - ``"factorised"``: two sparse factors with :math:`n m / ((1 - s)(n + m))` units between them,
    - ``"doped"``: a sparse layer beside a dense product of rank :math:`s\, n m / (n + m)`.

    Args:
        module: left as it is. Its weights are not taken over: the new ones are fresh.
        sparsity: s.
        kind: the family. All but ``"wide"`` replace ``torch.nn.Linear`` alone.
        example: of ``"wide"``: what the module is called with, to find its units (`weightsmith.graph.trace`).
        graph: of ``"wide"``: its units, where they are known.
        pattern: of the others: weights of the layers to replace; by default all that are usually pruned
            (`weightsmith.prune.prunable`) but the last, whose outputs are the answer.
        activation: makes what bends each branch, or stands between two factors; by default ReLU in branches (which a
            ReLU behind the layer leaves alone; branches that are not bent are one layer) and nothing between factors.
        seed: of the fresh weights.

    Returns:
        IsoFlop: ``made.module`` and ``made.densities``, for ``control(made.module, optimizer, rigl(stop=...),
        densities=made.densities)``.

    Raises:
        Error: an unknown kind, a sparsity outside (0, 1), no layer or space to grow, or none that becomes larger.

    >>> small = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> made = iso_flop(small, 0.75, "wide", example=torch.zeros(1, 8))
    >>> made.module[0].weight.shape, made.densities, made.before == made.after
    (torch.Size([32, 8]), {'0.weight': 0.5, '2.weight': 0.5}, True)
    """
    if kind not in get_args(Kind):
        raise Error(f"iso_flop: kind is one of {', '.join(get_args(Kind))}; got {kind!r}")
    if not 0 < sparsity < 1:
        raise Error(f"iso_flop: sparsity is between 0 and 1, got {sparsity}")
    if kind == "wide":
        made, densities, before = _wide(module, sparsity, example, graph)
    else:
        made, densities, before = _replaced(module, sparsity, kind, pattern, activation)
    # Branches that keep 1 / k each, and are k, are together as large as one dense layer.
    made = _fresh(made, {} if kind == "parallel" else densities, seed)
    sizes = {name: p.numel() for name, p in made.named_parameters()}
    after = sum(round(share * sizes[name]) for name, share in densities.items())
    return IsoFlop(made, densities, before, after + _dense_part(made))


def _wide(
    module: nn.Module, sparsity: float, example: Any, graph: UnitGraph | None
) -> tuple[nn.Module, dict[str, float], int]:
    from weightsmith.graph import trace
    from weightsmith.prune.structured import cut_module, cuttable

    if graph is None:
        if example is None:
            raise Error('iso_flop: kind="wide" needs example=, what the module is called with, or graph=')
        graph = trace(module, example)
    factor, index = 1 / math.sqrt(1 - sparsity), {}
    for name in cuttable(graph):
        space = graph.space(name)
        size = max(round(factor * space.size / space.multiple) * space.multiple, space.size)
        index[name] = torch.cat([torch.arange(space.size), torch.full((size - space.size,), -1)])
    made = cut_module(module, graph, index)
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.dim() > 1}
    wider = {name: p.numel() for name, p in made.named_parameters() if name in sizes and p.numel() > sizes[name]}
    if not wider:
        raise Error(f"iso_flop: no space of {listed(index)} becomes larger at sparsity {sparsity:g}")
    return made, {name: sizes[name] / count for name, count in wider.items()}, sum(sizes[name] for name in wider)


def _replaced(
    module: nn.Module, sparsity: float, kind: Kind, pattern: Pattern | None, activation: Activation
) -> tuple[nn.Module, dict[str, float], int]:
    made = copy.deepcopy(module)
    densities: dict[str, float] = {}
    before = 0
    for name in _linear_weights(made, pattern):
        layer: Any = made.get_submodule(name)
        inputs, outputs = layer.in_features, layer.out_features
        new, shares = _family(layer, sparsity, kind, activation)
        place, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(place), leaf, new.train(layer.training))
        densities |= {f"{name}.{part}": share for part, share in shares.items()}
        before += inputs * outputs
    return made, densities, before


def _linear_weights(module: nn.Module, pattern: Pattern | None) -> list[str]:
    """Names of the linear layers to replace."""
    names = [name.removesuffix(".weight") for name in chosen_targets(open(module), pattern)]
    layers = dict(module.named_modules())
    linear = [name for name in names if type(layers.get(name)) is nn.Linear]
    if pattern is not None and len(linear) < len(names):
        other = [name for name in names if name not in linear]
        raise Error(
            f'iso_flop: {listed(other)} are no torch.nn.Linear; leave them out of pattern=, or take kind="wide"'
        )
    found = linear if pattern is not None else linear[:-1]
    if not found or "" in found:
        raise Error("iso_flop: there is no inner torch.nn.Linear to replace; say which with pattern=")
    return found


def _family(
    layer: nn.Linear, sparsity: float, kind: Kind, activation: Activation
) -> tuple[nn.Module, dict[str, float]]:
    """What replaces a layer, and the density of each weight in it."""
    inputs, outputs, bias = layer.in_features, layer.out_features, layer.bias is not None
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    both = inputs + outputs
    if kind == "parallel":
        count = max(round(1 / (1 - sparsity)), 2)
        bend = nn.ReLU if activation == "usual" else activation
        layers: list[nn.Module] = [skip_init(nn.Linear, inputs, outputs, bias, **like) for _ in range(count)]
        return Branches(layers, bend), {f"layers.{i}.weight": 1 / count for i in range(count)}
    if kind == "factorised":
        inner = math.ceil(inputs * outputs / ((1 - sparsity) * both))
        bend = nn.Identity if activation == "usual" or activation is None else activation
        factors = nn.Sequential(
            skip_init(nn.Linear, inputs, inner, False, **like),
            bend(),
            skip_init(nn.Linear, inner, outputs, bias, **like),
        )
        share = inputs * outputs / (inner * both)
        return factors, {"0.weight": share, "2.weight": share}
    rank = math.floor(sparsity * inputs * outputs / both)
    if not rank:
        raise Error(f"iso_flop: a product beside {outputs} x {inputs} would have rank 0 at sparsity {sparsity:g}")
    product = nn.Sequential(
        skip_init(nn.Linear, inputs, rank, False, **like), skip_init(nn.Linear, rank, outputs, False, **like)
    )
    sparse = skip_init(nn.Linear, inputs, outputs, bias, **like)
    made = Branches([sparse, product], None)
    made.dense = rank * both  # type: ignore[assignment]
    return made, {"layers.0.weight": 1 - rank * both / (inputs * outputs)}


def _dense_part(module: nn.Module) -> int:
    """Multiplications of dense products beside sparse layers."""
    return sum(int(getattr(part, "dense", 0)) for part in module.modules() if isinstance(part, Branches))


def _fresh(module: nn.Module, densities: Mapping[str, float], seed: int) -> nn.Module:
    """Fresh weights; those that will be sparse are so much larger that they compute values as large as if dense."""
    from weightsmith.prune.structured import reinitialised

    made = reinitialised(module, seed)
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name, share in densities.items():
            parameters[name].div_(math.sqrt(share))
    return made

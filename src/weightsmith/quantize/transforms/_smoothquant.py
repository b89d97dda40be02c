"""Large inputs made smaller and their weights larger, by how large both are.

Between an input's largest value and the largest of its weights lies a factor that shares out what is hard to round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import stats as _stats
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.graph import UnitGraph
from weightsmith.quantize import _rtn
from weightsmith.quantize.room import lift, planned
from weightsmith.quantize.transforms._parts import floored, gathered, graph_of, sizes_of
from weightsmith.quantize.transforms._places import Place, by_unit, places, scaled
from weightsmith.stats import Batch, Forward
from weightsmith.stats.room import default_forward, restored
from weightsmith.weights import Pattern, Weights, open, working


@card(
    paper="Xiao, Lin, Seznec, Wu, Demouth, Han 2023, 'SmoothQuant: Accurate and Efficient Post-Training Quantization "
    "for Large Language Models'",
    needs=("data", "graph"),
    unit="model",
    claim="inputs of a layer have less far outliers, its outputs are the same",
    departs="all places of the graph are rescaled, not norms alone",
)
def smoothquant(
    weights: Any,
    batches: Iterable[Batch] | None = None,
    *,
    alpha: float = 0.5,
    graph: UnitGraph | None = None,
    maxima: Mapping[str, Tensor] | None = None,
    gains: Mapping[str, Sequence[str]] | None = None,
    offset: float = 0.0,
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
) -> Weights:
    r"""The same network with inputs and weights equally hard to round.

    .. math:: s_j = \frac{\max |x_j|^{\,\alpha}}{\max |w_j|^{\,1 - \alpha}}

    by which the weights that read the input :math:`j` are multiplied, and what writes it is divided.

    Args:
        weights: what `weightsmith.open` opens: a folder, a module.
        batches: ``inputs``, ``(inputs, labels)`` or mappings.
        alpha: from 0 (all weights of a matrix alike) to 1 (all inputs alike).
        graph: the units; by default of the family of a folder, or traced from a module.
        maxima: in place of ``batches``, the largest absolute values, as ``stats.activations(what="maximum")`` has them.
        gains, offset: as `places` takes them.
        model, blocks, dtype, device, forward: as in `weightsmith.stats.walk`.

    Returns:
        Weights: lazy, of the same shapes and names. A place of which the data says nothing, or only zeros, is left.

    Raises:
        Error: no data, an alpha outside 0 to 1, no place, inputs that are not finite, or a block that computes
            something else with its weights rescaled.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> new = smoothquant(net, [torch.ones(1, 2)], alpha=1.0)
    >>> values = torch.nn.functional.linear(torch.ones(1, 2), new["0.weight"], new["0.bias"]).abs()
    >>> torch.allclose(values, torch.ones(1, 2))  # with alpha 1 every input has 1 for its largest value
    True
    """
    opened = open(weights)
    how = {"blocks": blocks, "dtype": dtype, "device": device, "forward": forward}
    every, known = _known(weights, opened, batches, graph, maxima, gains, offset, model, how)
    factors = {place.name: f for place in every if (f := _balanced(place, opened, known, alpha)) is not None}
    return scaled(opened, every, factors, "smoothquant")


@card(
    paper="Pan, Wang, Zheng, Li, Wang, Feng 2023, 'SmoothQuant+: Accurate and Efficient 4-bit Post-Training "
    "WeightQuantization for LLM'",
    covers=("smoothquant-plus",),
    needs=("data", "graph"),
    unit="model",
    claim="rounding to nearest at few bits loses less with the alpha that is found than without rescaling",
    departs="the network as it is takes part in the search; a loss is the squared change of the network's outputs by "
    "default, which need not be the paper's; all places of the graph are rescaled",
)
def smoothquant_plus(
    weights: Any,
    batches: Iterable[Batch],
    *,
    steps: int = 20,
    graph: UnitGraph | None = None,
    maxima: Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    gains: Mapping[str, Sequence[str]] | None = None,
    offset: float = 0.0,
    pattern: Pattern | None = None,
    blocks: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> Weights:
    r"""`smoothquant` with the one alpha whose rounded network loses least.

    .. math:: \alpha = \operatorname{arg\,min}_\alpha \sum_x \ell\big(f_{Q(W_\alpha)}(x)\big)

    over 0, 1 / steps, ... 1, and the network as it is.

    Args:
        weights: a module, or what `weightsmith.open` opens with ``model``.
        batches: held in memory; the whole rounded network runs on them ``steps + 2`` times, and, without a ``loss``,
            the network itself as often, so that its outputs need not be held.
        steps: how many alphas above 0 are tried.
        graph, maxima, gains, offset, blocks: as in `smoothquant`.
        model: the module that ``weights`` are of; a copy of it is loaded with rounded weights.
        loss: ``(model, batch) -> number``; by default how far the outputs are from the network's own, squared and
            summed.
        pattern: which tensors will be rounded; by default those that `weightsmith.quantize.rtn` rounds.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        options: of the grid and of rounding to nearest (``bits``, ``group``, ``clip``, ...).

    Returns:
        Weights: lazy, of the same shapes and names. Memory: two copies of the module (one with a ``loss``).

    Raises:
        Error: no module, as `smoothquant`, or a loss that is never a finite number.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> data = [torch.rand(16, 4) * torch.tensor([1.0, 1.0, 1.0, 50.0])]
    >>> list(smoothquant_plus(net, data, steps=2, bits=3, group=4)) == list(net.state_dict())
    True
    """
    if steps < 1:
        raise Error(f"smoothquant_plus tries at least one alpha above 0, got steps={steps}")
    opened, batches = open(weights), list(batches)
    module = weights if model is None and isinstance(weights, nn.Module) else model
    if module is None:
        raise Error("smoothquant_plus runs the whole rounded network: give the module, or model=")
    options = {**options, "pattern": pattern}
    planned(_rtn.rtn, opened, options)
    how = {"blocks": blocks, "dtype": torch.float32, "device": None, "forward": forward}
    every, known = _known(module, opened, batches, graph, maxima, gains, offset, module, how)
    ask = forward or default_forward
    rounding: Any = lift(_rtn.rtn)
    scratch = dense = copy.deepcopy(module)
    if loss is None:
        dense = copy.deepcopy(module)
        opened.load_into(dense)
    best, least = opened, torch.inf
    for alpha in (None, *(step / steps for step in range(steps + 1))):
        changed = opened
        if alpha is not None:
            factors = {place.name: f for place in every if (f := _balanced(place, opened, known, alpha)) is not None}
            changed = scaled(opened, every, factors, "smoothquant_plus")
        rounding(changed, action="values", **options).load_into(scratch)
        total = 0.0
        with restored(scratch), restored(dense), torch.no_grad():
            for batch in batches:
                if loss is not None:
                    total += float(loss(scratch, batch))
                else:
                    total += float((ask(scratch, batch) - ask(dense, batch)).double().square().sum())
        if total < least:
            best, least = changed, total
    if least == torch.inf:
        raise Error("smoothquant_plus: the loss of no rounded network is a finite number; check the batches and loss=")
    return best


def _known(
    weights: Any, opened: Weights, batches: Any, graph: Any, maxima: Any, gains: Any, offset: float, model: Any,
    how: Mapping[str, Any],
) -> tuple[tuple[Place, ...], dict[str, Tensor]]:  # fmt: skip
    """The places, and of each that data speaks of how large its inputs get."""
    if batches is None and maxima is None:
        raise Error("smoothing needs batches of data, or the largest absolute inputs with maxima=")
    if graph is None:
        graph, batches = graph_of(weights, opened, model, batches)
    every = places(opened, graph, gains, offset=offset)
    if not every:
        raise Error("there is no place that can be rescaled; see quantize.transforms.places")
    known: dict[str, Tensor] = {}

    def keep(place: Place, seen: Mapping[str, Tensor]) -> None:
        found = sizes_of(place, seen, "maximum")
        if found is not None and float(found.max()) > 0:
            known[place.name] = floored(found)

    if maxima is not None:
        for place in every:
            keep(place, maxima)
    else:
        wanted = {side.tensor for place in every for side in place.readers}
        asked = {"maxima": _stats.Activations("maximum", pattern=wanted.__contains__)}
        module = weights if isinstance(weights, nn.Module) else model
        gathered(
            opened,
            batches or (),
            every,
            asked,
            lambda place, _, seen: keep(place, seen["maxima"]),
            module=module,
            **how,
        )
    return every, known


def _balanced(place: Place, weights: Weights, known: Mapping[str, Tensor], alpha: float) -> Tensor | None:
    """The factors of a place that data speaks of."""
    if not 0 <= alpha <= 1:
        raise Error(f"alpha lies from 0 to 1, got {alpha}")
    if place.name not in known:
        return None
    inputs = known[place.name]
    largest = torch.zeros_like(inputs)
    for side in place.readers:
        weight = working(weights[side.tensor]).abs().movedim(side.dim, 0).flatten(1)
        largest = torch.maximum(largest, by_unit(side, weight.amax(1), "maximum").to(largest))
    return inputs**alpha / floored(largest) ** (1 - alpha)

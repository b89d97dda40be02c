"""What each rounded weight costs, exactly, and the few that had better stay as they were.

A gradient at the weights as they were says little of what happens far away, where rounding puts them. Followed along
the whole way, gradients say for each weight its share of the loss that was made, and the shares add up to it. The few
weights of the largest shares are kept in full beside the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._layout import dequantize
from weightsmith.quantize._sequential import kernel_of
from weightsmith.quantize.room import lift, targets_of
from weightsmith.stats import Batch, Loss
from weightsmith.stats.room import default_loss, restored, size
from weightsmith.weights import Entire, Held, Pattern, Step, Weights, apply, open

KEPT, PLACES = "_kept", "_kept_places"
"""Endings of the weights that are kept, and of where they belong in the flattened tensor."""


@card(
    paper="Hu, Huang, Liang, Chen, Zhang, Zhu, Chen 2025, 'Identifying Sensitive Weights via Post-quantization "
    "Integral'",
    covers=("identifying-sensitive-weights-post-quantization",),
    needs=("data",),
    unit="model",
    claim="its scores add up to what rounding did to the loss, where those of a Taylor series do not",
    departs="the points lie in the middles of their intervals, so that few are enough",
)
def damage(
    model: nn.Module,
    quantized: Any,
    batches: Iterable[Batch],
    *,
    points: int = 8,
    pattern: Pattern | None = None,
    loss: Loss | None = None,
) -> Weights:
    r"""Each weight's share of what rounding did to the loss.

    .. math:: s_i = (v_i - w_i) \int_0^1 \frac{\partial L}{\partial w_i}\bigl( w + t\,(v - w) \bigr)\, dt, \qquad
        \sum_i s_i = L(v) - L(w)

    with :math:`L` the mean loss of an example, and the integral by the middles of as many intervals as there are
    points.

    Args:
        model: with the weights :math:`w`; asked in evaluation mode and left as it was.
        quantized: the weights :math:`v`, as codes or as values; anything `weightsmith.open` opens.
        batches: ``(inputs, labels)`` or mappings, as for `weightsmith.stats.fisher`.
        points: of the path.
        pattern: which tensors; by default those of `quantized` that are codes or differ from the model's.
        loss: ``(model, batch) -> number``, summed over examples, of a model that is only called; the default is
            cross-entropy.

    Returns:
        Weights: float32 scores under the names of the tensors, above zero where rounding did harm. ``points`` backward
        passes a batch; memory holds these weights four times.

    Raises:
        ValueError: no batch, no tensor that differs, shapes or settings that do not fit, a loss that is not finite.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> rounded = {"weight": torch.zeros(1, 2)}
    >>> square = lambda model, batch: model(batch).square().sum()
    >>> data = torch.ones(1, 2)
    >>> scores = damage(layer, rounded, [data], points=1, loss=square)
    >>> bool((scores["weight"].sum() + square(layer, data)).abs() < 1e-6)
    True
    """
    if not isinstance(points, int) or isinstance(points, bool) or points < 1:
        raise Error(f"points is a whole number from 1, got {points!r}")
    named = dict(model.named_parameters())
    moves = _moves(named, quantized, pattern)
    totals = {name: torch.zeros_like(move) for name, move in moves.items()}
    ask = loss or default_loss
    count = 0
    with restored(model), progress.task("damage", len(batches) if isinstance(batches, Sequence) else 0) as advance:
        for batch in batches:
            count += size(batch)
            for point in range(points):
                share = (point + 0.5) / points
                leaves = {
                    name: (named[name].detach() + share * move.to(named[name].dtype)).requires_grad_()
                    for name, move in moves.items()
                }
                with torch.enable_grad():
                    found = ask(_replaced(model, leaves), batch)
                if not isinstance(found, Tensor) or found.numel() != 1 or not bool(found.isfinite()):
                    raise Error("the loss is no finite number on the way from the weights to the quantized ones")
                slopes = torch.autograd.grad(found.sum(), list(leaves.values()), allow_unused=True)
                for total, slope in zip(totals.values(), slopes, strict=True):
                    if slope is not None:
                        total.add_(slope.to(total.dtype))
            advance(1)
    if not count:
        raise Error("damage needs at least one batch of data, got none")
    with torch.no_grad():
        scores = {name: (total * moves[name]).div_(points * count) for name, total in totals.items()}
    step = Step("quantize.damage", {"points": points, "pattern": pattern})
    return Weights({name: Held(score) for name, score in scores.items()}, step)


def _replaced(model: nn.Module, leaves: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model as a function, with some parameters replaced."""
    return lambda *args, **kwargs: functional_call(model, dict(leaves), args, kwargs)


def _moves(named: Mapping[str, nn.Parameter], quantized: Any, pattern: Pattern | None) -> dict[str, Tensor]:
    """How far each tensor is moved by rounding, float32."""
    values = _values_of(quantized)
    chosen = [name for name in values.names(pattern or "*", floating=True) if name in named]
    wrong = [name for name in chosen if values.spec(name).shape != tuple(named[name].shape)]
    if wrong:
        raise Error(f"{listed(wrong)} of the quantized weights are of other shapes than the model's")
    moves = {name: values[name].to(named[name].device).float() - named[name].detach().float() for name in chosen}
    moves = {name: move for name, move in moves.items() if pattern is not None or bool(move.any())}
    if not moves:
        raise Error("no tensor of the quantized weights differs from the model's")
    return moves


def _values_of(quantized: Any) -> Weights:
    opened = open(quantized)
    if any(name.endswith(KEPT) for name in opened):
        return with_kept(opened)
    return dequantize(opened) if any(name.endswith("_packed") for name in opened) else opened


@card(
    paper="Hu, Huang, Liang, Chen, Zhang, Zhu, Chen 2025, 'Identifying Sensitive Weights via Post-quantization "
    "Integral' (ReQuant)",
    needs=("data",),
    unit="model",
    claim="keeping the weights of most damage loses less than keeping as many of the largest",
    departs="outliers are shared out over tensors by the damage that plain rounding does in each; damage is counted "
    "by its magnitude",
)
def requant(
    model: nn.Module,
    batches: Iterable[Batch],
    method: str | Callable[..., Coded] = "rtn",
    *,
    outliers: float = 0.0045,
    kept: float = 0.0005,
    rounds: int = 2,
    points: int = 8,
    pattern: Pattern | None = None,
    stats: Any = None,
    loss: Loss | None = None,
    **options: Any,
) -> Weights:
    """Codes, and beside them the few weights whose rounding changes the loss most, in full.

    First outliers: of each tensor the largest weights are left out, before the others are rounded on a narrower range;
    tensors have as many as plain rounding damages them. Then, in rounds, the weights of most `damage`, for good or ill,
    are kept.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: as for `damage`.
        method: a rounding of `weightsmith.quantize`, by its name or as a kernel.
        outliers: share of the weights that are left out of rounding.
        kept: share of the weights that are kept for what their rounding does to the loss.
        rounds: in how many steps these are chosen.
        points: of each path.
        pattern: which tensors; by default matrices and convolutions without embeddings and the head.
        stats: of the inputs, where the method needs them.
        loss: as for `damage`.
        options: of the method and of its grid.

    Returns:
        Weights: codes, and for each tensor ``layer.weight_kept`` (values ``[k]`` in its dtype) and
        ``layer.weight_kept_places`` (``[k]`` int64, in the flattened tensor). `with_kept` puts them together. The
        number kept is fixed by the shares. Memory: as `damage`, and the scores once.

    Raises:
        ValueError: shares out of their range, and what `damage` and the method raise.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))]
    >>> found = requant(net, data, bits=2, outliers=0.0, kept=0.25, rounds=1)
    >>> found["0.weight_kept"].numel() + found["2.weight_kept"].numel()
    6
    """
    if not (outliers >= 0 and kept >= 0 and outliers + kept < 1):
        raise Error(f"outliers and kept are shares whose sum is below 1, got {outliers} and {kept}")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise Error(f"rounds is a whole number from 1, got {rounds!r}")
    kernel = kernel_of(method)
    quantize = lift(kernel)
    given = {**options} if stats is None else {**options, "stats": stats}
    opened, held = open(model), list(batches)
    names = targets_of(opened, pattern)
    numel = sum(opened[name].numel() for name in names)

    def scored(found: Weights) -> dict[str, Tensor]:
        # Magnitudes: to undo harm alone, and not the gains that go with it, spoils the loss on other data.
        scores = damage(model, found, held, points=points, pattern=names, loss=loss)
        return {name: score.abs() for name, score in scores.items()}

    dense = _computed(quantize(opened, pattern=names, **given))
    places = {name: torch.zeros(0, dtype=torch.int64) for name in names}
    if round(outliers * numel):
        harm = {name: float(score.sum()) for name, score in scored(dense).items()}
        counts = shared_out(harm, {name: opened[name].numel() for name in names}, round(outliers * numel))
        patch = {}
        for name, count in counts.items():
            weight = opened[name].clone()
            places[name] = weight.abs().flatten().float().topk(count).indices.sort().values
            weight.view(-1)[places[name]] = 0
            patch[name] = weight
        dense = _computed(quantize(opened | patch, pattern=names, **given))
    done = 0
    for number in range(rounds):
        upto = round(kept * numel * (number + 1) / rounds)
        if upto == done:
            continue
        found = scored(_joined(dense, opened, places))
        for name, own in places.items():
            found[name].view(-1)[own] = -torch.inf  # its damage is undone already
        places = {name: torch.cat([own, more]) for (name, own), more in _most(found, places, upto - done)}
        done = upto
    places = {name: own.sort().values for name, own in places.items()}
    said = {"method": kernel.__name__, "outliers": outliers, "kept": kept, **options}
    step = Step("quantize.requant", said, (dense.lineage,))
    made = _joined(dense, opened, places)
    return Weights({name: made.node(name) for name in made}, step, dense.files, dense.metadata)


def _computed(weights: Weights) -> Weights:
    """The same, held in memory: they are read again and again."""
    nodes = {name: Held(weights[name]) for name in weights}
    return Weights(nodes, weights.lineage, weights.files, weights.metadata)


def shared_out(harm: Mapping[str, float], sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """A number in whole parts that are in proportion to the harm, none larger than its tensor; they add up to it.

    >>> shared_out({"a": 3.0, "b": 1.0}, {"a": 10, "b": 10}, 6)
    {'a': 5, 'b': 1}
    >>> shared_out({"a": 3.0, "b": 1.0}, {"a": 2, "b": 10}, 6)
    {'a': 2, 'b': 4}
    """
    found = dict.fromkeys(harm, 0)
    left = min(count, sum(sizes[name] for name in harm))
    while left:
        free = {name: harm[name] for name in harm if found[name] < sizes[name]}
        total = sum(free.values())
        share = {name: left * (value / total if total > 0 else 1 / len(free)) for name, value in free.items()}
        given = {name: min(int(part), sizes[name] - found[name]) for name, part in share.items()}
        if not any(given.values()):
            rest = sorted(free, key=lambda name: share[name], reverse=True)[:left]
            given = dict.fromkeys(rest, 1)
        for name, more in given.items():
            found[name] += more
        left -= sum(given.values())
    return found


def _most(
    scores: Mapping[str, Tensor], places: Mapping[str, Tensor], count: int
) -> list[tuple[tuple[str, Tensor], Tensor]]:
    """Each tensor's places, and the places of its scores among the highest of all; ties go to the first."""
    names = list(places)
    whole = torch.cat([scores[name].flatten() for name in names])
    chosen = torch.argsort(whole, descending=True, stable=True)[:count].sort().values
    found, start = [], 0
    for name in names:
        stop = start + scores[name].numel()
        found.append(((name, places[name]), chosen[(chosen >= start) & (chosen < stop)] - start))
        start = stop
    return found


def _joined(dense: Weights, opened: Weights, places: Mapping[str, Tensor]) -> Weights:
    """Codes, with what is kept beside them."""
    nodes: dict[str, Any] = {name: dense.node(name) for name in dense}
    for name, own in places.items():
        own = own.cpu()
        nodes[name + KEPT] = Held(opened[name].flatten()[own.to(opened[name].device)].cpu())
        nodes[name + PLACES] = Held(own)
    return Weights(nodes, dense.lineage, dense.files, dense.metadata)


def with_kept(weights: Any) -> Weights:
    """Float weights from codes and the weights that were kept beside them, lazily.

    Raises:
        Error: nothing in it is quantized, or what is kept has no places or fits no tensor.

    >>> codes = ws.quantize.rtn({"l.weight": torch.tensor([[7.5, -7.5, 1.0, 0.4]])})
    >>> kept = {"l.weight_kept": torch.tensor([0.4]), "l.weight_kept_places": torch.tensor([3])}
    >>> with_kept(codes | kept)["l.weight"]
    tensor([[ 7.0000, -8.0000,  1.0000,  0.4000]])
    """
    opened = open(weights)
    own = [name.removesuffix(KEPT) for name in opened if name.endswith(KEPT)]
    wrong = [name for name in own if name + PLACES not in opened or f"{name}_packed" not in opened]
    if wrong:
        raise Error(f"{listed(wrong)}: weights are kept, but there are no codes, or nothing says where they belong")
    plain = dequantize(opened)
    nodes = {}
    for name in plain:
        if name.endswith((KEPT, PLACES)) and name.removesuffix(PLACES).removesuffix(KEPT) in own:
            continue
        nodes[name] = plain.node(name)
        if name in own:
            kept = (Entire(opened.node(name + KEPT)), Entire(opened.node(name + PLACES)))
            nodes[name] = apply(_put, nodes[name], *kept, unit="tensor", spec=plain.spec(name))
    return Weights(nodes, Step("quantize.with_kept", {}, (opened.lineage,)), plain.files, plain.metadata)


def _put(dense: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    if len(kept) != len(places) or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < dense.numel()):
        raise Error(f"what is kept of a tensor {list(dense.shape)} has places outside of it")
    made = dense.clone().contiguous()
    made.view(-1)[places.to(made.device)] = kept.to(made)
    return made

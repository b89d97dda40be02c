"""How much harm each sparsity of each tensor does, measured one tensor at a time.

The harm of pruning several layers is close to the sum of the harms of pruning each alone, so a table of a few levels
for each tensor is all that an allocation has to know. It is measured at the outputs of the whole model, or at those of
the layer itself, for which its Gram matrix stands in.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune import magnitude
from weightsmith.prune.allocation._parts import sized
from weightsmith.prune.room import Source, of_targets
from weightsmith.stats import Batch, Forward, Loss
from weightsmith.stats.room import counted, default_forward, default_loss, predictions, restored, size
from weightsmith.weights import Pattern, Weights, materialize, working

if TYPE_CHECKING:
    from weightsmith.inspect import Report

Harm = Literal["output", "kl", "loss"]

Method = Callable[[Weights, float], Weights]
"""``(weights, sparsity) -> pruned weights``, each tensor to that sparsity by itself."""

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Curves:
    """Harm by tensor and sparsity."""

    levels: tuple[float, ...]
    """Shares removed, ascending, the first is 0."""
    harms: Mapping[str, Tensor]
    """Tensor -> ``[levels]`` float64; 0 for the first."""
    sizes: Mapping[str, int]
    """Elements of each tensor."""

    def at(self, allocation: Mapping[str, float]) -> float:
        """The sum of the harms at these shares, linear between levels.

        Raises:
            Error: tensors that were not measured, or a share above the last level.
        """
        unknown = [name for name in allocation if name not in self.harms]
        if unknown:
            raise Error(f"the curves say nothing of {listed(unknown)}")
        return float(sum(self._one(name, share) for name, share in allocation.items()))

    def _one(self, name: str, share: float) -> float:
        if not 0 <= share <= self.levels[-1]:
            raise Error(f"{name}: the curves reach from 0 to {self.levels[-1]:g}; got a share of {share:g}")
        high = max(bisect.bisect_left(self.levels, share), 1)
        low = high - 1
        part = (share - self.levels[low]) / (self.levels[high] - self.levels[low])
        harm = self.harms[name]
        return float(harm[low] + part * (harm[high] - harm[low]))

    def report(self) -> Report:
        """A row for each tensor, and the curves drawn."""
        from weightsmith.inspect import Line, Plot, Report

        names = [f"at {100 * level:g} %" for level in self.levels[1:]]
        rows = [
            {"tensor": name, "elements": self.sizes[name]} | dict(zip(names, harm.tolist()[1:], strict=True))
            for name, harm in self.harms.items()
        ]
        lines = [Line(name, self.levels, harm.tolist()) for name, harm in self.harms.items()]
        return Report(
            "Harm of pruning one tensor", {"tensors": len(rows)}, rows, [Plot("Harm", "share removed", "harm", lines)]
        )


@card(
    paper="Xu et al. 2023, 'Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks'",
    covers=("efficient-joint-optimization-layer-adaptive",),
    needs=("data",),
    unit="model",
    claim="the harms of single tensors add up to nearly the harm of pruning them all",
)
def measured(
    model: nn.Module,
    batches: Iterable[Batch],
    levels: Sequence[float] = LEVELS,
    *,
    method: Method | None = None,
    error: Harm = "output",
    pattern: Pattern | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Curves:
    r"""What pruning one tensor alone does to what the model gives, for every tensor and level.

    .. math:: \delta_l(k) = \overline{\lVert f(x; W) - f(x; W_{l \to k}) \rVert^2}

    Args:
        model: asked in evaluation mode, with other weights in place of its own; left as it is.
        batches: read once; labels are needed for ``"loss"`` only.
        levels: shares removed, ascending.
        method: ``(weights, sparsity) -> pruned weights``; by default magnitude within each tensor. Others, such as
            ``partial(prune.wanda, stats=grams)``, are to prune each tensor by itself.
        error: ``"output"``, the mean squared change of an output; ``"kl"``, the divergence in nats of the predicted
            distribution from the whole model's; or ``"loss"``, by how much the loss of an example grows, which may be
            negative.
        pattern: which tensors; by default `weightsmith.prune.prunable`.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        loss: ``(model, batch) -> number``, where the default (cross-entropy, summed) does not fit.

    Returns:
        Curves: one forward pass a batch for each tensor and level; held is one batch of outputs, and no pruned copy.

    Raises:
        Error: levels that do not rise from 0 to 1, no batch, a method that leaves a tensor as it is, or outputs that
            are not finite.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 3.0]])
    >>> measured(layer, [torch.eye(2)], (0.5, 1.0)).harms["weight"]
    tensor([0.0000, 0.5000, 5.0000], dtype=torch.float64)
    """
    if error not in get_args(Harm):
        raise Error(f"measured: error is one of {', '.join(get_args(Harm))}; got {error!r}")
    opened, sizes = sized(model, pattern)
    pruned = _at_levels(opened, sizes, levels, method, "measured")
    total = torch.zeros(len(sizes), len(pruned), dtype=torch.float64)
    count = 0.0
    ask, judge = forward or default_forward, loss or default_loss
    with restored(model), torch.no_grad(), progress.task("curves", 0) as advance:
        for batch in batches:
            harm = _Harm(error, ask, judge, model, batch)
            count += harm.count
            for row, name in enumerate(sizes):
                for column, weights in enumerate(pruned):
                    total[row, column] += harm(name, weights[name].detach())
                advance(1)
    if not count:
        raise Error("measured needs at least one batch of data with something that counts, got none")
    wrong = [name for name, row in zip(sizes, total, strict=True) if not row.isfinite().all()]
    if wrong:
        raise Error(f"measured: the model's outputs are not finite without parts of {listed(wrong)}")
    return _curves(levels, sizes, total / count)


@card(
    paper="Hassibi, Stork, Wolff 1993, 'Optimal Brain Surgeon and General Network Pruning' (the squared error of a "
    "layer's outputs as the harm)",
    needs=("stats.gram",),
    unit="model",
    claim="needs no forward pass, and orders the levels of one tensor as its measured outputs do",
)
def gram_curves(
    weights: Source,
    levels: Sequence[float] = LEVELS,
    *,
    stats: Source,
    method: Method | None = None,
    relative: bool = True,
    pattern: Pattern | None = None,
) -> Curves:
    r"""What pruning a tensor does to the outputs of its own layer, from the Gram matrix of its inputs.

    .. math:: \delta_l(k) = \frac{\operatorname{tr}(D G D^\top)}{\operatorname{tr}(W G W^\top)}, \qquad D = W - W_k

    Args:
        weights: anything that `weightsmith.open` opens; one tensor in memory at a time, read once a level.
        levels: shares removed, ascending.
        stats: Gram matrices of the inputs (`weightsmith.stats.gram`): whole, in blocks, or diagonals.
        method: ``(weights, sparsity) -> pruned weights``; by default magnitude within each tensor.
        relative: divide by the energy of the layer's outputs, so that layers of different scale can be compared; False
            gives the sum of squares.
        pattern: which tensors; by default `weightsmith.prune.prunable`.

    Returns:
        Curves: a layer whose outputs are all zero has no harm.

    Raises:
        Error: levels that do not rise from 0 to 1, statistics that do not fit or are not finite, or a method that
            leaves a tensor as it is.

    >>> gram_curves({"w": torch.tensor([[1.0, 3.0]])}, (0.5, 1.0), stats={"w": torch.ones(2)}).harms["w"]
    tensor([0.0000, 0.1000, 1.0000], dtype=torch.float64)
    """
    opened, sizes = sized(weights, pattern)
    known = of_targets(stats, "stats.gram", opened, list(sizes), "gram_curves")
    pruned = _at_levels(opened, sizes, levels, method, "gram_curves")
    total = torch.zeros(len(sizes), len(pruned), dtype=torch.float64)
    with torch.no_grad():
        for row, name in enumerate(sizes):
            weight, gram = opened[name].detach(), materialize(known[name].node)
            gram = gram.to(weight.device)
            whole = output_energy(weight, gram) if relative else 1.0
            for column, other in enumerate(pruned):
                harm = output_energy(working(weight) - working(other[name].detach()), gram)
                total[row, column] = harm / whole if whole else 0.0
            if not total[row].isfinite().all():
                raise Error(f"gram_curves: the weights of {name} or the Gram matrix of its inputs are not finite")
    return _curves(levels, sizes, total)


def output_energy(weight: Tensor, gram: Tensor) -> float:
    r"""The sum of squares of a layer's outputs, ``tr(W G W')``, never below 0.

    Args:
        weight: ``[out, ...]``.
        gram: of its inputs: ``[in, in]``, blocks ``[in / b, b, b]``, or a diagonal ``[in]``; on the same device.

    Returns:
        Computed in the wider of float32 and the weight's dtype, summed in float64.

    >>> output_energy(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    9.0
    """
    flat = working(weight).reshape(len(weight), weight.shape[1:].numel())
    gram = gram.to(flat.dtype)
    if gram.dim() == 1:
        return float((flat.square() @ gram).sum(dtype=torch.float64))
    if gram.dim() == 2:
        return max(float((flat @ gram).mul_(flat).sum(dtype=torch.float64)), 0.0)
    blocks = flat.reshape(len(flat), *gram.shape[:2]).transpose(0, 1)
    return max(float((blocks @ gram).mul_(blocks).sum(dtype=torch.float64)), 0.0)


class _Harm:
    """What one batch says: the whole model's answer, and how far that of a pruned one is from it."""

    def __init__(self, error: Harm, forward: Forward, loss: Loss, model: nn.Module, batch: Batch):
        self.error, self.forward, self.loss, self.model, self.batch = error, forward, loss, model, batch
        if error == "loss":
            self.whole, self.count = loss(model, batch).double(), float(size(batch))
            return
        logits = forward(model, batch)
        self.keep = counted(logits, batch)
        self.whole = self._rows(logits)
        self.count = float(self.whole.numel() if error == "output" else len(self.whole))

    def _rows(self, logits: Tensor) -> Tensor:
        rows = predictions(logits, self.batch)[self.keep]
        return rows if self.error == "output" else rows.log_softmax(-1)

    def __call__(self, name: str, weight: Tensor) -> float:
        """The sum over what counts, with ``weight`` in place of the model's own."""

        def ask(*arguments: Any, **named: Any) -> Any:
            return functional_call(self.model, {name: weight}, arguments, named)

        if self.error == "loss":
            return float(self.loss(ask, self.batch).double() - self.whole)
        rows = self._rows(self.forward(ask, self.batch))
        if self.error == "output":
            return float((rows - self.whole).square().sum(dtype=torch.float64))
        return float((self.whole.exp() * (self.whole - rows)).sum(dtype=torch.float64))


def _at_levels(
    weights: Weights, sizes: Mapping[str, int], levels: Sequence[float], method: Method | None, who: str
) -> list[Weights]:
    """The weights pruned to each level above 0, lazily."""
    above = [level for level in levels if level != 0]
    if not above or not all(0 < level <= 1 for level in above) or sorted(set(above)) != list(above):
        raise Error(f"{who} needs levels that rise from 0 to 1, got {list(levels)}")
    chosen = weights.select(frozenset(sizes).__contains__)
    found = [(method or partial(magnitude, pattern="*"))(chosen, level) for level in above]
    same = [name for name in sizes if sizes[name] and any(one.node(name) is chosen.node(name) for one in found)]
    if same:
        raise Error(
            f"{who}: the method leaves {listed(same)} as it is; give the method a pattern= that names it, or leave it "
            "out with pattern= here"
        )
    return found


def _curves(levels: Sequence[float], sizes: Mapping[str, int], harms: Tensor) -> Curves:
    whole = harms.new_zeros(len(harms), 1)
    rows = torch.cat([whole, harms], dim=1)
    above = tuple(float(level) for level in levels if level != 0)
    return Curves((0.0, *above), dict(zip(sizes, rows, strict=True)), dict(sizes))

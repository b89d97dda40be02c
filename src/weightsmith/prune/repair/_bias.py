"""The mean of each output is restored through its bias.

What is removed from a row of weights had, on average, something to say: its mean inputs times the weights that went.
A constant can say the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune.room import Source, of_targets
from weightsmith.weights import Entire, Lazy, Weights, apply, open, same_names, working


@card(
    paper="Nagel, van Baalen, Blankevoort, Welling 2019, 'Data-Free Quantization through Weight Equalization and Bias "
    "Correction'",
    needs=("stats.activations",),
    unit="model",
    claim="the mean output of each unit is on the data what it was before pruning",
    departs="for pruned weights, with means gathered on data",
)
def bias_correction(weights: Source, pruned: Source, means: Source) -> Weights:
    r"""Biases that make up for the mean of what was removed.

    .. math:: b' = b + (W - W')\, \bar x

    Args:
        weights: before pruning.
        pruned: after it, under the same names.
        means: ``[in]`` under the names of weights: ``weightsmith.stats.activations(model, batches, what="mean")``.

    Returns:
        Weights: lazy, ``pruned`` with another ``name.bias`` wherever ``means`` know ``name.weight`` and there is a
        bias. Layers without one stay as they are.

    Raises:
        Error: other names or shapes, means that fit no weight, or no bias to correct at all.

    >>> weights = {"l.weight": torch.tensor([[1.0, 2.0]]), "l.bias": torch.zeros(1)}
    >>> pruned = weights | {"l.weight": torch.tensor([[0.0, 2.0]])}
    >>> bias_correction(weights, pruned, {"l.weight": torch.tensor([3.0, 4.0])})["l.bias"]
    tensor([3.])
    """
    before, after, known = open(weights), open(pruned), open(means)
    same_names(before, after, "bias_correction needs the weights before and after pruning")
    lacking = [name for name in known if name not in after]
    if lacking:
        raise Error(f"bias_correction: the means are of {listed(lacking)}, which the weights do not hold")
    biases = {f"{name.removesuffix('weight')}bias": name for name in known if name.endswith("weight")}
    biases = {bias: name for bias, name in biases.items() if bias in after}
    if not biases:
        raise Error(f"bias_correction: no layer of {listed(known)} has a bias; there is nothing to add its mean to")
    found = of_targets(known, "stats.activations", after, list(biases.values()), "bias_correction")

    def build(bias: str, node: Lazy) -> Lazy:
        if bias not in biases:
            return node
        name = biases[bias]
        if node.spec.shape != after.spec(name).shape[:1] or before.spec(name).shape != after.spec(name).shape:
            raise Error(f"its weight is {before.spec(name)} before and {after.spec(name)} after pruning")
        both = (Entire(before.node(name)), Entire(after.node(name)))
        return apply(corrected, node, *both, found[name], unit="tensor", spec=node.spec)

    return after.zip_nodes(build, (), "prune.repair.bias_correction", {})


def corrected(bias: Tensor, before: Tensor, after: Tensor, mean: Tensor) -> Tensor:
    """The bias ``[out]`` that goes with the weights ``after``, ``[out, ...]``; float32 or wider."""
    if not mean.isfinite().all():
        raise Error("the means of its inputs are not finite")
    lost = (working(before) - working(after)).flatten(1)
    return working(bias) + torch.mv(lost, mean.to(lost))

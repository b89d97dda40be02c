"""From a module that mixes its weights by the input back to a plain one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn


def fold(module: nn.Module, weight: Mapping[str, Sequence[float]] | Sequence[float] | None = None) -> nn.Module:
    """A copy with a plain layer in place of every mixture (`WeightMixture`, `RoutedLinear`).

    Args:
        module: what `weight_ensembling` or `routed` made.
        weight: the coefficients ``[k]``, for all layers or by name of the layer; by default what each router gives
            without an input, where there is such a thing.

    Returns:
        nn.Module: gives what ``module`` gives wherever its routers give these coefficients; the same everywhere
        for routers that do not read the input.
    """
    plain = copy.deepcopy(module)
    for name, inner in module.named_modules():
        folding = getattr(inner, "fold", None)
        if callable(folding):
            own = weight.get(name) if isinstance(weight, Mapping) else weight
            folded = folding(own)
            assert isinstance(folded, nn.Module)
            if not name:
                return folded
            plain.set_submodule(name, folded.train(inner.training))
    return plain

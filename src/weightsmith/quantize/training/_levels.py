"""Points that learn where to lie, under weights that stand still.

A weight's nearest point is what it computes with; every point gets the gradients of all weights that chose it. A few
dozen numbers a tensor learn, and they go where the loss is, not where the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune.sparse import weights_of
from weightsmith.quantize import _coded
from weightsmith.quantize._coded import Coded, fitted, spans
from weightsmith.quantize._layout import Layout
from weightsmith.quantize.training._fake import layouts_of, put_on, stepped_straight
from weightsmith.weights import Pattern, PerTensor


class LearnedLevels(nn.Module):
    """The parametrization ``W -> levels[codes]``, whose levels learn.

    Args:
        weight: ``[out, ...]``, what it will stand on.
        layout: how it is taken for a matrix, on a grid of ``levels``.
        fixed: whether weights keep the level that is nearest now.
    """

    codes: Tensor | None

    def __init__(self, weight: Tensor, layout: Layout, fixed: bool = False):
        super().__init__()
        self.layout = layout
        rows = layout.matrix(weight.detach())
        shared = layout.grid.shared(rows)
        own = fitted(rows, layout.grid, shared=shared)
        self.whole = "levels" in shared
        self.levels = nn.Parameter({**shared, **own}["levels"].clone())
        self.register_buffer("codes", None)
        if fixed:
            self.codes = self.coded(weight).codes

    def rows(self, weight: Tensor) -> Tensor:
        """The weight that is rounded, ``[out, in]``."""
        return self.layout.matrix(weight)

    def table(self) -> Tensor:
        """The levels as they are stored, from low to high unless weights keep theirs."""
        stored = stepped_straight(self.levels, self.layout.grid.stored()["levels"].dtype)
        return stored.sort(-1).values if self.codes is None else stored

    @torch.no_grad()
    def coded(self, weight: Tensor) -> Coded:
        """The codes as they stand."""
        table, grid = self.table().detach().clone(), self.layout.grid
        own, shared = ({}, {"levels": table}) if self.whole else ({"levels": table}, {})
        if self.codes is not None:
            return Coded(self.codes, own, grid, shared)
        return _coded.coded(self.rows(weight), grid, own, shared)

    def forward(self, weight: Tensor) -> Tensor:
        table, codes = self.table(), self.coded(weight).codes.long()
        if self.whole:
            values = table[codes]
        else:
            runs = enumerate(spans(codes.shape[1], self.layout.grid.group))
            values = torch.cat([table[:, group].gather(1, codes[:, start:stop]) for group, (start, stop) in runs], 1)
        return values.view(weight.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "codes" in state_dict and self.codes is None:
            self.codes = torch.empty_like(state_dict[prefix + "codes"], device=self.levels.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@card(
    paper="Polino, Pascanu, Alistarh 2018, 'Model compression via distillation and quantization' (differentiable "
    "quantization)",
    covers=("model-compression-distillation-quantization",),
    unit="model",
    claim="points that learn lose less than even ones, at the same bits",
    departs="one table a tensor, or one a row or group, of values as they are, not of buckets scaled to [0, 1]; begun "
    "at the centres of least squared error, not at quantiles",
)
def learned_levels(
    module: nn.Module,
    *,
    bits: PerTensor[int] = 3,
    group: PerTensor[int | None] = None,
    per_tensor: bool = True,
    fixed: bool = False,
    pattern: Pattern | None = None,
) -> dict[str, LearnedLevels]:
    r"""Let the points of a module's grids learn; its weights stand still.

    .. math:: \hat w_i = p_{j(i)}, \qquad \frac{\partial L}{\partial p_j}
        = \sum_{i : j(i) = j} \frac{\partial L}{\partial \hat w_i}

    Args:
        module: changed in place; quantized weights need no gradients any more, all else is as it was.
        bits: ``2^b`` points a table; see `bits_by_gradient` for widths of each.
        group: inputs that share a table, if ``per_tensor`` is False; None for whole rows.
        per_tensor: one table for each weight.
        fixed: False: each weight takes the point that is nearest at the moment, as in the paper. True: it keeps the
            point it began with.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        name of a weight -> its parametrization.

    Raises:
        Error: no weight fits, or groups that do not fill a row.

    >>> model = nn.Linear(64, 4)
    >>> made = learned_levels(model, bits=2, pattern="*")["weight"]
    >>> made.levels.shape, len(model.weight.unique())
    (torch.Size([4]), 4)
    """
    layouts = layouts_of(module, pattern, grid="levels", bits=bits, group=group, per_tensor=per_tensor)
    weights = weights_of(module, pattern)
    made = put_on(module, pattern, lambda name, weight: LearnedLevels(weight, layouts[name], fixed))
    for weight in weights.values():
        weight.requires_grad_(False)
    return made


def bits_by_gradient(gradients: Mapping[str, Tensor], mean: float, least: int = 1, most: int = 8) -> dict[str, int]:
    r"""Widths for tensors in the order of their gradients' norms.

    .. math:: b_l = b + \log_2 \frac{n_l}{\overline n_{\text{geometric}}}, \qquad \text{rounded}

    with :math:`n_l` the root mean square of a tensor's gradient: a tensor whose gradients are twice as large gets a
    bit more.

    Args:
        gradients: name -> gradient, any shape, such as ``weightsmith.stats.gradients`` gives.
        mean: :math:`b`, bits on average before they are rounded and limited, each tensor counted once. Tensors without
            a gradient get the fewest and do not count.
        least, most: limits.

    Returns:
        name -> bits.

    Raises:
        Error: no gradients, or some that are not finite.

    >>> bits_by_gradient({"a": torch.ones(4), "b": 4 * torch.ones(4)}, mean=3)
    {'a': 2, 'b': 4}
    """
    sizes = {name: float(gradients[name].double().square().mean().sqrt()) for name in gradients}
    wrong = [name for name, value in sizes.items() if not math.isfinite(value)]
    if wrong or not sizes:
        raise Error(f"bits_by_gradient needs finite gradients; those of {listed(wrong)} are not" if wrong else
                    "bits_by_gradient needs at least one gradient, got none")  # fmt: skip
    logs = {name: math.log2(value) for name, value in sizes.items() if value > 0}
    middle = sum(logs.values()) / max(len(logs), 1)
    return {name: min(max(round(mean + logs[name] - middle), least), most) if name in logs else least for name in sizes}

"""Train a change of low rank over quantized weights that folds back into their zero points.

A change that is the same for all inputs of a group moves the group's codes all at once: it is a shift of where the
group's grid begins, and that is stored as a number anyway. So the adapter sees its inputs summed over each group, and
after training nothing is rounded again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightsmith.adapt._parametrized import parametrized
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.solve import generator_for
from weightsmith.weights import Pattern

if TYPE_CHECKING:
    from weightsmith.quantize import Coded


class GroupedLowRank(nn.Module):
    r"""The parametrization of a weight by its grid's minima, :math:`W = s\,q + m + \delta`, one number a group.

    What stands under it, and is stored, are the minima ``[out, groups]`` alone; codes and steps are here.

    Args:
        base: the codes, on integers with float minima.
        shape: of the weight.
        rank: rows of ``A`` and columns of ``B``.
        alpha: the change is multiplied with ``alpha / (rank * group)``.
        generator: draws ``A``.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, base: Coded, layout: Any, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.layout = layout
        self.inputs = base.codes.shape[1]
        self.size = self.inputs if base.grid.group is None else min(base.grid.group, self.inputs)
        self.register_buffer("codes", base.codes)
        self.register_buffer("scale", base.params["scale"])
        self._begun: Tensor | None = base.params["minimum"]
        rows, groups = base.params["scale"].shape
        bound = math.sqrt(6 / (groups + rank))  # uniform, of equal variance both ways (Xavier), as the authors' code
        drawn = torch.rand(rank, groups, generator=generator) * (2 * bound) - bound
        self.a = nn.Parameter(drawn.to(base.params["scale"]))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=self.a.dtype, device=self.a.device))
        self.amount = alpha / (rank * self.size)

    def delta(self) -> Tensor:
        """What is added to every weight of a group: ``[out, groups]``."""
        return self.amount * (self.b @ self.a)

    def coded(self, minimum: Tensor) -> Coded:
        """The codes with the change in their minima: on the same grid, nothing is rounded again."""
        from weightsmith.quantize import Coded

        shifted = (minimum.to(self.scale.dtype) + self.delta().detach()).to(minimum.dtype).to(self.scale.dtype)
        return Coded(self.codes, {"scale": self.scale, "minimum": shifted}, self.layout.grid)

    def forward(self, minimum: Tensor) -> Tensor:
        start = minimum.to(self.scale.dtype) + self.delta()
        start = start + (start.to(minimum.dtype) - start).detach()  # as it will be stored
        runs = self.codes.unflatten(1, (-1, self.size)).to(start.dtype) * self.scale.unsqueeze(-1)
        return (runs + start.unsqueeze(-1)).view(self.layout.shape).to(minimum.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The minima for a weight: at first those of its codes; later the nearest for the codes that are there."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            return begun.to(weight)
        runs = self.layout.matrix(weight).unflatten(1, (-1, self.size))
        steps = self.codes.unflatten(1, (-1, self.size)).to(runs.dtype) * self.scale.unsqueeze(-1)
        return ((runs - steps).mean(-1) - self.delta().detach()).to(weight.dtype)


@card(
    paper="Xu, Xie, Gu, Chen, Chang, Zhang, Chen, Zhang, Tian 2023, 'QA-LoRA: Quantization-Aware Low-Rank Adaptation "
    "of Large Language Models'",
    covers=("qa-lora",),
    unit="model",
    claim="after merging the weights are as few bits as before, and compute the same",
    departs="the change is added to the weights, not to the outputs, which is the same function; minima are floats "
    "where the authors' are divided by the step",
)
def qa_lora(
    module: nn.Module,
    pattern: Pattern | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    bits: int = 4,
    group: int | None = 32,
    base: Mapping[str, Coded] | None = None,
    seed: int = 0,
) -> dict[str, GroupedLowRank]:
    r"""Quantize weights, and let the module learn changes of low rank that merge into their minima exactly.

    .. math:: W_{ij} = s_{ig}\, q_{ij} + m_{ig} + \frac{\alpha}{r L} (B A)_{ig}, \qquad g = \lfloor j / L \rfloor

    with groups of :math:`L` inputs: as many groups, as many columns of :math:`A`.

    Args:
        module: changed in place: matrices and convolutions get the parametrization `GroupedLowRank`, under which their
            minima alone are left; everything that was a parameter stands still.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.
        rank: :math:`r`.
        alpha: default ``2 * rank``.
        bits: of the codes.
        group: :math:`L`; None for whole rows.
        base: codes to begin with, by name, from a better rounding than to the nearest: a `Coded` on
            ``Integer(symmetric=False, zero="float")``. Its grid counts then, and ``bits`` and ``group`` are for the
            rest. Minima are kept in the dtype of the weight.
        seed: of ``A``; ``B`` is zero at first.

    Returns:
        name of a weight -> its codes and factors, in order. ``fold`` makes of the module a plain one in floats;
        ``weightsmith.quantize.training.coded`` gives the codes with merged minima.

    Raises:
        Error: no weight fits, a rank below 1, groups that do not fill a row, or a base of another grid or shape.

    >>> model = nn.Linear(8, 3)
    >>> factors = qa_lora(model, "*", rank=1, group=4)["weight"]
    >>> _ = factors.b.data.fill_(1)
    >>> merged = ws.quantize.dequantize(ws.quantize.training.coded(model))
    >>> torch.equal(merged["weight"], model.weight)
    True
    """
    from weightsmith.prune.sparse import weights_of
    from weightsmith.quantize import coded
    from weightsmith.quantize.training._fake import layouts_of

    if rank < 1:
        raise Error(f"qa_lora: the rank must be at least 1, got {rank}")
    weights = weights_of(module, pattern)
    unknown = [name for name in base or {} if name not in weights]
    if unknown:
        raise Error(f"qa_lora: base has {listed(unknown)}, which is no weight that fits; there are {listed(weights)}")
    grids = {name: _grid_of(name, one) for name, one in (base or {}).items()}
    usual = {"grid": "int", "bits": bits, "group": group, "symmetric": False, "zero": "float"}
    options: Any = {word: {**dict.fromkeys(grids), "*": value} for word, value in usual.items()}
    layouts = layouts_of(module, pattern, **{**options, "grid": {**grids, "*": "int"}})
    found = {}
    for name, weight in weights.items():
        rows = layouts[name].matrix(weight.detach())
        begun = base[name] if base and name in base else coded(rows, layouts[name].grid)
        if begun.codes.shape != rows.shape:
            raise Error(f"qa_lora: base has {list(begun.codes.shape)} codes for {name} {list(weight.shape)}")
        generator = generator_for(seed, "qa_lora", name)
        made = GroupedLowRank(begun, layouts[name], rank, 2 * rank if alpha is None else alpha, generator)
        found[name] = made.to(weight.device)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for name, made in found.items():
        parametrized(module, name, made)
    return found


def _grid_of(name: str, base: Coded) -> Any:
    if set(base.params) != {"scale", "minimum"}:
        raise Error(
            f"qa_lora: the base of {name} has {listed(base.params)}; a change merges into float minima: use the grid "
            'Integer(symmetric=False, zero="float")'
        )
    return base.grid

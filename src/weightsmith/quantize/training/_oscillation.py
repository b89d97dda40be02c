"""Weights that jump to and fro between two codes: fewer of them, a count of them, and an end to it.

Near a border between two codes a weight is pushed over it and back at every step, and what the network computes with
then depends on where training happens to stop. Learned steps make it worse, for when a step moves all borders move
with it; so does the product of queries and keys, where one factor answers to the other's jumps. A step that follows
from the weights' mean is calmer, the product of two matrices can be rounded as one, and late in training all but the
weights at a border can be held.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.adapt import parametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import Coded, runs_of
from weightsmith.quantize._layout import Layout
from weightsmith.quantize.grids import Integer
from weightsmith.quantize.grids._grid import check_values
from weightsmith.quantize.training._fake import Fake, codes, layouts_of, put_on, reach, standing, step_dtype
from weightsmith.weights import Pattern, PerTensor, Spec


class Statistical(Fake):
    """The parametrization whose step follows from the mean magnitude of a group; see `statistical`."""

    def found(self, rows: Tensor, clip: int) -> dict[str, Tensor]:
        check_values(rows)
        grid = cast(Integer, self.grid)
        halves = 2 ** (grid.bits - 1)
        spread = [2 * runs.abs().mean(-1) for runs in runs_of(rows, grid.group)]
        # A group of zeros has no step; the smallest that there is leaves its weights as good as zero.
        scale = (torch.cat(spread, 1) / halves).clamp(min=4 * torch.finfo(grid.scale_dtype).tiny)
        scale = scale.to(grid.scale_dtype).to(rows.dtype)
        minimum = (scale * (0.5 - halves)).to(grid.scale_dtype).to(rows.dtype)
        return {"scale": scale, "minimum": minimum}


@card(
    paper="Liu, Liu, Cheng 2023, 'Oscillation-free Quantization for Low-bit Vision Transformers' (StatsQ)",
    covers=("oscillation-free-quantization",),
    unit="model",
    claim="at 2 bits fewer weights jump to and fro than with learned steps",
    departs="steps for groups of inputs too; a group of zeros stays all but zero; at 1 bit, rounding to even gives the "
    "formula a third point for clipped weights, which is left out",
)
def statistical(
    module: nn.Module,
    *,
    bits: PerTensor[int] = 2,
    group: PerTensor[int | None] = None,
    pattern: Pattern | None = None,
) -> dict[str, Fake]:
    r"""Let a module compute with quantized weights whose step follows from their mean magnitude.

    .. math:: s = 2\, \overline{|w|}, \quad n = 2^{b-1}, \quad
        \hat w = \frac{s}{n} \Big( \operatorname{round}\big(n \operatorname{clip}(w / s, -1, 1) - \tfrac12\big)
        + \tfrac12 \Big)

    The points lie evenly around zero, which is none of them. Gradients pass straight, also where a weight is clipped.

    Args:
        module: changed in place, as by `fake`.
        bits: :math:`b`, 1 to 8.
        group: inputs that share a step; None for whole rows.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        name of a weight -> its parametrization. The codes are those of ``Integer(symmetric=False, zero="float")``.

    Raises:
        Error: no weight fits, or groups that do not fill a row.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> model.weight = nn.Parameter(torch.tensor([[0.1, -0.1, 1.0, -2.8]]))   # mean 1, so points at -1.5 -.5 .5 1.5
    >>> _ = statistical(model, bits=2, pattern="*")
    >>> model.weight.detach()
    tensor([[ 0.5000, -0.5000,  0.5000, -1.5000]])
    """
    layouts = layouts_of(module, pattern, bits=bits, group=group, symmetric=False, zero="float")
    return put_on(module, pattern, lambda name, weight: Statistical(weight, layouts[name]))


@card(
    paper="Liu, Liu, Cheng 2023, 'Oscillation-free Quantization for Low-bit Vision Transformers' (confidence-guided "
    "annealing)",
    covers=("oscillation-free-quantization",),
    unit="model",
    claim="flips of codes become rare and nothing is lost",
    departs="a weight once frozen stays so and keeps its value whatever the optimizer's momentum does, and the grid "
    "stands still with it; the authors' code looks anew at every step",
)
@torch.no_grad()
def calm(module: nn.Module, margin: float = 0.005) -> dict[str, float]:
    """Freeze every weight that is sure of its code; only those at a border between two codes still learn.

    A weight is at a border if ``margin`` steps more or less would give it another code. Call it where the learning
    rate has become small, and after every step from then on. Learned steps are then no parameters any more: a module in
    ``DistributedDataParallel`` must be wrapped anew after the first call.

    Args:
        module: has parametrizations of `fake` or `statistical`; their grids stand still from now on.
        margin: in steps; the mean step of a grid where its points are not even.

    Returns:
        name of a weight -> the share of its elements that is frozen.

    Raises:
        Error: nothing in the module is quantized, or a margin below 0.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> model.weight = nn.Parameter(torch.tensor([[1.5, 0.49, 0.2]]))
    >>> _ = ws.quantize.training.fake(model, bits=2, pattern="*")   # steps of 1: the border nearest to 0.49 is 0.5
    >>> round(calm(model, margin=0.05)["weight"], 2)
    0.67
    """
    if not margin >= 0:
        raise Error(f"calm: the margin must be 0 or more steps, got {margin}")
    found = {name: (top, below) for name, top, below in standing(module) if isinstance(top, Fake)}
    if not found:
        raise Error("calm: no weight of this module is quantized; put a grid on them with fake or statistical")
    return {name: _freeze(top, below, margin) for name, (top, below) in found.items()}


def _freeze(fake: Fake, below: Tensor, margin: float) -> float:
    rows = fake.rows(below)
    if fake.frozen is None:
        fake.fix(below)
    params = fake.params(rows)
    low, high = reach(fake, rows, params)
    step = (high - low) / max(2**fake.grid.bits - 1, 1)
    ends = [fake.coded_rows(rows + sign * margin * step, params).codes for sign in (-1, 1)]
    sure = ends[0] == ends[1]
    fake.held, fake.frozen = rows.clone(), sure if fake.frozen is None else fake.frozen | sure
    return float(fake.frozen.float().mean())


class Oscillations:
    """Counts the codes of a module that jump back where they came from.

    Args:
        module: has parametrizations of `fake` or `statistical`; only looked at.
        momentum: of the running rates.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> model.weight = nn.Parameter(torch.ones(1, 1))
    >>> made = ws.quantize.training.fake(model, bits=2, pattern="*")["weight"].fix(torch.ones(1, 1))
    >>> counter = Oscillations(model)
    >>> for value in (1.0, -1.0, 1.0):
    ...     _ = model.parametrizations.weight.original.data.fill_(value)
    ...     print(counter.update())
    {'weight': 0.0}
    {'weight': 0.0}
    {'weight': 1.0}
    """

    def __init__(self, module: nn.Module, momentum: float = 0.01):
        self.module, self.momentum = module, momentum
        self.before = codes(module)
        self.direction = {name: torch.zeros_like(one.codes, dtype=torch.int8) for name, one in self.before.items()}
        self.rate = {name: torch.zeros(one.codes.shape, device=one.codes.device) for name, one in self.before.items()}
        """``[out, in]`` of each weight: the running share of steps at which it turned back."""

    def update(self) -> dict[str, float]:
        """Look at the codes after a step: the share of each weight's elements that turned back at it."""
        now, shares = codes(self.module), {}
        for name, one in now.items():
            turned, self.direction[name] = turns(self.before[name], one, self.direction[name])
            self.rate[name].lerp_(turned.to(self.rate[name].dtype), self.momentum)
            shares[name] = float(turned.float().mean()) if turned.numel() else 0.0
        self.before = now
        return shares


def turns(before: Coded, now: Coded, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Which codes changed against the way of their last change, and the way of the last change now.

    Args:
        before, now: the codes of a weight after two steps; both are read on the grid as it now lies.
        direction: ``[out, in]`` int8: up 1, down -1, 0 where a code never changed.

    Returns:
        boolean and int8, ``[out, in]``.
    """
    moved = (now.values() - Coded(before.codes, now.params, now.grid, now.shared).values()).sign().to(torch.int8)
    return moved * direction == -1, torch.where(moved != 0, moved, direction)


class _Product(nn.Module):
    """Two originals, ``[heads * width, in]`` each, to the products of heads: ``[heads * in, in]``."""

    def __init__(self, heads: int, width: int, begun: tuple[Tensor, Tensor]):
        super().__init__()
        self.heads, self.width = heads, width
        self._begun: tuple[Tensor, Tensor] | None = begun

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = (one.unflatten(0, (self.heads, self.width)) for one in (query, key))
        return (queries.mT @ keys).flatten(0, 1)

    def right_inverse(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """At first the factors it began with; later the nearest ones, exact for products of this width."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            return begun
        wide = product.to(torch.promote_types(product.dtype, torch.float32)).unflatten(0, (self.heads, -1))
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        root = values[:, : self.width].sqrt().unsqueeze(-1)
        factors = (root * left[..., : self.width].mT, root * right[:, : self.width])
        rest = (0, 0, 0, self.width - root.shape[1])  # heads wider than their inputs
        return tuple(functional.pad(one, rest).flatten(0, 1).to(product.dtype) for one in factors)  # type: ignore[return-value]


class JointScores(nn.Module):
    r"""Scores of attention from one matrix a head, :math:`M_h = W_{q,h}^\top W_{k,h}`, which is rounded as a whole.

    .. math:: \text{score}_h(x, y) = \frac{x\, M_h\, y^\top + (b_{q,h} W_{k,h})\, y^\top}{\sqrt{d}}

    What a bias of the keys adds is the same for all keys, and a softmax does not see it. The factors learn; after
    ``weightsmith.adapt.fold`` the product stands in their place, ``in / (2 d)`` times their size. Made by
    `joint_scores`; not for attention that turns queries and keys in between, as rotary positions do.
    """

    def __init__(self, product: Tensor, heads: int, width: int, bias: Tensor | None):
        super().__init__()
        self.heads, self.width = heads, width
        self.weight = nn.Parameter(product)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``x [..., n, in]`` and ``y [..., m, in]`` (default: x) to ``[..., heads, n, m]``."""
        y = x if y is None else y
        product = self.weight.unflatten(0, (self.heads, -1))
        turned = x.unsqueeze(-3) @ product
        turned = turned if self.bias is None else turned + self.bias.unsqueeze(-2)
        return turned @ y.unsqueeze(-3).mT / math.sqrt(self.width)


@card(
    paper="Liu, Liu, Cheng 2023, 'Oscillation-free Quantization for Low-bit Vision Transformers' (query-key "
    "reparametrization)",
    covers=("oscillation-free-quantization",),
    unit="model",
    claim="queries and keys no longer answer to each other's jumps",
    departs="the bias of queries is kept, beside the product",
)
def joint_scores(
    query: nn.Module, key: nn.Module, heads: int, *, bits: int | None = 2, group: int | None = None
) -> JointScores:
    """Queries and keys of an attention as one quantized product a head, which gives the scores.

    Args:
        query, key: layers with ``weight [heads * width, in]`` and perhaps ``bias``; only looked at. Keys of fewer
            heads serve several heads of queries each, in order.
        heads: of the queries.
        bits: of the product, with steps as in `statistical`; None to leave it in floats.
        group: inputs that share a step; None for whole rows.

    Returns:
        a module ``(x [..., n, in]) -> scores [..., heads, n, n]`` with factors of its own that learn.

    Raises:
        Error: heads that do not divide the weights, or layers of other inputs.

    >>> q, k, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(5, 6)
    >>> scores = joint_scores(q, k, heads=2, bits=None)(x).softmax(-1)
    >>> queries, keys = (part(x).unflatten(-1, (2, 2)).transpose(0, 1) for part in (q, k))
    >>> torch.allclose(scores, (queries @ keys.mT / 2**0.5).softmax(-1), atol=1e-6)
    True
    """
    first, second = cast(Tensor, query.weight).detach(), cast(Tensor, key.weight).detach()
    width = len(first) // max(heads, 1)
    if heads < 1 or first.dim() != 2 or len(first) % heads or not width or len(second) % width:
        raise Error(f"joint_scores: {heads} heads do not divide {list(first.shape)} and {list(second.shape)}")
    if first.shape[1] != second.shape[1] or heads % (len(second) // width):
        raise Error(f"joint_scores: queries {list(first.shape)} and keys {list(second.shape)} do not fit together")
    shared = heads * width // len(second)  # heads of queries that share one of keys
    second = second.unflatten(0, (-1, width)).repeat_interleave(shared, 0).flatten(0, 1)
    bias = getattr(query, "bias", None)
    if bias is not None:
        bias = (bias.detach().view(heads, 1, width) @ second.view(heads, width, -1)).squeeze(1)
    product = _Product(heads, width, (first.clone(), second))
    made = JointScores(product(first, second), heads, width, bias)
    parametrized(made, "weight", product)
    if bits is not None:
        grid = Integer(bits, group, symmetric=False, zero="float", scale_dtype=step_dtype(first))
        layout = Layout.of("weight", Spec(tuple(made.weight.shape), first.dtype), grid)
        parametrized(made, "weight", Statistical(made.weight, layout))
    return made

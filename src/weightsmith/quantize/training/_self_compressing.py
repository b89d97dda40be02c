"""Channels that learn how many bits they are worth, and go when that is none.

The width of every channel's codes is a number that learns: the loss of the task asks for bits, a penalty on the size
takes them away. A channel of no bits is zero for good, so it is cut out of the network, and training goes on faster.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightsmith.adapt import fold, parametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.graph import UnitGraph, take_
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._layout import Layout
from weightsmith.quantize.grids import Integer
from weightsmith.quantize.grids._grid import check_values
from weightsmith.quantize.training._fake import put_on, standing
from weightsmith.stats.room import restored
from weightsmith.weights import Pattern, Spec

MOST = 8  # bits a code can have


class Compressing(nn.Module):
    r"""The parametrization ``W -> 2**e * round(clip(W / 2**e, -2**(b-1), 2**(b-1) - 1))`` with ``b`` that learns.

    Args:
        weight: ``[out, ...]``, what it will stand on.
        layout: how it is taken for a matrix, on `Integer` codes of 8 bits.
        bits: ``b`` of every row at first; ``e`` begins where the row just fits, and that of a row of zeros where the
            largest weight of the tensor fits.
    """

    def __init__(self, weight: Tensor, layout: Layout, bits: float):
        super().__init__()
        self.layout = layout
        rows = layout.matrix(weight.detach())
        check_values(rows)
        largest = rows.abs().amax(1)
        # A row of zeros begins with the range of the others: its step must be one that it can grow by.
        usual = torch.where(largest.amax() > 0, largest.amax(), 1.0)
        reached = torch.where(largest > 0, largest, usual) / 2 ** (bits - 1)
        self.bits = nn.Parameter(torch.full_like(reached, bits))
        self.exponent = nn.Parameter(reached.log2())

    def rows(self, weight: Tensor) -> Tensor:
        """The weight that is rounded, ``[out, in]``."""
        return self.layout.matrix(weight)

    def width(self) -> Tensor:
        """``b``, ``[out]``, within 0 and 8. Above 8 its gradient is kept, so that a penalty can bring it back."""
        return self.bits.clamp(min=0) - (self.bits - MOST).clamp(min=0).detach()

    def alive(self) -> Tensor:
        """``[out]`` boolean: the rows that have bits."""
        return self.bits.detach() > 0

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The whole numbers before they are rounded, ``[out, in]``, and the step ``[out, 1]``."""
        half = 2 ** (self.bits.clamp(0, MOST) - 1).unsqueeze(1)
        step = 2 ** self.exponent.unsqueeze(1)
        return torch.minimum(torch.maximum(self.rows(weight) / step, -half), half - 1), step

    def forward(self, weight: Tensor) -> Tensor:
        levels, step = self.levels(weight)
        whole = levels + (levels.round() - levels).detach()
        # 0 bits have the one level 0, which a limit of half a step on both sides rounds to; it is said here all the
        # same, for there a weight must neither get a sign nor a gradient.
        kept = torch.where(self.alive().unsqueeze(1), whole * step, torch.zeros_like(whole))
        return kept.view(weight.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    @torch.no_grad()
    def coded(self, weight: Tensor) -> Coded:
        """Codes of 8 bits; a row of fewer uses those around the middle alone."""
        levels, step = self.levels(weight)
        whole = levels.round() * self.alive().unsqueeze(1)
        return Coded((whole + 2 ** (MOST - 1)).to(torch.uint8), {"scale": step}, self.layout.grid)


class _Alive(nn.Module):
    """The parametrization of what stands beside channels, as a bias: zero where none of them has bits."""

    units: Tensor

    def __init__(self, writers: list[tuple[Compressing, Tensor]], units: Tensor, size: int):
        super().__init__()
        # Not modules of this one: they belong to the weights. Copies of the network take theirs along all the same.
        self._writers, self.size = tuple(writers), size
        self.register_buffer("units", units, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        alive = _units_alive(self._writers, self.size, value.device)
        return value * (alive[self.units.clamp(min=0)] | (self.units < 0)).to(value.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def _units_alive(writers: Any, size: int, device: torch.device) -> Tensor:
    alive = torch.zeros(size, dtype=torch.bool, device=device)
    for made, units in writers:
        there = units.to(device)
        alive[there[(there >= 0) & made.alive().to(device)]] = True
    return alive


@card(
    paper="Cséfalvay, Imber 2023, 'Self-Compressing Neural Networks'",
    covers=("self-compressing",),
    unit="model",
    claim="at the accuracy of floats a few bits a weight are left, and many channels none",
    departs="b is held within 0 and 8; with a graph, biases and norms go with their channels, so that cutting changes "
    "nothing",
)
def self_compressing(
    module: nn.Module, *, bits: float = 8.0, graph: UnitGraph | None = None, pattern: Pattern | None = None
) -> dict[str, Compressing]:
    r"""Let every output channel of a module learn the width of its codes.

    .. math:: q(w) = 2^e \operatorname{round}\big(\operatorname{clip}(2^{-e} w, -2^{b-1}, 2^{b-1} - 1)\big)

    Rounding passes gradients straight; they reach :math:`b` and :math:`e` through the limits and the step.

    Args:
        module: changed in place: weights get the parametrization `Compressing`. Add ``gamma * size(module, graph)`` to
            the loss, and at times call `without_dead`.
        bits: :math:`b` of all channels at first, at most 8.
        graph: of the module's units (`weightsmith.graph.trace`): what else belongs to a channel, its bias and the gain
            and shift of its norm, is then zero where the channel has no bits.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        name of a weight -> its parametrization.

    Raises:
        Error: no weight fits, bits out of range, or a graph of another module.

    >>> model = nn.Linear(2, 2)
    >>> made = self_compressing(model, pattern="*")["weight"]
    >>> _ = made.bits.data.copy_(torch.tensor([0.0, 8.0]))
    >>> (model.weight[0] == 0).all().item(), size(model).item()
    (True, 4.0)
    """
    if not 0 < bits <= MOST:
        raise Error(f"self_compressing: bits at first lie above 0 and at most at {MOST}, got {bits}")
    if graph is not None:
        graph.check(module)

    def made_for(name: str, weight: Tensor) -> Compressing:
        wide = torch.promote_types(weight.dtype, torch.float32)
        layout = Layout.of(name, Spec(tuple(weight.shape), weight.dtype), Integer(MOST, scale_dtype=wide))
        return Compressing(weight, layout, bits)

    made = put_on(module, pattern, made_for)
    for space in graph.spaces if graph is not None else ():
        assert graph is not None
        writers = _writers(graph, space, made)
        for member in graph.members(space) if writers else ():
            if len(graph.tensors[member.tensor]) == 1 and member.tensor in dict(module.named_parameters()):
                units = graph.units(member, space)
                gate = _Alive(writers, units, graph.sizes[space])
                place = module.get_submodule(member.tensor.rpartition(".")[0])
                parametrized(module, member.tensor, gate.to(next(place.parameters()).device))
    return made


def _writers(graph: UnitGraph, space: str, made: Mapping[str, Compressing]) -> list[tuple[Compressing, Tensor]]:
    """The compressed weights whose rows are the units of a space; none where others put something there too."""
    found = []
    for member in graph.members(space):
        if len(graph.tensors[member.tensor]) < 2 or not member.use.writes:
            continue
        if member.dim or member.tensor not in made or made[member.tensor].layout.experts > 0:
            return []
        found.append((made[member.tensor], graph.units(member, space)))
    return found


def compressing(module: nn.Module) -> dict[str, Compressing]:
    """The self-compressing weights of a module by name.

    Raises:
        Error: there is none.
    """
    found = {name: top for name, top, _ in standing(module) if isinstance(top, Compressing)}
    if not found:
        raise Error("no weight of this module learns its bits; put that there with self_compressing(module)")
    return found


def size(module: nn.Module, graph: UnitGraph | None = None) -> Tensor:
    r"""The mean bits a weight of a self-compressing module, which learns.

    .. math:: Q = \frac1N \sum_l I_l \sum_c b_{l,c}

    with :math:`I_l` the inputs of a row that come from channels that have bits, and :math:`N` the weights at first.

    Args:
        module: as `self_compressing` left it.
        graph: of its units; without it all inputs count.

    Returns:
        a number; the bits that all begin with at first, 0 when nothing is left.

    Raises:
        Error: nothing learns its bits.

    >>> model = nn.Linear(2, 2)
    >>> _ = self_compressing(model, bits=4, pattern="*")
    >>> size(model).item()
    4.0
    """
    found = compressing(module)
    left = None if graph is None else graph.resized(dead_units(module, graph))
    total, count = [], 0
    for name, one in found.items():
        count += one.layout.rows * one.layout.inputs
        layout = one.layout if left is None else replace(one.layout, shape=left.shape(name))
        total.append(one.width().sum() * layout.inputs)
    device = total[0].device
    return torch.stack([bits.to(device) for bits in total]).sum() / max(count, 1)


def dead_units(module: nn.Module, graph: UnitGraph) -> dict[str, Tensor]:
    """The units that stay of every space that has some without bits.

    Args:
        module: as `self_compressing` left it, with a graph; only looked at.
        graph: of its units.

    Returns:
        space -> the indices of its units, ``[kept]`` int64. Where a space must not have just any size, a few without
        bits stay.

    Raises:
        Error: nothing learns its bits.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> graph = ws.graph.trace(model, torch.ones(1, 2))
    >>> made = self_compressing(model, graph=graph)
    >>> _ = made["0.weight"].bits.data.copy_(torch.tensor([8.0, 0.0, 8.0]))
    >>> [units.tolist() for units in dead_units(model, graph).values()]
    [[0, 2]]
    """
    made, alive, wanted = compressing(module), {}, graph.sizes.copy()
    for space in graph.spaces.values():
        writers = _writers(graph, space.name, made)
        if writers:
            alive[space.name] = _units_alive(writers, space.size, torch.device("cpu"))
            least = max(int(alive[space.name].sum()), space.minimum, 1)
            wanted[space.name] = min(-(-least // space.multiple) * space.multiple, space.size)
    for names in graph.alike:
        wanted |= dict.fromkeys(names, max(wanted[name] for name in names))
    found = {}
    for name, there in alive.items():
        # A space must not have just any size; what is kept beside is zero.
        there[(~there).nonzero().flatten()[: wanted[name] - int(there.sum())]] = True
        if not there.all():
            found[name] = there.nonzero().flatten()
    return found


def without_dead(module: nn.Module, graph: UnitGraph, example: Any = None) -> UnitGraph:
    """Fold a self-compressing module and cut the channels that have no bits out of it, in place.

    What is left computes the same, since a channel without bits, with its bias and batch norm, is zero, and functions
    such as ReLU, GELU and SiLU leave zero at zero. Others do not, such as sigmoids; and norms over channels, such as
    ``nn.LayerNorm``, have means over fewer: give an example where there are any. To train on, call `self_compressing`
    on it again.

    Args:
        module: as `self_compressing` left it, with a graph.
        graph: of its units.
        example: what the module is called with: a tensor, a tuple or a mapping. If given, the outputs before and after
            are compared. The cut is tried on a copy first, so for a moment the module is held twice.

    Returns:
        the graph of what is left.

    Raises:
        Error: nothing learns its bits, the module cannot be cut, or the outputs on the example differ: a function in
            between does not leave zero at zero. The module is then as it was.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> graph = ws.graph.trace(model, torch.ones(1, 2))
    >>> made = self_compressing(model, graph=graph)
    >>> _ = made["0.weight"].bits.data.copy_(torch.tensor([8.0, 0.0, 8.0]))
    >>> _ = without_dead(model, graph, torch.ones(1, 2))
    >>> model[0], model[2]
    (Linear(in_features=2, out_features=2, bias=True), Linear(in_features=2, out_features=1, bias=True))
    """
    kept = dead_units(module, graph)
    if kept:
        trial = copy.deepcopy(module)
        fold(trial)
        take_(trial, graph, kept)
        if example is not None:
            _check_same(_outputs(module, example), _outputs(trial, example))
    fold(module)
    return take_(module, graph, kept) if kept else graph


def _check_same(before: list[Tensor], after: list[Tensor]) -> None:
    for one, other in zip(before, after, strict=True):
        apart, most = (float(x.abs().amax()) if x.numel() else 0.0 for x in (one - other, one))
        if not apart <= torch.finfo(one.dtype).eps ** 0.5 * most:
            raise Error(
                f"without channels of no bits the outputs differ by up to {apart:.3g}: a function between the layers "
                "does not leave zero at zero, or a norm takes its mean over channels; the module is as it was"
            )


@torch.no_grad()
def _outputs(module: nn.Module, example: Any) -> list[Tensor]:
    """The floats that a module returns in evaluation mode, its logits alone where it has some."""
    with restored(module):
        if isinstance(example, Mapping):
            found = module(**example)
        else:
            found = module(*example) if isinstance(example, tuple) else module(example)
    leaves = pytree.tree_leaves(getattr(found, "logits", found))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise Error(
            f"without_dead: the module returns a {type(found).__name__}, no tensors to compare; leave example out"
        )
    return tensors

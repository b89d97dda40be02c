"""Where a network can be rescaled and stays the same function: a factor put in before a matrix, and taken out behind.

What writes a unit is divided by its factor and what reads it multiplied with it. A place is found in the graph of
units, never by the name of an architecture: between a norm's gain and its readers, values and outputs of attention,
the branch of a gated MLP that is not bent and what follows, and two layers with nothing or a ReLU between them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.graph import Atom, Axis, Locked, Member, Product, Sum, UnitGraph, norm_readers, scale
from weightsmith.weights import Entire, Held, Lazy, Weights, apply, open, working


@dataclass(frozen=True, eq=False)
class Side:
    """One dimension of a tensor along which a place runs.

    Attributes:
        tensor: its name.
        dim: the dimension.
        units: ``[length of the dimension]`` int64, the unit of each position, -1 for none.
        offset: what the network adds to the stored values: 1 for gains that are stored less one.
    """

    tensor: str
    dim: int
    units: Tensor
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Place:
    """Units that some tensors write and others read, with nothing between that a positive factor does not pass.

    Attributes:
        name: of the gain or of the space of the graph.
        units: how many.
        writers, readers: all of them; what is divided, and what is multiplied.
    """

    name: str
    units: int
    writers: tuple[Side, ...]
    readers: tuple[Side, ...]

    def __str__(self) -> str:
        written, read = (", ".join(side.tensor for side in sides) for sides in (self.writers, self.readers))
        return f"{self.name} ({self.units}): {written} -> {read}"


def places(
    weights: Any, graph: UnitGraph, gains: Mapping[str, Sequence[str]] | None = None, *, offset: float = 0.0
) -> tuple[Place, ...]:
    """Every place of a network that can be rescaled, in the order of what reads it.

    Heads that share their keys and values share the factors of those, so grouped-query attention has a place between
    values and outputs as any other. A tensor that holds both the bent and the other branch of a gated MLP
    (``gate_up_proj``) has none behind it, since its graph does not tell which half is which.

    Args:
        weights: what `weightsmith.open` opens; nothing is read.
        graph: their graph.
        gains: gain of a norm -> all that reads what it puts out, as `weightsmith.graph.fold` takes them; by default
            those that `weightsmith.graph.norm_readers` finds. Its bias is the tensor of the same name with ``bias``
            for ``weight``, ``gain`` or ``scale`` at the end (``beta`` for ``gamma``). Where names say nothing of
            norms, they are no places, and a warning says so. What a tied tensor reads or writes is none.
        offset: what the network adds to a stored gain: 1 where gains are stored less one, as in Gemma.

    Returns:
        Places, none of which shares a tied tensor.

    Raises:
        Error: a graph of other weights, or ``gains`` that name what is no gain or does not read it.

    >>> from weightsmith.graph import declare
    >>> weights = {"up": torch.zeros(3, 2), "down": torch.zeros(2, 3)}
    >>> print(places(weights, declare(weights, {"up": "> hidden, 2", "down": "2, < hidden"}))[0])
    hidden (3): up -> down
    """
    found = open(weights)
    graph.check(found)
    every: dict[Any, Place] = {}
    for place in [*_of_norms(graph, gains, offset), *(_of_space(found, graph, name) for name in graph.spaces)]:
        if place is not None:  # heads, and the width of heads, are one place with two names
            every[
                tuple(frozenset((one.tensor, one.dim) for one in side) for side in (place.writers, place.readers))
            ] = place
    tied = {*found.ties, *found.ties.values()}
    every = {key: place for key, place in every.items() if not tied & {one for side in key for one, _ in side}}
    order = {name: number for number, name in enumerate(graph.tensors)}
    return tuple(sorted(every.values(), key=lambda place: min(order[side.tensor] for side in place.readers)))


def scaled(weights: Any, every: Sequence[Place], factors: Mapping[str, Tensor], method: str = "scaled") -> Weights:
    """The same function with what reads each place multiplied with its factors, and what writes it divided by them.

    Args:
        weights: what `weightsmith.open` opens.
        every: as `places` finds them.
        factors: name of a place -> ``[units]``, above 0.

    Returns:
        The weights, lazily, in their dtypes (computed in float32 or wider, rounded once).

    Raises:
        Error: an unknown place, factors that are not above 0 or of another number, or tied tensors that would become
            two.

    >>> from weightsmith.graph import declare
    >>> weights = {"up": torch.ones(2, 1), "down": torch.ones(1, 2)}
    >>> found = places(weights, declare(weights, {"up": "> hidden, 1", "down": "1, < hidden"}))
    >>> scaled(weights, found, {"hidden": torch.tensor([1.0, 4.0])}).to_dict()
    {'up': tensor([[1.0000],
            [0.2500]]), 'down': tensor([[1., 4.]])}
    """
    found, known = open(weights), {place.name: place for place in every}
    plan: dict[str, dict[int, Tensor]] = {}
    offsets = {side.tensor: side.offset for name in factors if name in known for side in known[name].writers}
    for name, given in factors.items():
        if name not in known:
            raise Error(f"there is no place {name!r}{did_you_mean(name, known)}; there are {listed(known)}")
        factor = torch.as_tensor(given).detach().double().cpu().flatten()
        if len(factor) != known[name].units or not (factor.isfinite() & (factor > 0)).all():
            raise Error(f"the place {name} takes {known[name].units} factors above 0, got {list(factor.shape)}")
        for sides, by in ((known[name].writers, 1 / factor), (known[name].readers, factor)):
            for side in sides:
                dims = plan.setdefault(side.tensor, {})
                value = by_position(side, by)
                dims[side.dim] = dims[side.dim] * value if side.dim in dims else value
    for alias, name in found.ties.items():
        one, other = plan.get(alias, {}), plan.get(name, {})
        if one.keys() != other.keys() or any(not torch.equal(one[dim], other[dim]) for dim in one):
            raise Error(f"{alias} and {name} are one tensor, and only one of them is rescaled; see graph.untie")

    def build(name: str, node: Lazy) -> Lazy:
        if name not in plan:
            return node
        if not node.spec.dtype.is_floating_point:
            raise Error(f"{name} holds {node.spec}, which cannot be rescaled")
        dims = plan[name]
        first = [Held(dims[0])] if 0 in dims else []
        others = {dim: value for dim, value in dims.items() if dim}
        options = {"rows": bool(first), "dims": tuple(others), "offset": offsets.get(name, 0.0)}
        columns = [Entire(Held(value)) for value in others.values()]
        return apply(times, node, *first, *columns, unit="row", spec=node.spec, options=options)

    return found.zip_nodes(build, (), f"quantize.transforms.{method}", {"places": sorted(factors)})


def times(weight: Tensor, *factors: Tensor, rows: bool, dims: tuple[int, ...], offset: float = 0.0) -> Tensor:
    """A tensor with each position along some dimensions multiplied; the factors of the first axis come first."""
    weight = working(weight) + offset if offset else working(weight)
    for dim, factor in zip(((0, *dims) if rows else dims), factors, strict=True):
        weight = weight * factor.to(weight).view([-1 if other == dim else 1 for other in range(weight.dim())])
    return weight - offset if offset else weight


def by_position(side: Side, factor: Tensor) -> Tensor:
    """``[length]``: the factor of each position's unit, 1 where it has none."""
    return spread(side.units.to(factor.device), factor)


def spread(units: Tensor, factor: Tensor) -> Tensor:
    """The factor of each of some units, 1 for -1."""
    return torch.where(units < 0, torch.ones_like(factor[:1]), factor[units.clamp(min=0)])


def by_unit(side: Side, values: Tensor, how: str) -> Tensor:
    """``[units of the place]`` from ``[length]``: the mean, or the largest, of the positions of each unit."""
    inside = side.units >= 0
    units = side.units[inside].to(values.device)
    count = int(side.units.max()) + 1 if len(side.units) else 0
    kept = values[inside.to(values.device)]
    return kept.new_zeros(count).scatter_reduce(
        0, units, kept, {"mean": "mean", "maximum": "amax"}[how], include_self=False
    )


# How places are found


def readers_of_norms(graph: UnitGraph) -> dict[str, list[str]]:
    """As `weightsmith.graph.norm_readers`, which tied embeddings keep from finding any."""
    streams = {name for name, space in graph.spaces.items() if space.flags & _NORMS}
    tied = {m.tensor: m.use for name in streams for m in graph.members(name) if m.use.reads and m.use.writes}
    if not tied:
        return norm_readers(graph)
    tensors = {name: uses for name, uses in graph.tensors.items() if name not in tied}
    stand_in = {_HEAD: (replace(next(iter(tied.values())), writes=False),)}
    found = norm_readers(replace(graph, tensors=tensors | stand_in))
    return {gain: readers for gain, readers in found.items() if _HEAD not in readers}


_NORMS = frozenset({"rms_norm", "layer_norm"})
_HEAD = "lm_head.weight"


def _of_norms(graph: UnitGraph, gains: Mapping[str, Sequence[str]] | None, offset: float) -> list[Place]:
    if gains is None:
        try:
            gains = readers_of_norms(graph)
        except Error as error:
            if any(space.flags & _NORMS for space in graph.spaces.values()):
                warnings.warn(f"norms are left as they are: {error}", stacklevel=4)
            return []
    found = []
    for gain, readers in gains.items():
        absent = [name for name in (gain, *readers) if name not in graph.tensors]
        if absent:
            raise Error(f"the graph has no tensor {absent[0]!r}{did_you_mean(absent[0], graph.tensors)}")
        axis = graph.tensors[gain][0].axis
        if len(graph.tensors[gain]) != 1 or not isinstance(axis, Atom):
            raise Error(f"{gain} is no gain of a norm: it has the axes {listed(map(str, graph.tensors[gain]))}")
        members = graph.members(axis.space)
        both = {gain, re.sub(r"(weight|gain|scale)$", "bias", gain), re.sub(r"gamma$", "beta", gain)}
        written = [m for m in members if m.tensor in both and len(graph.tensors[m.tensor]) == 1]
        read = [m for m in members if m.tensor in readers and m.use.reads]
        if {m.tensor for m in read} != set(readers):
            raise Error(f"not all of {listed(readers)} read {axis.space}, the space of {gain}")
        if any(m.use.writes for m in read):
            continue  # a tied embedding, which is written by what it reads
        writers, readers_ = _sides(graph, written, (axis.space,)), _sides(graph, read, (axis.space,))
        writers = tuple(replace(side, offset=offset) if side.tensor == gain else side for side in writers)
        found.append(Place(gain, graph.space(axis.space).size, writers, readers_))
    return found


def _of_space(weights: Weights, graph: UnitGraph, name: str) -> Place | None:
    """The place of a space through which `weightsmith.graph.scale` lets factors, or None."""
    space = graph.space(name)
    if (
        "batch_norm" in space.flags
        or not space.size
        or any(_lives(member.use.axis, name) != 1 for member in graph.members(name))
    ):
        return None
    try:
        after = scale(weights, graph, {name: torch.full((space.size,), 2.0)})
    except Error:
        return None
    moved = [m for m in graph.members(name) if after.node(m.tensor) is not weights.node(m.tensor)]
    terms = [_term(member.use.axis, name) for member in moved]
    # Heads beside a head's width: each of them may have factors of its own, since the width is what a function bends.
    common = [one for one in terms[0] if all(one in term for term in terms)]
    units = tuple(common)
    if any(graph.space(one).flags & _TOGETHER for one in units):
        units = (name,)
    count = 1
    for one in units:
        count *= graph.space(one).size
    writers = [m for m in moved if not m.use.reads]
    readers = [m for m in moved if m.use.reads]
    return Place(name, count, _sides(graph, writers, units), _sides(graph, readers, units))


_TOGETHER = frozenset({"softmax", "reduced", "layer_norm", "group_norm", "rms_norm", "tokens", "score"})
"""Flags of spaces whose units do not stand each for itself."""


def _sides(graph: UnitGraph, members: Sequence[Member], spaces: tuple[str, ...]) -> tuple[Side, ...]:
    sides = []
    for member in members:
        total = torch.zeros(graph.shape(member.tensor)[member.dim], dtype=torch.int64)
        outside = torch.zeros_like(total, dtype=torch.bool)
        for space in spaces:
            units = graph.units(member, space)
            outside |= units < 0
            total = total * graph.space(space).size + units.clamp(min=0)
        sides.append(Side(member.tensor, member.dim, torch.where(outside, -1, total)))
    return tuple(sides)


def _lives(axis: Axis, space: str) -> int:
    """In how many terms of an axis a space stands."""
    if isinstance(axis, Atom):
        return int(axis.space == space)
    return 0 if isinstance(axis, Locked) else sum(_lives(part, space) for part in axis.parts)


def _term(axis: Axis, space: str) -> list[str]:
    """The spaces that are multiplied with a space, itself among them, in their order."""
    if isinstance(axis, Sum):
        return _term(next(part for part in axis.parts if _lives(part, space)), space)
    if isinstance(axis, Product):
        found = []
        for part in axis.parts:
            found += _term(part, space) if isinstance(part, Atom) or _lives(part, space) else []
        return found
    return [axis.space] if isinstance(axis, Atom) else []

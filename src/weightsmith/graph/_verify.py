"""The proof of a graph: units in another order, the same function."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightsmith.errors import Error, listed
from weightsmith.graph._axes import Axis, Locked, Product, Sum, renamed, spaces_of
from weightsmith.graph._units import UnitGraph


def verify(
    module: nn.Module,
    graph: UnitGraph,
    example: Any,
    *,
    outputs: Sequence[str] | None = None,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> list[str]:
    """The spaces whose units cannot be permuted without changing what the module computes.

    A random order of a space's units, in every tensor that it runs along, must leave the outputs as they are. All
    spaces are permuted at once; only where that changes something are they told apart, by halves. Spaces flagged
    ``tokens`` are left alone: another order of theirs is another function.

    Args:
        module: run in evaluation mode, on a copy in float64 (float32 above a hundred million weights); it is left as
            it is. Tensors that are on the meta device or hold one number everywhere (zeros, ones) are given random
            numbers in the copy, since they would hide a mistake.
        graph: of the module.
        example: what the module is called with, as for `trace`.
        outputs: which entries of a returned mapping count, as for `trace`.
        seed: of the permutations and of random weights.
        tolerance: the largest change of an output, relative to the largest output, that counts as none.

    Returns:
        Names of spaces, empty for a graph that is right.

    Raises:
        Error: the graph is of other weights, or the module's outputs are not finite.

    >>> from weightsmith.graph import declare
    >>> module = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5))
    >>> right = declare(module, {"0.*": "> a, 2"} | {"0.weight": "> a, 2", "0.bias": "> a", "2.weight": "5, < a"})
    >>> verify(module, right, torch.randn(64, 2))
    []
    >>> wrong = declare(module, {"0.weight": "> a, 2", "0.bias": "> a"})
    >>> verify(module, wrong, torch.randn(64, 2))
    ['a']
    """
    generator = torch.Generator().manual_seed(seed)
    trial = Trial(module, graph, example, generator, outputs)
    orders = {
        name: shuffled(space.size, generator)
        for name, space in graph.spaces.items()
        if space.size > 1 and "tokens" not in space.flags
    }
    return wrong_among(trial, orders, tolerance)


def wrong_among(trial: Trial, orders: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """The spaces that change something, found by halving."""
    if not orders or trial.change(orders) <= tolerance:
        return []
    if len(orders) == 1:
        return list(orders)
    names = list(orders)
    half = len(names) // 2
    return [
        name
        for part in (names[:half], names[half:])
        for name in wrong_among(trial, {each: orders[each] for each in part}, tolerance)
    ]


def shuffled(size: int, generator: torch.Generator) -> Tensor:
    """A random order that is not the one there is."""
    order = torch.randperm(size, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(size)) else order


class Trial:
    """A copy of a module that is called with permuted weights."""

    def __init__(self, module: nn.Module, graph: UnitGraph, example: Any, generator: torch.Generator,
                 outputs: Sequence[str] | None = None) -> None:  # fmt: skip
        tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        for name, uses in graph.tensors.items():
            if name not in tensors or tensors[name].shape != graph.shape(name):
                raise Error(f"the graph is not of this module: its tensor {name} is {[str(use) for use in uses]}")
        self.graph, self.counting = graph, outputs
        small = sum(t.numel() for t in module.parameters()) <= 10**8
        state = generator.get_state()
        try:
            self.prepare(module, example, tensors, generator, torch.float64 if small else torch.float32)
        except RuntimeError:  # an operator that has no double precision
            if not small:
                raise
            generator.set_state(state)
            self.prepare(module, example, tensors, generator, torch.float32)
        if not any(output.numel() for output in self.outputs):
            raise Error(f"{type(module).__name__} returns no tensors, so permutations cannot be told apart")
        if not all(bool(output.isfinite().all()) for output in self.outputs):
            raise Error("the outputs of the module on the example are not finite, so permutations cannot be told apart")

    def prepare(
        self,
        module: nn.Module,
        example: Any,
        tensors: Mapping[str, Tensor],
        generator: torch.Generator,
        wide: torch.dtype,
    ) -> None:
        """The copy, its inputs and its outputs."""
        from weightsmith.graph._trace import called_with, computed

        device = next((t.device for t in tensors.values() if not t.is_meta), torch.device("cpu"))
        filled: dict[int, Tensor] = {}
        memo: dict[int, Any] = {id(tensor): tensor.detach() for tensor in computed(module)}
        for tensor in tensors.values():
            if id(tensor) not in filled:
                filled[id(tensor)] = telling(tensor.detach(), generator, wide).to(device)
                made = filled[id(tensor)]
                memo[id(tensor)] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made
        self.module = copy.deepcopy(module, memo).eval()
        self.values = {name: filled[id(tensor)] for name, tensor in tensors.items()}
        args, keywords = called_with(module, example)
        self.call = pytree.tree_map_only(Tensor, lambda t: input_like(t, generator, wide).to(device), (args, keywords))
        self.outputs = self.run({})

    def run(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs with other values of some tensors."""
        from weightsmith.graph._trace import counted

        args, keywords = copy.deepcopy(self.call)
        given = {**self.values, **values}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own = {name: value.clone() if value.ndim == 0 else value for name, value in given.items()}
            found = torch.func.functional_call(self.module, own, args, keywords, tie_weights=False)
        return [leaf.double() for leaf in pytree.tree_leaves(counted(found, self.counting)) if isinstance(leaf, Tensor)]

    def change(self, orders: Mapping[str, Tensor]) -> float:
        """How far the outputs move, relative to the largest."""
        permuted = {}
        for name in self.graph.tensors:
            value = self.values[name]
            for dim in range(value.ndim):
                index = self.graph.index(name, dim, orders)
                if index is not None:
                    value = value.index_select(dim, index.to(value.device))
            if value is not self.values[name]:
                permuted[name] = value
        outputs = self.run(permuted)
        worst = 0.0
        for before, after in zip(self.outputs, outputs, strict=True):
            if before.shape != after.shape:
                return float("inf")
            if before.numel():
                scale = before.abs().max().clamp(min=1e-30)
                moved = ((before - after).abs().max() / scale).item()
                worst = max(worst, moved if moved == moved else float("inf"))
        return worst


def telling(tensor: Tensor, generator: torch.Generator, wide: torch.dtype) -> Tensor:
    """Values that a permutation changes: its own, or random ones."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.clone()
    if tensor.is_meta:
        if tensor.ndim > 1:
            spread = max(tensor[0].numel(), 1) ** -0.5
            return torch.randn(tensor.shape, generator=generator, dtype=wide) * spread
        return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=wide)
    value = tensor.to(wide, copy=True)
    level = value.flatten()[0].item() if value.numel() else 1.0
    if (value.numel() > 1 or not level) and bool((value == level).all()):
        noise = torch.rand(value.shape, generator=generator, dtype=wide).to(value.device)
        return level * (0.5 + noise) if level else 0.2 * (noise - 0.5)
    return value


def input_like(tensor: Tensor, generator: torch.Generator, wide: torch.dtype) -> Tensor:
    """The example, or random values where it has none."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.clone()
    if tensor.is_meta or (tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())):
        return torch.randn(tensor.shape, generator=generator, dtype=wide)
    return tensor.to(wide)


def checked(module: nn.Module, graph: UnitGraph, example: Any, outputs: Sequence[str] | None = None) -> UnitGraph:
    """The graph without the spaces that are wrong."""
    wrong = verify(module, graph, example, outputs=outputs)
    return without(graph, wrong) if wrong else graph


def without(graph: UnitGraph, spaces: Sequence[str]) -> UnitGraph:
    """The graph with some spaces locked."""
    sizes = graph.sizes

    def lock(axis: Axis) -> Axis:
        return _merged(renamed(axis, lambda name: Locked(sizes[name]) if name in spaces else _same(name)))

    tensors, locked = {}, dict(graph.locked)
    for name, uses in graph.tensors.items():
        lost = sorted({space for use in uses for space in spaces_of(use.axis) if space in spaces})
        tensors[name] = tuple(replace(use, axis=lock(use.axis)) for use in uses)
        if lost:
            reason = f"a permutation of {listed(lost)} changed the outputs"
            locked[name] = f"{locked[name]}; {reason}" if name in locked else reason
    config = {key: axis for key, axis in graph.config.items() if not _lost(axis, graph, spaces)}
    kept = {name: space for name, space in graph.spaces.items() if name not in spaces}
    torn = [names for names in graph.alike if not set(names).isdisjoint(spaces)]
    for name in (name for names in torn for name in names if name in kept):  # as long as what is locked now
        kept[name] = replace(kept[name], multiple=sizes[name], minimum=sizes[name])
    alike = tuple(names for names in graph.alike if names not in torn)
    return replace(graph, spaces=kept, tensors=tensors, locked=locked, config=config, alike=alike)


def _same(name: str) -> Axis:
    from weightsmith.graph._axes import Atom

    return Atom(name)


def _lost(text: str, graph: UnitGraph, spaces: Sequence[str]) -> bool:
    """Whether an axis of the config names a space that is gone."""
    from weightsmith.graph._axes import parsed
    from weightsmith.graph._units import _fitting

    return any(
        name in spaces for pattern in spaces_of(parsed(text))
        for name in (_fitting(pattern, graph.spaces) if "{}" in pattern else [pattern])
    )  # fmt: skip


def _merged(axis: Axis) -> Axis:
    """Neighbouring numbers as one."""
    if not isinstance(axis, Product | Sum):
        return axis
    parts: list[Axis] = []
    for part in map(_merged, axis.parts):
        last = parts[-1] if parts else None
        if isinstance(part, Locked) and isinstance(last, Locked):
            parts[-1] = Locked(last.size * part.size if isinstance(axis, Product) else last.size + part.size)
        else:
            parts.append(part)
    return parts[0] if len(parts) == 1 else type(axis)(tuple(parts))

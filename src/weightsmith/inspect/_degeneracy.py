"""Which parameters of a network do nothing: directions that no activation takes, no output sees, units that act as one.

A weight matrix can change freely where its inputs do not reach (null directions of their Gram matrix) and
where its outputs do not matter (null directions of the Gram matrix of the Jacobians behind it). Units of a ReLU layer
that always fire together could be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.stats.room import Batch, Forward, default_forward, restored
from weightsmith.weights import Pattern, matches

_HASHED = 2**62


@card(
    paper="Bushnaq et al. 2024, 'Using Degeneracy in the Loss Landscape for Mechanistic Interpretability' "
    "(activations, Jacobians, synchronised nonlinearities)",
    covers=("degeneracy-loss-landscape-mechanistic",),
    needs=("data",),
    unit="model",
    claim="a duplicated unit costs each layer beside it exactly one rank",
    departs="a count of null directions above a tolerance, not an estimate of the learning coefficient",
)
def degeneracy(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    pattern: Pattern = "*",
    tolerance: float = 1e-5,
    probes: int | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> Report:
    r"""Null directions around every linear layer, and ReLU units that fire together.

    .. math:: G = \frac1n \sum_x a_x a_x^\top, \qquad K = \frac1n \sum_x J_x^\top J_x, \qquad
              \text{free} = |W| - \operatorname{rank} G \cdot \operatorname{rank} K

    with :math:`a_x` the inputs of a layer (and a 1 for its bias), and :math:`J_x` the Jacobian of the network's outputs
    by the layer's outputs.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``inputs``, ``(inputs, labels)`` or mappings; read once.
        pattern: names of linear layers.
        tolerance: directions whose root mean square is below this share of the largest are null.
        probes: so many random mixtures of the outputs stand for all of them; at least the layers' widths, or ranks
            may be missed. None asks for each output by itself: a backward pass each.
        forward: ``(model, batch) -> outputs [n, ...]``, where the default does not fit.
        seed: of the probes.

    Returns:
        Report: a row a linear layer (ranks of its inputs and of the Jacobian behind it, ``free`` parameters and their
        share), and a row a ReLU (``distinct`` patterns over the data, ``dead`` and ``always on`` units). Plots: both
        spectra by layer.

    Raises:
        ValueError: no batch, or no linear layer that fits and is called.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> found = degeneracy(layer, [torch.tensor([[1.0, 1.0], [2.0, 2.0]])])      # one direction of two is never taken
    >>> found["input rank"], found["free"]
    ([1], 1)
    """
    if tolerance <= 0 or (probes is not None and probes < 1):
        raise Error(f"degeneracy needs a tolerance above 0 and at least 1 probe, got {tolerance} and {probes}")
    linear = {n or "model": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and matches(pattern, n)}
    gates = {name or "model": module for name, module in model.named_modules() if isinstance(module, nn.ReLU)}
    if not linear:
        raise Error(f"no linear layer fits pattern={pattern!r}")
    generator = torch.Generator().manual_seed(seed)
    layers = {name: _Layer() for name in linear}
    units = {name: _Units() for name in gates}
    total = len(batches) if hasattr(batches, "__len__") else 0  # type: ignore[arg-type]
    with restored(model), progress.task("degeneracy", total) as advance:
        for batch in batches:
            _see(model, batch, linear, gates, layers, units, forward or default_forward, probes, generator)
            advance(1)
    seen = {name: layer for name, layer in layers.items() if layer.inputs is not None}
    if not seen:
        raise Error(f"none of the linear layers was called: no batch, or no use of {listed(linear)}")
    rows = [_row(name, linear[name], layer, tolerance) for name, layer in seen.items()]
    rows += [_unit_row(name, unit) for name, unit in units.items() if unit.total is not None]
    parameters = sum(row["parameters"] or 0 for row in rows)
    free = sum(row["free"] or 0 for row in rows)
    return Report(
        "Degeneracy of a network",
        figures={
            "linear layers": len(seen),
            "parameters in them": parameters,
            "free": free,
            "effective": parameters - free,
            "units that another one repeats": sum(row["units"] - row["distinct"] for row in rows if row["units"]),
        },
        table=rows,
        plots=[
            _spectra("Directions of the inputs", {name: layer.inputs for name, layer in seen.items()}),
            _spectra("Directions of the Jacobian behind", {name: layer.behind for name, layer in seen.items()}),
        ],
        notes=["What is null on these data need not be on others; ranks count directions above the tolerance."],
    )


@dataclass
class _Layer:
    """Sums over the data of one linear layer."""

    inputs: Tensor | None = None
    behind: Tensor | None = None


@dataclass
class _Units:
    """Sums over the data of one ReLU."""

    total: int | None = None
    fired: Tensor | int = 0
    hashes: Tensor | int = 0


@dataclass
class _Taps:
    """What hooks have caught in one forward pass."""

    linear: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    gates: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def _tapped(linear: Mapping[str, nn.Module], gates: Mapping[str, nn.Module]) -> Iterator[_Taps]:
    taps = _Taps()

    def on_linear(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            made = output if output.requires_grad else output.detach().requires_grad_()
            taps.linear.setdefault(name, []).append((inputs[0].detach(), made))
            return made.clone()  # what follows may work in place

        return hook

    def on_gate(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            taps.gates.setdefault(name, []).append(output.detach() > 0)

        return hook

    handles = [module.register_forward_hook(on_linear(name)) for name, module in linear.items()]
    handles += [module.register_forward_hook(on_gate(name)) for name, module in gates.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _see(
    model: nn.Module,
    batch: Batch,
    linear: Mapping[str, nn.Linear],
    gates: Mapping[str, nn.Module],
    layers: Mapping[str, _Layer],
    units: Mapping[str, _Units],
    forward: Forward,
    probes: int | None,
    generator: torch.Generator,
) -> None:
    with torch.enable_grad(), _tapped(linear, gates) as taps:
        outputs = forward(model, batch)
    outputs = outputs.reshape(len(outputs), -1)
    for name, calls in taps.linear.items():
        for inputs, _ in calls:
            flat = inputs.reshape(-1, inputs.shape[-1]).double()
            if linear[name].bias is not None:
                flat = torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
            layers[name].inputs = _plus(layers[name].inputs, flat.T @ flat)
    for name, calls in taps.gates.items():
        for fired in calls:
            _count(units[name], fired.reshape(-1, fired.shape[-1]).long(), generator)
    behind = [(name, output) for name, calls in taps.linear.items() for _, output in calls]
    if not behind:
        return
    for direction in _directions(outputs, probes, generator):
        found = torch.autograd.grad(
            outputs, [output for _, output in behind], direction, retain_graph=True, allow_unused=True
        )
        for (name, output), gradient in zip(behind, found, strict=True):
            flat = torch.zeros_like(output) if gradient is None else gradient
            flat = flat.reshape(-1, flat.shape[-1]).double()
            layers[name].behind = _plus(layers[name].behind, flat.T @ flat)


def _plus(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def _directions(outputs: Tensor, probes: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """What the outputs ``[n, c]`` are multiplied with: one of them at a time, or random signs of all."""
    if probes is None:
        for index in range(outputs.shape[1]):
            chosen = torch.zeros_like(outputs)
            chosen[:, index] = 1
            yield chosen
        return
    for _ in range(probes):
        signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2 - 1
        yield signs.to(outputs) / probes**0.5


def _count(units: _Units, fired: Tensor, generator: torch.Generator) -> None:
    """Sums of a random number for each example where a unit fires: equal for two units only if they fire together."""
    numbers = torch.randint(-_HASHED, _HASHED, (len(fired),), generator=generator).to(fired.device)
    units.total = (units.total or 0) + len(fired)
    units.fired = units.fired + fired.sum(dim=0)
    units.hashes = units.hashes + (fired * numbers[:, None]).sum(dim=0)  # overflow wraps around, alike for all


def _roots(gram: Tensor) -> Tensor:
    """Square roots of the eigenvalues, descending, over the largest."""
    roots = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    return roots / roots[0] if float(roots[0]) else roots


def _rank(gram: Tensor, tolerance: float) -> int:
    return int((_roots(gram) > tolerance).sum())


_COLUMNS = ("input rank", "of inputs", "Jacobian rank", "of outputs", "parameters", "free", "share free")
_UNITS = ("units", "distinct", "dead", "always on")


def _row(name: str, module: nn.Linear, layer: _Layer, tolerance: float) -> dict[str, Any]:
    assert layer.inputs is not None
    assert layer.behind is not None
    if not bool(layer.inputs.isfinite().all() & layer.behind.isfinite().all()):
        raise Error(f"{name}: its inputs, or the gradients at its outputs, are not finite; no rank can be told")
    inputs, outputs = len(layer.inputs), len(layer.behind)
    ranks = _rank(layer.inputs, tolerance), _rank(layer.behind, tolerance)
    free = inputs * outputs - ranks[0] * ranks[1]
    found = (ranks[0], inputs, ranks[1], outputs, inputs * outputs, free, free / (inputs * outputs))
    return {"part": name, "kind": "linear", **dict(zip(_COLUMNS, found, strict=True)), **dict.fromkeys(_UNITS)}


def _unit_row(name: str, units: _Units) -> dict[str, Any]:
    assert isinstance(units.fired, Tensor)
    assert isinstance(units.hashes, Tensor)
    patterns = torch.stack([units.fired, units.hashes], dim=1)
    found = (len(units.fired), len(patterns.unique(dim=0)), _sum(units.fired == 0), _sum(units.fired == units.total))
    return {"part": name, "kind": "relu", **dict.fromkeys(_COLUMNS), **dict(zip(_UNITS, found, strict=True))}


def _sum(chosen: Tensor) -> int:
    return int(chosen.sum())


def _spectra(title: str, grams: Mapping[str, Tensor | None]) -> Plot:
    lines = []
    for name, gram in list(grams.items())[:8]:
        if gram is not None:
            roots = _roots(gram).clamp(min=1e-12).tolist()
            lines.append(Line(name, list(range(1, len(roots) + 1)), roots))
    return Plot(title, "direction", "root mean square over the largest", lines, log="y")

"""Memories whose energy is a high power of the overlap: how much they hold, and from how poor examples they learn.

With an energy of order P a network of N units holds on the order of N^(P-1) patterns. If the patterns themselves are
never seen, only noisy examples, a teacher who says which examples belong together lets them be averaged first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report, Surface

_AT_ONCE = 1 << 22  # numbers of fields that are held together: 16 MiB


@card(
    paper="Agliari et al. 2023, 'Dense Hebbian neural networks: a replica symmetric picture of supervised learning'",
    covers=("dense-hebbian-neural-networks",),
    needs=("data",),
    unit="model",
    claim="with a teacher the same examples make far better memories",
)
def hebbian_patterns(examples: Tensor, supervised: bool = True) -> tuple[Tensor, Tensor]:
    r"""The vectors that a memory stores, and their weights, from examples of each pattern.

    With a teacher the mean of each pattern's examples is stored, divided by its root mean square; without one every
    example is, with an equal share of its pattern's weight.

    Args:
        examples: ``[k, m, n]``, m examples of k patterns of n signs.
        supervised: whether it is known which examples belong together.

    Returns:
        Vectors ``[s, n]`` and weights ``[s]``: ``s = k`` with a teacher, ``k m`` without.

    >>> vectors, weights = hebbian_patterns(torch.tensor([[[1.0, 1.0], [1.0, 1.0]]]))
    >>> vectors.tolist(), weights.tolist()
    ([[1.0, 1.0]], [1.0])
    """
    if examples.dim() != 3 or not examples.numel():
        raise Error(f"examples are [patterns, examples, units], got {list(examples.shape)}")
    values = examples.float()
    if not supervised:
        return values.flatten(0, 1), values.new_full((len(values) * values.shape[1],), 1 / values.shape[1])
    mean = values.mean(dim=1)
    size = mean.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(size > 0, mean / size.clamp(min=1e-12), 0.0), values.new_ones(len(values))


@card(
    paper="Hebb 1949; Hopfield 1982, 'Neural networks and physical systems with emergent collective computational "
    "abilities'",
    covers=("dense-hebbian-neural-networks",),
    needs=("data",),
    unit="model",
    claim="of order 2, its updates are those of the dense memory",
)
def hebbian_couplings(patterns: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""The couplings between units of a memory of order 2.

    .. math:: J_{ij} = \frac1N \sum_\mu w_\mu\, \xi^\mu_i \xi^\mu_j, \qquad J_{ii} = 0

    Args:
        patterns: ``[s, n]``.
        weights: ``[s]``; 1 by default.

    Returns:
        ``[n, n]`` in float32.

    >>> hebbian_couplings(torch.tensor([[1.0, -1.0]])).tolist()
    [[0.0, -0.5], [-0.5, 0.0]]
    """
    if patterns.dim() != 2 or not patterns.numel():
        raise Error(f"patterns are [count, units], got {list(patterns.shape)}")
    values = patterns.float()
    scaled = values if weights is None else values * weights.to(values)[:, None]
    return (scaled.T @ values / values.shape[1]).fill_diagonal_(0)


@card(
    paper="Krotov, Hopfield 2016, 'Dense Associative Memory for Pattern Recognition'; Agliari et al. 2023, "
    "'Dense Hebbian neural networks: a replica symmetric picture of supervised learning'",
    covers=("dense-hebbian-neural-networks",),
    needs=("data",),
    unit="model",
    claim="at order 4 it restores most of 500 patterns of 100 units, at order 2 not 40",
)
def retrieve(
    patterns: Tensor,
    start: Tensor,
    *,
    order: int = 2,
    weights: Tensor | None = None,
    temperature: float = 0.0,
    steps: int = 20,
    seed: int = 0,
) -> Tensor:
    r"""States that a dense associative memory reaches from given ones, all units updated together.

    .. math:: E(s) = -N \sum_\mu w_\mu \left(\frac{\xi^\mu \cdot s}{N}\right)^P, \qquad
        h_i = \tfrac12 \bigl(E(s_i = -1) - E(s_i = 1)\bigr), \qquad s_i \leftarrow \mathrm{sign}\, h_i

    or, at a temperature T, 1 with the chance :math:`1 / (1 + e^{-2 h_i / T})`.

    Args:
        patterns: ``[s, n]``, such as `hebbian_patterns` gives.
        start: ``[b, n]`` signs.
        order: P >= 2.
        weights: ``[s]`` of the patterns; 1 by default.
        temperature: 0 is without noise: then it stops where nothing changes, and a field of 0 changes nothing.
        steps: of all units, at most.
        seed: of the noise.

    Returns:
        ``[b, n]`` signs in float32.

    Raises:
        Error: shapes that do not fit, an order below 2, a negative temperature.

    >>> patterns = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]])
    >>> retrieve(patterns, torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0]])).tolist()
    [[1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    if patterns.dim() != 2 or start.dim() != 2 or patterns.shape[1] != start.shape[1] or not patterns.numel():
        raise Error(f"patterns [s, n] and start [b, n] do not fit: {list(patterns.shape)}, {list(start.shape)}")
    if order < 2 or order != int(order) or not temperature >= 0:
        raise Error(f"needs a whole order of at least 2 and a temperature of at least 0, got {order} and {temperature}")
    stored = patterns.float()
    shares = stored.new_ones(len(stored)) if weights is None else weights.to(stored)
    generator = torch.Generator(device=stored.device).manual_seed(seed)
    state = torch.where(start.to(stored) < 0, -1.0, 1.0)
    for _ in range(steps):
        field = _field(stored, shares, state, order)
        if temperature:
            chance = torch.sigmoid(2 * field / temperature)
            after = torch.where(torch.rand(chance.shape, generator=generator, device=chance.device) < chance, 1.0, -1.0)
        else:
            after = torch.where(field == 0, state, field.sign())
            if torch.equal(after, state):
                break
        state = after
    return state


def _field(stored: Tensor, shares: Tensor, state: Tensor, order: int) -> Tensor:
    """Half the energy that each unit gains by being 1 and not -1, ``[b, n]``."""
    units = stored.shape[1]
    if order == 2:  # ((m + x)^2 - (m - x)^2) is linear: the couplings
        own = (shares[:, None] * stored.square()).sum(dim=0)
        return 2 / units * (((state @ stored.T) * shares) @ stored - own * state)
    field = torch.zeros_like(state)
    together = max(_AT_ONCE // units, 1)  # patterns
    rows = max(_AT_ONCE // (units * min(together, len(stored))), 1)
    for some, share in zip(stored.split(together), shares.split(together), strict=True):
        for part, out in zip(state.split(rows), field.split(rows), strict=True):
            overlap = (part @ some.T)[..., None] - some * part[:, None]  # without the unit itself
            gain = ((overlap + some) / units).pow(order) - ((overlap - some) / units).pow(order)
            out += units / 2 * torch.einsum("bsn,s->bn", gain, share)
    return field


@card(
    paper="Agliari et al. 2023, 'Dense Hebbian neural networks: a replica symmetric picture of supervised learning'",
    covers=("dense-hebbian-neural-networks",),
    unit="model",
    claim="shows where a memory of an order works, over load, noise and the quality of its examples",
    departs="measured by running memories of finite size, not from the replica equations",
)
def retrieval_diagram(
    order: int,
    *,
    units: int = 100,
    patterns: Sequence[int] = (5, 10, 20, 40, 80),
    temperatures: Sequence[float] = (0.0, 0.2, 0.5, 1.0),
    quality: float = 1.0,
    examples: int = 1,
    supervised: bool = True,
    flipped: float = 0.2,
    trials: int = 10,
    steps: int = 20,
    seed: int = 0,
) -> Report:
    r"""Overlap between a pattern and what a memory makes of a spoiled copy of it, over load and noise.

    .. math:: m = \frac1N\, \xi \cdot s

    Args:
        order: P of the energy.
        units: N.
        patterns: numbers of random patterns; the load is their number over :math:`N^{P-1}`.
        temperatures: of the updates.
        quality: r; every bit of an example is right with the chance (1 + r) / 2.
        examples: of each pattern, M.
        supervised: whether a teacher says which belong together.
        flipped: share of the bits that a start has wrong.
        trials: starts, each from a different pattern where there are enough.
        steps: of all units.
        seed: of patterns, examples, starts and noise.

    Returns:
        Report: a row for every load and temperature with the mean ``overlap``; a surface of them.

    Raises:
        Error: nothing to try, a quality outside of (0, 1], a share outside of [0, 1].

    >>> found = retrieval_diagram(4, units=50, patterns=(5,), temperatures=(0.0,))
    >>> round(found["overlap"][0], 3)
    1.0
    """
    if not patterns or not temperatures or min(patterns) < 1 or min(units, examples, trials) < 1:
        raise Error("retrieval_diagram needs patterns, temperatures, units, examples and trials of at least 1")
    if not 0 < quality <= 1 or not 0 <= flipped <= 1:
        raise Error(f"needs a quality in (0, 1] and a share flipped in [0, 1], got {quality} and {flipped}")
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int, chance: float = 0.5) -> Tensor:
        return torch.where(torch.rand(*shape, generator=generator) < chance, 1.0, -1.0)

    rows = []
    for count in patterns:
        truth = signs(count, units)
        seen = truth[:, None] * signs(count, examples, units, chance=(1 + quality) / 2)
        stored, weights = hebbian_patterns(seen, supervised)
        wanted = truth[torch.arange(trials) % count]
        start = wanted * signs(trials, units, chance=1 - flipped)
        for temperature in temperatures:
            reached = retrieve(
                stored, start, order=order, weights=weights, temperature=temperature, steps=steps, seed=seed
            )
            overlap = (reached * wanted).mean(dim=1).double()
            rows.append({"patterns": count, "load": count / units ** (order - 1), "temperature": float(temperature),
                         "overlap": float(overlap.mean()),
                         "start overlap": float((start * wanted).mean())})  # fmt: skip
    grid = [[row["overlap"] for row in rows if row["temperature"] == heat] for heat in map(float, temperatures)]
    plots = [Plot("Overlap", "patterns", "overlap", [
        Line(f"temperature {heat:g}", list(patterns), line) for heat, line in zip(temperatures, grid, strict=True)
    ])]  # fmt: skip
    if len(patterns) > 1 and len(temperatures) > 1:
        surface = Surface(list(patterns), [float(heat) for heat in temperatures], grid)
        plots.append(Plot("Where it retrieves", "patterns", "temperature", surface=surface))
    held = [row["patterns"] for row in rows if row["temperature"] == min(temperatures) and row["overlap"] > 0.95]
    figures = {"order": order, "units": units, "quality": quality, "examples": examples, "supervised": supervised,
               "most patterns held": max(held, default=0)}  # fmt: skip
    return Report(f"Retrieval at order {order}", figures, rows, plots, ("Held: a mean overlap above 0.95.",))

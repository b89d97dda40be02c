"""Channels with outliers taken apart into several, and as many of the others put together.

A channel that is split into T has values a T-th as large, which is exact. Two channels that are alike, or that matter
little, are replaced by their mean, which is not: so few are put together as bring the number back to what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import coded
from weightsmith.quantize.grids import Integer
from weightsmith.quantize.transforms._places import Place, Side
from weightsmith.weights import Entire, Held, Lazy, Spec, Weights, apply, open, working


@dataclass(frozen=True, eq=False)
class Channels:
    """Which old channels stand behind each new one.

    Attributes:
        index: ``[entries]``, an old channel.
        place: ``[entries]``, the new channel that it is in.
        written: ``[entries]``, the share of the old channel's value: ``1 / T`` of one that is split in T, halved in a
            pair.
        count: new channels.
    """

    index: Tensor
    place: Tensor
    written: Tensor
    count: int

    def write(self, values: Tensor, dim: int = -1) -> Tensor:
        """The new channels' values: weighted sums of old ones along a dimension."""
        return self._moved(values, self.written, dim)

    def read(self, weight: Tensor, dim: int = -1) -> Tensor:
        """The new channels' weights: sums of old ones along a dimension."""
        return self._moved(weight, torch.ones_like(self.written), dim)

    def _moved(self, values: Tensor, shares: Tensor, dim: int) -> Tensor:
        last = values.movedim(dim, -1)
        parts = last[..., self.index.to(last.device)] * shares.to(last)
        new = last.new_zeros(*last.shape[:-1], self.count)
        return new.index_add(-1, self.place.to(last.device), parts).movedim(-1, dim)


def disassembled(maxima: Tensor, threshold: float) -> Channels:
    r"""Channels of which none is larger than a threshold: :math:`T_j = \lceil \max |x_j| / \theta \rceil` for each.

    Args:
        maxima: ``[in]``, the largest absolute value of each channel.
        threshold: above 0.

    Returns:
        Channels: parts of one channel beside one another.

    Raises:
        Error: a threshold or largest values that are not finite, or a threshold that is not above 0.

    >>> disassembled(torch.tensor([1.0, 5.0]), 2.0).write(torch.tensor([1.0, 6.0]))
    tensor([1., 2., 2., 2.])
    """
    if not 0 < threshold < torch.inf:
        raise Error(f"channels are split at a finite threshold above 0, got {threshold}")
    if not maxima.isfinite().all():
        raise Error("the largest values of channels must be finite to be split")
    counts = (maxima.double() / threshold).ceil().clamp(min=1).long()
    index = torch.arange(len(maxima), device=maxima.device).repeat_interleave(counts)
    shares = (1 / counts.double())[index]
    return Channels(index, torch.arange(len(index), device=maxima.device), shares, len(index))


def assembled(channels: Channels, gram: Tensor, weight: Tensor, count: int) -> Channels:
    r"""As many pairs of channels made one as bring their number to ``count``, those first that change outputs least.

    .. math:: \big(x_i w_i + x_j w_j\big) - \tfrac{x_i + x_j}{2} (w_i + w_j) = \tfrac12 (x_i - x_j)(w_i - w_j)

    so a pair costs :math:`\tfrac14 \lVert x_i - x_j \rVert^2 \lVert w_i - w_j \rVert^2`. Channels at even places look
    for the best partner among those at odd ones (bipartite soft matching); at most half can be put together.
    Parts of one channel cost nothing, and are never put together.

    Args:
        channels: as `disassembled` gives them.
        gram: ``[in, in]``, of the old channels' values.
        weight: ``[out, in]``, what reads them.
        count: how many are wanted.

    Returns:
        Channels: ``count`` of them, or as given where there are no more.

    Raises:
        Error: fewer pairs are found than have to go: half of the channels at most, and less where several want the
            same partner.

    >>> weight, gram = torch.tensor([[1.0, 1.0, 9.0, 5.0]]), torch.eye(4)
    >>> found = assembled(disassembled(torch.ones(4), 1.0), gram, weight, 3)
    >>> found.place, found.read(weight)
    (tensor([0, 0, 1, 2]), tensor([[2., 9., 5.]]))
    """
    if channels.count <= count:
        return channels
    unit = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    written, read = channels.write(unit), channels.read(weight.double())
    values, weights = written.T @ gram.double() @ written, read.T @ read
    cost = _apart(values) * _apart(weights) / 4
    own = channels.index[channels.place.argsort(stable=True)]
    cost = cost.masked_fill(own[:, None] == own, torch.inf)[::2, 1::2]
    least, partner = cost.min(1)
    # A channel at an odd place takes one partner: the one that costs least.
    order = least.argsort(stable=True)
    taken: dict[int, int] = {}
    for row in order.tolist():
        if len(taken) == channels.count - count:
            break
        if int(partner[row]) not in taken and least[row] < torch.inf:
            taken[int(partner[row])] = row
    if len(taken) < channels.count - count:
        raise Error(
            f"{channels.count} channels cannot be brought to {count} by pairs: only {len(taken)} were found; take a "
            "higher threshold"
        )
    into = torch.arange(channels.count)
    for odd, even in taken.items():
        into[2 * odd + 1] = 2 * even
    kept, place = into.unique(return_inverse=True)
    place = place.to(gram.device)[channels.place]
    paired = torch.bincount(into, minlength=channels.count)[into].to(gram.device)[channels.place]
    return Channels(channels.index, place, channels.written / paired, len(kept))


def _apart(products: Tensor) -> Tensor:
    """Squared distances of all pairs, from their inner products."""
    own = products.diagonal()
    return (own[:, None] + own - 2 * products).clamp(min=0)


@card(
    paper="Liu, Gong, Wei, Dong, Cai, Zhuang 2024, 'QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large "
    "Language Models'",
    covers=("qllm",),
    needs=("data",),
    unit="model",
    claim="the product of rounded inputs and rounded weights has less error when outliers are split and others paired",
    departs="errors are those of a matrix and its inputs, not of attention or the MLP behind it; parts of split "
    "channels may be paired with others, and every channel is in one pair at most; thresholds fall geometrically; the "
    "low-rank reconstruction that follows in the paper is another method",
)
def qllm(inputs: Tensor, weight: Tensor, *, bits: int = 4, steps: int = 20) -> Channels:
    r"""The channels under which a layer's outputs change least when its inputs and its weight are rounded.

    .. math:: \theta = \operatorname{arg\,min}_\theta \lVert X W^\top - Q(X_\theta)\, Q(W_\theta)^\top \rVert^2

    over ``steps`` thresholds from the largest value on down to the median of the channels' largest values, as long as
    pairs enough are found to bring the channels back to their number.

    Args:
        inputs: ``[n, in]``, what the layer is given; each row is rounded on its own grid.
        weight: ``[out, in]``; so is each of its rows.
        bits: of both; the grids are asymmetric.
        steps: how many thresholds are tried, apart from leaving the channels as they are.

    Returns:
        Channels: as many as there were; `rechannelled` puts them into a network.

    Raises:
        Error: shapes that do not fit, values that are not finite, or no threshold to try.

    >>> generator = torch.Generator().manual_seed(0)
    >>> inputs, weight = (torch.randn(rows, 64, generator=generator) for rows in (64, 4))
    >>> inputs[:, 3] *= 50
    >>> found = qllm(inputs, weight)
    >>> found.count, int((found.index == 3).sum()) > 1
    (64, True)
    """
    rows, matrix = (x if x.dtype == torch.float64 else x.float() for x in (inputs.flatten(0, -2), weight))
    if matrix.dim() != 2 or rows.shape[1] != matrix.shape[1] or not len(rows):
        raise Error(f"inputs {list(inputs.shape)} and a weight {list(weight.shape)} do not fit")
    if steps < 1:
        raise Error(f"qllm tries at least one threshold, got steps={steps}")
    grid, maxima = Integer(bits=bits, symmetric=False), rows.abs().amax(0)
    if not (maxima.isfinite().all() and matrix.isfinite().all()):
        raise Error("inputs and weight must be finite")
    wanted, gram = rows @ matrix.T, rows.T @ rows
    low, high = float(maxima.median()), float(maxima.max())
    best, least = disassembled(maxima, torch.finfo(torch.float64).max), torch.inf
    for step in range(steps + 1):
        threshold = high * (low / high) ** (step / steps) if low > 0 else high * (1 - step / (steps + 1))
        if step and not 0 < threshold < high:
            continue
        try:
            split = disassembled(maxima, threshold) if step else best
            found = assembled(split, gram, matrix, len(maxima))
        except Error:
            break  # lower thresholds split even more
        given, read = found.write(rows), found.read(matrix)
        off = float((coded(given, grid).values() @ coded(read, grid).values().T - wanted).square().sum())
        if off < least:
            best, least = found, off
    return best


def rechannelled(weights: Any, place: Place, channels: Channels) -> Weights:
    """The network with other channels at a place: what writes it is mixed, what reads it added up.

    Exact where channels are only taken apart; where some are put together, as near as the pairs are alike, if nothing
    bends the place (behind a ReLU the mean of two differs from the ReLU of their mean).

    Args:
        weights: what `weightsmith.open` opens.
        place: one of `places`.
        channels: of its units.

    Returns:
        Weights: lazy; tensors of the place have ``channels.count`` units, so a module must be built with as many.

    Raises:
        Error: a tensor that does not have the units of the place once and in order, or channels of another number.

    >>> from weightsmith.graph import declare
    >>> from weightsmith.quantize.transforms import places
    >>> weights = {"up": torch.tensor([[1.0], [6.0]]), "down": torch.tensor([[1.0, 2.0]])}
    >>> place = places(weights, declare(weights, {"up": "> hidden, 1", "down": "1, < hidden"}))[0]
    >>> new = rechannelled(weights, place, disassembled(torch.tensor([1.0, 6.0]), 3.0))
    >>> new["up"].flatten(), new["down"], new["down"] @ new["up"]
    (tensor([1., 3., 3.]), tensor([[1., 2., 2.]]), tensor([[13.]]))
    """
    found = open(weights)
    plan: dict[str, tuple[Side, bool]] = {}
    for sides, reads in ((place.writers, False), (place.readers, True)):
        for side in sides:
            if not torch.equal(side.units, torch.arange(place.units)):
                raise Error(f"{side.tensor} does not have the units of {place.name} once and in order along its axis")
            if found.spec(side.tensor).shape[side.dim] != int(channels.index.max()) + 1:
                raise Error(
                    f"{place.name} has {place.units} units, and the channels are of {int(channels.index.max()) + 1}"
                )
            plan[side.tensor] = (side, reads)

    def build(name: str, node: Lazy) -> Lazy:
        if name not in plan:
            return node
        side, reads = plan[name]
        shape = list(node.spec.shape)
        shape[side.dim] = channels.count
        held = [Entire(Held(part)) for part in (channels.index, channels.place, channels.written)]
        options = {"count": channels.count, "dim": side.dim, "reads": reads}
        return apply(_mixed, node, *held, unit="tensor", spec=Spec(tuple(shape), node.spec.dtype), options=options)

    return found.zip_nodes(build, (), "quantize.transforms.rechannelled", {"place": place.name})


def _mixed(
    weight: Tensor, index: Tensor, place: Tensor, written: Tensor, *, count: int, dim: int, reads: bool
) -> Tensor:
    channels = Channels(index, place, written, count)
    return channels.read(working(weight), dim) if reads else channels.write(working(weight), dim)

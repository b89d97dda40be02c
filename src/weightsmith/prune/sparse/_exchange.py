"""Exact counts: so many of the highest scores, and whole numbers in proportion to shares."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from weightsmith.solve import keys

_LEAST = torch.iinfo(torch.int32).min


def highest(score: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """The mask of exactly ``count`` elements with the highest scores; of equal ones the first.

    Args:
        score: ``[*shape]``, compared as float32; NaN counts as the highest.
        count: at most as many as there are.
        among: ``[*shape]`` bool: only these can be chosen.

    Returns:
        ``[*shape]`` bool, on the device of the scores. 12 bytes an element are held meanwhile.

    >>> highest(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2)
    tensor([ True, False,  True, False])
    >>> highest(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2, torch.tensor([False, True, True, False]))
    tensor([False,  True,  True, False])
    """
    if among is not None and count >= int(among.sum()):
        return among.clone()
    if count <= 0 or count >= score.numel():
        return torch.full(score.shape, count > 0, dtype=torch.bool, device=score.device)
    key = keys(score.detach()).reshape(-1)
    if among is not None:
        key = key.masked_fill(~among.reshape(-1), _LEAST)
    threshold = key.kthvalue(key.numel() - count + 1).values
    above, level = key > threshold, key == threshold
    return (above | (level & (level.cumsum(0) <= count - above.sum()))).reshape(score.shape)


def apportioned(shares: Mapping[str, float], total: int, capacities: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers that add up to ``total``, in proportion to shares as far as there is room.

    What does not fit in one is shared by the others; fractions go to the largest remainders, of equal ones the first.
    Where all shares are zero, capacities are the shares.

    Args:
        shares: name -> at least 0.
        total: is cut to the sum of capacities.
        capacities: name -> the most that it can have.

    >>> apportioned({"a": 1.0, "b": 1.0, "c": 2.0}, 9, {"a": 9, "b": 9, "c": 3})
    {'a': 3, 'b': 3, 'c': 3}
    """
    left, room = min(total, sum(capacities.values())), list(capacities)
    given = dict.fromkeys(capacities, 0)
    parts: dict[str, float] = {}
    while room:
        own = {name: max(float(shares[name]), 0.0) for name in room}
        if not sum(own.values()) > 0:
            own = {name: float(capacities[name]) for name in room}
        scale = left / max(sum(own.values()), 1e-300)
        parts = {name: scale * own[name] for name in room}
        full = [name for name in room if parts[name] >= capacities[name]]
        if not full:
            break
        for name in full:
            given[name] = capacities[name]
            left -= capacities[name]
        room = [name for name in room if name not in full]
    given |= {name: math.floor(parts[name]) for name in room}
    rest = left - sum(given[name] for name in room)
    for name in sorted(room, key=lambda name: given[name] - parts[name])[:rest]:
        given[name] += 1
    return given

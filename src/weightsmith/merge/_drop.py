"""Elements of a task vector are dropped by lot, at one rate for all or the small ones more often.

A number drawn depends on the seed, the tensor's name, the model and the element's place, and on nothing
else: chunks, threads and the order of work cannot change it.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.merge._trim import Numbers, Trim, Trimming, fractions, scaled

Dialect = Literal["mergekit", "paper"]

PER_COUNT = 8
"""Numbers of 32 bits that one step of the Philox counter makes."""


def keep_random(
    density: Numbers = 0.5, rescale: bool = True, dialect: Dialect = "mergekit", seed: int = 0, key: str = ""
) -> Trimming:
    """Every element with the probability ``density``."""
    trim = Trim(partial(_drawn, density=density, inverse=rescale and _is_paper(dialect), seed=seed, key=key))
    return (yield from scaled(trim, rescale and not _is_paper(dialect)))


def keep_by_rank(
    shape: torch.Size,
    density: Numbers,
    epsilon: Numbers,
    rescale: bool,
    dialect: Dialect,
    seed: int,
    key: str,
) -> Trimming:
    """Every element with a probability that grows with its rank in its row, for tensors of one shape."""
    row = shape[1:].numel() if len(shape) > 1 else shape.numel()
    inverse = rescale and _is_paper(dialect)
    factors = partial(_drawn, density=density, inverse=inverse, seed=seed, key=key, epsilon=epsilon, row=row)
    return (yield from scaled(Trim(factors), rescale and not _is_paper(dialect)))


def _is_paper(dialect: Dialect) -> bool:
    if dialect not in ("mergekit", "paper"):
        raise Error(f"dialect must be 'mergekit' or 'paper', got {dialect!r}")
    return dialect == "paper"


def _drawn(
    deltas: Tensor,
    *,
    density: Numbers,
    inverse: bool,
    seed: int,
    key: str,
    epsilon: Numbers = 0.0,
    row: int = 0,
    start: int,
) -> Tensor:
    """1 where an element is kept, or with ``inverse`` one over the probability that it is; else 0."""
    count, numbers = len(deltas), deltas.shape[1]
    found = []
    spreads = fractions("epsilon", epsilon, count)
    for model, (share, spread) in enumerate(zip(fractions("density", density, count), spreads, strict=True)):
        chance = by_rank(deltas[model].abs(), share, spread, row) if row else deltas.new_tensor(share)
        mask = uniform(numbers, start=start, seed=seed, key=f"{model}/{key}").to(deltas.device) < chance
        found.append(mask / chance.clamp(min=torch.finfo(chance.dtype).tiny) if inverse else mask)
    return torch.stack(found)


def by_rank(size: Tensor, density: float, epsilon: float, row: int) -> Tensor:
    """From ``density - epsilon`` for the smallest of a row to ``density + epsilon`` for the largest, in even steps."""
    if density in (0, 1):
        return torch.full_like(size, density)
    if not epsilon < min(density, 1 - density):
        raise Error(f"epsilon must be smaller than density and 1 - density, got {epsilon} with density {density}")
    order = size.reshape(-1, row).argsort(dim=-1, stable=True)
    steps = torch.linspace(-1 if row > 1 else 0, 1, row, dtype=size.dtype, device=size.device)
    chance = torch.empty(order.shape, dtype=size.dtype, device=size.device)
    return chance.scatter_(-1, order, (density + epsilon * steps).expand(order.shape)).reshape(-1)


def uniform(count: int, *, start: int, seed: int, key: str) -> Tensor:
    """Numbers ``start`` to ``start + count`` of an endless row of them in [0, 1), float32.

    >>> torch.equal(uniform(5, start=3, seed=0, key="w"), uniform(8, start=0, seed=0, key="w")[3:])
    True
    """
    named = hashlib.blake2b(json.dumps([int(seed), key]).encode(), digest_size=16).digest()
    counter, skipped = divmod(start, PER_COUNT)
    source = np.random.Philox(key=int.from_bytes(named, "little"), counter=counter)
    bits = source.random_raw((skipped + count + 1) // 2).astype("<u8", copy=False).view("<u4")[skipped:][:count]
    return torch.from_numpy((bits >> 8).astype(np.float32) * np.float32(2**-24))  # float32 holds 24 bits

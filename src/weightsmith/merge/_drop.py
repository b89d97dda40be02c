"""Elements of a task vector are dropped by lot, at one rate for all or the small ones more often.

A number drawn depends on the seed, the tensor's name, the model and the element's place, and on nothing
else: chunks, threads and the order of work cannot change it.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from weightsmith import native
from weightsmith.errors import Error
from weightsmith.merge._trim import Dialect, Numbers, Trim, Trimming, fractions, known, scaled
from weightsmith.solve import bit_source, random_bits, uniform
from weightsmith.weights import workspace

CLOSE = 1e-4
"""How near, in proportion, a probability must be to a multiple of 2**-16 for numbers of 16 bits to do."""


def keep_random(
    density: Numbers = 0.5, rescale: bool = True, dialect: Dialect = "mergekit", seed: int = 0, key: str = ""
) -> Trimming:
    """Every element with the probability ``density``."""
    inverse = rescale and by_probability(dialect)
    trim = Trim(partial(_drawn, density=density, inverse=inverse, seed=seed, key=key))
    return (yield from scaled(trim, rescale and not inverse))


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
    inverse = rescale and by_probability(dialect)
    cut = partial(_drawn, density=density, inverse=inverse, seed=seed, key=key, epsilon=epsilon, row=row)
    return (yield from scaled(Trim(cut), rescale and not inverse))


def by_probability(dialect: Dialect) -> bool:
    """Whether the rest is divided by the probability that it is kept, and not brought to the sum that there was."""
    known(dialect, "mergekit", "paper", "peft", "count")
    return dialect in ("paper", "peft")


def election(dialect: Dialect) -> Dialect:
    """Whose way of voting goes with a way of dropping: the papers on dropping have none of their own."""
    return "mergekit" if dialect == "paper" else dialect


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
    """In place: as it was where an element is kept, or with ``inverse`` over the probability that it is; else 0."""
    count, numbers = len(deltas), deltas.shape[1]
    spreads = fractions("epsilon", epsilon, count)
    for model, (share, spread) in enumerate(zip(fractions("density", density, count), spreads, strict=True)):
        delta, key_of_model = deltas[model], f"{model}/{key}"
        chance = by_rank(delta.abs(), share, spread, row) if row else delta.new_tensor(share)
        if row:
            mask = uniform(numbers, start=start, seed=seed, key=key_of_model).to(delta.device) < chance
        elif _dropped(delta, float(chance), inverse, start=start, seed=seed, key=key_of_model):
            continue
        else:
            mask = below(float(chance), numbers, start=start, seed=seed, key=key_of_model).to(delta.device)
        # By way of bytes: torch turns booleans to floats one by one.
        factor = workspace(delta.shape, delta.dtype, delta.device, "factor").copy_(mask.view(torch.uint8))
        delta.mul_(factor.div_(chance.clamp(min=torch.finfo(chance.dtype).tiny)) if inverse else factor)
    return deltas


def _dropped(delta: Tensor, chance: float, inverse: bool, *, start: int, seed: int, key: str) -> bool:
    """What `_drawn` does to one model where all have one chance, in one loop; False where there is none for it."""
    width, limit = _numbers_below(chance)
    if not 0 < limit < 2**width:
        return False
    source, skipped = bit_source(start, seed, key, width)
    state = source.state["state"]
    factor = float(delta.new_ones(()).div_(chance)) if inverse else 1.0
    return native.dropped(delta, state["state"], state["inc"], skipped, width, limit, factor)


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


def below(chance: float, count: int, *, start: int, seed: int, key: str) -> Tensor:
    """Elements ``start`` to ``start + count`` of an endless row of booleans, true with the probability ``chance``.

    >>> torch.equal(below(0.3, 5, start=3, seed=0, key="w"), below(0.3, 8, start=0, seed=0, key="w")[3:])
    True
    """
    width, limit = _numbers_below(chance)
    if not 0 < limit < 2**width:
        return torch.full((count,), limit > 0)
    found = np.empty(count, dtype=np.bool_)
    for place, bits in random_bits(count, start, seed, key, width):
        np.less(bits, bits.dtype.type(limit), out=found[place : place + len(bits)])
    return torch.from_numpy(found)


def _numbers_below(chance: float) -> tuple[int, int]:
    """How many bits a number needs to be below a limit with a probability, and that limit."""
    short = round(chance * 2**16)
    width = 16 if abs(short / 2**16 - chance) <= CLOSE * min(chance, 1 - chance) else 32
    return width, round(chance * 2**width)

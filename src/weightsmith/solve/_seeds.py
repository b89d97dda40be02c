"""Random numbers by name: they depend on a seed and on what they are for, not on what was drawn before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_PIECE = 2**14
"""Numbers of 64 bits that are drawn at once."""


def generator_for(seed: int, *words: object) -> torch.Generator:
    """Random numbers that depend on a seed and a name, and on nothing else.

    Args:
        seed: the caller's.
        *words: the name of a tensor, a purpose, a number; anything that ``str`` tells apart.

    Returns:
        torch.Generator: on the processor, so that a seed means the same on every device.

    >>> one, same, other = (torch.rand(1, generator=generator_for(0, name)) for name in ("a", "a", "b"))
    >>> bool(one == same), bool(one == other)
    (True, False)
    """
    return torch.Generator().manual_seed(seed_for(seed, *words))


def seed_for(seed: int, *words: object) -> int:
    """Another seed for each name, so that equal shapes do not get equal numbers.

    Args:
        seed: the caller's.
        *words: as for `generator_for`.

    Returns:
        From 0 to 2^63 - 1.

    >>> seed_for(0, "a"), seed_for(1, "2a") == seed_for(12, "a")
    (7635241192072670218, False)
    """
    text = "\0".join(str(word) for word in (seed, *words))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(count: int, *, start: int, seed: int, key: str) -> Tensor:
    """Numbers ``start`` to ``start + count`` of an endless row of them in [0, 1), float32.

    What stands at a place depends on nothing but the place, the seed and the key, so a tensor may be cut anywhere.

    Args:
        count: how many.
        start: index of the first.
        seed: the caller's.
        key: what the row is for, such as the name of a tensor.

    >>> torch.equal(uniform(5, start=3, seed=0, key="w"), uniform(8, start=0, seed=0, key="w")[3:])
    True
    """
    found = np.empty(count, dtype=np.float32)
    for place, bits in random_bits(count, start, seed, key, 32):
        np.multiply(bits >> 8, np.float32(2**-24), out=found[place : place + len(bits)], casting="same_kind")
    return torch.from_numpy(found)


def bit_source(start: int, seed: int, key: str, width: int) -> tuple[np.random.PCG64DXSM, int]:
    """A generator at the word that holds number ``start``, and how many numbers stand before it in that word."""
    named = hashlib.blake2b(json.dumps([int(seed), key]).encode(), digest_size=32).digest()
    state, odd = int.from_bytes(named[:16], "little"), int.from_bytes(named[16:], "little") | 1
    skipped, inside = divmod(start, 64 // width)
    source = np.random.PCG64DXSM(0)
    source.state = {
        "bit_generator": "PCG64DXSM", "state": {"state": state, "inc": odd}, "has_uint32": 0, "uinteger": 0
    }  # fmt: skip
    source.advance(skipped)
    return source, inside


def random_bits(count: int, start: int, seed: int, key: str, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """The row of numbers of ``width`` bits from ``start`` on, in pieces that stay in the cache, each with its place."""
    source, inside = bit_source(start, seed, key, width)
    per = 64 // width
    place = -inside
    while place < count:
        wanted = min(_PIECE, -(-(count - place) // per))
        bits = source.random_raw(wanted).astype("<u8", copy=False).view(f"<u{width // 8}")
        first = max(-place, 0)
        yield place + first, bits[first : count - place]
        place += wanted * per

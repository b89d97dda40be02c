"""Memory that a thread uses again and again."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_own = threading.local()

_KEPT = 2**23
"""Bytes up to which a workspace is kept: chunks are smaller, whole tensors may be larger."""


def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device, place: str = "") -> Tensor:
    """An uninitialised tensor that nobody keeps: this thread's next one of the dtype and ``place`` is in its place.

    Fresh memory for every chunk costs more, in page faults, than the arithmetic on it.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize > _KEPT:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    kept: dict[tuple[str, torch.dtype], Tensor] = _own.__dict__.setdefault("buffers", {})
    key = (place, dtype)
    if key not in kept or kept[key].numel() < size:
        kept[key] = torch.empty(size, dtype=dtype)
    return kept[key][:size].view(tuple(shape))

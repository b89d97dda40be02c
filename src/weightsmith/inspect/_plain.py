"""Results as plain data: what JSON can say, and the layer that a tensor's name speaks of."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

_LAYER = re.compile(r"(?:^|.*?[._/])\d+(?=[._/])")


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON can hold them. What is not finite becomes None.

    >>> plain({"shape": (2, 3), "norm": float("inf")})
    {'shape': [2, 3], 'norm': None}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def layer_of(name: str) -> str:
    """The part of a name up to its first number; without a number, the name without its last part.

    >>> layer_of("model.layers.7.mlp.up.weight"), layer_of("model.embed_tokens.weight"), layer_of("scale")
    ('model.layers.7', 'model.embed_tokens', 'scale')
    """
    found = _LAYER.match(name)
    return found[0] if found else name.rpartition(".")[0] or name

"""Writing GGUF files: what stands before the values, and where each tensor goes.

Weights that are to become one carry a small file `WORDS` beside them, which tells the keys of the header and how each
tensor is packed; their tensors are then bytes (`uint8 [rows, bytes of a row]`) or plain numbers, under GGUF names.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from weightsmith.errors import Error
from weightsmith.weights._files import Bytes, content_of
from weightsmith.weights._layout import Layout, OutFile
from weightsmith.weights._spec import Spec, dtype_name

WORDS = "gguf.json"
"""The file beside weights that tells how they become a GGUF file; it is not written itself."""

KINDS: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
}
"""Name of a packing -> its number, how many values lie together, and in how many bytes."""

PLAIN = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
}  # fmt: skip
"""dtype -> the packing that keeps it."""

ALIGNMENT = 32

_TYPES = {
    "uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I"), "int32": (5, "i"),
    "float32": (6, "f"), "bool": (7, "?"), "uint64": (10, "Q"), "int64": (11, "q"), "float64": (12, "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9


def words_of(files: Mapping[str, bytes | Bytes]) -> dict[str, Any] | None:
    """What the small file says, or None where weights are not to become GGUF."""
    return json.loads(content_of(files[WORDS])) if WORDS in files else None


def layout(specs: Mapping[str, Spec], words: Mapping[str, Any], name: str) -> Layout:
    """One file called ``name``.

    Args:
        specs: GGUF name -> spec, in the order of the header.
        words: ``keys``, a list of ``[key, type, value]`` (a type in brackets is that of a list's items), and ``kinds``,
            the packing of the tensors that are bytes.
    """
    kinds = {tensor: kind_of(tensor, spec, words["kinds"]) for tensor, spec in specs.items()}
    begin = struct.pack("<4sIQQ", b"GGUF", 3, len(specs), len(words["keys"]))
    header = bytearray(begin)
    for key, kind, value in words["keys"]:
        try:
            header += _text(key) + _value(kind, value)
        except (struct.error, TypeError, AttributeError):
            raise Error(f"the key {key} of a GGUF file is {kind}, which {value!r} is not") from None
    places: dict[str, int] = {}
    position = 0
    for tensor, spec in specs.items():
        shape = shape_of(spec, kinds[tensor])
        if not 1 <= len(shape) <= 4:
            raise Error(f"tensor {tensor}: GGUF has tensors of 1 to 4 axes, not {len(shape)}")
        header += _text(tensor) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", KINDS[kinds[tensor]][0], position)
        places[tensor] = position
        position += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    start = -(-len(header) // ALIGNMENT) * ALIGNMENT
    header += bytes(start - len(header))
    file = OutFile(name, start + position, [(0, bytes(header))])
    return Layout([file], {tensor: (0, start + offset) for tensor, offset in places.items()})


def kind_of(tensor: str, spec: Spec, kinds: Mapping[str, str]) -> str:
    """How a tensor is packed: as it was said, or by its dtype."""
    found = kinds.get(tensor) or PLAIN.get(dtype_name(spec.dtype))
    if found is None:
        raise Error(f"tensor {tensor}: GGUF has no place for {dtype_name(spec.dtype)}")
    if tensor in kinds and spec.shape[-1] % KINDS[found][2]:
        raise Error(f"tensor {tensor}: rows of {spec.shape[-1]} bytes are not whole blocks of {found}")
    return found


def shape_of(spec: Spec, kind: str) -> tuple[int, ...]:
    """The shape of the values that bytes stand for."""
    _, block, nbytes = KINDS[kind]
    if block == 1:
        return spec.shape
    return (*spec.shape[:-1], spec.shape[-1] // nbytes * block)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: str, value: Any) -> bytes:
    if kind == "string":
        return struct.pack("<I", _STRING) + _text(value)
    if kind == "[string]":
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    inner = kind.strip("[]")
    if inner not in _TYPES:
        raise Error(f"GGUF has no values of the type {kind!r}; known: string, {', '.join(_TYPES)}, and [lists] of them")
    number, form = _TYPES[inner]
    if kind != inner:
        return struct.pack(f"<IIQ{len(value)}{form}", _ARRAY, number, len(value), *value)
    if isinstance(value, float) and not math.isfinite(value):
        raise Error(f"a key of a GGUF file cannot be {value}")
    return struct.pack(f"<I{form}", number, value)

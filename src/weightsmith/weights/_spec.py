"""What is known of a tensor before it is read: its shape and its dtype.

Two tables live here and nowhere else: the names that the safetensors format gives to dtypes, and
the dtype in which arithmetic on stored values is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean

# Names of the safetensors format. F4 packs two values in a byte, so its last axis halves in torch.
_FORMAT_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _FORMAT_NAMES.items() if hasattr(torch, attribute)
}
"""safetensors name -> torch dtype, for those that the installed torch knows."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

FORMAT_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {
    name: DTYPES[name].itemsize * 8 for name in DTYPES if name != "F4"
}
"""Bits of one value, for every name that the format has."""

HALF = frozenset(dtype for name, dtype in DTYPES.items() if name in ("F16", "BF16") or name.startswith("F8"))
"""Floating dtypes too narrow to compute in; arithmetic on them is done in float32."""

_SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
}
_SHORT |= {"fp64": "float64", "f64": "float64", "float": "float32", "double": "float64", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of a tensor.

    >>> Spec((2, 3), torch.bfloat16).nbytes
    12
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype from a dtype, torch's name for it, a usual short form, or the safetensors name.

    >>> as_dtype("bf16"), as_dtype("F32")
    (torch.bfloat16, torch.float32)
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str):
        raise Error(f"a dtype is torch.float32 or a word such as 'bf16', not {dtype!r}")
    word = dtype.removeprefix("torch.")
    found = DTYPES.get(word.upper()) or getattr(torch, _SHORT.get(word.lower(), word.lower()), None)
    if not isinstance(found, torch.dtype):
        known = [dtype_name(d) for d in NAMES] + list(_SHORT)
        raise Error(f"unknown dtype {dtype!r}{did_you_mean(word, known)}; known: {', '.join(sorted(known))}")
    return found


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which arithmetic on ``dtype`` is done: float32 for the narrow floats, else itself."""
    return torch.float32 if dtype in HALF else dtype


def working(values: Tensor) -> Tensor:
    """Values in their working dtype (no copy where they are in it)."""
    return values.to(working_dtype(values.dtype))


def promote(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of a sum: torch's promotion, with float8 kept among equals and float32 among unlike."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        if dtype == result:
            continue
        if result.itemsize == 1 and dtype.itemsize == 1 and result in HALF and dtype in HALF:
            result = torch.float32
        elif result.itemsize == 1 and result in HALF:
            result = dtype if dtype.is_floating_point or dtype.is_complex else result
        elif dtype.itemsize == 1 and dtype in HALF:
            result = result if result.is_floating_point or result.is_complex else dtype
        else:
            try:
                result = torch.promote_types(result, dtype)
            except RuntimeError:
                both = f"{dtype_name(result)} and {dtype_name(dtype)}"
                raise Error(f"PyTorch has no common dtype for {both}; cast one of them first") from None
    return result

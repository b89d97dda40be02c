"""What torch.save puts into its pickle, as plain data: storages, views of them, arrays and scalars.

The interpreter of `_pickle` calls these functions where the pickle names PyTorch's or numpy's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import FormatError
from weightsmith.weights._files import Bytes
from weightsmith.weights._pickle import Buildable, Name, Opaque

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
}
# Raw codes: known here so that a quantized tensor is refused by its own name.
_CODES = {"QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32}


@dataclass(eq=False)
class Storage:
    """Raw values in the file. In the legacy format its place is known only after the pickles."""

    key: str
    dtype: torch.dtype
    offset: int = -1
    nbytes: int = 0


META = Storage("meta", torch.uint8)
"""Stands for the storage of a tensor that has none."""


@dataclass(eq=False)
class View:
    """A tensor as the pickle describes it, not yet believed."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any = None
    metadata: Any = None


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> View:
    return View(storage, offset, size, stride, None, rest[2] if len(rest) > 2 else None)


def _rebuild_typed(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> View:
    return View(storage, offset, size, stride, dtype, metadata)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    """A tensor of a subclass, or with attributes: its values are those of the tensor inside."""
    known = _TENSORS.get(str(function)) if isinstance(function, Name) else None
    if known is None or not isinstance(arguments, tuple):
        return Opaque(function if isinstance(function, Name) else Name("builtins", "object"), (arguments, state))
    return known(*arguments)


def _rebuild_meta(dtype: Any, size: Any, stride: Any, grad: Any = None) -> View:
    return View(META, 0, size, stride, dtype)


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta,
    "torch.nn.parameter.Parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
}


class _Dtype(Buildable):
    """numpy's dtype, in the making."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *rest: Any):
        self.code, self.order = code, "<"

    def build(self, state: Any) -> None:
        if not isinstance(state[1], str):
            raise TypeError("no byte order")
        self.order = state[1]

    def plain(self) -> np.dtype[Any] | None:
        """The dtype, if it is of numbers."""
        simple = isinstance(self.code, str) and len(self.code) <= 3 and self.code[:1] in tuple("biufc")
        return np.dtype(self.code).newbyteorder(cast(Any, self.order)) if simple else None


class Array(Buildable):
    """numpy's array, in the making."""

    __slots__ = ("reason", "values")

    def __init__(self, *_: Any):
        self.values: np.ndarray[Any, Any] | None = None
        self.reason = "a numpy array of a dtype that PyTorch has not"

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any) -> None:
        plain = dtype.plain() if isinstance(dtype, _Dtype) else None
        if isinstance(raw, str):  # bytes of Python 2 that happened to be text
            raw = raw.encode()
        if plain is None or not isinstance(raw, bytes):
            self.reason = "a numpy array of objects or texts"
            return
        axes = lengths(shape)
        if axes is None or math.prod(axes) * plain.itemsize != len(raw):
            raise ValueError("its shape and its bytes do not fit")
        self.values = np.frombuffer(raw, plain).reshape(axes, order="F" if order == "F" else "C")

    def tensor(self) -> Tensor | None:
        if self.values is None:
            return None
        little = self.values.astype(self.values.dtype.newbyteorder("="), copy=True)
        try:
            return torch.from_numpy(little)
        except TypeError:  # a dtype of numpy's own, such as float128
            return None


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any = "C", *rest: Any) -> Array:
    made = Array()
    made.fill(raw, dtype, shape, order)
    return made


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    plain = dtype.plain() if isinstance(dtype, _Dtype) else None
    if plain is None or not isinstance(raw, bytes) or len(raw) != plain.itemsize:
        return Opaque(Name("numpy", "generic"), ())
    return np.frombuffer(raw, plain)[0].item()


def _device(kind: Any, index: Any = None) -> str:
    return shown(kind) if index is None else f"{shown(kind)}:{shown(index)}"


CALLS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._tensor._rebuild_from_type": lambda function, kind, arguments, *rest: _rebuild_from_type(
        function, kind, arguments
    ),
    "torch.Size": lambda lengths=(): lengths,
    "torch.device": _device,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{package}.{name}": call
        for package in ("core", "_core")
        for name, call in (
            ("multiarray._reconstruct", Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}


def lengths(value: Any) -> tuple[int, ...] | None:
    """A shape or strides, if it is one."""
    if not isinstance(value, tuple | list) or len(value) > 64:
        return None
    plain = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    return tuple(value) if plain else None


def storage_dtype(file: Bytes, kind: Any) -> torch.dtype:
    torch_own = isinstance(kind, Name) and kind.module.partition(".")[0] == "torch"
    known = (STORAGES | _CODES).get(kind.qualname) if torch_own else None
    if known is None:
        raise FormatError(f"{file.name}: a storage of the kind {shown(kind)} needs its own code to be read")
    return known


def shown(value: Any) -> str:
    """A value for a message. What nests is not written out: shared parts can make it endless."""
    return str(value)[:80] if isinstance(value, Name | str | int) else type(value).__name__

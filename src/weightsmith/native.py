"""A few inner loops in C, where they were built: optional, and equal to the Python beside them to the bit.

``pip`` builds them where it finds a C compiler. Where there is none, where ``WEIGHTSMITH_NATIVE=0`` is set, and
for tensors that are not contiguous float32 on a CPU, the functions here answer None, and their callers go on
with PyTorch and NumPy.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 3
"""What the C side must say of itself."""

LIBRARY = Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")

_VOTES = {"weighted": 0, "count": 1, "plain": 2}
_SPARE = 16
"""Values that `inside` may write beyond its last."""


def available() -> bool:
    """Whether the loops are there and wanted."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("WEIGHTSMITH_NATIVE") == "0" or not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.weightsmith_native_version() != VERSION:
            return None
    except (OSError, AttributeError):  # of another system, or of another version
        return None
    address, i32, u32, i64, u64, real = (
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
    )  # fmt: skip
    library.weightsmith_inside.argtypes = [address, i64, i32, u32, i32, address, address, address]
    library.weightsmith_inside.restype = i64
    library.weightsmith_elected.argtypes = [address, i64, i64, i64, address, i32, i32, i32, real, real, address]
    library.weightsmith_elected.restype = None
    library.weightsmith_dropped.argtypes = [address, i64, u64, u64, u64, u64, i32, i32, u32, real]
    library.weightsmith_dropped.restype = None
    library.weightsmith_planes.argtypes = library.weightsmith_together.argtypes = [address, i64, i32, address]
    library.weightsmith_planes.restype = library.weightsmith_together.restype = None
    library.weightsmith_counted.argtypes = [address, i64, address]
    library.weightsmith_counted.restype = None
    library.weightsmith_lane_bits.argtypes = [address, i64, i64, address, address]
    library.weightsmith_lane_bits.restype = None
    library.weightsmith_coded.argtypes = [address, i64, i64, address, address, address, address]
    library.weightsmith_coded.restype = None
    library.weightsmith_decoded.argtypes = [address, i64, address, i64, i64, address, address, i32, address]
    library.weightsmith_decoded.restype = i64
    library.weightsmith_rounded_columns.argtypes = [
        address, i64, i64, address, i64, address, address, address, i64, i64, i64, real, real, address, address
    ]  # fmt: skip
    library.weightsmith_rounded_columns.restype = None
    return library


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.itemsize == 4 and tensor.is_contiguous()


def inside(key: Tensor, lower: int, upper: int) -> tuple[Tensor, Tensor, int] | None:
    """Of keys ``[n]`` int32: the places of those in ``[lower, upper)`` int32, they themselves, how many lie above.

    None where there is no native loop for it.
    """
    import torch

    from weightsmith.weights import workspace

    library = _library()
    if library is None or key.dtype != torch.int32 or not _plain(key):
        return None
    numel = key.numel()
    # From a workspace: large buffers made anew would be freed between the small ones that are kept, and leave holes.
    places, found = workspace((2, numel + _SPARE), torch.int32, key.device)
    above = ctypes.c_int64()
    none_above = upper > torch.iinfo(torch.int32).max
    top = torch.iinfo(torch.int32).max if none_above else upper
    count = library.weightsmith_inside(
        key.data_ptr(), numel, lower, upper - lower - 1, top, places.data_ptr(), found.data_ptr(), ctypes.byref(above)
    )
    return places[:count].clone(), found[:count].clone(), 0 if none_above else above.value


def elected(rows: Tensor, weights: Sequence[float], vote: str, mean: bool, tie: float) -> Tensor | None:
    """The inner loop of ``merge._trim.elected`` on ``[k, n]`` float32, which are used up; None without one."""
    import torch

    library = _library()
    if library is None or rows.dtype != torch.float32 or not _plain(rows) or not rows.numel():
        return None
    made = torch.empty(rows.shape[1], dtype=torch.float32)
    given = (ctypes.c_float * len(weights))(*weights)
    library.weightsmith_elected(
        rows.data_ptr(), *rows.shape, rows.shape[1], given, _VOTES[vote], mean, min(weights) < 0, 0.5 * tie,
        torch.finfo(torch.float32).tiny, made.data_ptr(),
    )  # fmt: skip
    return made


def dropped(row: Tensor, state: int, increment: int, skipped: int, width: int, limit: int, factor: float) -> bool:
    """In place, ``row`` ``[n]`` times ``factor`` where its random number is below ``limit``, else times 0.

    The numbers are those of numpy's PCG64DXSM from ``state`` on, ``width`` bits each, after ``skipped`` of the first
    word. False, and nothing done, where there is no native loop for it.
    """
    import torch

    library = _library()
    if library is None or row.dtype != torch.float32 or not _plain(row) or sys.byteorder != "little":
        return False
    low = 2**64 - 1
    library.weightsmith_dropped(
        row.data_ptr(), row.numel(), state >> 64, state & low, increment >> 64, increment & low, skipped, width, limit,
        factor,
    )  # fmt: skip
    return True


def _bytes_of(*tensors: Tensor) -> bool:
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)


def planes(values: Tensor) -> Tensor | None:
    """What ``share._planes.planes`` makes of floats ``[n]`` of 2 or 4 bytes; None where there is no native loop."""
    import torch

    library, width = _library(), values.itemsize
    if library is None or width not in (2, 4) or not _bytes_of(values):
        return None
    made = torch.empty(width, values.numel(), dtype=torch.uint8)
    library.weightsmith_planes(values.data_ptr(), values.numel(), width, made.data_ptr())
    return made


def together(planes: Tensor, made: Tensor) -> bool:
    """The way back, into ``made`` ``[n]``; False, and nothing done, where there is no native loop for it."""
    library, width = _library(), made.itemsize
    if library is None or width not in (2, 4) or not _bytes_of(planes, made):
        return False
    library.weightsmith_together(planes.data_ptr(), made.numel(), width, made.data_ptr())
    return True


def counted(symbols: Tensor) -> Tensor | None:
    """How often each byte occurs in ``[n]`` uint8: ``[256]`` int64; None without a native loop."""
    import torch

    library = _library()
    if library is None or not _bytes_of(symbols):
        return None
    counts = torch.zeros(256, dtype=torch.int64)
    library.weightsmith_counted(symbols.data_ptr(), symbols.numel(), counts.data_ptr())
    return counts


def lane_bits(symbols: Tensor, lane: int, length: Tensor) -> Tensor | None:
    """Bits of each lane of symbols ``[n]`` uint8 with code lengths ``[256]`` uint8: ``[lanes]`` int32; or None."""
    import torch

    library = _library()
    if library is None or not _bytes_of(symbols, length):
        return None
    bits = torch.empty(-(-symbols.numel() // lane), dtype=torch.int32)
    library.weightsmith_lane_bits(symbols.data_ptr(), symbols.numel(), lane, length.data_ptr(), bits.data_ptr())
    return bits


def coded(symbols: Tensor, lane: int, code: Tensor, length: Tensor, begin: Tensor) -> Tensor | None:
    """Symbols ``[n]`` uint8 as codes of at most 12 bits (``code [256]`` of 16 bits), lane l from ``begin[l]`` on.

    ``begin`` is ``[lanes + 1]`` int64, from 0; the result ``[begin[-1]]`` uint8. None without a native loop.
    """
    import torch

    library = _library()
    if library is None or not _bytes_of(symbols, code, length, begin):
        return None
    made = torch.empty(int(begin[-1]) + 8, dtype=torch.uint8)
    library.weightsmith_coded(
        symbols.data_ptr(), symbols.numel(), lane, code.data_ptr(), length.data_ptr(), begin.data_ptr(), made.data_ptr()
    )
    return made[:-8]


def decoded(
    stream: Tensor, begin: Tensor, count: int, lane: int, several: Tensor, single: Tensor, window: int
) -> tuple[Tensor, int] | None:
    """The ``count`` symbols of a stream uint8 whose lanes begin at ``begin`` ``[lanes + 1]`` int64, and a wrong lane.

    That is one that does not end where the next begins, or -1. ``begin`` must lie within the stream. None without a
    native loop.
    """
    import torch

    library = _library()
    if library is None or not _bytes_of(stream, begin, several, single):
        return None
    made = torch.empty(count, dtype=torch.uint8)
    wrong = library.weightsmith_decoded(
        stream.data_ptr(), stream.numel(), begin.data_ptr(), count, lane, several.data_ptr(), single.data_ptr(), window,
        made.data_ptr(),
    )  # fmt: skip
    return made, int(wrong)


def rounded_columns(
    values: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, minimum: Tensor, lowest: int, highest: int,
    errors: Tensor, codes: Tensor,
) -> bool:  # fmt: skip
    """See ``quantize._gptq.rounded_columns``; False, and nothing done, where there is no native loop for it."""
    import torch

    library = _library()
    floats = (values, scale, zero, minimum, errors)
    if library is None or not all(_plain(one) and one.dtype == torch.float32 for one in floats):
        return False
    if not factor.is_cpu or factor.dtype != torch.float32 or factor.stride(-1) != 1 or not _bytes_of(codes):
        return False
    columns, rows = values.shape
    steps = [0 if len(one) == 1 else rows for one in (scale, zero, minimum)]
    library.weightsmith_rounded_columns(
        values.data_ptr(), columns, rows, factor.data_ptr(), factor.stride(0), scale.data_ptr(), zero.data_ptr(),
        minimum.data_ptr(), *steps, lowest, highest, errors.data_ptr(), codes.data_ptr(),
    )  # fmt: skip
    return True

"""Shapes, dtypes and their names."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.weights import Spec, as_dtype, dtype_name, promote, working_dtype
from weightsmith.weights._spec import DTYPES, NAMES


def test_spec() -> None:
    spec = Spec((2, 0, 3), torch.float64)
    assert (spec.numel, spec.nbytes, str(spec)) == (0, 0, "float64[2, 0, 3]")
    assert (Spec((), torch.bool).numel, Spec((), torch.complex64).nbytes) == (1, 8)


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", torch.bfloat16), ("torch.float16", torch.float16), ("half", torch.float16), ("BF16", torch.bfloat16),
     ("F8_E4M3", torch.float8_e4m3fn), ("fp8", torch.float8_e4m3fn), ("int8", torch.int8), ("I64", torch.int64),
     (torch.bool, torch.bool), ("FP32", torch.float32), ("double", torch.float64)],
)  # fmt: skip
def test_words_for_dtypes(word: str, dtype: torch.dtype) -> None:
    assert as_dtype(word) == dtype


@pytest.mark.parametrize("word", ["float33", "Tensor", "", "nn", "load", 3, None])
def test_what_is_no_dtype(word: object) -> None:
    with pytest.raises(Error, match="dtype"):
        as_dtype(word)  # type: ignore[arg-type]


def test_tables_agree() -> None:
    assert {NAMES[dtype]: dtype for dtype in NAMES} == DTYPES
    for name, dtype in DTYPES.items():
        assert as_dtype(name) == as_dtype(dtype_name(dtype)) == dtype


def test_promotion() -> None:
    eights = (torch.float8_e4m3fn, torch.float8_e5m2)
    assert promote(eights[0], eights[0]) == eights[0]
    assert promote(*eights) == torch.float32
    assert promote(torch.bfloat16, torch.float16) == torch.float32
    for dtype in NAMES:
        if dtype.itemsize and "float4" not in str(dtype):
            assert promote(dtype, dtype) == dtype
    for one in eights:
        assert promote(one, torch.int32) == promote(torch.int32, one) == one
        assert promote(one, torch.complex64) == promote(torch.complex64, one) == torch.complex64
        assert promote(one, torch.bfloat16) == promote(torch.bfloat16, one) == torch.bfloat16
        assert promote(one, torch.bool) == one
    with pytest.raises(Error, match="no common dtype"):
        promote(torch.uint16, torch.int64)


def test_working() -> None:
    wide = {torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu}
    assert {working_dtype(d) for d in wide} == {torch.float32}
    for dtype in (torch.float64, torch.int8, torch.bool, torch.complex64, torch.uint16):
        assert working_dtype(dtype) == dtype

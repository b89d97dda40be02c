"""Steps that formats share: scales in few bits, and what a config says."""

from __future__ import annotations

import warnings

import pytest
import torch

from weightsmith.errors import Error, FormatError
from weightsmith.quantize.formats._parts import dtype_of, exponents, floating, half, number_of
from weightsmith.weights import Weights


def test_exponents_are_the_bytes_of_e8m0():
    powers = torch.arange(-127, 128)
    assert torch.equal(exponents(torch.ldexp(torch.ones(255, dtype=torch.float64), powers)), (powers + 127).byte())
    assert exponents(torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16)).tolist() == [126, 127, 128]


def test_scales_in_half_precision():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale = torch.tensor([0.0, 1e-4, -1 / 3, 65504.0])
        assert torch.equal(half(scale, "w"), scale.half())
    with pytest.warns(UserWarning, match=r"w: 1 of 2 scales are so small"):
        assert half(torch.tensor([1e-9, 1.0]), "w").tolist() == [0.0, 1.0]
    with pytest.raises(Error, match=r"w has scales up to 7e\+04, too large for float16"):
        half(torch.tensor([1.0, -7e4]), "w")


def test_what_a_config_says_is_not_trusted():
    assert floating("bfloat16") == torch.bfloat16
    assert [floating(word) for word in ("int8", "x", None, 3, ["float32"])] == [None] * 5
    for raw, dtype in ((b'{"torch_dtype": "float16"}', torch.float16), (b'{"dtype": "int8"}', torch.float32)):
        assert dtype_of(Weights.of({}).with_files({"config.json": raw}), None) == dtype
    assert number_of({"bits": 4}, "bits", 8, 1, 8) == 4
    assert number_of({}, "bits", 8, 1, 8) == 8
    for wrong in (True, 4.0, "4", 0, 9):
        with pytest.raises(FormatError, match="says bits"):
            number_of({"bits": wrong}, "bits", None, 1, 8)

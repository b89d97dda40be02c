"""Errors of rounding against codes that were made and read back."""

from __future__ import annotations

import math

import pytest
import torch

import weightsmith
from weightsmith.errors import Error
from weightsmith.inspect import quantization_error


def checkpoint(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(20, 12, generator=generator).to(dtype),
        "h.0.q.weight": torch.randn(300, 12, generator=generator).to(dtype),
        "h.1.q.weight": torch.randn(4, 3, 2, 2, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [None, 4])
def test_the_error_is_that_of_quantizing_and_reading_back(dtype, group):
    weights = checkpoint(dtype)
    found = quantization_error(weights, bits=(2, 5), group=group)
    assert found["tensor"] == ["h.0.q.weight", "h.1.q.weight"]  # no embeddings, as when quantizing
    for bits in (2, 5):
        near = weightsmith.quantize.dequantize(weightsmith.quantize.rtn(weights, bits=bits, group=group), torch.float32)
        errors, energies = [], []
        for row in found.table:
            exact = weights[row["tensor"]].double()
            errors.append(float((exact - near[row["tensor"]].double()).square().sum()))
            energies.append(float(exact.square().sum()))
            assert row[f"{bits} bits"] == pytest.approx(math.sqrt(errors[-1] / energies[-1]), rel=1e-4)
        assert found.figures[f"{bits} bits"] == pytest.approx(math.sqrt(sum(errors) / sum(energies)), rel=1e-4)


def test_groups_that_do_not_fill_a_row_are_said():
    found = quantization_error({"a.w": torch.ones(2, 6), "b.w": torch.eye(8)}, bits=[4], group=4, pattern="*")
    assert [row["4 bits"] is None for row in found.table] == [True, False]
    assert (found.figures["matrices"], found.figures["measured"]) == (2, 1)
    assert any("groups of 4 do not fill" in note for note in found.notes)


def test_values_that_no_grid_holds_and_zeros():
    weights = {"a": torch.tensor([[1.0, math.inf]]), "z": torch.zeros(2, 2)}
    found = quantization_error(weights, bits=[3], pattern="*")
    assert [row["3 bits"] for row in found.table] == [None, 0.0]
    assert any("not finite" in note for note in found.notes)
    nothing = quantization_error({"a": torch.full((1, 2), math.nan)}, pattern="*")
    assert nothing.figures["2 bits"] is None


@pytest.mark.parametrize("options", [{"bits": []}, {"bits": [9]}, {"bits": [0]}, {"group": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(Error):
        quantization_error(checkpoint(), **options)


def test_fewer_bits_cost_more(tmp_path):
    found = quantization_error(checkpoint(), bits=(8, 2, 4, 4))
    assert list(found.table[0])[-3:] == ["2 bits", "4 bits", "8 bits"]
    assert found.figures["2 bits"] > 3 * found.figures["4 bits"] > 12 * found.figures["8 bits"]
